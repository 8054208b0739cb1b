"""The closed form of who holds what, against the slices that DeepSpeed really makes; memory against what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest

from longskip.engine import fitting, partition
from longskip.engine.config import Config
from longskip.engine.configio import validate
from longskip.errors import ConfigError
from longskip.models.specs import UViTSpec
from longskip.profiling.memory import RankMemory, Stage
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


def _memory(stage: Stage, **groups: Any) -> RankMemory:
    config = validate({"model": {"preset": "uvit-0.3b"}, "encoders": {"vae": {"kind": "vae"}, "text": {"kind": "clip"}},
                       "engine": {"layout": "named"}, "train": {"batch_size": 8, "dtype": "bf16"}} | groups)  # fmt: skip
    return fitting.ranks_memory(config, stage, world=4, micro=2, n_parameters=286_865_572)


def test_sixteen_bytes_a_parameter_are_shared_out_by_stage() -> None:
    """bf16: 2 of weight, 2 of gradient, 12 of fp32 master and moments (1910.02054), 4 of EMA; padding is next to nothing.
    At the stages 1 and 2 a rank holds the gradients of whole tensors."""
    n = 286_865_572
    share = n / 4
    for stage, weights, gradients, states in (
        (0, 2 * n, 2 * n, 16 * n), (1, 2 * n, 2 * share, 16 * share), (2, 2 * n, 2 * share, 16 * share),
        (3, 2 * share, 2 * share, 16 * share),
    ):  # fmt: skip
        found = _memory(cast("Stage", stage))
        assert (found.weights, found.states) == pytest.approx((weights, states), rel=1e-5)
        if stage in (1, 2):
            assert gradients <= found.gradients <= gradients + 2 * 2 * 2 * 4096 * 1024
        else:
            assert found.gradients == pytest.approx(gradients, rel=1e-5)
    kept = UViTSpec(1024, 20, 16, n_txt=77, text_width=1024).saved_bytes(2, 2)
    assert _memory(3).activations.saved == kept.total
    away = _memory(3, deepspeed={"offload_optimizer": "cpu"}, engine={"layout": "named", "ema_device": "cpu"})
    assert away.states == away.gradients == 0
    assert away.host == pytest.approx((12 + 4 + 4 + 2) * share, rel=1e-5)  # and the gradients in bf16 and fp32


def test_the_parts_of_the_worst_moment_add_up() -> None:
    config = validate({"model": {"preset": "uvit-0.3b"}, "encoders": {"vae": {"kind": "vae"}, "text": {"kind": "clip"}},
                       "train": {"batch_size": 8}})  # fmt: skip
    for stage in fitting.STAGES:
        sizes: dict[str, Any] = {"world": 4, "micro": 2, "n_parameters": 286_865_572}
        found, short = fitting.ranks_memory(config, stage, **sizes), fitting.memory(config, stage, **sizes)
        assert short.device == found.peak == max(found.backward.total, found.reduce.total, found.step.total)
        assert found.peak > found.device > found.states > 0


def test_auto_takes_the_first_stage_that_fits() -> None:
    config = validate({"model": {"preset": "uvit-0.3b"}, "encoders": {"vae": {"kind": "vae"}, "text": {"kind": "clip"}},
                       "train": {"batch_size": 8}, "deepspeed": {"zero_stage": "auto"}})  # fmt: skip
    sizes: dict[str, Any] = {"world": 4, "micro": 1, "n_parameters": 286_865_572}
    needs = [fitting.memory(config, stage, **sizes, overlap=False).device for stage in fitting.STAGES]
    assert min(needs) < 0.9 * max(needs)
    for need in needs:
        free = fitting.Free(int(need / fitting.MARGIN) + 1)
        assert fitting.choose_stage(config, free=free, **sizes) == next(s for s, n in enumerate(needs) if n <= need)
    least = needs.index(min(needs))
    with pytest.raises(ConfigError, match=f"even stage {least} on 4 rank.s. needs {fitting.readable(min(needs))}"):
        fitting.choose_stage(config, free=fitting.Free(min(needs)), **sizes)


def test_offload_without_host_memory_is_refused() -> None:
    config = small_config(Path("data"), deepspeed={"offload_optimizer": "cpu"})
    settings = {"world": 1, "micro": 8, "n_parameters": 1_000_000}
    fitting.check_offload(config, 3, free=fitting.Free(1 << 30, 1 << 30), **settings)
    with pytest.raises(ConfigError, match="host memory would have to hold"):
        fitting.check_offload(config, 3, free=fitting.Free(1 << 40, 1 << 20), **settings)
