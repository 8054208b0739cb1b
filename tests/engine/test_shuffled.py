"""Samples drawn from a whole source, and what draws them: default prompts, prompts of scores, likelihood."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from longskip.engine.config import Config
from longskip.engine.data.mix import MixedSource
from longskip.engine.data.shuffled import shuffled
from longskip.engine.data.sources import ShardSource
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.data.windows import WindowOrder
from longskip.engine.inputs import STORED_CAPTIONS, Inputs
from longskip.engine.likelihood import batches_of
from longskip.engine.scoring import captions_drawn
from longskip.engine.texts import StoredTexts, WordTexts
from longskip.engine.validation import DEFAULT_PROMPTS, default_prompts
from longskip.errors import EncoderError
from tests.engine.remote_server import (
    PER_SHARD,
    SAMPLES,
    SEED,
    WINDOW,
    Server,
)
from tests.engine.stored_features import N_TOKENS, SIDES, WIDTH, write_features


def tars(server: Server) -> list[str]:
    return [file for file, _ in server.log if file.endswith(".tar")]


WORDS = WordTexts(Vocabulary.build(["number"], 300), 8, truncate=False)


class Many:
    """Stands for a local source of n samples."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n


def test_every_sample_comes_once_and_from_everywhere() -> None:
    source: Any = Many(5000)
    order = list(shuffled(source, 3))
    assert sorted(order) == list(range(5000))
    assert order == list(shuffled(source, 3)) != list(shuffled(source, 4))
    first = np.bincount(np.array(order[:500]) // 500, minlength=10)  # of each tenth of the source
    assert first.min() >= 25 and first.max() <= 80  # 50 ± 3.7 standard deviations of 6.7 (without replacement less)


def test_remote_shards_are_gone_through_one_after_the_other(opened, server) -> None:
    source = opened()
    order = list(shuffled(source, SEED))
    assert sorted(order) == list(range(SAMPLES)) and not tars(server)
    counts = [shard.count for shard in source.index.shards]
    shards = np.searchsorted(np.cumsum(counts), order, side="right").tolist()
    visited = list(dict.fromkeys(shards))
    assert shards == [shard for shard in visited for _ in range(counts[shard])]
    assert any(np.diff(order[:PER_SHARD]) < 0)  # shuffled within
    plan = WindowOrder(counts, WINDOW, SEED)
    assert set(visited[:WINDOW]) == set(plan.shards_of(0, 0).tolist())  # what an epoch begins with


def test_a_mix_gives_every_sample_once_in_the_order_of_each_data_set(opened, folder) -> None:
    remote, local = opened(), ShardSource(folder)
    mix = MixedSource([local, remote], [1.0, 9.0], ["here", "there"])
    order = list(shuffled(mix, 5))
    assert sorted(order) == list(range(2 * SAMPLES))
    assert [i for i in order if i < SAMPLES] == list(shuffled(local, 5))
    assert [i - SAMPLES for i in order if i >= SAMPLES] == list(shuffled(remote, 5))
    half = sum(i < SAMPLES for i in order[:SAMPLES])
    assert abs(half - SAMPLES / 2) <= 4 * (SAMPLES / 8) ** 0.5  # alike, whatever the weights


def test_captions_of_a_url_need_as_few_shards_as_hold_them(opened, server, folder) -> None:
    source = opened()
    for count, shards in ((1, 1), (PER_SHARD - 1, 1), (PER_SHARD + 2, 2), (4 * PER_SHARD + 1, 5)):
        found, left_out = captions_drawn(source, WORDS, count, seed=0)
        assert left_out == 0 and len(set(found)) == count
        assert len(set(tars(server))) == shards and set(Counter(tars(server)).values()) == {1}
    every, _ = captions_drawn(source, WORDS, 2 * SAMPLES, seed=0)
    assert Counter(every) == {f"number {i}": 2 for i in range(SAMPLES)}
    assert set(Counter(tars(server)).values()) == {1}


def test_default_prompts_are_drawn_from_everywhere_and_from_few_remote_shards(opened, server, folder) -> None:
    local = ShardSource(folder)
    prompts = default_prompts(WORDS, local, 7)
    assert prompts == [f"number {i}" for i in islice(shuffled(local, 7), DEFAULT_PROMPTS)]
    assert prompts != default_prompts(WORDS, local, 8)
    assert len(default_prompts(WORDS, opened(), 7)) == DEFAULT_PROMPTS
    assert len(tars(server)) == -(-DEFAULT_PROMPTS // PER_SHARD)


# --- stored features -------------------------------------------------------------------------------------------------


def inputs_of(source: ShardSource, seed: int = 3, *, text: str = "t5", width: int = WIDTH) -> Inputs:
    kinds = {"t5": {"kind": "t5", "width": width, "n_tokens": N_TOKENS}, "none": {"kind": "none"}}
    config = Config(
        model={"preset": "uvit-tiny", "resolution": 32, "patch": 2},
        data={"buckets": [[32, 32], [16, 64]]},
        encoders={"vae": {"kind": "vae", "factor": 4}, "text": kinds[text]},
        diffusion={} if text == "t5" else {"caption_dropout": 0.0},
        train={"seed": seed},
    )
    return Inputs(config, None, torch.device("cpu"), source)


@pytest.fixture(scope="module")
def features(tmp_path_factory) -> Path:
    return write_features(tmp_path_factory.mktemp("features") / "shards")


def test_stored_texts_are_of_samples_from_everywhere_and_the_empty_one_is_the_stored_one(features) -> None:
    """In both sizes of latents, and where sample 0, whose place the empty caption once took, is a bad one."""
    source = ShardSource(features)
    texts = inputs_of(source).texts
    assert isinstance(texts, StoredTexts)
    empty, mask = texts.known[""]
    assert mask.dtype == torch.bool and mask.tolist() == [True, *[False] * (N_TOKENS - 1)]
    assert torch.equal(empty, torch.full((N_TOKENS, WIDTH), 7, dtype=torch.float16))
    drawn = [i for i in shuffled(source, 3) if i]
    captions = {f"number {i}": i for i in range(60)} | {"one": 1, "another": 1}
    found = [captions[caption] for caption in texts.known if caption]
    assert len(found) >= STORED_CAPTIONS and found == drawn[: len(found)]
    assert {i % 2 for i in found} == {0, 1} and max(found) >= 40
    for i in found:
        if i != 1:
            text, mask = texts.known[f"number {i}"]
            assert text.numpy().tobytes() == (source.member(i, "text.npy") or b"")[-2 * N_TOKENS * WIDTH :]
            assert mask.numpy().tobytes() == (source.member(i, "mask.npy") or b"")[-N_TOKENS:]
    again, other = inputs_of(source).texts, inputs_of(source, seed=4).texts
    assert isinstance(again, StoredTexts) and isinstance(other, StoredTexts)
    assert list(again.known) == list(texts.known) != list(other.known)
    conditions = texts.conditions(["", f"number {found[-1]}" if found[-1] != 1 else "one"], torch.device("cpu"))
    assert conditions["text"].shape == (2, N_TOKENS, WIDTH) and conditions["text_mask"].dtype == torch.bool
    assert default_prompts(texts, source, 3) == [caption for caption in texts.known if caption][:DEFAULT_PROMPTS]


def test_stored_texts_of_one_sample_that_is_bad_hold_the_empty_caption(tmp_path) -> None:
    source = ShardSource(write_features(tmp_path / "features", 2))
    texts = inputs_of(source).texts
    assert isinstance(texts, StoredTexts) and texts.known.keys() <= {"", "one", "another"} and "" in texts.known
    save_file({"text": np.zeros((N_TOKENS - 1, WIDTH), np.float16), "mask": np.ones(N_TOKENS - 1, np.uint8)},
              tmp_path / "features" / "empty.safetensors")  # fmt: skip
    index = ShardSource(tmp_path / "features")
    index.index.encoders.clear()  # type: ignore[attr-defined]
    with pytest.raises(EncoderError, match="the empty caption's features are"):
        _ = inputs_of(index).texts


def test_likelihood_is_of_samples_from_everywhere_and_of_every_bucket(features) -> None:
    source = ShardSource(features)
    inputs = inputs_of(source, text="none")
    batches = list(batches_of(inputs, source, 24, size=5, seed=9))
    assert all(bool((batch.weight > 0).all()) and len(batch) <= 5 for batch in batches)
    for batch in batches:
        assert {SIDES[i % 2] for i in batch.samples.tolist()} == {tuple(batch.clean.shape[2:])}
    found = [i for batch in batches for i in batch.samples.tolist()]
    assert sorted(found) == sorted(islice(shuffled(source, 9), 24)) and {i % 2 for i in found} == {0, 1}
    assert len(list(batches_of(inputs, source, 1000, size=100))) == 2  # all there are, one batch a bucket
