"""Ctrl-C: one exit code and not a word, also where it is pressed again while Python ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

COMMAND = """
import atexit, os, signal, time
from longskip.launcher import cli, tables

def interrupted():
    signal.raise_signal(signal.SIGINT)

def again():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(0.2)

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background takes away
tables.print_presets = interrupted
if {again}:
    atexit.register(again)
cli.main(["presets"])
"""


@pytest.mark.parametrize("again", [False, True])
def test_ctrl_c_says_nothing_however_often(again: bool) -> None:
    done = subprocess.run([sys.executable, "-c", COMMAND.format(again=again)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")
