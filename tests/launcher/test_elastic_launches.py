"""``launch --elastic`` under real launchers: a node dies in mid-training, the others go on, it comes back, all go on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from longskip.engine import checkpoint
from longskip.engine.configio import dump_yaml, load_config
from longskip.engine.opening import open_training, plan_for
from longskip.launcher.processes import rank_environment
from tests.figures import figure
from tests.launcher.machines import free_port, missing, slurm, sshd, wait_for
from tests.launcher.supervised import ROOT
from tests.launcher.telling import samples_of
from tests.ranks import small_config

pytestmark = pytest.mark.slow

PDSH = missing("pdsh", "ssh", "sshd", "ssh-keygen")
SLURM = missing("sbatch", "slurmctld", "slurmd", "munged", "scontrol", "scancel")
LONG = 120  # seconds that nothing here takes, whatever else the machine does
NODE_TIMEOUT = 5
# Python reads it before a program: ranks, and only they, tell the samples of their steps.
TELLING = """\
import sys
if "longskip.launcher" in sys.orig_argv and sys.orig_argv[sys.orig_argv.index("longskip.launcher") + 1] == "train":
    from tests.launcher.telling import tell
    tell()
"""


@pytest.fixture
def home(shapes: Path, in_tmp: Path) -> Path:
    """A folder with ``run.yaml``, whose run is long, a hostfile, and what makes its ranks tell their samples."""
    config = small_config(
        shapes,
        train={"steps": 100_000, "batch_size": 8, "micro_batch": 4},
        checkpoint={"every": 5},
        eval={"every": 0},
        logging={"every": 1},
        launch={"port": free_port() & ~1 or 29400, "node_timeout": NODE_TIMEOUT},
    )
    (in_tmp / "run.yaml").write_text(dump_yaml(config))
    (in_tmp / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
    (in_tmp / "sitecustomize.py").write_text(TELLING)
    return in_tmp


@pytest.fixture
def ssh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with sshd(tmp_path_factory.mktemp("ssh") / "sshd") as config:
        yield config


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with slurm(tmp_path_factory.mktemp("slurm") / "slurm", 2) as environment:
        yield environment


def environment(home: Path, **more: str) -> dict[str, str]:
    return rank_environment(2) | {"PYTHONPATH": f"{home}:{ROOT}", "LONGSKIP_PAUSE": "0.3", **more}


class Run:
    """What the run in ``home`` is at, and its processes."""

    def __init__(self, home: Path) -> None:
        self.home, self.folder = home, home / "runs" / "run"

    def last(self) -> tuple[int, int]:
        """Step and world that rank 0 is at."""
        path = self.home / "ids-0"
        lines = path.read_text().splitlines() if path.exists() else []
        return tuple(json.loads(lines[-1])[1:3]) if lines else (0, 0)

    def until(self, world: int, more: int, said: Path) -> float:
        """Wait for ``more`` steps that ``world`` ranks have taken; the seconds until the first of them."""
        began = time.monotonic()
        try:
            wait_for(lambda: self.last()[1] == world, LONG, "")
            seconds, step = time.monotonic() - began, self.last()[0]
            wait_for(lambda: self.last() >= (step + more, world), LONG, "")
        except TimeoutError:
            raise AssertionError(f"not {more} steps on {world}:\n{said.read_text(errors='replace')[-5000:]}") from None
        return seconds

    def rank(self, number: int) -> psutil.Process:
        for process in self.processes():
            try:
                if process.environ().get("RANK") == str(number) and "train" in process.cmdline():
                    return process
            except psutil.Error:
                continue
        raise AssertionError(f"no rank {number}")

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if Path(process.cwd()) == self.home and process.pid != os.getpid():
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def lose_node(self, beyond: str) -> None:
        """SIGKILL of all that belongs to rank 1's node, up to the process whose command line matches ``beyond``."""
        rank = self.rank(1)
        above = [rank]
        for parent in rank.parents():
            if parent.pid == 1 or re.match(beyond, " ".join(parent.cmdline())):
                break
            above.append(parent)
        everything = {process.pid: process for process in [*above, *above[-1].children(recursive=True)]}
        for process in everything.values():
            process.kill()
        psutil.wait_procs(everything.values(), timeout=20)

    def incidents(self) -> list[str]:
        return [json.loads(line)["kind"] for line in (self.folder / "incidents.jsonl").read_text().splitlines()]

    def attempts(self) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (self.folder / "launch" / "attempts.jsonl").read_text().splitlines()]
        return [line for line in lines if line["ended"] is not None]

    def assert_planned(self) -> None:
        """Every step that counts had the plan's batch: the straight run's, on however many ranks."""
        config = load_config(self.home / "run.yaml")
        plan = plan_for(config, open_training(config), config.train.batch_size, None)
        found, complaints = checkpoint.newest(self.folder / "checkpoints")
        assert found is not None and not complaints
        reached, told = checkpoint.read_state(found)["step"], samples_of(self.home)
        for step in range(1, reached + 1):
            assert told[step][max(told[step])] == sorted(plan.batch_at(step - 1)[1].tolist()), step


