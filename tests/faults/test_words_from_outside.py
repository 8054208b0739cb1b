"""Words that come from outside, through the whole command: shell signs in names and arguments, and secrets."""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from longskip.engine.configio import dump_yaml
from longskip.errors import EXIT_USAGE
from longskip.profiling.yamlfiles import read_yaml
from tests.faults.defences import ROOT
from tests.faults.running import end_tree, environment
from tests.ranks import small_config

SIGNS = "a b; $(touch it-ran) `touch it-ran` && touch it-ran | x > it-ran '\" \\ * ~ #"


def launched(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "longskip.launcher", "launch", "--local", "1", "--", *arguments]


def ran(folder: Path) -> list[Path]:
    return list(folder.rglob("it-ran*"))


# --- 22: shell signs --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_signs_of_a_shell_are_passed_on_literally(shapes: Path, in_tmp: Path) -> None:
    """A folder, a configuration and a prompt full of them: the run is trained, the words arrive, nothing of them is run."""
    folder = in_tmp / SIGNS.replace("/", "")
    folder.mkdir()
    config = folder / "c $(touch it-ran);'`touch it-ran`.yaml"
    config.write_text(dump_yaml(small_config(shapes, train={"steps": 2, "batch_size": 2}, checkpoint={"every": 2})))
    prompt = SIGNS.replace("'", "").replace("\\", "").replace('"', "")
    done = subprocess.run(
        launched("train", config.name, f"logging.prompts=['{prompt}']", "train.name=run"),
        cwd=folder,
        env=environment(ROOT),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_yaml(folder / "runs" / "run" / "config.yaml", "configuration")["logging"]["prompts"] == [prompt]
    assert (folder / "runs" / "run" / "checkpoints" / "step-00000002" / "manifest.json").is_file()
    assert not ran(in_tmp)


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "run.yaml", "train.name=-rf"),
        ("train", "run.yaml", "train.name=../elsewhere"),
        ("train", "run.yaml", "train.name=a\nb"),
        ("train", "run.yaml", "train.name=$(touch it-ran)"),
        ("train", "run.yaml", "--dry-run"),
        ("train", "run.yaml", "-oProxyCommand=touch it-ran"),
        ("train", "-oProxyCommand=touch it-ran"),
        ("train; touch it-ran", "run.yaml"),
        ("train", "run.yaml", "optim.lr=1e-3; touch it-ran"),
        ("train", "run.yaml", "a\n.b=1"),
    ],
)
def test_names_and_options_that_are_none_are_refused(shapes: Path, in_tmp: Path, arguments: tuple[str, ...]) -> None:
    """Exit code 2, one message without a traceback, no run's folder and no process left."""
    (in_tmp / "run.yaml").write_text(dump_yaml(small_config(shapes)))
    done = subprocess.run(
        launched(*arguments), cwd=in_tmp, env=environment(ROOT), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == EXIT_USAGE, done.stdout + done.stderr
    assert done.stderr.startswith("longskip: ") and "Traceback" not in done.stderr
    assert not ran(in_tmp) and not (in_tmp / "runs").exists()


# --- 23: secrets ------------------------------------------------------------------------------------------------------


def _watched(command: list[str], folder: Path, variables: dict[str, str]) -> tuple[int, str, set[str]]:
    """Exit code, all output, and every command line that was seen below the command while it ran."""
    lines: set[str] = set()
    with open(folder / "output", "wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(ROOT) | variables, stdout=output, stderr=output, start_new_session=True
        )
        deadline = time.monotonic() + 240
        try:
            while process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(psutil.Error):
                    for member in psutil.Process(process.pid).children(recursive=True):
                        with contextlib.suppress(psutil.Error):
                            lines.add(" ".join(member.cmdline()))
                time.sleep(0.05)
        finally:
            end_tree(process)
    return process.returncode, (folder / "output").read_text("utf-8", errors="replace"), lines


def _written(folder: Path) -> bytes:
    return b"\n".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


@pytest.mark.slow
def test_secrets_of_the_environment_are_written_nowhere(shapes: Path, in_tmp: Path) -> None:
    """A run that is killed, started again and reported on: in no file of its own, no output, no command line."""
    names = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "DATABASE_PASSWORD", "MY_CREDENTIALS")
    values = {name: f"hush-{secrets.token_hex(12)}" for name in names}
    config = small_config(shapes, train={"steps": 6, "batch_size": 2}, checkpoint={"every": 2})
    (in_tmp / "run.yaml").write_text(dump_yaml(config))
    fault = {"LONGSKIP_FAULT": "step.begin:kill:rank=0:step=4"}
    code, output, lines = _watched(launched("train", "run.yaml", "launch.restarts=1"), in_tmp, values | fault)
    assert code == 1 and any(
        "train" in line for line in lines
    )  # killed at each attempt's step 4, with its stacks and logs
    report = subprocess.run(
        [sys.executable, "-m", "longskip.launcher", "report", "run"],
        cwd=in_tmp,
        env=environment(ROOT) | values,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert report.returncode == 0, report.stderr
    everything = _written(in_tmp).decode("utf-8", "replace") + output + report.stdout + report.stderr + "\n".join(lines)
    assert (in_tmp / "runs" / "run" / "report.html").is_file()
    assert [name for name, value in values.items() if value in everything] == []


@pytest.mark.slow
@pytest.mark.parametrize("secret", ["user", "signature"])
def test_secrets_of_a_url_are_written_nowhere(shapes: Path, in_tmp: Path, secret: str) -> None:
    """Data at a URL with a password or a signature in it, which the run would write down: refused, and not told."""
    hush = f"hush{secrets.token_hex(12)}"
    url = f"http://someone:{hush}@127.0.0.1:9/shards" if secret == "user" else f"http://127.0.0.1:9/shards?sig={hush}"
    config = small_config(shapes, train={"steps": 2, "batch_size": 2})
    (in_tmp / "run.yaml").write_text(dump_yaml(config))
    arguments = (f"data.path={url}", "data.remote=fsspec", f"data.cache={in_tmp / 'cache'}", "data.shuffle=window")
    code, output, _ = _watched(
        [sys.executable, "-m", "longskip.launcher", "train", "run.yaml", *arguments], in_tmp, {"NO_PROXY": "127.0.0.1"}
    )
    assert code == EXIT_USAGE and "a password or a signature in it" in output and "Traceback" not in output
    assert hush not in output
    assert hush not in _written(in_tmp).decode("utf-8", "replace")
