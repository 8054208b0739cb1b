"""The closed form of who holds what, against the slices that DeepSpeed really makes; memory against what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longskip.engine import fitting, partition
from longskip.engine.config import Config
from longskip.engine.configio import validate
from longskip.errors import ConfigError
from longskip.models.specs import UViTSpec
from tests.ranks import run_ranks, small_config

VOCABULARY = 300


def _write_slices(config: Config, folder: Path) -> None:
    from longskip.engine import build
    from longskip.engine.distributed import join

    world = join()
    batch = config.batch(world.size)
    model = build.build_model(config, VOCABULARY)
    ds_config = build.deepspeed_config(config, batch, n_parameters=10_000, cuda=False)
    _, _, shards = build.build_engine(config, model, world, ds_config)
    slices = [(world.rank, item.name, item.shape, item.offset, item.numel) for item in shards.slices]
    (folder / f"{world.rank}.json").write_text(json.dumps(slices))


@pytest.mark.parametrize("layout", ["flat", "named"])
@pytest.mark.parametrize("world", [2, 3])
def test_shards_are_those_of_zero3(tmp_path: Path, layout: str, world: int) -> None:
    text = {"kind": "words", "depth": world - 2}  # with and without layers of the word encoder
    config = small_config(tmp_path, engine={"layout": layout}, train={"batch_size": 12}, encoders={"text": text})
    assert run_ranks(world, _write_slices, config, tmp_path) == [0] * world
    real: list[Any] = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    closed = partition.shards(config, VOCABULARY, world)
    wanted = [[rank, name, list(shape), offset, numel] for rank, name, shape, offset, numel in closed]
    assert sorted(wanted) == sorted(item for part in real for item in part)


def test_every_element_of_the_8b_once_over_64_ranks() -> None:
    config = validate(
        {"model": {"preset": "uvit-8b"}, "encoders": {"vae": {"kind": "vae"}, "text": {"kind": "clip"}},
         "train": {"batch_size": 2048}}
    )  # fmt: skip
    covered: dict[str, list[tuple[int, int]]] = {}
    for shard in partition.shards(config, 0, 64):
        covered.setdefault(shard.name, []).append((shard.offset, shard.numel))
    names = {f"backbone.{spec.name}": spec.numel for unit in config.backbone().parameters().values() for spec in unit}
    assert covered.keys() == names.keys()
    for name, runs in covered.items():
        end = 0
        for offset, numel in sorted(runs):
            assert offset == end
            end += numel
        assert end == names[name]
    assert sum(names.values()) == 7_971_360_932


def _memory(stage: fitting.Stage, **groups: Any) -> fitting.Memory:
    config = validate({"model": {"preset": "uvit-0.3b"}, "encoders": {"vae": {"kind": "vae"}, "text": {"kind": "clip"}},
                       "train": {"batch_size": 8, "dtype": "bf16"}} | groups)  # fmt: skip
    return fitting.memory(config, stage, world=4, micro=2, n_parameters=286_865_572)


def test_sixteen_bytes_a_parameter_are_shared_out_by_stage() -> None:
    """bf16: 2 of weight, 2 of gradient, 12 of fp32 master and moments (1910.02054), 4 of EMA."""
    n = 286_865_572
    share = -(-n // 4)
    assert [(m.weights, m.gradients, m.states) for m in map(_memory, fitting.STAGES)] == [
        (2 * n, 2 * n, 16 * n), (2 * n, 2 * n, 16 * share), (2 * n, 2 * share, 16 * share), (2 * share, 2 * share, 16 * share),
    ]  # fmt: skip
    assert _memory(3).activations == UViTSpec(1024, 20, 16, n_txt=77, text_width=1024).saved_bytes(2, 2).peak
    away = _memory(3, deepspeed={"offload_optimizer": "cpu"}, engine={"ema_device": "cpu"})
    assert (away.states, away.host) == (0, (12 + 4 + 4) * share)


def test_auto_takes_the_smallest_stage_that_fits() -> None:
    config = validate({"model": {"preset": "uvit-0.3b"}, "encoders": {"vae": {"kind": "vae"}, "text": {"kind": "clip"}},
                       "train": {"batch_size": 8}, "deepspeed": {"zero_stage": "auto"}})  # fmt: skip
    n = 286_865_572
    seen = []
    for gib in (100, 5.5, 5.0, 4.5):
        free = fitting.Free(int(gib * fitting.GIB))
        seen.append(fitting.choose_stage(config, world=4, micro=1, n_parameters=n, free=free))
    needs = [
        fitting.memory(config, stage, world=4, micro=1, n_parameters=n).device / fitting.GIB for stage in (0, 1, 2, 3)
    ]
    assert needs == sorted(needs, reverse=True), needs
    expected = [next(s for s, need in enumerate(needs) if need <= 0.9 * gib) for gib in (100, 5.5, 5.0, 4.5)]
    assert seen == expected
    with pytest.raises(ConfigError, match="even stage 3 on 4 rank"):
        fitting.choose_stage(config, world=4, micro=1, n_parameters=n, free=fitting.Free(fitting.GIB))


def test_offload_without_host_memory_is_refused() -> None:
    config = small_config(Path("data"), deepspeed={"offload_optimizer": "cpu"})
    settings = {"world": 1, "micro": 8, "n_parameters": 1_000_000}
    fitting.check_offload(config, 3, free=fitting.Free(1 << 30, 1 << 30), **settings)
    with pytest.raises(ConfigError, match="host memory would have to hold"):
        fitting.check_offload(config, 3, free=fitting.Free(1 << 40, 1 << 20), **settings)
