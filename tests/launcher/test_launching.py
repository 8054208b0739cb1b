"""``longskip launch`` and ``supervise`` as a user types them: what is refused, shown, kept, started, and stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longskip.engine import signals
from longskip.engine.configio import dump_yaml
from longskip.errors import ConfigError, LongskipError
from longskip.launcher import asking, launching
from longskip.launcher.cli import main
from longskip.launcher.hosts import Cluster
from longskip.launcher.launching import node_of
from longskip.launcher.rendering import BY_SSH, DEVICES, HERE, LAUNCHER, Rendered, Request, render, unpack
from tests.launcher.machines import wait_for
from tests.launcher.requests import asked, configured

Longskip = Callable[..., tuple[int, str, str]]


@pytest.fixture
def longskip(in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Longskip:
    """Runs a command in an empty folder with ``run.yaml``; returns (exit code, standard output, standard error)."""
    (in_tmp / "run.yaml").write_text(dump_yaml(configured()))
    (in_tmp / "hosts").write_text("node-1 slots=2\nnode-2 slots=2\n")
    for name in ("NCCL_DEBUG", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    handlers = {number: signal.getsignal(number) for number in signals.ASKING}  # which a command leaves ignored

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            main(list(arguments))
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
        for number, handler in handlers.items():
            signal.signal(number, handler)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


TRAIN = ("--", "train", "run.yaml")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--on", "slrum", *TRAIN), ["slrum", "did you mean 'slurm'"]),
        (("--via", "torchrn", *TRAIN), ["torchrn", "torchrun"]),
        (("--launcher", "pds", "--hostfile", "hosts", *TRAIN), ["pds", "pdsh"]),
        (("--hostfile", "nowhere", *TRAIN), ["nowhere", "cannot be read"]),
        (("--hostfile", "hosts", "--nodes", "2", *TRAIN), ["--hostfile says"]),
        (("--hostfile", "hosts", "--on", "slurm", *TRAIN), ["--on hosts"]),
        (("--local", "2", "--nodes", "2", *TRAIN), ["--local N"]),
        (("--local", "0", *TRAIN), ["0 ranks"]),
        (("--on", "slurm", *TRAIN), ["--nodes and --gpus-per-node"]),
        (("--on", "hosts", "--nodes", "2", "--gpus-per-node", "1", "--no-ssh", *TRAIN), ["--master"]),
        (("--on", "hosts", "--nodes", "2", "--gpus-per-node", "1", "--master", "a", *TRAIN), ["names of the nodes"]),
        (("--hostfile", "hosts", "--node-rank", "0", *TRAIN), ["--node-rank"]),
        (("--hostfile", "hosts", "--no-ssh", "--node-rank", "2", *TRAIN), ["0 … 1"]),
        (("--hostfile", "hosts", "--master", "-oX=y", *TRAIN), ["no host name"]),
        (("--setup", "x.sh", *TRAIN), ["--setup"]),
        (("--submit", *TRAIN), ["--submit"]),
        (("--local", "3", *TRAIN), ["3 rank(s)", "64"]),
        (("--", "evaluate", "run"), ["train only"]),
        (("--", "train"), ["train only"]),
        (("--", "train", "run.yaml", "--dry-run"), ["--dry-run stands behind train", "longskip launch --dry-run --"]),
        (("--", "train", "--dry-run", "run.yaml"), ["--dry-run stands behind train"]),
        (("--", "train", "run.yaml", "data.validation=https://me:pw@host/x"), ["password"]),
        (("--", "train", "run.yaml", "lunch.port=1"), ["lunch", "launch"]),
        (("--on", "slurm", "--via", "torchrun", "--nodes", "2", "--gpus-per-node", "2", *TRAIN), ["srun"]),
        (("--on", "kubernetes", "--nodes", "2", "--gpus-per-node", "2", *TRAIN), ["image is not set"]),
    ],
)
def test_refusals(longskip: Longskip, in_tmp: Path, arguments: tuple[str, ...], words: list[str]) -> None:
    code, out, err = longskip("launch", *arguments)
    assert code == 2 and not out, (out, err)
    assert all(word in err for word in words), err
    assert not (in_tmp / "runs").exists()


def test_a_dry_run_shows_all_and_writes_nothing(longskip: Longskip, in_tmp: Path) -> None:
    slurm = ("--on", "slurm", "--nodes", "2", "--gpus-per-node", "2")
    for options, words in (
        (("--local", "4"), ["supervise --nodes 1 --node 0 --ranks 4"]),
        (("--hostfile", "hosts"), ["launch/hostfile", "node-1 slots=1", "deepspeed.launcher.runner", "--packed"]),
        (("--hostfile", "hosts", "--no-ssh"), ["command of node 0", "command of node 1", "--node_rank 1"]),
        (("--hostfile", "hosts", "--via", "torchrun"), ["torch.distributed.run", "--node-rank 1"]),
        (slurm, ["#SBATCH --nodes=2", "srun", "sbatch --parsable"]),
    ):
        code, out, err = longskip("launch", *options, "--dry-run", *TRAIN)
        assert code == 0, err
        assert all(word in out for word in words) and '"stage": 3' not in out and "--verbose" in out, out
        whole = longskip("launch", *options, "--dry-run", "--verbose", *TRAIN)[1]
        assert all(word in whole for word in [*words, '"train_batch_size": 64', '"stage": 3']), whole
        told = json.loads(longskip("launch", *options, "--dry-run", "--json", *TRAIN)[1])
        assert told["deepspeed"]["train_batch_size"] == 64 and told.keys() >= {
            "files",
            "command",
            "environment",
            "per_node",
        }
    assert not (in_tmp / "runs").exists()


def test_a_scheduled_job_is_written_and_its_command_told(longskip: Longskip, in_tmp: Path) -> None:
    code, out, err = longskip("launch", "--on", "slurm", "--nodes", "2", "--gpus-per-node", "2", *TRAIN)
    kept = in_tmp / "runs" / "run" / "launch"
    assert code == 0 and f"sbatch --parsable --chdir={in_tmp}" in out, err
    assert "not submitted" in out.splitlines()[-1] and "--submit" in out.splitlines()[-1]
    assert "srun" in (kept / "run.sbatch").read_text()
    assert json.loads((kept / "launch.json").read_text())["command"][0] == "sbatch"
    longskip("launch", "--on", "slurm", "--nodes", "4", "--gpus-per-node", "2", *TRAIN)
    lines = [json.loads(line) for line in (kept / "launches.jsonl").read_text().splitlines()]
    assert [(line["on"], line["nodes"], line["ranks"]) for line in lines] == [("slurm", 2, 4), ("slurm", 4, 8)]


def test_a_refused_launch_says_why_once_and_leaves_nothing(longskip: Longskip, in_tmp: Path) -> None:
    """Nor does a preflight alone; what it says is told on stdout, a refusal on stderr."""
    code, out, err = longskip("launch", "--local", "2", *TRAIN, "data.path=nowhere")
    assert code == 2 and not out and (err.count("nowhere"), err.count("preflight")) == (1, 1), (out, err)
    assert not list(in_tmp.glob("runs/*"))
    code, out, err = longskip("launch", "--local", "2", "--preflight-only", *TRAIN, "data.path=nowhere")
    assert code == 2 and "refused (1 failed" in out and not list(in_tmp.glob("runs/*")), err


def fake(folder: Path, name: str, code: str) -> None:
    """A program of that name, in Python, on PATH."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!{sys.executable}\nimport json, os, sys\n{code}\n")
    (folder / "bin" / name).chmod(0o755)


