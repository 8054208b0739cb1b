"""What the end-to-end tests of faults share: the run without a fault that every other one is compared with."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.test_resume import config_of
from tests.ranks import train_ranks


@pytest.fixture(scope="session")
def unbroken(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 ranks, ZeRO-3, 9 steps, saved every 3; the last two checkpoints are kept."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    assert train_ranks(2, config_of(shapes), run) == [0, 0]
    return run
