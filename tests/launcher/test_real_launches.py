"""Two nodes for real: loopback addresses over pdsh, mpirun, deepspeed without ssh and torchrun, and a Slurm of our own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from longskip.engine.configio import dump_yaml, load_config
from longskip.launcher.local import rank_environment
from tests.launcher.machines import free_port, missing, slurm, sshd, wait_for
from tests.ranks import small_config

pytestmark = pytest.mark.slow

SECRET = "s3cret-that-no-one-may-see"
PDSH = missing("pdsh", "ssh", "sshd", "ssh-keygen")
MPIRUN = missing("mpirun", "ssh", "sshd", "ssh-keygen")
SLURM = missing("sbatch", "slurmctld", "slurmd", "munged", "scontrol", "scancel")
LONG = 300  # seconds that nothing here takes, whatever else the machine does


@pytest.fixture
def home(shapes: Path, in_tmp: Path) -> Path:
    """A folder with ``run.yaml``, whose run is short, and a hostfile of two addresses of this machine."""
    ports = {"launch": {"port": free_port() & ~1 or 29400}}
    config = small_config(shapes, train={"steps": 3}, checkpoint={"every": 2}, logging={"every": 1}, **ports)
    (in_tmp / "run.yaml").write_text(dump_yaml(config))
    (in_tmp / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    return in_tmp


@pytest.fixture
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with sshd(tmp_path_factory.mktemp("ssh") / "sshd") as config:
        yield config


def launch(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """``longskip launch ARGUMENTS`` in a process of its own, with a secret in its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "longskip.launcher", "launch", *arguments],
        env=rank_environment(2) | {"WANDB_API_KEY": SECRET, "MLFLOW_TRACKING_PASSWORD": SECRET} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )


def ended(*launches: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """(exit code, output) of each."""
    try:
        return [(each.wait(), said) for each in launches for said in [each.communicate(timeout=LONG)[0]]]
    finally:
        for each in launches:
            each.kill()


def ours(folder: Path) -> list[psutil.Process]:
    """Processes that work in the folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if Path(process.cwd()) == folder and process.pid != os.getpid():
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def steps(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


def status(run: Path) -> str:
    return str(json.loads((run / "run.json").read_text())["status"])


def attempts(run: Path) -> list[dict[str, Any]]:
    """The attempts that ended."""
    lines = [json.loads(line) for line in (run / "launch" / "attempts.jsonl").read_text().splitlines()]
    return [line for line in lines if line["ended"] is not None]


@pytest.mark.skipif(bool(PDSH), reason=PDSH)
def test_hostfile_over_pdsh(home: Path, ssh: Path) -> None:
    """Through DeepSpeed's runner: what shells would read arrives as it is, and no command line ever shows a secret."""
    prompt = "a; touch pwned $(touch pwned) `touch pwned` 'b' \"c\" | %h & é"
    override = f"logging.prompts={json.dumps([prompt], ensure_ascii=False)}"
    lines: set[str] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.2):
            for process in psutil.process_iter():
                try:
                    lines.add(" ".join(process.cmdline()))
                except psutil.Error:
                    continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        ((code, said),) = ended(
            launch(
                "--hostfile",
                "hosts",
                "--no-preflight",
                "--",
                "train",
                "run.yaml",
                override,
                PDSH_SSH_ARGS_APPEND=f"-F {ssh}",
            )
        )
    finally:
        over.set()
        watcher.join()
    run = home / "runs" / "run"
    assert code == 0 and status(run) == "done", said
    assert load_config(run / "config.yaml").logging.prompts == (prompt,)
    assert attempts(run)[-1]["nodes"] == [0, 1] and attempts(run)[-1]["why"] == "done"
    assert any("--packed" in line and "pdsh" in line for line in lines) and not any(SECRET in line for line in lines)
    kept = "".join(
        path.read_text(errors="replace") for path in run.rglob("*") if path.is_file() and path.suffix != ".safetensors"
    )
    assert SECRET not in said and SECRET not in kept
    assert not list(home.rglob("pwned")) and not Path("/pwned").exists()
    assert ours(home) == []


@pytest.mark.skipif(bool(PDSH), reason=PDSH)
def test_a_launch_that_is_killed_leaves_no_ranks_on_the_nodes(home: Path, ssh: Path) -> None:
    """The connections end with it; the supervisors see that, save, and go."""
    long = (
        "--hostfile",
        "hosts",
        "--no-preflight",
        "--",
        "train",
        "run.yaml",
        "train.steps=100000",
        "checkpoint.every=100000",
    )
    started = launch(*long, PDSH_SSH_ARGS_APPEND=f"-F {ssh}")
    run = home / "runs" / "run"
    wait_for(lambda: len(steps(run)) > 2, LONG, "no step was taken")
    started.kill()
    started.communicate()
    wait_for(lambda: not ours(home), LONG, "ranks are left")
    assert attempts(run)[-1]["why"] == "saved" and status(run) == "saved"
    assert len(list((run / "checkpoints").glob("step-*/manifest.json"))) == 1


