"""``longskip data encode``: pictures and captions → feature shards, once, so that training reads instead of encoding.

One output shard per input shard, with the same keys in the same order: ``KEY.latent.npy`` (C, h, w), already scaled;
``KEY.text.npy`` (n_captions, n_txt, E) and ``KEY.mask.npy`` (n_captions, n_txt) uint8, row k of caption k as
``captions_of`` lists them; ``KEY.txt`` and ``KEY.json`` as they were. A sample that cannot be encoded (picture,
captions, a caption that is too long, values past the dtype) is left out and listed in ``bad_samples.jsonl``.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from longskip import __version__
from longskip.engine.data.decode import decode_image
from longskip.engine.data.encoding import EMPTY_NAME, Encoding, Record, check_share, npy_bytes, reasons
from longskip.engine.data.index import refuse_url, write_atomically
from longskip.engine.data.pack import PER_SHARD, caption_members, image_extension
from longskip.engine.data.sources import FolderSource, ShardSource, open_source
from longskip.engine.encoders import Encoders
from longskip.errors import BadSampleError, ConfigError, DataError

DTYPES = {"fp16": np.float16, "fp32": np.float32}
AHEAD = 2  # windows that are read and decoded while one is encoded

Size = tuple[int, int]


@dataclass
class EncodeReport:
    """What one call did: shards it ``encoded`` and found ``finished`` before, of its own ``shards``.

    ``samples`` are those in its shards, ``bad`` those left out, per reason. ``complete``: every rank's shards are
    done and the index is written.
    """

    shards: int = 0
    encoded: int = 0
    finished: int = 0
    samples: int = 0
    bad: dict[str, int] = field(default_factory=dict)
    complete: bool = False
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Sample:
    """A decoded sample: its number and key, the members to keep, captions, and pixels (H, W, 3) uint8."""

    number: int
    key: str
    members: Mapping[str, bytes]
    captions: tuple[str, ...]
    pixels: np.ndarray | None


def encode_shards(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    encoders: Encoders,
    *,
    dtype: Literal["fp16", "fp32"] = "fp16",
    batch: int = 32,
    buckets: Sequence[Size] = (),
    keep_pictures: bool = False,
    rank: int = 0,
    world: int = 1,
    per_shard: int = PER_SHARD,
    workers: int = 4,
    max_bad_share: float = 0.05,
    on_damage: Literal["stop", "skip"] = "stop",
    progress: Callable[[int], None] | None = None,
) -> EncodeReport:
    """Encodes this rank's shards of the data at ``path`` into ``out``; the last rank to end writes ``index.json``.

    The data are indexed shards, or a plain folder of pictures, which makes shards of ``per_shard`` samples with
    nine-digit keys. What ``encoders`` has is encoded: latents, text features or both; without latents the pictures must
    be kept. Pictures are cut to ``encoders.resolution``, or each to the nearest of ``buckets`` ((H, W) pixels).
    Features are stored in ``dtype``. Rank r takes every ``world``-th shard; ranks share no process group, only
    ``out``. Started again, a call keeps the shards whose SHA-256 is the recorded one and writes the others, to the
    same bytes (with the same ``batch``, whose size decides the rounding of products). ``workers`` threads read and
    decode; ``progress`` is called with the samples done of ``samples_of(...)``.

    Raises ``ConfigError`` for settings that cannot be, ``EncoderError`` for a folder that was encoded otherwise,
    ``DataError`` where more than ``max_bad_share`` of the samples are bad, ``RunLockedError`` where another process
    writes the same shard, and what reading the data raises.
    """
    started = time.perf_counter()
    _check(encoders, dtype, batch, buckets, keep_pictures, rank, world, max_bad_share)
    source, shards = _open(path, out, per_shard, on_damage)
    parts = encoders.describe()
    for part in parts.values():
        part["computed_in"], part["dtype"] = part["dtype"], dtype
    if "vae" in parts:
        parts["vae"]["crop"] = "centre"
        if buckets:
            parts["vae"]["buckets"] = [list(size) for size in buckets]
    encoding = Encoding(Path(out))
    made_with = _made_with(encoders)
    encoding.agree(
        {
            "source": source.fingerprint(),
            "encoders": parts,
            "pictures": keep_pictures,
            "shards": [[file, count] for file, _, count in shards],
            "made_with": made_with,
        }
    )
    mine = shards[rank::world]
    report = EncodeReport(shards=len(mine))
    bad: list[Mapping[str, Any]] = []
    todo = []
    for shard in mine:
        record = encoding.verified(shard[0])
        if record is None:
            todo.append(shard)
            continue
        report.finished += 1
        report.samples += record.samples
        bad += record.bad
    if todo:
        encoding.agree_on_versions(made_with)
        work = _Work(source, encoders.load(), DTYPES[dtype], batch, tuple(buckets), keep_pictures)
        if "text" in parts:
            write_atomically(encoding.out / EMPTY_NAME, work.empty())
        done = sum(count for _, _, count in mine) - sum(count for _, _, count in todo)
        with ThreadPoolExecutor(max(workers, 1), thread_name_prefix="longskip-encode") as pool:
            for file, first, count in todo:
                run = work.samples(pool, file, range(first, first + count), lambda k, at=done: progress and progress(at + k))
                limited = _limited(run, bad, work.bad, len(source), max_bad_share)
                record = encoding.write(file, limited, work.bad)
                report.encoded += 1
                report.samples += record.samples
                bad += record.bad
                done += count
    report.bad = reasons(bad)
    if not encoding.unfinished():
        encoding.finish(max_bad_share)
        report.complete = True
    report.seconds = time.perf_counter() - started
    return report
