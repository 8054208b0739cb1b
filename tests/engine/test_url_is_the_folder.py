"""Shards at a URL and the same shards in a folder are one run: its words, its order, its losses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longskip.engine.config import Config
from longskip.engine.data.mix import MixedSource
from longskip.engine.data.shapes import write_shapes
from longskip.engine.data.sources import ShardSource
from longskip.engine.data.windows import WindowOrder
from longskip.engine.opening import open_training
from longskip.engine.vocabulary import build_vocabulary, spread
from tests.engine.remote_server import Server, forget_connections
from tests.engine.test_training import losses, weights
from tests.ranks import small_config, train_ranks

SAMPLES, PER_SHARD, WINDOW = 64, 6, 2
SHARDS = -(-SAMPLES // PER_SHARD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("remote") / "shards"
    write_shapes(path, SAMPLES, seed=4, per_shard=PER_SHARD)
    yield path
    forget_connections()


def config_of(path: str, cache: Path, *, shuffle: str = "window", **groups: Any) -> Config:
    remote = {"remote": "fsspec", "cache": str(cache)} if "://" in path else {}
    data: dict[str, Any] = {"path": path, "validation": None, "shuffle": shuffle, **remote}
    data |= {"window_shards": WINDOW} if shuffle == "window" else {}
    return small_config(Path(), data=data, **groups)


def words(config: Config) -> tuple[str, ...]:
    return tuple(build_vocabulary(config, open_training(config)).words)


def test_the_words_are_the_same(server: Server, folder: Path, tmp_path: Path) -> None:
    """Those of the first window alone, whose counts order them otherwise than those of all shards would."""
    local = words(config_of(str(folder), tmp_path))
    assert words(config_of(server.url, tmp_path / "cache")) == local
    assert len({file for file, _ in server.log if file.endswith(".tar")}) == WINDOW
    everything = words(config_of(str(folder), tmp_path, shuffle="full"))
    assert everything != local and set(local) <= set(everything)
    other = config_of(str(folder), tmp_path, train={"seed": 4})
    assert words(other) == words(config_of(server.url, tmp_path / "cache", train={"seed": 4})) != local
    forget_connections()  # the ranks of the next test are forked


def test_the_samples_of_a_window_of_a_folder_and_of_a_mix(folder: Path) -> None:
    source = ShardSource(folder)
    counts = [shard.count for shard in source.index.shards]
    order = WindowOrder(counts, WINDOW, 9)
    size = int(np.count_nonzero(order.window_of(0, np.arange(SAMPLES)) == 0))
    of_window = order.lookup(0, np.arange(size)).tolist()
    assert len(counts) == SHARDS and PER_SHARD < size <= 2 * PER_SHARD
    assert list(spread(source, 1000, WINDOW, 9)) == sorted(of_window)
    assert list(spread(source, 4, WINDOW, 9)) == sorted(of_window)[::3]
    assert list(spread(source, 1000, None, 9)) == list(range(SAMPLES))
    mix = MixedSource([source, ShardSource(folder)], [1, 2], ["a", "b"])
    assert list(spread(mix, 1000, WINDOW, 9)) == [start + i for start in (0, SAMPLES) for i in sorted(of_window)]


@pytest.mark.slow
def test_training_over_a_server_that_breaks_off_is_training_on_the_folder(
    server: Server, folder: Path, tmp_path: Path
) -> None:
    """2 ranks, more than an epoch: the same words and the same losses to the bit."""
    files = ["index.json", *(path.name for path in folder.glob("*.tar"))]
    server.faults = {file: [("break", 200)] for file in files}
    end = SAMPLES // 8 + 3
    text = {"too_long": "truncate"}  # a word that is not in the first window is spelt in bytes
    groups: dict[str, Any] = {"train": {"steps": end}, "checkpoint": {"every": end}, "encoders": {"text": text}}
    for name, path in (("near", str(folder)), ("far", server.url)):
        assert train_ranks(2, config_of(path, tmp_path / "cache", **groups), tmp_path / name) == [0, 0]
    assert not any(server.faults.values())  # every file broke off, and was gone on with
    assert {"bytes=200-"} <= {asked for file, asked in server.log if file.endswith(".tar")}
    near, far = losses(tmp_path / "near"), losses(tmp_path / "far")
    assert near == far and len(near) == end
    for kind in ("weight", "exp_avg_sq"):
        ours, theirs = weights(tmp_path / "far", kind, end), weights(tmp_path / "near", kind, end)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for file in ("vocabulary.json", "run.json"):
        both = [json.loads((tmp_path / name / file).read_text()) for name in ("near", "far")]
        told = [each["data"] if file == "run.json" else each for each in both]
        assert told[0] == told[1]
