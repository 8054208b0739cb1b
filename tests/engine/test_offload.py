"""What the configuration puts off to host memory is what DeepSpeed and the optimizer are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from longskip.engine.config import Config
from tests.ranks import run_ranks, small_config


class Asked(torch.Tensor):
    """A tensor on ``meta`` that writes down where it is to be copied."""

    places: ClassVar[list[tuple[str, dict[str, Any]]]] = []

    def to(self, device: Any, **how: Any) -> torch.Tensor:  # type: ignore[override]
        self.places.append((torch.device(device).type, how))
        return torch.empty(self.shape)


class Enough(Exception):
    """All that is wanted was seen."""


def handed_over(config: Config, run: Path, told: Path) -> int:
    """Prepares a run up to DeepSpeed's engine; writes what ``zero.Init`` and ``initialize`` are given."""
    from longskip.engine.distributed import import_deepspeed, join
    from longskip.engine.prepare import prepare

    deepspeed = import_deepspeed()
    units: list[dict[str, Any]] = []
    init = deepspeed.zero.Init

    def initialize(*, model: Any, optimizer: Any, config: dict[str, Any]) -> None:
        state = optimizer.state_of(torch.empty(4, device="meta").as_subclass(Asked))
        beside = {state[moment].device.type for moment in ("exp_avg", "exp_avg_sq")}
        found = {"engine": config, "units": units, "ema": Asked.places, "moments": sorted(beside)}
        told.write_text(json.dumps(found))
        raise Enough

    def partition(**given: Any) -> Any:
        units.append(given["config_dict_or_path"])
        return init(**given)

    deepspeed.initialize, deepspeed.zero.Init = initialize, partition
    with pytest.raises(Enough):
        prepare(config, run, join())
    return 0


@pytest.mark.parametrize(
    ("stage", "offload", "ema"),
    [
        (3, ("offload_optimizer", "offload_param"), "cpu"),
        (3, ("offload_param",), "device"),
        (2, ("offload_optimizer",), "device"),
        (1, (), "cpu"),
    ],
)
def test_deepspeed_and_the_optimizer_are_told(
    shapes: Path, tmp_path: Path, stage: int, offload: tuple[str, ...], ema: str
) -> None:
    config = small_config(
        shapes,
        deepspeed={"zero_stage": stage} | dict.fromkeys(offload, "cpu"),
        engine={"ema_device": ema},
    )
    assert run_ranks(1, handed_over, config, tmp_path / "run", tmp_path / "told") == [0]
    told = json.loads((tmp_path / "told").read_text())
    for given in (told["engine"], *told["units"]):
        zero = given["zero_optimization"]
        assert zero["stage"] == stage
        for part in ("offload_optimizer", "offload_param"):
            assert zero.get(part) == ({"device": "cpu", "pin_memory": False} if part in offload else None)
    assert bool(told["units"]) == (stage == 3)  # partitioned as they are made
    assert told["ema"] == [["cpu" if ema == "cpu" else "meta", {"copy": True}]]
    assert told["moments"] == ["meta"]