@pytest.mark.skipif(bool(PDSH), reason=PDSH)
def test_a_node_lost_and_regained_over_pdsh(home: Path, ssh: Path) -> None:
    """It comes back by the same launch, given there without ssh, and passes its preflight; the first launch stops both."""
    run, said = Run(home), home / "said"
    train = ("--elastic", "--", "train", "run.yaml")
    base = [sys.executable, "-m", "longskip.launcher", "launch", "--hostfile", "hosts"]
    variables = environment(home, PDSH_SSH_ARGS_APPEND=f"-F {ssh}")
    with open(said, "wb") as out:
        launch = subprocess.Popen(
            [*base, *train], env=variables, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
    back = None
    try:
        run.until(2, 7, said)
        run.lose_node(r"sshd.* -D ")
        figure(
            f"pdsh, a node of two killed, time-out {NODE_TIMEOUT} s: on the rest after {run.until(1, 4, said):.1f} s"
        )
        with open(home / "back", "wb") as out:
            command = [*base, "--no-ssh", "--node-rank", "1", *train]
            back = subprocess.Popen(
                command, env=variables, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
            )
        figure(f"pdsh, the node is back: on both again after {run.until(2, 4, said):.1f} s")
        launch.terminate()
        assert (launch.wait(LONG), back.wait(LONG)) == (75, 75), said.read_text()
    finally:
        for process in (launch, back):
            if process is not None:
                process.kill()
                process.wait()
    assert [attempt["world"] for attempt in run.attempts()][-3:] == [2, 1, 2]
    assert [kind for kind in run.incidents() if kind.startswith("node")] == ["node_lost", "node_back"]
    run.assert_planned()
    wait_for(lambda: not run.processes(), LONG, "processes are left")


@pytest.mark.skipif(bool(SLURM), reason=SLURM)
@pytest.mark.parametrize("machine", [False, True], ids=["processes", "machine"])
def test_a_node_lost_and_regained_in_a_slurm_job(home: Path, cluster: dict[str, str], machine: bool) -> None:
    """Its processes killed, it comes back in the job's allocation; its machine down, Slurm takes it out of the job, and it
    comes back as a job of its own. The end is the first node's: 75, and the job stands in the queue again."""
    run = Run(home)
    variables = environment(home, **cluster)

    def said(*command: str) -> str:
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=LONG).stdout

    options = (
        "--on",
        "slurm",
        "--nodes",
        "2",
        "--gpus-per-node",
        "1",
        "--elastic",
        "--no-preflight",
        "--submit",
        "--json",
    )
    settings = ("launch.slurm.gpus=none", "launch.slurm.cpus=1", 'launch.slurm.time="0:10:00"')
    launch = (sys.executable, "-m", "longskip.launcher", "launch", *options, "--", "train", "run.yaml", *settings)
    job = json.loads(said(*launch))["job"]
    log, again = run.folder / "launch" / f"slurm-{job}.log", str(run.folder / "launch" / "node.sh")
    back = None
    try:
        run.until(2, 7, log)
        run.lose_node(r"slurmd " if machine else r"slurmstepd")
        if machine:
            said("scontrol", "update", "NodeName=127.0.0.2", "State=DOWN", "Reason=dead")
        figure(
            f"Slurm, a node of two killed, time-out {NODE_TIMEOUT} s: on the rest after {run.until(1, 4, log):.1f} s"
        )
        assert ("NumNodes=1" if machine else "NumNodes=2") in said("scontrol", "show", "job", job)
        place = ("--nodes=1", "--ntasks=1", "--cpus-per-task=1", "--nodelist=127.0.0.2")
        if machine:
            said("sbatch", *place, f"--output={home / 'back'}", again, "1")
        else:
            step = ("srun", f"--jobid={job}", "--overlap", *place, "bash", again, "1")
            with open(home / "back", "wb") as out:
                back = subprocess.Popen(step, env=variables, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
        figure(f"Slurm, the node is back: on both again after {run.until(2, 4, log):.1f} s")
        said("scancel", "--signal=USR1", job)
        waiting = ("squeue", "--noheader", "--format=%T", f"--jobs={job}")
        wait_for(lambda: said(*waiting) == "PENDING\n", LONG, "not queued again")
    finally:
        subprocess.run(["scancel", job], env=variables, check=False)
        if back is not None:
            back.kill()
            back.wait()
    assert [attempt["world"] for attempt in run.attempts()][-3:] == [2, 1, 2]
    assert [kind for kind in run.incidents() if kind.startswith("node")] == ["node_lost", "node_back"]
    run.assert_planned()
    wait_for(lambda: not run.processes(), LONG, "processes are left")
