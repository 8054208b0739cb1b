"""Configurations that cannot be run: refused before torch is loaded or any process group exists, within seconds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.figures import figure

# file, words of the complaint: the key's path and what is allowed
WRONG = {
    "unknown key": ("optim: {learning_rate: 1}", ["optim.learning_rate", "lr"]),
    "duplicate key": ("train: {steps: 1}\ntrain: {steps: 2}", ["train", "twice"]),
    "alias bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]", ["aliases"]),
    "python tag": ("train: !!python/object/apply:os.mkdir ['it-ran']", ["python"]),
    "negative": ("optim: {lr: -1}", ["optim.lr", "-1"]),
    "not a number": ("optim: {lr: .nan}", ["optim.lr", "nan"]),
    "infinite": ("optim: {clip: .inf}", ["optim.clip", "finite", "inf"]),
    "word for a number": ("optim: {lr: fast}", ["optim.lr", "fast"]),
    "indivisible batch": (
        "data: {path: .}\ntrain: {batch_size: 8}",
        ["train.batch_size 8", "3 rank(s)", "[1, 2, 4, 8]"],
    ),
    "depth": ("a: " + "[" * 5000, ["nested deeper", "32"]),
}
CODE = (
    "import os, sys\nfrom longskip.launcher.cli import main\n"
    "try:\n    main(['train', 'run.yaml'])\nexcept SystemExit as end:\n    code = end.code\n"
    "spent = os.times(); open('seconds', 'w').write(str(spent.user + spent.system))\n"
    "sys.exit(99 if any(heavy in sys.modules for heavy in ('torch', 'deepspeed', 'triton')) else code)"
)


@pytest.mark.parametrize("what", WRONG)
def test_refused_before_any_process_group(tmp_path: Path, what: str) -> None:
    """As rank 1 of 3, whose first rank nobody started: exit code 2, the key and what is allowed, no torch, at once."""
    text, words = WRONG[what]
    (tmp_path / "run.yaml").write_text(text)
    world = {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    # Every rank refuses; the first one says it, so that it is said once.
    for rank in ("1", "0"):
        ran = subprocess.run(
            [sys.executable, "-c", CODE],
            cwd=tmp_path,
            env=os.environ | world | {"RANK": rank},
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert ran.returncode == 2, ran.stderr
    assert "Traceback" not in ran.stderr
    for word in words:
        assert word in ran.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "seconds"}
    seconds = float((tmp_path / "seconds").read_text())
    figure(f"{what}: refused in {seconds:.2f} s of processor time")
    assert seconds < 2.0


def test_a_number_that_yaml_reads_as_text_is_the_number(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("optim: {lr: 1e-4}")
    shown = subprocess.run(
        [sys.executable, "-m", "longskip.launcher", "config", "show", "run.yaml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert shown.returncode == 0, shown.stderr
    assert "lr: 0.0001" in shown.stdout
