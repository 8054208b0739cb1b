"""From a command line to a running launch: what is asked, written to RUN/launch/, started, stopped, and how it ended.

The launchers between this process and the supervisors are not asked to stop: DeepSpeed's kills every DeepSpeed job of the
user on the nodes, torchrun and mpirun kill what does not end in seconds, and none of them keeps an exit code of 75. A file
in RUN/launch/ asks the supervisors, and in another they leave their exit code.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from longskip.engine.config import Config
from longskip.engine.runs import RUNS, RunFolder, append_json, write_atomic
from longskip.engine.secrets import holds_user, is_secret
from longskip.engine.signals import ASKING
from longskip.errors import EXIT_DONE, EXIT_FAILED, EXIT_SAVED, EXIT_USAGE, ConfigError, LongskipError
from longskip.launcher.rendering import DEVICES, HERE, LAUNCHER, Rendered, Request

STOP, ENDED = "stop", "ended"
FAREWELL_SECONDS = 60.0
"""For the other nodes, after the first one's supervisor has ended; what is then still connected is cut off, and ends."""
# What a program that is not here is called, and how it comes here.
_CURES = {
    "pdsh": "apt install pdsh, or --no-ssh",
    "mpirun": "apt install openmpi-bin, or --launcher pdsh",
    "srun": "run this inside Slurm (salloc), or --launcher pdsh",
    "sbatch": "submit from a login node of the cluster; without --submit the script is only written",
    "kubectl": "install kubectl; without --submit the manifests are only written",
}
# DeepSpeed's runner puts variables that begin so on the nodes' command lines, with quotes that a remote shell looks into.
# They go in the packed word instead; only Python's must be there before it starts.
_EXPORTED = ("MLFLOW", "MV2", "UCX", "NCCL", "PYTHON")
_KEPT_FOR_PYTHON = frozenset({"PYTHONPATH"})


def run_of(config: Config, path: str) -> Path:
    """The run's folder, as ``longskip train`` names it."""
    return RUNS / (config.train.name or Path(path).stem)


def kept_micro(config: Config, run: Path) -> int | None:
    """The micro-batch of a run that is there already; raises RunMismatchError where it is another run."""
    folder = RunFolder(run)
    return folder.summary().get("micro_batch") if folder.check(config) else None


def keep(rendered: Rendered, request: Request) -> Path:
    """Write what was rendered into RUN/launch/, where the newest launch lies, and a line to ``launches.jsonl``."""
    folder = Path(request.kept)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _forget_earlier(folder, request)
        for name, text in rendered.files.items():
            write_atomic(folder / name, text)
        write_atomic(folder / "launch.json", json.dumps(rendered.as_json(), indent=1, ensure_ascii=False))
        asked = {"on": request.on, "via": request.via, "nodes": request.cluster.nodes, "ranks": request.cluster.world}
        append_json(folder / "launches.jsonl", {"time": time.time(), **asked, "command": list(rendered.command)})
    except OSError as error:
        raise LongskipError(
            f"{folder} cannot be written: {error}", cure="run from a folder that you may write"
        ) from None
    return folder


def _forget_earlier(folder: Path, request: Request) -> None:
    """What an earlier launch asked for and how it ended is none of this one's; of nodes that are started by themselves each
    forgets its own."""
    one = request.node if request.cluster.nodes > 1 else None
    own = [folder / f"{name}-{one}" for name in (STOP, ENDED)]
    for path in [*folder.glob(f"{STOP}-*"), *folder.glob(f"{ENDED}-*")] if one is None else own:
        path.unlink(missing_ok=True)
    (folder / STOP).unlink(missing_ok=True)


def sweep(run: Path) -> None:
    """Remove RUN/launch/ of a start that never became a run, as its other traces are."""
    if (run / "config.yaml").exists():
        return
    shutil.rmtree(run / "launch", ignore_errors=True)
    for name in ("logs", ""):
        with suppress(OSError):  # something else stands in it
            (run / name).rmdir()


