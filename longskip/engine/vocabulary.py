"""The words of a run: counted from its captions, kept in its folder (no torch)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from longskip.engine.config import Config
from longskip.engine.data.mix import MixedSource
from longskip.engine.data.sources import ShardSource, SizedSource, Source
from longskip.engine.data.tokens import FIRST_WORD, Vocabulary
from longskip.engine.data.windows import WindowOrder
from longskip.engine.jsonfiles import read_object
from longskip.engine.runs import write_atomic
from longskip.errors import BadSampleError, DataError

SCAN = 100_000


def build_vocabulary(config: Config, source: SizedSource) -> Vocabulary:
    """The words of the captions (of at most ``SCAN`` samples spread evenly), the most frequent kept.

    With ``data.shuffle: window`` those of each data set's first window, of which no more need be fetched, whether they
    lie at a URL or in a folder: other captions would give other counts, other ids, and so another run.
    """
    window = config.data.window_shards if config.data.shuffle == "window" else None
    texts = (text for i in spread(source, SCAN, window, config.train.seed) for text in captions_at(source, i))
    return Vocabulary.build(texts, max(config.encoders.text.vocabulary, FIRST_WORD))


def captions_at(source: Source, i: int) -> list[str]:
    """The captions of a sample; none for a bad one (the reader counts and lists those)."""
    try:
        return [text for text, _ in source.captions(i)]
    except BadSampleError:
        return []


def save_vocabulary(path: Path, vocabulary: Vocabulary) -> None:
    write_atomic(path, json.dumps(vocabulary.to_json(), ensure_ascii=False))


def load_vocabulary(path: Path) -> Vocabulary:
    """The words of a run; raises DataError for a file that is none of them."""
    return Vocabulary.from_json(read_object(path, DataError))


def words_of(run: Path, config: Config) -> Vocabulary | None:
    """The run's vocabulary where its text encoder is the word encoder."""
    return load_vocabulary(run / "vocabulary.json") if config.encoders.text.kind == "words" else None


def spread(source: SizedSource, limit: int, window_shards: int | None, seed: int) -> Iterator[int]:
    """At most ``limit`` samples spread evenly, of shards those of the first window of ``window_shards`` (None: of all)."""
    if isinstance(source, MixedSource):
        for start, member in zip(source.starts.tolist(), source.members, strict=True):
            few = max(1, limit // len(source.members))
            yield from (start + i for i in spread(member, few, window_shards, seed))
        return
    numbers = np.arange(len(source))
    if window_shards is not None and isinstance(source, ShardSource):
        counts = [shard.count for shard in source.index.shards]
        ends = np.cumsum([0, *counts])
        shards = sorted(WindowOrder(counts, window_shards, seed).shards_of(0, 0).tolist())
        numbers = np.concatenate([np.arange(ends[shard], ends[shard + 1]) for shard in shards])
    stride = -(-len(numbers) // limit)
    yield from numbers[::stride].tolist()
