"""The house keeps no door open: what would run what is read, or build a command out of texts, stands nowhere in it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "longskip").rglob("*.py"))

# What is a program on purpose, named by the user and told of in SECURITY.md.
ALLOWED = {("engine/feature_network.py", "torch.jit.load")}

UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "torch.load", "torch.jit.load", "torch.hub.load", "np.load",
    "numpy.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.Loader", "yaml.UnsafeLoader",
    "yaml.FullLoader", "subprocess.getoutput", "subprocess.getstatusoutput", "runpy.run_path", "runpy.run_module",
    "shutil.unpack_archive", "zipfile.extractall", "importlib.util.spec_from_file_location", "pty.spawn", "code.interact",
    "dcp.load", "torch.distributed.checkpoint.load", "all_gather_object", "broadcast_object_list", "gather_object",
    "scatter_object_list",
}  # fmt: skip
METHODS = {"extract", "extractall", "read_pickle", "load_checkpoint", "allow_pickle"}
STARTS = {
    "run",
    "Popen",
    "call",
    "check_call",
    "check_output",
    "execv",
    "execve",
    "execvp",
    "execvpe",
    "spawnv",
    "posix_spawn",
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(path: str, text: str) -> Iterator[str]:
    """What must not stand in a file; ``path`` is relative to the package."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names = {name.split(".")[0] for name in (*module, *(alias.name for alias in node.names))}
            if names & UNPICKLING:
                yield f"imports {names & UNPICKLING}"
        if isinstance(node, ast.keyword) and node.arg:
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            if node.arg == "shell" and value is not False:
                yield "shell="
            if node.arg == "allow_pickle" and value is not False:
                yield "allow_pickle="
            if node.arg == "weights_only" and value is not True:
                yield "weights_only="
            if node.arg == "trust_remote_code" and value is not False:
                yield "trust_remote_code="
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        last = name.rpartition(".")[2]
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in CALLS or (last in CALLS and "." in name and last not in ("compile", "eval")):
            refused = "allow_pickle" in keywords or "weights_only" in keywords  # which are looked at above
            if (path, name) not in ALLOWED and not refused:
                yield f"calls {name}"
        if isinstance(node.func, ast.Attribute) and last in METHODS:
            yield f"calls .{last}"
        if last in STARTS and name.startswith(("subprocess.", "os.")) and node.args and _is_text(node.args[0]):
            yield f"{name} of a command that is a text"
        if last in ("create_subprocess_shell",):
            yield name


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.JoinedStr)
        or (isinstance(node, ast.Constant) and isinstance(node.value, str))
        or (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("join", "format")
        )
        or (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, (ast.Add, ast.Mod))
            and (_is_text(node.left) or _is_text(node.right))
        )
    )


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_nothing_runs_what_it_reads(path: Path) -> None:
    relative = path.relative_to(ROOT / "longskip").as_posix()
    assert list(faults(relative, path.read_text("utf-8"))) == []


BROKEN = [
    "import pickle",
    "from pickle import loads",
    "import torch.nn, dill",
    "eval('1')",
    "exec(x)",
    "os.system(x)",
    "torch.load(p)",
    "torch.load(p, weights_only=False)",
    "torch.load(p, weights_only=flag)",
    "np.load(p)",
    "np.load(p, allow_pickle=True)",
    "np.load(p, allow_pickle=x)",
    "numpy.load(p)",
    "yaml.load(t)",
    "yaml.load(t, Loader=yaml.Loader)",
    "yaml.unsafe_load(t)",
    "subprocess.run('ls')",
    "subprocess.run(f'ls {x}', shell=True)",
    "subprocess.Popen(x, shell=y)",
    "subprocess.run('ls ' + x)",
    "subprocess.run(' '.join(x))",
    "subprocess.run('ls %s' % x)",
    "os.popen(x)",
    "tar.extractall()",
    "archive.extract(m)",
    "compile(t, n, 'exec')",
    "dist.all_gather_object(a, b)",
    "torch.jit.load(p)",
    "AutoModel.from_pretrained(p, trust_remote_code=True)",
    "engine.load_checkpoint(p)",
    "asyncio.create_subprocess_shell(x)",
    "pd.read_pickle(p)",
]
SOUND = [
    "model.eval()", "re.compile(x)", "torch.compile(m)", "np.load(p, allow_pickle=False)", "torch.load(p, weights_only=True)",
    "yaml.safe_load(t)", "subprocess.run(['ls', x])", "subprocess.Popen(command, env=e)", "json.load(f)", "app.run('x')",
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_the_test_sees(text: str) -> None:
    assert list(faults("engine/x.py", text))


@pytest.mark.parametrize("text", SOUND)
def test_the_test_does_not_see_what_is_sound(text: str) -> None:
    assert not list(faults("engine/x.py", text))


def test_frozen_encoders_are_read_from_local_safetensors() -> None:
    """transformers and diffusers would fetch from a hub and unpickle ``.bin`` files, if they were not told not to."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and dotted(node.func).endswith(".from_pretrained"):
                given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                unpacked = any(keyword.arg is None for keyword in node.keywords)
                assert given.get("local_files_only") is True or unpacked, path
    text = (ROOT / "longskip/engine/encoders.py").read_text("utf-8")
    assert "use_safetensors" in text and "local_files_only" in text


def test_security_tells_of_every_door() -> None:
    """What may run or listen is named where users look for it, and what that file names is there."""
    text = (ROOT / "SECURITY.md").read_text("utf-8")
    for word in (
        "TorchScript",
        "pickle",
        "rendezvous",
        "run folder",
        "fsspec",
        "curl",
        "trust_remote_code",
        "LONGSKIP_STORE",
    ):
        assert word in text, word
    for name in re.findall(r"`([a-z_]+(?:/[a-z_]+)+\.py)`", text):
        assert (ROOT / "longskip" / name).is_file() or (ROOT / name).is_file(), name
