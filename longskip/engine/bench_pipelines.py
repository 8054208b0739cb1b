"""What ``longskip bench data`` measures: our reader and webdataset's pipelines over the same shards, each in a process.

Every pipeline gives the same collated batches: keys, captions, and per kind of shards latents (m, 4, 32, 32) fp16 with
text features (m, 77, 768) fp16 and masks (m, 77), or pictures (m, 3, 256, 256) float32 in [-1, 1].
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import torch
from PIL import Image

from longskip.engine.data.assembler import Assembler, MicroBatch
from longskip.engine.data.crc import crc32
from longskip.engine.data.features import LATENT, MASK, TEXT
from longskip.engine.data.plan import Plan
from longskip.engine.data.reader import Reader
from longskip.engine.data.sources import ShardSource, open_source

Kind = Literal["features", "jpeg"]

BATCH = 64
LATENT_SHAPE, TEXT_SHAPE, SIDE, STORED_SIDE = (4, 32, 32), (77, 768), 256, 512
SHUFFLE = 1000  # samples in webdataset's buffer, as in its documentation
WARM_UP = 8  # batches after the shuffle buffer is full
COARSE = 8  # blocks along a side, whose means tell pictures apart that two decoders made


class Batch(NamedTuple):
    """What a pipeline hands out; ``arrays`` are the latents, texts and masks, or the pictures."""

    keys: Sequence[str]
    captions: Sequence[str]
    arrays: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Contender:
    """``batches(folder, kind, workers, endless)`` iterates its batches, for one epoch or without end."""

    name: str
    title: str
    batches: Callable[[Path, Kind, int, bool], Iterator[Batch]]
    workers: int


# -- ours --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Undrawn(Assembler):
    """The assembler without times and noise, which webdataset's pipelines do not draw either."""

    def draws(self, epochs: np.ndarray, samples: np.ndarray, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(len(samples)), torch.zeros(len(samples), 0)


def reader_of(folder: Path, kind: Kind, workers: int, *, draws: bool, start: int = 0) -> Reader:
    """Our reader as training uses it: a full shuffle, every member's crc32 checked, batches collated."""
    source = open_source(folder)
    plan = Plan(len(source), BATCH, seed=0)
    reader = Reader(
        source,
        plan,
        None,
        resolution=(SIDE, SIDE),
        n_txt=TEXT_SHAPE[0] if kind == "features" else 0,
        micro=BATCH,
        latent_shape=LATENT_SHAPE,
        workers=workers,
        cursor=plan.cursor(start),
    )
    if not draws:
        settings = {item.name: getattr(reader.assembler, item.name) for item in fields(Assembler) if item.init}
        reader.assembler = Undrawn(**settings)
    return reader


def _ours(folder: Path, kind: Kind, workers: int, endless: bool, *, draws: bool) -> Iterator[Batch]:
    with reader_of(folder, kind, workers, draws=draws) as reader:
        left = None if endless else reader.plan.n_samples
        while left is None or left > 0:
            (micro,) = next(reader)
            yield _batch(micro)
            left = None if left is None else left - len(micro)


def _batch(micro: MicroBatch) -> Batch:
    return Batch(micro.keys, micro.captions, (micro.clean, *micro.conditions.values()))


def ours(folder: Path, kind: Kind, workers: int, endless: bool) -> Iterator[Batch]:
    """What webdataset's pipelines give, and nothing more."""
    return _ours(folder, kind, workers, endless, draws=False)


def ours_with_draws(folder: Path, kind: Kind, workers: int, endless: bool) -> Iterator[Batch]:
    """As training takes it: with the times and the noise of every sample."""
    return _ours(folder, kind, workers, endless, draws=True)


# -- webdataset --------------------------------------------------------------------------------------------------------


def _members(kind: Kind) -> tuple[str, ...]:
    return ("__key__", "txt", LATENT, TEXT, MASK) if kind == "features" else ("__key__", "txt", "jpg")


def _shards(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.glob("*.tar"))


def default(folder: Path, kind: Kind, workers: int, endless: bool) -> Iterator[Batch]:
    """The pipeline of webdataset's documentation: its own decoders, shuffle, to_tuple, batched; torch's DataLoader."""
    import webdataset

    data = webdataset.WebDataset(_shards(folder), shardshuffle=100, seed=0).shuffle(SHUFFLE)
    if kind == "features":
        data = data.decode().to_tuple(*_members(kind))
    else:
        data = data.decode("pil").to_tuple(*_members(kind)).map_tuple(_same, _same, _resized)
    data = data.batched(BATCH)
    loader = torch.utils.data.DataLoader(data.repeat() if endless else data, batch_size=None, num_workers=workers)
    for keys, captions, *arrays in loader:
        yield Batch(keys, captions, tuple(torch.as_tensor(array) for array in arrays))


def _same(value: Any) -> Any:
    return value


def _resized(picture: Image.Image) -> np.ndarray:
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    return pixels.transpose(2, 0, 1).astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)


