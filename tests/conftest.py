"""Shared fixtures: one thread per process, quiet DeepSpeed, small data made once."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Inductor's pool of compiling processes does not come along into a forked rank, which would wait for it for ever.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ:
    # In this process Triton's kernels are interpreted on the CPU, which is decided before triton is imported. Triton's
    # own switch carries it on; the variable is not left to the processes that tests start.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    from longskip.kernels import jit

    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    assert jit.INTERPRETED
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``train`` (300 pictures) and ``validation`` (40) of the shapes data set."""
    from longskip.engine.data.shapes import write_shapes

    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder / "train", 300, seed=0)
    write_shapes(folder / "validation", 40, seed=1, held_out=None)
    return folder


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The test runs inside an empty folder, so that ``runs/`` is its own."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
