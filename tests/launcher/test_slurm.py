"""The sbatch script: its text, what bash makes of it, and a job in a real Slurm of our own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longskip.errors import ConfigError
from longskip.launcher.hosts import Cluster
from longskip.launcher.rendering import Request, render
from longskip.launcher.slurm import job_name
from tests.launcher.requests import NASTY, asked, configured

SCRIPT = """\
#!/bin/bash
#SBATCH --job-name=run
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=h100:2
#SBATCH --cpus-per-task=16
#SBATCH --mem=200G
#SBATCH --partition=gpu
#SBATCH --account=mine
#SBATCH --time=1-12:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --exclusive

set -uo pipefail
cd -- '/home/m e' || exit 2
export NCCL_DEBUG=INFO
export OMP_NUM_THREADS=4
export LONGSKIP_LAUNCH='/home/m e/runs/run/launch'
source -- /home/me/modules.sh || exit 2

# The first node serves the supervisors' store, at a port of this job's own.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 2
first=${hosts%%$'\\n'*}
port=$((29400 + SLURM_JOB_ID % 1000 * 2))
ended='/home/m e/runs/run/launch/ended-0'
rm -f -- "$ended" '/home/m e/runs/run/launch/stop'

# A cancelled job waits for its ranks, which save, and is not queued again.
cancelled=
trap 'cancelled=yes' TERM
srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpus-per-task=16 --kill-on-bad-exit=0 --wait=60 /env/bin/python -m \
longskip.launcher supervise --nodes 2 --node auto --ranks 2 --store "$first:$port" --preflight -- train run.yaml optim.lr=1e-3
code=$?
# srun's own code is that of whichever node was lost: the first node's supervisor says how the run ended.
[ -s "$ended" ] && code=$(cat -- "$ended")
if [ "$code" -eq 75 ] && [ -z "$cancelled" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
"""


def wanted(**changes: Any) -> Request:
    return asked("slurm", "srun", **changes)


def test_the_script() -> None:
    config = configured(
        environment={"NCCL_DEBUG": "INFO"},
        slurm={"gpu_type": "h100", "cpus": 16, "memory": "200G", "partition": "gpu", "account": "mine", "time": "1-12:00:00",
               "signal_seconds": 300, "extra": ["--exclusive"]},
    )  # fmt: skip
    rendered = render(config, wanted(folder="/home/m e", setup="/home/me/modules.sh"))
    assert rendered.files == {"run.sbatch": SCRIPT}
    assert rendered.command == (
        "sbatch", "--parsable", "--chdir=/home/m e", "--output=/home/m e/runs/run/launch/slurm-%j.log",
        "/home/m e/runs/run/launch/run.sbatch",
    )  # fmt: skip


def test_other_sites() -> None:
    text = render(configured(slurm={"gpus": "gres", "requeue": False}), wanted(elastic=True)).files["run.sbatch"]
    assert "#SBATCH --gres=gpu:2\n" in text and "#SBATCH --no-requeue\n" in text and "scontrol requeue" not in text
    assert (
        "#SBATCH --no-kill\n" in text
        and "--kill-on-bad-exit=0 --wait=0 --no-kill" in text
        and "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --cpu-bind=none" in text
    )
    assert "gpu" not in render(configured(slurm={"gpus": "none"}), wanted()).files["run.sbatch"]
    assert "%%" in render(configured(), wanted(folder="/50%")).command[3]


def test_the_jobs_port_is_one_that_there_is() -> None:
    for port, line in (
        (29400, "29400 + SLURM_JOB_ID % 1000 * 2"),
        (65000, "65000 + SLURM_JOB_ID % 267 * 2"),
        (65534, "% 1 * 2"),
    ):
        assert line in render(configured(port=port), wanted()).files["run.sbatch"]
    assert 65000 + 266 * 2 + 1 <= 65535


@pytest.mark.parametrize(
    "setting",
    [
        {"partition": "-p"}, {"partition": "a b"}, {"partition": "a\n#SBATCH --wrap=x"}, {"partition": "gpü"}, {"partition": ""},
        {"account": "$(x)"}, {"qos": "a;b"}, {"gpu_type": "a\tb"}, {"time": "12:00:00\n"}, {"time": 43200}, {"time": "now"},
        {"memory": "1 G"}, {"memory": "-1"}, {"extra": ["--wrap=x"]}, {"extra": ["--wra=x"]}, {"extra": ["-p"]}, {"extra": ["x"]},
        {"extra": ["--comment=a b"]}, {"extra": ["--comment=a\n#SBATCH --wrap=x"]}, {"extra": ["--comment='x'"]},
        {"extra": ["--nodes=9"]}, {"extra": ["--export=ALL,LD_PRELOAD=x"]}, {"cpus": 0}, {"signal_seconds": 1}, {"nodes": 2},
    ],
)  # fmt: skip
def test_settings_that_slurm_would_read_as_something_else(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"launch\.slurm"):
        configured(slurm=setting)


def test_job_names() -> None:
    assert [job_name(f"runs/{name}") for name in ("run-1.a", "a b;c", "é", "-x", "x" * 99)] == [
        "run-1.a", "a_b_c", "_", "x", "x" * 64,
    ]  # fmt: skip


def fake_cluster(folder: Path) -> Path:
    """``srun`` that writes down what it was given, and where; ``scontrol`` that knows two nodes."""
    programs = folder / "bin"
    programs.mkdir()
    note = "import json, os, sys\ntold = {'argv': sys.argv[1:], 'cwd': os.getcwd(), 'env': dict(os.environ)}\n"
    kept = f"open({str(folder)!r} + '/' + os.path.basename(sys.argv[0]), 'a').write(json.dumps(told) + '\\n')\n"
    hosts = "if sys.argv[1] == 'show': print('node-7\\nnode-8')\n"
    code = f"sys.exit(int(open({str(folder / 'code')!r}).read()))\n"
    for name, more in (("srun", code), ("scontrol", hosts)):
        (programs / name).write_text(f"#!{sys.executable}\n{note}{kept}{more}")
        (programs / name).chmod(0o755)
    return programs


def run_script(folder: Path, text: str, code: int = 0) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
    """The script's exit code, and what srun and scontrol were given."""
    (folder / "code").write_text(str(code))
    for name in ("srun", "scontrol"):
        (folder / name).unlink(missing_ok=True)
    (folder / "run.sbatch").write_text(text, "utf-8")
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", folder / "run.sbatch"],
        env={"PATH": path, "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node-[7-8]", "LANG": "C.UTF-8"},
        capture_output=True,
        timeout=60,
    )
    told = [
        [json.loads(line) for line in (folder / name).read_text().splitlines()] if (folder / name).exists() else []
        for name in ("srun", "scontrol")
    ]
    return done.returncode, told[0], told[1]