def tuned(folder: Path, kind: Kind, workers: int, endless: bool) -> Iterator[Batch]:
    """The fastest that was found with webdataset's parts: nothing is decoded but what the batch needs, by functions made
    for these shards, batches are stacked once, where they are read, and pictures leave the workers as bytes."""
    import webdataset

    data = webdataset.WebDataset(_shards(folder), shardshuffle=100, seed=0).shuffle(SHUFFLE).to_tuple(*_members(kind))
    data = data.batched(BATCH, collation_fn=_stacked_features if kind == "features" else _stacked_pictures)
    loader = webdataset.WebLoader(data.repeat() if endless else data, batch_size=None, num_workers=workers)
    for keys, captions, *arrays in loader:
        yield Batch(keys, captions, tuple(arrays) if kind == "features" else (_scaled(arrays[0]),))


_HEADER = 128
_FEATURES = ((np.float16, LATENT_SHAPE), (np.float16, TEXT_SHAPE), (np.uint8, TEXT_SHAPE[:1]))


def _stacked_features(samples: Sequence[tuple[Any, ...]]) -> list[Any]:
    keys, texts, *members = zip(*samples, strict=True)
    arrays = []
    for data, (dtype, shape) in zip(members, _FEATURES, strict=True):
        rows = np.stack([np.frombuffer(member, dtype, offset=_HEADER) for member in data])
        arrays.append(torch.from_numpy(rows.reshape(len(data), *shape)))
    return [list(keys), [text.decode() for text in texts], *arrays]


def _stacked_pictures(samples: Sequence[tuple[Any, ...]]) -> list[Any]:
    keys, texts, jpegs = zip(*samples, strict=True)
    pixels = np.stack([_decoded(jpeg) for jpeg in jpegs])
    return [list(keys), [text.decode() for text in texts], torch.from_numpy(pixels)]


def _decoded(jpeg: bytes) -> np.ndarray:
    picture: Image.Image = Image.open(io.BytesIO(jpeg))
    picture.draft("RGB", (SIDE, SIDE))  # decodes at half size, as ours does
    if picture.size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.asarray(picture)


def _scaled(pixels: torch.Tensor) -> torch.Tensor:
    out = torch.empty(len(pixels), 3, SIDE, SIDE)
    return out.copy_(pixels.permute(0, 3, 1, 2)).mul_(float(np.float32(1 / 127.5))).sub_(1.0)


# -- measuring ---------------------------------------------------------------------------------------------------------


def rates(contender: Contender, folder: Path, kind: Kind, samples: int, seconds: float) -> dict[str, float]:
    """Samples per second by wall clock and the processor time per sample (µs) of this process and its children.

    Endless batches are read; the clocks start when the shuffle buffer, the workers' queues and the allocator have
    settled, and stop after at least ``samples`` samples and ``seconds``.
    """
    stream = contender.batches(folder, kind, contender.workers, True)
    count = 0
    while count < SHUFFLE + WARM_UP * BATCH:
        count += len(next(stream).keys)
    count, cpu, begin = 0, _processor_seconds(), time.perf_counter()
    while count < samples or time.perf_counter() - begin < seconds:
        count += len(next(stream).keys)
    wall, cpu = time.perf_counter() - begin, _processor_seconds() - cpu
    return {"samples_per_second": count / wall, "cpu_us": 1e6 * cpu / count}