def test_submitting(longskip: Longskip, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked_for = ("launch", "--on", "slurm", "--nodes", "2", "--gpus-per-node", "2", "--submit")
    monkeypatch.setenv("PATH", str(in_tmp / "bin"))
    code, _, err = longskip(*asked_for, *TRAIN)
    assert code == 2 and "sbatch is not installed" in err and "login node" in err
    fake(in_tmp, "sbatch", "json.dump(sys.argv[1:], open('given', 'w')); print('4711;cluster')")
    code, out, err = longskip(*asked_for, "--json", *TRAIN)
    assert code == 0 and json.loads(out)["job"] == "4711", err
    given = json.loads((in_tmp / "given").read_text())
    assert given[-1] == json.loads(out)["files"][0] == str(in_tmp / "runs" / "run" / "launch" / "run.sbatch")
    fake(in_tmp, "sbatch", "sys.exit('invalid partition specified: no')")
    code, _, err = longskip(*asked_for, *TRAIN)
    assert code == 1 and "invalid partition" in err and "run.sbatch" not in err


@pytest.mark.parametrize(("program", "launcher"), [("pdsh", "pdsh"), ("mpirun", "openmpi"), ("srun", "slurm")])
def test_programs_that_are_not_here(
    longskip: Longskip, in_tmp: Path, monkeypatch: pytest.MonkeyPatch, program: str, launcher: str
) -> None:
    monkeypatch.setenv("PATH", str(in_tmp))
    code, _, err = longskip("launch", "--hostfile", "hosts", "--launcher", launcher, *TRAIN)
    assert code == 2 and f"{program} is not installed" in err and "cure" in err
    assert not (in_tmp / "runs").exists()


def at(folder: Path, **changes: Any) -> Request:
    return asked(folder=str(folder), python=sys.executable, **changes)


def started(folder: Path, code: str, **changes: Any) -> int:
    """``start`` with a Python program in the launcher's place; its first argument is RUN/launch."""
    request = at(folder, **({"ssh": False, "node": 0} | changes))
    return launching.start(Rendered(command=(sys.executable, "-c", code, request.kept)), request)


ENDS = "import os, sys\nfor node, code in {!r}.items(): open(sys.argv[1] + '/ended-%s' % node, 'w').write(code)\nsys.exit({})"


@pytest.mark.parametrize(
    ("left", "launchers", "code"),
    [
        ({"0": "0"}, 0, 0),
        ({"0": "75"}, 1, 75),  # torchrun's 1 after a clean save
        ({"0": "2"}, 1, 2),
        ({"0": "0"}, 1, 0),  # another node's supervisor did not come away in peace; the run is done
        ({"0": "1"}, 0, 1),
        ({"0": "137"}, 0, 1),
        ({}, 0, 1),  # DeepSpeed's runner ends with 0 when pdsh is killed
        ({}, 75, 75),
        ({}, 2, 2),
        ({}, 255, 1),
        ({"0": "x"}, 0, 1),
    ],
)
def test_the_exit_code_is_the_first_supervisors(
    tmp_path: Path, left: dict[str, str], launchers: int, code: int
) -> None:
    assert started(tmp_path, ENDS.format(left, launchers)) == code


def test_a_word_that_an_earlier_launch_left_is_none_of_this_one(tmp_path: Path) -> None:
    assert started(tmp_path, ENDS.format({"0": "0"}, 0)) == 0
    assert started(tmp_path, "raise SystemExit(0)") == 1
    assert started(tmp_path, ENDS.format({"0": "0", "1": "75"}, 0), node=1) == 75
    kept = tmp_path / "runs/run/launch"
    for name in ("stop", "stop-0", "stop-1"):
        (kept / name).write_text("SIGTERM")
    started(tmp_path, "", node=1)
    assert sorted(path.name for path in kept.glob("*-*")) == ["ended-0", "stop-0"] and not (kept / "stop").exists()
    launching.keep(Rendered(), at(tmp_path))
    assert not list(kept.glob("stop*")) and not list(kept.glob("ended*"))


def test_a_launch_does_not_wait_for_a_node_that_is_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake(tmp_path, "pdsh", "")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(launching, "FAREWELL_SECONDS", 1.0)
    code = "import sys, time\nopen(sys.argv[1] + '/ended-0', 'w').write('0')\ntime.sleep(600)"
    began = time.monotonic()
    assert started(tmp_path, code, ssh=True, node=None) == 0
    assert time.monotonic() - began < 300


SEES_THE_STOP = """
import pathlib, sys, time
stop = pathlib.Path(sys.argv[1]) / {!r}
deadline = time.monotonic() + 60
while not stop.exists() and time.monotonic() < deadline: time.sleep(0.05)
(stop.parent / 'seen').write_text(stop.read_text())
(stop.parent / 'ended-{}').write_text('75')
"""


@pytest.mark.parametrize(("node", "number"), [(0, signal.SIGTERM), (1, signal.SIGUSR1), (None, signal.SIGINT)])
def test_a_signal_asks_the_supervisors_and_no_launcher(
    tmp_path: Path, node: int | None, number: signal.Signals
) -> None:
    alone = {"cluster": Cluster(1, 2), "on": "local"} if node is None else {}
    name = "stop" if node is None else f"stop-{node}"
    threading.Timer(1.0, os.kill, (os.getpid(), number)).start()
    assert started(tmp_path, SEES_THE_STOP.format(name, node or 0), node=node, **alone) == 75
    assert (tmp_path / "runs/run/launch/seen").read_text() == number.name
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_reaches_an_ssh_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's runner puts NCCL…, PYTHON…, UCX…, MLFLOW… on the nodes' command lines: none of them reaches it."""
    fake(tmp_path, "pdsh", "")
    secrets = {
        "HF_TOKEN": "s-1", "MLFLOW_TRACKING_PASSWORD": "s-2", "NCCL_DEBUG": "$(touch s-3)", "PYTHONSTARTUP": "s-4",
        "UCX_TLS": "s-5", "HTTP_PROXY": "http://me:s-6@host", "MASTER_ADDR": "s-7", "PYTHONPATH": "/a;touch s-8",
    }  # fmt: skip
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    code = "import json, os, sys\njson.dump([dict(os.environ), os.getcwd()], open(sys.argv[1] + '/told', 'w'))"
    request = at(tmp_path)
    environment = render(configured(), request).environment
    launching.start(Rendered(command=(sys.executable, "-c", code, request.kept), environment=environment), request)
    told, folder = json.loads((tmp_path / "runs/run/launch/told").read_text())
    assert not [name for name, value in told.items() if "s-" in value and name in secrets]
    assert folder == "/" and told["DS_ENV_FILE"] == "/dev/null" and "PATH" in told
    monkeypatch.setenv("PYTHONPATH", "/plain/path:/other")
    assert launching._may_travel("PYTHONPATH", "/plain/path:/other")


def test_deepspeeds_own_file_of_variables_is_not_read(tmp_path: Path) -> None:
    """~/.deepspeed_env would be printed and put on command lines: its runner looks for it under the name that we set."""
    (tmp_path / ".deepspeed_env").write_text("HF_TOKEN=s3cret\n")
    names = "from deepspeed.launcher import runner; print(runner.DEEPSPEED_ENVIRONMENT_NAME, runner.DEEPSPEED_ENVIRONMENT_PATHS)"
    environment = os.environ | {"HOME": str(tmp_path)} | dict(render(configured(), asked()).environment)
    done = subprocess.run([sys.executable, "-c", names], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("/dev/null ") and not os.path.isfile(os.path.join(str(tmp_path), "/dev/null"))  # noqa: PTH113, PTH118


@pytest.mark.parametrize(
    ("environment", "node"),
    [({"RANK": "3", "SLURM_NODEID": "1"}, 3), ({"OMPI_COMM_WORLD_RANK": "2"}, 2), ({"SLURM_NODEID": "1"}, 1),
     ({"JOB_COMPLETION_INDEX": "7"}, 7), ({"RANK": "", "JOB_COMPLETION_INDEX": "0"}, 0)],
)  # fmt: skip
def test_which_node_this_is(environment: dict[str, str], node: int) -> None:
    assert node_of(environment) == node


def test_no_node_or_none_that_can_be() -> None:
    for environment in ({}, {"RANK": "-1"}, {"RANK": "1;x"}, {"SLURM_NODEID": "²"}):
        with pytest.raises(ConfigError):
            node_of(environment)


def test_a_supervisors_environment_is_cleared_of_its_launchers() -> None:
    environment = {
        "RANK": "0", "CROSS_RANK": "0", "CUDA_VISIBLE_DEVICES": "0", DEVICES: "4,5", "OMPI_COMM_WORLD_RANK": "0", "PATH": "/bin",
        "TORCHELASTIC_USE_AGENT_STORE": "True", HERE: "/x", "SLURM_JOB_ID": "1",
    }  # fmt: skip
    asking.clear(environment)
    assert environment == {"CUDA_VISIBLE_DEVICES": "4,5", "PATH": "/bin", "SLURM_JOB_ID": "1"}
    nodes = {"CROSS_RANK": "1", "CUDA_VISIBLE_DEVICES": "0"}
    asking.clear(nodes)
    assert nodes == {}
    own = {"RANK": "0", "CUDA_VISIBLE_DEVICES": "3"}  # no launcher of DeepSpeed's: the user's own
    asking.clear(own)
    assert own == {"CUDA_VISIBLE_DEVICES": "3"}


@pytest.fixture
def got() -> Any:
    """The signals that this process gets while the test runs."""
    numbers: list[int] = []
    before = {
        n: signal.signal(n, lambda number, frame: numbers.append(number)) for n in (signal.SIGTERM, signal.SIGUSR1)
    }
    yield numbers
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_supervisor_hears_the_launch(tmp_path: Path, got: list[int]) -> None:
    for name, said, number in (("stop", "SIGTERM", 15), ("stop-1", "SIGUSR1", 10), ("stop-1", "SIGINT", 15)):
        with asking.told_from_outside({HERE: str(tmp_path)}, 1) as ended:
            (tmp_path / "stop-0").write_text("SIGTERM")  # another node's
            time.sleep(1.2)
            assert got == []
            (tmp_path / name).write_text(said)
            wait_for(lambda: bool(got), 30, f"no signal for {name}")
            ended.append(75)
        (tmp_path / name).unlink()
        assert got == [number] and (tmp_path / "ended-1").read_text() == "75"
        got.clear()


def test_a_supervisor_outlives_no_launch(got: list[int]) -> None:
    launch = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    with asking.told_from_outside({LAUNCHER: str(launch.pid)}, 0):
        time.sleep(1.2)
        assert got == []
        launch.kill()
        wait_for(lambda: bool(got), 30, "no signal after the launch's death")
    launch.wait()
    assert got == [signal.SIGTERM]


def test_the_end_of_the_connection_is_the_launches_end(tmp_path: Path) -> None:
    code = (
        "import signal, sys, time\nfrom longskip.launcher import asking\n"
        "signal.signal(signal.SIGTERM, lambda n, f: (print('saving', flush=True), sys.exit(75)))\n"
        f"with asking.told_from_outside({{{BY_SSH!r}: '1', {HERE!r}: {str(tmp_path)!r}}}, 0) as ended:\n"
        "    print('here', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout and process.stdin and process.stdout.readline() == b"here\n"
    process.stdin.write(b"typed\n")  # a key is no end
    process.stdin.flush()
    time.sleep(1.5)
    assert process.poll() is None
    process.stdout.close()
    process.stdin.close()
    assert process.wait(timeout=30) == 75 and not (tmp_path / "ended-0").exists()


def test_a_rank_does_not_die_of_a_connection_that_ended(tmp_path: Path) -> None:
    """Its output goes through the supervisor: all of it arrives while somebody reads, and afterwards nothing breaks."""
    rank = "import sys, time\nfor i in range(20): print('line', i, flush=True); time.sleep(0.1)\nsys.exit(75)"
    code = (
        "import subprocess, sys\nfrom longskip.launcher.asking import outlet\nwith outlet():\n"
        f"    code = subprocess.run([sys.executable, '-c', {rank!r}]).returncode\n"
        "    print('ended', flush=True)\nopen(sys.argv[1], 'w').write(str(code))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "code")]
    heard = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert heard.stdout.splitlines() == [*(f"line {i}" for i in range(20)), "ended"] and heard.returncode == 0
    (tmp_path / "code").unlink()
    deaf = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert deaf.stdout is not None and deaf.stderr is not None and deaf.stdout.readline() == b"line 0\n"
    deaf.stdout.close()
    deaf.stderr.close()
    assert deaf.wait(timeout=60) == 0 and (tmp_path / "code").read_text() == "75"


@pytest.mark.parametrize(("at_the_end", "code"), [("signals.ignore()", 75), ("pass", -signal.SIGTERM)])
def test_a_signal_that_comes_while_a_rank_ends_is_none(at_the_end: str, code: int) -> None:
    """Python takes its handlers away before it takes modules apart: without `ignore` the signal kills."""
    rank = (
        "import os, signal, sys\nfrom longskip.engine import signals\nsignals.listen()\n"
        "class Late:\n    def __del__(self, kill=os.kill, own=os.getpid(), number=signal.SIGTERM):\n        kill(own, number)\n"
        f"late = Late()\n{at_the_end}\nsys.exit(75)\n"
    )
    assert subprocess.run([sys.executable, "-c", rank], timeout=60).returncode == code


def test_supervise_refuses(longskip: Longskip) -> None:
    for arguments, word in (
        (("--node", "0", "--", "evaluate"), "train only"),
        (("--node", "x", *TRAIN), "--node 'x'"),
        (("--node", "2", "--nodes", "2", *TRAIN), "node 2 of 2"),
        (("--packed", "x"), "no packed launch"),
    ):
        code, _, err = longskip("supervise", *arguments)
        assert code == 2 and word in err, err


def test_a_packed_supervisor_is_the_plain_one(
    longskip: Longskip, in_tmp: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longskip.launcher import supervisor

    seen: list[Any] = []
    monkeypatch.setattr(
        supervisor, "supervise", lambda what: seen.append((what, str(Path.cwd()), dict(os.environ))) or 75
    )
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("OMP_X", "before")
    folder = in_tmp / "else where"
    folder.mkdir()
    train = ("run.yaml", "logging.prompts=[a b, $(x)]")
    request = asked(folder=str(folder), train=train, environment={"OMP_X": "a 'b'"}, elastic=True, ssh=False, node=1)
    word = render(configured(), request).command[-1]
    assert unpack(word)[1] == str(folder)
    assert longskip("supervise", "--packed", word)[0] == 75
    (what, where, environment), = seen  # fmt: skip
    assert (what.nodes, what.node, what.ranks, what.store) == (2, 1, 2, "node-1:29400")
    assert what.arguments == ("train", *train) and what.elastic and what.preflight == "yes"
    assert where == str(folder) and environment["OMP_X"] == "a 'b'" and "RANK" not in environment
    gone = render(configured(), asked(folder=str(in_tmp / "gone"), ssh=False, node=1)).command[-1]
    os.chdir(in_tmp)
    code, _, err = longskip("supervise", "--packed", gone)
    assert code == 2 and "not on this node" in err


def test_files_that_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(LongskipError, match="cannot be written"):
        launching.keep(Rendered(), at(tmp_path))