def test_bash_hands_every_value_on_as_it_is(tmp_path: Path) -> None:
    fake_cluster(tmp_path)
    folder = tmp_path / "a 'b' $(touch pwned) \"c\" é;touch pwned"
    folder.mkdir()
    (folder / "set up;.sh").write_text("export FROM_SETUP=yes\n")
    train = ("my run;touch pwned.yaml", *(f"logging.prompts={value}" for value in NASTY))
    environment = {f"OMP_{i}": value for i, value in enumerate(NASTY) if "\n" not in value}
    request = wanted(
        train=train, folder=str(folder), environment=environment, setup=str(folder / "set up;.sh"),
        python="/my env/$(touch pwned)/python",
    )  # fmt: skip
    code, srun, _ = run_script(tmp_path, render(configured(), request).files["run.sbatch"])
    assert code == 0 and len(srun) == 1
    argv = srun[0]["argv"]
    assert argv[argv.index("/my env/$(touch pwned)/python") :][:3] == [
        "/my env/$(touch pwned)/python",
        "-m",
        "longskip.launcher",
    ]
    assert tuple(argv[argv.index("--") + 1 :]) == ("train", *train)
    assert argv[argv.index("--store") + 1] == f"node-7:{29400 + 345 * 2}"
    assert srun[0]["cwd"] == str(folder) and srun[0]["env"]["FROM_SETUP"] == "yes"
    assert {name: srun[0]["env"][name] for name in environment} == environment
    assert not list(tmp_path.rglob("pwned"))


def test_a_job_that_saved_is_queued_again(tmp_path: Path) -> None:
    fake_cluster(tmp_path)
    again = ["requeue", "12345"]
    text = render(configured(), wanted(folder=str(tmp_path))).files["run.sbatch"]
    for code, queued in ((0, False), (75, True), (1, False), (2, False), (137, False)):
        ended, _, scontrol = run_script(tmp_path, text, code)
        assert ended == code and ([told["argv"] for told in scontrol[1:]] == [again]) is queued
    never = render(configured(slurm={"requeue": False}), wanted(folder=str(tmp_path))).files["run.sbatch"]
    assert run_script(tmp_path, never, 75)[0] == 75 and len(run_script(tmp_path, never, 75)[2]) == 1


