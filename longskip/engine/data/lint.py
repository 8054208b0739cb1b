"""``longskip data lint``: reads everything once and says what is wrong, without stopping at the first fault."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from longskip.engine.data.decode import MAX_PIXELS, decode_image
from longskip.engine.data.hashes import file_sha256
from longskip.engine.data.index import (
    DERIVED,
    INDEX_NAME,
    Index,
    check_shard,
    check_table_hash,
    load_index,
    refuse_url,
)
from longskip.engine.data.npy import array_of
from longskip.engine.data.sources import METADATA_NAME, RawSample, ShardSource, open_source, read_entry, scan_folder
from longskip.engine.data.tokens import Vocabulary, split_words
from longskip.errors import BadSampleError, ShardError

MAX_EXAMPLES = 100


@dataclass
class LintReport:
    """What ``lint`` found: faults per reason, and of the first of them (key or file, reason, detail).

    ``samples`` is how many the data should hold, ``good`` how many can be trained on, ``bad`` how many a run would read
    and could not (the rest it would refuse to begin with), ``captions_alone`` the first of ``n_captions_alone`` texts of
    a folder that have no picture and are no samples. ``sha256_checked`` is how many shards were hashed,
    ``longest_caption`` is in tokens (without a vocabulary, in words). ``tables_unhashed`` counts the tables of which the
    index holds no hash, because it was made before tables had one: no fault, but not checked.
    """

    path: str
    samples: int = 0
    good: int = 0
    bad: int = 0
    shards: int = 0
    sha256_checked: int = 0
    tables_unhashed: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    examples: list[tuple[str, str, str]] = field(default_factory=list)
    longest_caption: int = 0
    n_captions_alone: int = 0
    captions_alone: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was found; captions without a picture are only named."""
        return not self.counts

    def to_json(self) -> dict[str, Any]:
        """All fields and ``ok``."""
        return {**asdict(self), "ok": self.ok}

    def add(self, name: str, reason: str, detail: str) -> None:
        """Counts a fault and keeps the first ``MAX_EXAMPLES``."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append((name, reason, detail))


def lint(
    path: str | os.PathLike[str],
    *,
    vocabulary: Vocabulary | None = None,
    n_txt: int | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Callable[[int], None] | None = None,
    bad: Callable[[dict[str, Any]], None] | None = None,
) -> LintReport:
    """Checks a folder of shards or of pictures: hashes, headers, every picture decoded, every caption read.

    Stored features are read as well. Reasons beside those of reading: ``feature_values`` (NaN or infinity),
    ``shard`` (missing, truncated, altered headers or table), ``shard_sha256``, ``table_sha256``,
    ``duplicate_key``, ``duplicate_image`` (the same bytes as an earlier picture), ``text_too_long`` (more than
    ``n_txt`` tokens of ``vocabulary``; without one, more than ``n_txt`` words). Duplicates can still be trained on and
    count as good; samples of a shard that cannot be opened do not. ``bad`` is called with ``{"key", "sample", "reason",
    "detail"}`` of every sample that cannot be trained on, as ``data.quarantine`` takes them. Raises ``ShardError`` where
    there is no index to check against, ``DataError`` where there are no data.
    """
    folder = refuse_url(path)
    report = LintReport(str(folder))
    check = _Checks(report, vocabulary, n_txt, max_pixels, progress, bad)
    if folder.name == INDEX_NAME or (folder / INDEX_NAME).exists():
        _lint_shards(load_index(folder, check=False), check)
    elif folder.is_dir() and not any(folder.glob("*.tar")):
        entries, problems = scan_folder(folder)
        report.samples = len(entries) + len(problems)
        for problem in problems:
            report.add(*problem)
        if not (folder / METADATA_NAME).exists():
            alone = _captions_alone(folder, {entry.file.rpartition(".")[0] for entry in entries})
            report.n_captions_alone, report.captions_alone = len(alone), alone[:MAX_EXAMPLES]
        for i, entry in enumerate(entries):
            check.sample(entry.key, partial(read_entry, folder, entry), i)
        if not report.samples:
            open_source(folder)  # raises with the cure
    else:
        open_source(folder)  # the same
    report.counts = dict(sorted(report.counts.items()))
    return report


def _captions_alone(folder: Path, pictures: set[str]) -> list[str]:
    """The ``.txt`` files of a folder and below that lie beside no picture of their name, which ``pictures`` has."""
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            file = (Path(parent) / name).relative_to(folder).as_posix()
            if name.lower().endswith(".txt") and not name.startswith(".") and file.rpartition(".")[0] not in pictures:
                found.append(file)
    return sorted(found)


def _lint_shards(index: Index, check: _Checks) -> None:
    report = check.report
    report.samples, report.shards = index.total, len(index.shards)
    starts = accumulate((shard.count for shard in index.shards), initial=0)
    for start, shard in zip(starts, index.shards, strict=False):
        try:
            check_shard(index.folder, shard)
        except ShardError as error:
            report.add(shard.file, "shard", error.message)
            continue
        sha256 = file_sha256(index.folder / shard.file)
        report.sha256_checked += 1
        if sha256 != shard.sha256:
            report.add(shard.file, "shard_sha256", f"expected {shard.sha256}, found {sha256}")
        report.tables_unhashed += shard.table_sha256 is None
        try:
            check_table_hash(index.folder, shard)
        except ShardError as error:
            report.add(shard.table, "table_sha256", error.message)
        source = ShardSource(Index(index.folder, (shard,)), on_damage="skip")
        for i in range(len(source)):
            check.sample(source.key(i), partial(_read_shard, source, i), start + i)
        source.close()


def _read_shard(source: ShardSource, i: int) -> RawSample:
    """Sample ``i`` with its features looked at; where latents stand for the picture, its bytes are none."""
    for kind in DERIVED:
        data = source.member(i, kind)
        if data is not None and not np.isfinite(array_of(data)).all():
            raise BadSampleError("feature_values", f"{kind} holds NaN or infinity")
    if source.member(i, "image") is None and source.member(i, "latent.npy") is not None:
        return RawSample(source.key(i), b"", source.captions(i))
    return source.read(i)


class _Checks:
    """Checks samples one by one and remembers, as 8-byte hashes, the keys and pictures seen."""

    def __init__(
        self,
        report: LintReport,
        vocabulary: Vocabulary | None,
        n_txt: int | None,
        max_pixels: int,
        progress: Callable[[int], None] | None,
        bad: Callable[[dict[str, Any]], None] | None,
    ) -> None:
        self.report = report
        self.vocabulary = vocabulary
        self.n_txt = n_txt
        self.max_pixels = max_pixels
        self.progress = progress
        self.bad = bad
        self.done = 0
        self.keys: set[bytes] = set()
        self.pictures: set[bytes] = set()

    def sample(self, key: str, read: Callable[[], RawSample], number: int) -> None:
        found: list[tuple[str, str]] = []
        if _seen(self.keys, key.encode("utf-8", "replace")):
            found.append(("duplicate_key", "an earlier sample has the same key"))
        try:
            sample = read()
            found += self._captions(sample)
            if sample.image and _seen(self.pictures, sample.image):
                found.append(("duplicate_image", "an earlier picture has the same bytes"))
            if sample.image:
                decode_image(sample.image, resolution=(8, 8), max_pixels=self.max_pixels)
        except BadSampleError as error:
            found.append((error.reason, error.message))
        for reason, detail in found:
            self.report.add(key, reason, detail)
        faults = [fault for fault in found if fault[0] not in ("duplicate_key", "duplicate_image")]
        self.report.good += not faults
        self.report.bad += bool(faults)
        if faults and self.bad is not None:
            self.bad({"key": key, "sample": number, "reason": faults[0][0], "detail": faults[0][1]})
        self.done += 1
        if self.progress is not None:
            self.progress(self.done)

    def _captions(self, sample: RawSample) -> list[tuple[str, str]]:
        for text, _ in sample.captions:
            count = len(self.vocabulary.ids(text) if self.vocabulary is not None else split_words(text))
            self.report.longest_caption = max(self.report.longest_caption, count)
            if self.n_txt is not None and count > self.n_txt:
                unit = "tokens" if self.vocabulary is not None else "words"
                return [("text_too_long", f"{count} {unit}; the limit is {self.n_txt}")]
        return []


def _seen(known: set[bytes], data: bytes) -> bool:
    digest = hashlib.blake2b(data, digest_size=8).digest()
    if digest in known:
        return True
    known.add(digest)
    return False