def start(rendered: Rendered, request: Request) -> int:
    """Run the launch's command until it ends; returns 0 done, 1 failed, 2 configuration, 75 saved on a signal.

    Signals ask the supervisors to save and end. Raises ConfigError for a program that is not installed.
    """
    by_ssh = _program(request) is not None
    _find(_program(request))
    folder = keep(rendered, request)
    mine = "" if request.node is None or request.cluster.nodes == 1 else f"-{request.node}"
    asked: list[int] = []
    handlers = {number: signal.signal(number, lambda n, frame: asked.append(n)) for number in ASKING}
    try:
        process = subprocess.Popen(
            rendered.command,
            env=_environment(rendered, request),
            # Over ssh DeepSpeed goes to this folder on every node, in a line for a shell, and lays it over PYTHONPATH.
            cwd="/" if by_ssh else None,
            start_new_session=True,
        )
        with _guarded(process.pid) if by_ssh else nullcontext():
            told = False
            over: float | None = None
            while (code := process.poll()) is None:
                if asked and not told:
                    write_atomic(folder / f"{STOP}{mine}", signal.Signals(asked[0]).name)
                    told = True
                if by_ssh and (folder / f"{ENDED}-0").exists():
                    over = over or time.monotonic()
                    if time.monotonic() - over > FAREWELL_SECONDS:  # ssh waits for a node that is no more
                        os.killpg(process.pid, signal.SIGKILL)
                time.sleep(0.1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return _how_it_ended(folder, request, code)


@contextmanager
def _guarded(group: int) -> Iterator[None]:
    """Should this process die, however it dies, the launcher's processes here are killed: with them the connections end,
    which the supervisors on the nodes see."""
    code = "import os, sys\nif not sys.stdin.read(): os.killpg(int(sys.argv[1]), 9)"
    guard = subprocess.Popen([sys.executable, "-c", code, str(group)], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guard.communicate(b"done")


def submit(rendered: Rendered, request: Request) -> str:
    """Hand the rendered job to sbatch or kubectl; returns what that said (sbatch: the job's number)."""
    program = _find("sbatch" if request.on == "slurm" else "kubectl")
    keep(rendered, request)
    said = subprocess.run([program, *rendered.command[1:]], capture_output=True, text=True, check=False)
    if said.returncode:
        raise LongskipError(
            f"{rendered.command[0]} ended with {said.returncode}: {(said.stderr or said.stdout).strip()[-2000:]}",
            cure=f"what it was given lies in {request.kept}",
        )
    return said.stdout.strip().partition(";")[0] if request.on == "slurm" else said.stdout.strip()


def deepspeed_json(config: Config, request: Request) -> dict[str, Any]:
    """DeepSpeed's JSON as the ranks will have it (the vocabulary of words at its full size)."""
    from longskip.engine.build import deepspeed_config

    batch = config.batch(request.cluster.world, request.kept_micro)
    text = config.text_encoder(config.encoders.text.vocabulary)
    trained = config.backbone().param_counts().total + (text.param_counts().total if text else 0)
    return deepspeed_config(config, batch, n_parameters=trained, cuda=False)


def command_line(command: tuple[str, ...]) -> str:
    """A command as a shell would have to be told it: for people, never run."""
    return shlex.join(command)


def _program(request: Request) -> str | None:
    if request.on != "hosts" or not request.ssh or request.via != "deepspeed":
        return None
    return {"pdsh": "pdsh", "openmpi": "mpirun", "slurm": "srun"}[request.runner]


def _find(program: str | None) -> str:
    if program is None:
        return ""
    found = shutil.which(program)
    if found is None:
        raise ConfigError(f"{program} is not installed here", cure=_CURES[program])
    return found


def _environment(rendered: Rendered, request: Request) -> dict[str, str]:
    """The launcher's environment. Over ssh without what it would put on command lines: secrets, and what a shell reads."""
    environment = dict(os.environ)
    if _program(request) is not None:
        environment = {name: value for name, value in environment.items() if _may_travel(name, value)}
    else:
        environment[LAUNCHER] = str(os.getpid())
        if "CUDA_VISIBLE_DEVICES" in environment:
            environment[DEVICES] = environment["CUDA_VISIBLE_DEVICES"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", HERE):
        environment.pop(name, None)
    return environment | dict(rendered.environment)


def _may_travel(name: str, value: str) -> bool:
    if name in _KEPT_FOR_PYTHON:
        return not set(value) - set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./:+-")
    return not (name.startswith(_EXPORTED) or is_secret(name) or holds_user(value))


def _how_it_ended(folder: Path, request: Request, code: int) -> int:
    """The exit code that the first supervisor left behind; the launcher's own where that was not reached."""
    node = 0 if request.node is None else request.node
    try:
        left = int((folder / f"{ENDED}-{node}").read_text("ascii"))
    except (OSError, ValueError):
        if code in (EXIT_USAGE, EXIT_SAVED):
            return code
        print(
            f"longskip: the launcher ended with {code}, and no supervisor of node {node} left its word in {folder}\n"
            "  cure: see what it said above; the run's folder must be the same on all nodes",
            file=sys.stderr,
        )
        return EXIT_FAILED
    return left if left in (EXIT_DONE, EXIT_USAGE, EXIT_SAVED) else EXIT_FAILED


def node_of(environment: Mapping[str, str]) -> int:
    """Which node this is, from what its launcher set: RANK (deepspeed, torchrun), mpirun's, Slurm's, Kubernetes's.

    Raises ConfigError where none of them did.
    """
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
    for name in names:
        text = environment.get(name, "")
        if text:
            if not text.isascii() or not text.isdigit():
                raise ConfigError(f"{name}={text!r} is no node's number", cure="--node I")
            return int(text)
    raise ConfigError(f"--node auto: none of {', '.join(names)} is set", cure="--node I, or longskip launch")