def floor(folder: Path, processes: int, seconds: float) -> dict[str, float]:
    """``rates`` of what no reader of these shards can do without: one system call a sample, of the bytes from its first
    member to its last, into memory that is used again, and the crc32 of those bytes; nothing is made of them.
    """
    context, parts, running = multiprocessing.get_context("fork"), [], []
    for seed in range(processes):  # no pool, whose threads would be in the way of forks
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_tell_floor, args=(theirs, folder, seconds, seed))
        process.start()
        theirs.close()
        running.append((process, ours))
    for process, ours in running:
        parts.append(ours.recv())
        process.join()
    return {
        "samples_per_second": sum(count / wall for count, wall, _ in parts),
        "cpu_us": 1e6 * sum(cpu for _, _, cpu in parts) / sum(count for count, _, _ in parts),
    }


def _tell_floor(connection: Connection, folder: Path, seconds: float, seed: int) -> None:
    connection.send(_floor(folder, seconds, seed))


def _floor(folder: Path, seconds: float, seed: int) -> tuple[int, float, float]:
    """Samples, seconds, and seconds of processor time of one process."""
    source = ShardSource(folder)
    places: list[tuple[int, int, int]] = []
    for shard in range(len(source.index.shards)):
        descriptor, table, names = source.opened(shard)
        kinds = [name.removesuffix("_offset") for name in names if name.endswith("_offset")]
        begins = np.min([table[f"{kind}_offset"] for kind in kinds], axis=0)
        ends = np.max([table[f"{kind}_offset"] + table[f"{kind}_size"] for kind in kinds], axis=0)
        places += [(descriptor, at, size) for at, size in zip(begins.tolist(), (ends - begins).tolist(), strict=True)]
    memory = np.ones((BATCH, max(size for _, _, size in places)), np.uint8)  # touched, so that no page is missing
    order = np.random.default_rng(seed).permutation(len(places)).tolist()
    reads = [(places[i][0], memory[k % BATCH].data[: places[i][2]], places[i][1]) for k, i in enumerate(order)]
    count, wall, begin, cpu = 0, 0.0, time.perf_counter(), time.process_time()
    while wall < seconds:
        for descriptor, row, at in reads:
            os.preadv(descriptor, (row,), at)
            crc32(row)
        count, wall = count + len(reads), time.perf_counter() - begin
    return count, wall, time.process_time() - cpu


def _processor_seconds() -> float:
    me = psutil.Process()
    return sum(time.user + time.system for time in (one.cpu_times() for one in (me, *me.children(recursive=True))))


def resume(folder: Path, kind: Kind, position: int) -> float:
    """Milliseconds to open the shards, checks and all, seek to a position and have the first batch with its draws."""
    begin = time.perf_counter()
    with reader_of(folder, kind, 0, draws=True, start=position) as reader:
        next(reader)
        return 1e3 * (time.perf_counter() - begin)


def contents(contender: Contender, folder: Path, kind: Kind) -> dict[str, Any]:
    """One epoch by key: the SHA-256 of caption and arrays, and for pictures the means of coarse blocks."""
    found: dict[str, Any] = {}
    for batch in contender.batches(folder, kind, contender.workers, False):
        for i, key in enumerate(batch.keys):
            digest = hashlib.sha256(batch.captions[i].encode())
            for array in batch.arrays:
                digest.update(array[i].numpy().tobytes())
            if key in found:
                raise ValueError(f"{contender.name}: the sample {key} came twice in an epoch")
            found[key] = {"sha256": digest.hexdigest()}
            if kind == "jpeg":
                step = SIDE // COARSE
                blocks = batch.arrays[0][i].reshape(3, COARSE, step, COARSE, step).mean(dim=(2, 4))
                found[key]["coarse"] = blocks.flatten().tolist()
    return found
