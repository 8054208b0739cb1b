"""``longskip checkpoint`` as a user types it, on whole and on damaged runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from longskip.launcher.cli import main
from tests.saved_runs import saved_run, saved_tensors


@pytest.fixture
def home(in_tmp: Path) -> Path:
    """A folder with ``runs/small``, saved at steps 7 and 9."""
    saved_run(in_tmp / "runs" / "small")
    saved_run(in_tmp / "other", seed=1, step=9)
    shutil.move(in_tmp / "other" / "checkpoints" / "step-00000009", in_tmp / "runs" / "small" / "checkpoints")
    return in_tmp


class Typed:
    """Types commands: exit code, and what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["checkpoint", *arguments])
        said = self.capsys.readouterr()
        code = ended.value.code
        return (code if isinstance(code, int) else 0), said.out, said.err

    def json(self, *arguments: str) -> dict[str, Any]:
        code, out, _ = self(*arguments, "--json")
        return json.loads(out) | {"code": code}


@pytest.fixture
def typed(capsys: pytest.CaptureFixture[str]) -> Typed:
    return Typed(capsys)


def test_list_says_what_is_there(home: Path, typed: Typed) -> None:
    folder = home / "runs" / "small" / "checkpoints"
    (folder / "step-00000005.bad").mkdir()
    (folder / "step-00000005.bad" / "x").write_text("1234")
    found = typed.json("list", "small")
    assert [(e["step"], e["complete"], e["world"], e["zero_stage"]) for e in found["checkpoints"]] == [
        (7, True, 1, 0), (9, True, 1, 0),
    ]  # fmt: skip
    assert found["newest"] == "step-00000009" and found["leftovers"] == [{"name": "step-00000005.bad", "bytes": 4}]
    sizes = [sum(p.stat().st_size for p in (folder / e["name"]).iterdir()) for e in found["checkpoints"]]
    assert [e["bytes"] for e in found["checkpoints"]] == sizes
    (folder / "step-00000009" / "moments-00000.safetensors").unlink()
    found = typed.json("list", "small")
    assert found["newest"] == "step-00000007" and "moments-00000" in found["checkpoints"][1]["problem"]
    (folder / "step-00000007" / "manifest.json").write_text("{")
    code, out, _ = typed("list", "small")
    assert code == 0 and "manifest.json" in out and "newest" not in out and "step-00000005.bad" in out


def test_verify_names_what_is_wrong(home: Path, typed: Typed) -> None:
    assert typed.json("verify", "small")["good"] and typed("verify", "small")[0] == 0
    file = home / "runs" / "small" / "checkpoints" / "step-00000009" / "weights-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert typed.json("list", "small")["newest"] == "step-00000009"  # sizes alone do not tell
    found = typed.json("verify", "small")
    assert found["code"] == 1 and not found["good"]
    assert [e["problem"] is None for e in found["checkpoints"]] == [True, False]
    assert f"{file.relative_to(home)} was altered" in found["checkpoints"][1]["problem"]
    assert typed("verify", "small", "--checkpoint", "7")[0] == 0
    assert typed("verify", str(file.parent))[0] == 1
    code, _, error = typed("verify", "small", "--checkpoint", "8")
    assert code == 2 and "step-00000007, step-00000009" in error
    assert typed("verify", "nowhere")[0] == 2


def test_export_and_convert(home: Path, typed: Typed) -> None:
    run = home / "runs" / "small"
    said = typed.json("export", "small", "--out", "newest")
    assert said["checkpoint"] == "step-00000009" and said["tensors"] == len(load_file("newest/model.safetensors"))
    said = typed.json("export", "small", "--out", "seven", "--checkpoint", "7", "--weights", "raw", "--dtype", "bf16")
    raw, read = saved_tensors(run, "weight"), load_file("seven/model.safetensors")
    assert said["code"] == 0 and all(torch.equal(read[name], raw[name].bfloat16()) for name in raw)
    code, out, _ = typed("export", "small", "--out", "laid-out", "--format", "diffusers")
    assert code == 0 and "from_pretrained" in out and (home / "laid-out" / "model_index.json").is_file()
    code, out, _ = typed("convert", "newest/model.safetensors", "--to", "original", "--out", "theirs.safetensors")
    assert code == 0 and "text.embedding.weight" in out
    theirs = {name: value.clone() for name, value in load_file("theirs.safetensors").items()}
    from safetensors.torch import save_file

    save_file(theirs, "bare.safetensors")
    shape = ("--preset", "uvit-shapes", "width=64", "n_heads=2")
    said = typed.json("convert", "bare.safetensors", "--to", "longskip", "--out", "ours.safetensors", *shape)
    ema = saved_tensors(run, "ema", step=9)
    assert said["tensors"] == len(ema) - 1
    assert all(torch.equal(value, ema[name]) for name, value in load_file("ours.safetensors").items())
    torch.save({}, "model.pth")
    cases: list[tuple[tuple[str, ...], int, str]] = [
        (("export", "small", "--out", "newest"), 2, "already"),
        (("export", "small", "--out", "x", "--format", "onnx"), 2, "safetensors, diffusers"),
        (("export", "small", "--out", "x", "--checkpoint", "8"), 2, "step-00000009"),
        (("convert", "model.pth", "--to", "longskip", "--out", "x.safetensors"), 1, "weights_only"),
        (("convert", "none.safetensors", "--to", "longskip", "--out", "x.safetensors"), 2, "none.safetensors"),
        (("convert", "bare.safetensors", "--to", "longskip", "--out", "x.safetensors"), 2, "--preset"),
        (("convert", "bare.safetensors", "--to", "theirs", "--out", "x.safetensors"), 2, "original, longskip"),
        (("convert", "bare.safetensors", "--to", "longskip", "--out", "x.safetensors", "depth=2"), 2, "--preset"),
        (("convert", "bare.safetensors", "--to", "longskip", "--out", "bare.safetensors"), 2, "already"),
        (("convert", "bare.safetensors", "--to", "longskip", "--out", "x.safetensors", "--preset", "uvit-tinny"), 2, "uvit-tiny"),
    ]  # fmt: skip
    for arguments, wanted, words in cases:
        code, _, error = typed(*arguments)
        assert code == wanted and words in error, (arguments, code, error)
    assert not [path for path in home.iterdir() if path.name.startswith((".", "x"))]


def test_nothing_of_training_is_needed(home: Path) -> None:
    """A fresh process without DeepSpeed or a process group."""
    code = (
        "import sys\n"
        "for name in ('deepspeed', 'diffusers', 'transformers'):\n"
        "    sys.modules[name] = None\n"  # an import of it fails
        "from longskip.launcher.cli import main\n"
        "for command in (['list', 'small'], ['verify', 'small'], ['export', 'small', '--out', 'a'],\n"
        "                ['export', 'small', '--out', 'b', '--format', 'diffusers']):\n"
        "    try:\n"
        "        main(['checkpoint', *command])\n"
        "    except SystemExit as ended:\n"
        "        assert ended.code in (0, None), (command, ended.code)\n"
        "import torch\n"
        "assert not torch.distributed.is_initialized()\n"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(root)!r})\n{code}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"model.safetensors"} <= {path.name for path in (home / "a").iterdir()}
    assert (home / "b" / "transformer" / "diffusion_pytorch_model.safetensors").is_file()