@pytest.mark.skipif(bool(MPIRUN), reason=MPIRUN)
def test_hostfile_over_mpirun(home: Path, ssh: Path) -> None:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_plm_rsh_args": f"-F {ssh}"}
    train = ("--", "train", "run.yaml")
    ((code, said),) = ended(launch("--hostfile", "hosts", "--launcher", "openmpi", "--no-preflight", *train, **root))
    run = home / "runs" / "run"
    assert code == 0 and status(run) == "done" and attempts(run)[-1]["nodes"] == [0, 1], said
    assert ours(home) == []


def test_deepspeed_without_ssh_started_on_each_node(home: Path) -> None:
    options = ("--hostfile", "hosts", "--no-ssh")
    both = ended(*(launch(*options, "--node-rank", str(node), "--", "train", "run.yaml") for node in (0, 1)))
    run = home / "runs" / "run"
    assert [code for code, _ in both] == [0, 0] and status(run) == "done", both
    assert attempts(run)[-1]["nodes"] == [0, 1] and "step 3/3" in both[0][1]
    assert ours(home) == []


def test_torchrun_on_each_node_and_a_signal_to_one(home: Path) -> None:
    """SIGTERM to one node's launch: all ranks save, both launches end with 75, which torchrun itself would turn into 1."""
    options = ("--hostfile", "hosts", "--via", "torchrun", "--no-preflight")
    train = ("--", "train", "run.yaml", "train.steps=100000", "checkpoint.every=100000")
    both = [launch(*options, "--node-rank", str(node), *train) for node in (0, 1)]
    run = home / "runs" / "run"
    try:
        wait_for(lambda: len(steps(run)) > 2, LONG, "no step was taken")
    finally:
        both[1].send_signal(signal.SIGTERM)
    said = ended(*both)
    assert [code for code, _ in said] == [75, 75] and status(run) == "saved", "\n".join(text for _, text in said)
    assert len(list((run / "checkpoints").glob("step-*/manifest.json"))) == 1
    assert ours(home) == []


def queue(environment: dict[str, str]) -> str:
    command = ["squeue", "--noheader", "--format=%T"]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm(tmp_path_factory.mktemp("slurm") / "slurm", 2) as environment:
        yield environment


@pytest.mark.skipif(bool(SLURM), reason=SLURM)
def test_a_slurm_job_is_saved_queued_again_and_done(home: Path, cluster: dict[str, str]) -> None:
    """Two nodes of a real Slurm: USR1, as before the time limit, saves; the job stands in the queue again and goes on."""
    options = ("--on", "slurm", "--nodes", "2", "--gpus-per-node", "1", "--no-preflight", "--submit", "--json")
    settings = ("launch.slurm.gpus=none", "launch.slurm.cpus=1", 'launch.slurm.time="0:10:00"', "train.steps=30")
    waits = ("eval.every=0", "checkpoint.every=1000")
    ((code, said),) = ended(launch(*options, "--", "train", "run.yaml", *settings, *waits, **cluster))
    assert code == 0, said
    job, run = json.loads(said)["job"], home / "runs" / "run"
    try:
        wait_for(lambda: len(steps(run)) > 2, LONG, "no step was taken")
        subprocess.run(["scancel", "--signal=USR1", job], env=os.environ | cluster, check=True)
        wait_for(lambda: queue(cluster) == "PENDING", LONG, "the job was not queued again")
        # Slurm makes a job that is queued again wait for two minutes.
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], env=os.environ | cluster, check=True)
        wait_for(lambda: status(run) == "done", LONG, f"the job was not done: {queue(cluster)}")
        wait_for(lambda: queue(cluster) == "", LONG, "the job did not end")
    finally:
        subprocess.run(["scancel", job], env=os.environ | cluster, check=False)
        log = (run / "launch" / f"slurm-{job}.log").read_text()
    whys = [line["why"] for line in attempts(run)]
    assert whys in (["saved", "done"], ["done"]), log
    assert whys == ["saved", "done"] and steps(run)[-1] == 30, log
    assert SECRET not in log and ours(home) == []


@pytest.mark.skipif(bool(SLURM), reason=SLURM)
def test_deepspeeds_slurm_runner_inside_an_allocation(home: Path, cluster: dict[str, str]) -> None:
    options = ["--hostfile", "hosts", "--launcher", "slurm", "--no-preflight", "--", "train", "run.yaml"]
    command = [
        "salloc",
        "--nodes=2",
        "--ntasks-per-node=1",
        sys.executable,
        "-m",
        "longskip.launcher",
        "launch",
        *options,
    ]
    done = subprocess.run(command, env=rank_environment(2) | cluster, capture_output=True, text=True, timeout=LONG)
    run = home / "runs" / "run"
    assert done.returncode == 0 and status(run) == "done", done.stdout + done.stderr
    assert attempts(run)[-1]["nodes"] == [0, 1]
    time.sleep(1)
    assert ours(home) == []
