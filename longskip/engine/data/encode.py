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
import safetensors.numpy
import torch

from longskip import __version__
from longskip.engine.data.buckets import check_buckets, nearest
from longskip.engine.data.decode import decode_image, upright_size
from longskip.engine.data.encoding import Encoding, check_share, npy_bytes, reasons
from longskip.engine.data.features import EMPTY_NAME
from longskip.engine.data.index import refuse_url, write_atomically
from longskip.engine.data.pack import PER_SHARD, caption_members, image_extension, refuse_pictures
from longskip.engine.data.remote import RemoteSource, open_remote
from longskip.engine.data.sources import FolderSource, ShardSource, Source, open_source
from longskip.engine.data.transport import is_url
from longskip.engine.encoders import Encoders
from longskip.errors import BadSampleError, ConfigError, DataError

DTYPES: dict[str, type[np.floating]] = {"fp16": np.float16, "fp32": np.float32}
AHEAD = 2
"""Windows of ``batch`` samples that are read and decoded while one is encoded."""

Size = tuple[int, int]
Bad = dict[str, Any]
Members = dict[str, bytes]
Window = tuple[int, list[tuple[str, Members]]]


@dataclass
class EncodeReport:
    """What one call did: of its own ``shards`` it ``encoded`` some and found others ``finished`` by an earlier one.

    ``samples`` are those written in its shards, ``bad`` those left out, per reason. ``complete``: all ranks' shards are
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
        """All fields."""
        return asdict(self)


@dataclass(frozen=True)
class _Shard:
    """An output shard: its file, and the ``count`` samples of the source from ``first`` on that go into it."""

    file: str
    first: int
    count: int


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
    remote: str = "none",
    cache: str | os.PathLike[str] | None = None,
    cache_gib: float = 64.0,
    progress: Callable[[int, int], None] | None = None,
) -> EncodeReport:
    """Encodes this rank's shards of the data at ``path`` into ``out``; the last rank to end writes ``index.json``.

    The data are indexed shards, or a plain folder of pictures, which makes shards of ``per_shard`` samples with
    nine-digit keys. Shards at a URL are fetched one after the other, the next one ahead, by the transport ``remote``
    into ``cache`` within ``cache_gib``, as ``open_remote``. What ``encoders`` has is encoded: latents, text features or
    both; without latents the pictures must be kept. Pictures are cut to ``encoders.resolution``, or each to the nearest
    of ``buckets`` ((H, W) pixels). Features are stored in ``dtype``. Rank r takes every ``world``-th shard; ranks share
    nothing but ``out``. Started again, a call keeps the shards whose SHA-256 is the recorded one and writes the others,
    to the same bytes (with the same ``batch``, whose size decides the rounding of products). ``workers`` threads read
    and decode; ``progress`` is called with the samples done and all samples of this rank.

    Raises ``ConfigError`` for settings that cannot be, ``UnfitDataError`` for an ``out`` that holds pictures,
    ``EncoderError`` for a folder that was encoded otherwise, ``DataError`` where more than ``max_bad_share`` of the
    samples are bad, ``RunLockedError`` where another process writes the same shard, and what reading the data raises.
    """
    started = time.perf_counter()
    _check(encoders, dtype, batch, buckets, keep_pictures, rank, world, per_shard, max_bad_share)
    refuse_url(out)
    source: FolderSource | ShardSource
    if is_url(path):
        source = open_remote(
            str(path), transport=remote, cache=cache, cache_gib=cache_gib, window_shards=1, on_damage=on_damage
        )
    elif refuse_url(path).absolute() == Path(out).absolute():
        raise ConfigError(f"{out} is the folder that is encoded", cure="give --out another folder")
    else:
        source = open_source(path, on_damage=on_damage)
    refuse_pictures(Path(out))
    shards = _shards(source, per_shard)
    made_with = _made_with(encoders)
    encoding = Encoding(Path(out))
    encoding.agree(
        {
            "source": source.fingerprint(),
            "shards": [[shard.file, shard.count] for shard in shards],
            "encoders": _manifest(encoders, dtype, buckets),
            "pictures": keep_pictures,
            "made_with": made_with,
        }
    )
    report = EncodeReport()
    bad: list[Mapping[str, Any]] = []
    todo: list[_Shard] = []
    for shard in shards[rank::world]:
        report.shards += 1
        record = encoding.verified(shard.file)
        if record is None:
            todo.append(shard)
        else:
            report.finished += 1
            report.samples += record.samples
            bad += record.bad
    if todo:
        encoding.agree_on_versions(made_with)
        work = _Work(source, encoders.load(), DTYPES[dtype], batch, tuple(buckets), keep_pictures)
        if encoders.text_files is not None:
            write_atomically(encoding.out / EMPTY_NAME, work.empty())
        total = sum(shard.count for shard in shards[rank::world])
        done = total - sum(shard.count for shard in todo)

        def tell(count: int) -> None:
            nonlocal done
            done += count
            if progress is not None:
                progress(done, total)

        with ThreadPoolExecutor(workers, thread_name_prefix="longskip-encode") as pool:
            for number, shard in enumerate(todo):
                if isinstance(source, RemoteSource):
                    source.ahead(
                        source.locate(np.array([each.first for each in todo[number : number + 2]]))[0].tolist()
                    )
                left_out: list[Bad] = []
                windows = work.windows(pool, shard, left_out)
                samples = _limited(windows, bad, left_out, len(source), max_bad_share, tell)
                record = encoding.write(shard.file, samples, left_out)
                report.encoded += 1
                report.samples += record.samples
                bad += record.bad
    if isinstance(source, RemoteSource):
        source.close()
    report.bad = reasons(bad)
    if not encoding.unfinished():
        encoding.finish(max_bad_share)
        report.complete = True
    report.seconds = time.perf_counter() - started
    return report


def _limited(
    windows: Iterator[Window],
    bad: Sequence[Mapping[str, Any]],
    left_out: Sequence[Bad],
    total: int,
    max_bad_share: float,
    tell: Callable[[int], None],
) -> Iterator[tuple[str, Members]]:
    """The samples of all windows; ends with ``DataError`` as soon as too many of all ``total`` are bad."""
    for count, samples in windows:
        if left_out:
            check_share([*bad, *left_out], total, max_bad_share)
        yield from samples
        tell(count)


def _check(
    encoders: Encoders,
    dtype: str,
    batch: int,
    buckets: Sequence[Size],
    keep_pictures: bool,
    rank: int,
    world: int,
    per_shard: int,
    max_bad_share: float,
) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"features cannot be stored in {dtype!r}", cure=f"one of {', '.join(DTYPES)}")
    if batch < 1 or per_shard < 1:
        raise ConfigError(f"batch {batch} and per_shard {per_shard} must be 1 or more")
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} of {world}", cure="set RANK from 0 to WORLD_SIZE - 1, or neither of them")
    if not 0 <= max_bad_share <= 1:
        raise ConfigError(f"max_bad_share {max_bad_share} is not a share from 0 to 1")
    if encoders.vae_files is None and encoders.text_files is None:
        raise ConfigError("no encoder is named", cure="give --vae, --text or both")
    if encoders.vae_files is None and (buckets or not keep_pictures):
        raise ConfigError(
            "without an autoencoder there are no latents, so pictures must be kept, as they are",
            cure="give --vae, or --keep-pictures without --buckets",
        )
    if encoders.vae_files is not None:
        factor, (height, width) = encoders.vae.factor, encoders.resolution
        if height % factor or width % factor:
            raise ConfigError(
                f"the resolution {height}x{width} is not divisible by the autoencoder's factor {factor}",
                cure=f"take multiples of {factor} times the model's patch",
            )
        if buckets:
            check_buckets(buckets, factor)


def _shards(source: Source, per_shard: int) -> list[_Shard]:
    """The output shards of all ranks."""
    if isinstance(source, FolderSource):
        starts = range(0, len(source), per_shard)
        return [_Shard(f"{k:05d}.tar", at, min(per_shard, len(source) - at)) for k, at in enumerate(starts)]
    if not isinstance(source, ShardSource):
        raise DataError(f"{type(source).__name__} cannot be encoded")
    if not source.index.members.get("image"):
        raise DataError(
            f"{source.index.folder} holds no pictures but features already", cure="encode the shards they were made of"
        )
    shards, first = [], 0
    for entry in source.index.shards:
        shards.append(_Shard(entry.file, first, entry.count))
        first += entry.count
    return shards


def _manifest(encoders: Encoders, dtype: str, buckets: Sequence[Size]) -> dict[str, dict[str, Any]]:
    """What the index says of the encoders; ``dtype`` is the one of what is stored."""
    parts = encoders.describe()
    for part in parts.values():
        part |= {"computed_in": part["dtype"], "dtype": dtype}
    if "vae" in parts:
        parts["vae"] |= {"crop": "centre"} | ({"buckets": [list(size) for size in buckets]} if buckets else {})
    return parts


def _made_with(encoders: Encoders) -> dict[str, str]:
    """The versions of all that decides the last bit of a feature."""
    packages = ["torch", "pillow"]
    packages += ["diffusers"] if encoders.vae_files is not None else []
    packages += ["transformers", "tokenizers"] if encoders.text_files is not None else []
    return {
        "longskip": __version__,
        **{name: metadata.version(name) for name in packages},
        "device": encoders.device.type,
    }


@dataclass(frozen=True)
class _Work:
    """Samples of a source → members of an output shard."""

    source: Source
    encoders: Encoders
    dtype: type[np.floating]
    batch: int
    buckets: tuple[Size, ...]
    keep_pictures: bool

    def empty(self) -> bytes:
        """``empty.safetensors``: the features of no caption, for guidance and dropped captions."""
        text, mask = self._texts([""])
        if not np.isfinite(text).all():
            raise DataError(f"the empty caption's features are past {self.dtype.__name__}", cure="give --dtype fp32")
        return safetensors.numpy.save({"text": text[0], "mask": mask[0]})

    def windows(self, pool: ThreadPoolExecutor, shard: _Shard, left_out: list[Bad]) -> Iterator[Window]:
        """(samples taken, [(key, members)] of those that are good) in the source's order; bad ones go to ``left_out``."""
        ahead: deque[list[Future[_Sample | Bad]]] = deque()
        for at in range(shard.first, shard.first + shard.count, self.batch):
            numbers = range(at, min(at + self.batch, shard.first + shard.count))
            ahead.append([pool.submit(self._read, number) for number in numbers])
            if len(ahead) > AHEAD:
                yield self._window(shard.file, ahead.popleft(), left_out)
        while ahead:
            yield self._window(shard.file, ahead.popleft(), left_out)

    def _read(self, number: int) -> _Sample | Bad:
        """Runs in a thread."""
        try:
            raw = self.source.read(number)
            if isinstance(self.source, ShardSource):
                key = raw.key
                texts = {kind: self.source.member(number, kind) for kind in ("txt", "json")}
                members = {kind: data for kind, data in texts.items() if data is not None}
            else:
                key = f"{number:09d}"
                members = caption_members(raw.captions)
            pixels = None
            if self.encoders.vae_files is not None:
                size = self.encoders.resolution
                if self.buckets:
                    size = self.buckets[nearest(self.buckets, *upright_size(raw.image))]
                pixels = decode_image(raw.image, resolution=size)
            if self.keep_pictures:
                members[image_extension(raw.image)] = raw.image
        except BadSampleError as error:
            return self._bad(number, error.reason, error.message)
        return _Sample(number, key, members, tuple(text for text, _ in raw.captions), pixels)

    def _bad(self, number: int, reason: str, detail: str) -> Bad:
        return {"key": self.source.key(number), "sample": number, "reason": reason, "detail": detail}

    def _window(self, file: str, futures: list[Future[_Sample | Bad]], left_out: list[Bad]) -> Window:
        found = [future.result() for future in futures]
        bad = [item for item in found if isinstance(item, dict)]
        good: dict[int, _Sample] = {item.number: item for item in found if isinstance(item, _Sample)}
        derived: dict[int, dict[str, np.ndarray]] = {number: {} for number in good}
        for encode in (self._add_texts, self._add_latents):
            for item in encode(good, derived):
                bad.append(item)
                del good[item["sample"]]
        left_out += [{"shard": file, **item} for item in sorted(bad, key=lambda item: item["sample"])]
        return len(found), [
            (sample.key, {**sample.members, **{kind: npy_bytes(array) for kind, array in derived[number].items()}})
            for number, sample in good.items()
        ]

    def _add_texts(self, good: Mapping[int, _Sample], derived: dict[int, dict[str, np.ndarray]]) -> list[Bad]:
        """Adds text and mask of all captions to ``derived``; returns the samples that cannot have them."""
        if self.encoders.text_files is None:
            return []
        bad: list[Bad] = []
        taken: list[_Sample] = []
        for sample in good.values():
            try:
                self.encoders.check_text(sample.captions)
                taken.append(sample)
            except BadSampleError as error:
                bad.append(self._bad(sample.number, error.reason, error.message))
        texts, masks = self._texts([caption for sample in taken for caption in sample.captions])
        at = 0
        for sample in taken:
            rows = slice(at, at + len(sample.captions))
            at = rows.stop
            if np.isfinite(texts[rows]).all():
                derived[sample.number] |= {"text.npy": texts[rows], "mask.npy": masks[rows]}
            else:
                bad.append(self._bad(sample.number, "text_not_finite", f"features past {self.dtype.__name__}"))
        return bad

    def _texts(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Features (N, n_txt, E) in the stored dtype and masks (N, n_txt) uint8, ``batch`` captions at a time."""
        shape = (len(captions), self.encoders.text.n_tokens)
        texts = np.empty((*shape, self.encoders.text.width), self.dtype)
        masks = np.empty(shape, np.uint8)
        for at in range(0, len(captions), self.batch):
            text, mask = self.encoders.encode_text(captions[at : at + self.batch])
            with np.errstate(over="ignore"):  # found as not finite and told with the sample
                texts[at : at + len(text)] = text.cpu().numpy()
            masks[at : at + len(mask)] = mask.cpu().numpy()
        return texts, masks

    def _add_latents(self, good: Mapping[int, _Sample], derived: dict[int, dict[str, np.ndarray]]) -> list[Bad]:
        """Adds latents to ``derived``, one bucket after the other; returns the samples that cannot have them."""
        by_size: dict[Size, list[_Sample]] = {}
        for sample in good.values():
            if sample.pixels is not None:
                by_size.setdefault(sample.pixels.shape[:2], []).append(sample)
        bad: list[Bad] = []
        for samples in by_size.values():
            pixels = np.stack([sample.pixels for sample in samples if sample.pixels is not None])
            scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() * (1 / 127.5) - 1.0
            with np.errstate(over="ignore"):
                latents = self.encoders.encode_images(scaled).cpu().numpy().astype(self.dtype)
            for sample, latent in zip(samples, latents, strict=True):
                derived[sample.number]["latent.npy"] = latent
                if not np.isfinite(latent).all():
                    bad.append(self._bad(sample.number, "latent_not_finite", f"latents past {self.dtype.__name__}"))
        return bad