@pytest.mark.parametrize("elastic", [False, True])
def test_the_first_nodes_word_counts_and_not_sruns_code(tmp_path: Path, elastic: bool) -> None:
    """srun ends with the worst of its tasks' codes: 137 where a node's processes were killed in a run that went on."""
    fake_cluster(tmp_path)
    text = render(configured(), wanted(folder=str(tmp_path), elastic=elastic)).files["run.sbatch"]
    kept = tmp_path / "runs" / "run" / "launch"
    kept.mkdir(parents=True)
    (kept / "ended-0").write_text("0")  # of an earlier job
    (kept / "stop").write_text("SIGTERM")
    assert run_script(tmp_path, text, 137)[0] == 137 and not list(kept.glob("ended*")) and not (kept / "stop").exists()
    srun = tmp_path / "bin" / "srun"
    note = f"open({str(kept / 'ended-0')!r}, 'w').write('75')"
    srun.write_text(srun.read_text().replace("sys.exit", f"{note}\nsys.exit"))
    ended, _, scontrol = run_script(tmp_path, text, 137)
    assert ended == 75 and [told["argv"][0] for told in scontrol] == ["show", "requeue"]


@pytest.mark.slow
def test_an_elastic_job_does_not_wait_for_a_node_whose_end_nobody_tells(tmp_path: Path) -> None:
    fake_cluster(tmp_path)
    kept = tmp_path / "runs" / "run" / "launch"
    kept.mkdir(parents=True)
    note = f"open({str(kept / 'ended-0')!r}, 'w').write('75')"
    (tmp_path / "bin" / "srun").write_text(f"#!{sys.executable}\nimport time\n{note}\ntime.sleep(600)\n")
    text = render(configured(), wanted(folder=str(tmp_path), elastic=True)).files["run.sbatch"]
    assert run_script(tmp_path, text)[0] == 75


def test_what_brings_a_lost_node_back(tmp_path: Path) -> None:
    """``node.sh I``: the supervisor of the script's step, as node I, at the store that the script has noted."""
    fake_cluster(tmp_path)
    folder = tmp_path / "a b;touch pwned"
    (folder / "runs" / "run" / "launch").mkdir(parents=True)
    python = tmp_path / "bin" / "python"
    shutil.copy(tmp_path / "bin" / "srun", python)
    rendered = render(
        configured(), wanted(folder=str(folder), elastic=True, python=str(python), train=("run.yaml", *NASTY[:4]))
    )
    _, srun, _ = run_script(tmp_path, rendered.files["run.sbatch"])
    (tmp_path / "node.sh").write_text(rendered.files["node.sh"])
    done = subprocess.run(["bash", tmp_path / "node.sh", "1"], env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"})
    assert done.returncode == 0
    again = json.loads((tmp_path / "python").read_text())
    first = srun[0]["argv"][srun[0]["argv"].index(str(python)) + 1 :]
    first[first.index("--node") + 1] = "1"
    assert again["argv"] == first and again["cwd"] == str(folder)
    assert again["env"]["LONGSKIP_LAUNCH"] == srun[0]["env"]["LONGSKIP_LAUNCH"] == f"{folder}/runs/run/launch"
    assert not list(tmp_path.rglob("pwned"))
    assert any("--overlap" in note and f"{folder}/runs/run/launch/node.sh I" in note for note in rendered.notes)
    assert "node.sh" not in render(configured(), wanted()).files


@pytest.mark.parametrize("elastic", [False, True])
def test_a_cancelled_job_is_not_queued_again(tmp_path: Path, elastic: bool) -> None:
    fake_cluster(tmp_path)
    srun = tmp_path / "bin" / "srun"
    srun.write_text(
        f"#!{sys.executable}\nimport os, signal, sys\nos.kill(os.getppid(), signal.SIGTERM)\nsys.exit(75)\n"
    )
    (tmp_path / "runs" / "run" / "launch").mkdir(parents=True)
    text = render(configured(), wanted(folder=str(tmp_path), elastic=elastic)).files["run.sbatch"]
    ended, _, scontrol = run_script(tmp_path, text, 75)
    assert ended == 75 and [told["argv"][0] for told in scontrol] == ["show"]


def test_a_cluster_of_one_is_as_any_other() -> None:
    text = render(configured(), wanted(cluster=Cluster(1, 8))).files["run.sbatch"]
    assert "--nodes=1 --ntasks=1" in text and '--store "$first:$port"' in text
