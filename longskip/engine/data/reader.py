"""The reader: a rank's micro-batches, decoded, tokenised and with every draw that training needs.

What a sample looks like (caption, crop, flip, dropout, time, noise) is a function of (seed, epoch, sample), and which
samples come when is the plan's; ranks, workers and the step of a resume change neither. A bad sample keeps its slot
with weight 0, so ranks never have to agree on what to skip.
"""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.util
import os
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from longskip.engine.data.buffers import Buffers
from longskip.engine.data.captions import Captions
from longskip.engine.data.decode import MAX_PIXELS, decode_image
from longskip.engine.data.draws import Draws, generator
from longskip.engine.data.features import FeatureBatch, FeatureLayout
from longskip.engine.data.plan import Cursor, Plan
from longskip.engine.data.sources import FeatureSource, Source
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.signals import ASKING
from longskip.errors import BadSampleError, ConfigError, DataError, EncoderError, LongskipError

Coordinates = tuple[np.ndarray, np.ndarray]

THREADS = 2
"""Threads that assemble where there are no worker processes: reading, checking, decoding and drawing let go of the GIL."""


@dataclass
class MicroBatch:
    """m samples of one rank in one micro-step.

    ``conditions`` are handed to the model by name: ``tokens`` (m, n_txt) int64 for the word encoder, ``text``
    (m, n_txt, E) and ``text_mask`` (m, n_txt) bool for features, nothing where the text is still to be encoded or not
    wanted. ``captions`` are those chosen, empty where ``dropped`` marks that dropout took them. ``time_normal`` is a
    standard normal draw that the objective maps to a time; ``weight`` is 1, or 0 for a bad sample, whose picture is 0
    and text padding. ``bad`` lists the bad ones as ``{"key", "sample", "reason", "detail"}``.
    """

    clean: torch.Tensor  # (m, 3, H, W) float32 pixels in [-1, 1], or (m, C, h, w) scaled latents as stored
    conditions: dict[str, torch.Tensor]
    dropped: torch.Tensor  # (m,) bool
    time_normal: torch.Tensor  # (m,) float32
    noise: torch.Tensor  # (m, *latent_shape) float32, standard normal
    weight: torch.Tensor  # (m,) float32
    samples: torch.Tensor  # (m,) int64
    epochs: torch.Tensor  # (m,) int64
    keys: tuple[str, ...]
    captions: tuple[str, ...] = ()
    bad: list[dict[str, Any]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MicroBatch:
        """The same micro-batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            item.name: value.to(device, non_blocking=non_blocking)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), torch.Tensor)
        }
        conditions = {name: value.to(device, non_blocking=non_blocking) for name, value in self.conditions.items()}
        return replace(self, conditions=conditions, **moved)


@dataclass(frozen=True)
class Assembler:
    """Coordinates → ``MicroBatch``, a pure function of its fields and the source's bytes; what workers run.

    ``resolution`` and ``latent_shape`` are (H, W) in pixels and the model's (C, H, W). Where the source holds latents
    they are read as stored, unless the model's input is pixels and there are pictures. Without a ``vocabulary`` stored
    text features are read where ``n_txt`` is above 0, and captions are handed on as they are. ``crop`` is ``"centre"``
    or ``"random"``; ``flip`` mirrors half of the samples; both are of pictures. A caption past ``n_txt`` tokens
    makes a bad sample (``text_too_long``) when ``too_long`` is ``"error"``, and is cut when it is ``"truncate"``.

    Raises ``ConfigError`` for impossible settings (``EncoderError`` for stored features of other shapes) and
    ``ShardError`` for features that contradict their index.
    """

    source: Source
    vocabulary: Vocabulary | None
    resolution: tuple[int, int]
    n_txt: int
    seed: int = 0
    caption_dropout: float = 0.0
    flip: bool = False
    crop: Literal["centre", "random"] = "centre"
    too_long: Literal["error", "truncate"] = "error"
    latent_shape: tuple[int, int, int] | None = None
    max_pixels: int = MAX_PIXELS
    features: FeatureLayout | None = field(init=False, default=None)
    _empty: tuple[np.ndarray, np.ndarray] | None = field(init=False, default=None, repr=False)
    _buffers: Buffers = field(init=False, default_factory=Buffers, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.resolution) != 2 or min(self.resolution) < 1:
            raise ConfigError(f"resolution {self.resolution}; it is (H, W) in pixels, each 1 or more")
        if self.n_txt < 1 and self.vocabulary is not None:
            raise ConfigError(f"n_txt {self.n_txt}; at least one text token is needed")
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise ConfigError(f"caption_dropout {self.caption_dropout}; it is a share from 0 to 1")
        if self.crop not in ("centre", "random"):
            raise ConfigError(f"crop {self.crop!r}; it is 'centre' or 'random'")
        if self.too_long not in ("error", "truncate"):
            raise ConfigError(f"too_long {self.too_long!r}; it is 'error' or 'truncate'")
        layout = self.source.features
        if layout is None or (self.latent_shape == (3, *self.resolution) and layout.pictures):
            return
        object.__setattr__(self, "features", layout)
        if self.flip or self.crop == "random":
            raise ConfigError(
                f"the data hold latents, which are neither mirrored nor cut; flip is {self.flip}, crop {self.crop}",
                cure="set data.flip: false and data.crop: centre, or train on the pictures",
            )
        if self.latent_shape not in (None, layout.latent):
            raise EncoderError(
                f"the data hold latents of the shape {layout.latent}, the model takes {self.latent_shape}",
                cure="encode the pictures for this model (longskip data encode), or set model.resolution and "
                "encoders.vae as they were then",
            )
        if self._reads_text and layout.text is not None:
            if layout.text[0] != self.n_txt:
                raise EncoderError(
                    f"the data hold text features of {layout.text[0]} tokens, the model takes {self.n_txt}",
                    cure=f"set encoders.text.n_tokens to {layout.text[0]}, or encode the captions again",
                )
            if self.caption_dropout > 0.0:
                object.__setattr__(self, "_empty", self._empty_text(layout))

    @property
    def _reads_text(self) -> bool:
        return self.vocabulary is None and self.n_txt > 0

    def _empty_text(self, layout: FeatureLayout) -> tuple[np.ndarray, np.ndarray]:
        text, mask = cast(FeatureSource, self.source).empty_text
        if text.shape != layout.text or text.dtype != layout.text_dtype:
            raise EncoderError(
                f"the empty caption's features are {text.dtype} {text.shape}, "
                f"the captions' {layout.text_dtype} {layout.text}",
                cure="encode the captions again: longskip data encode",
            )
        return text, mask

    def assemble(self, epochs: Sequence[int] | np.ndarray, samples: Sequence[int] | np.ndarray) -> MicroBatch:
        """The micro-batch of (epoch, sample) pairs. Raises ``ShardError`` where the source stops at damage."""
        epochs, samples = np.asarray(epochs, dtype=np.int64), np.asarray(samples, dtype=np.int64)
        if epochs.shape != samples.shape or samples.ndim != 1:
            raise ValueError(f"epochs {epochs.shape} and samples {samples.shape} must be two lists of one length")
        content = self._pictures(epochs, samples) if self.features is None else self._features(epochs, samples)
        shape = self.latent_shape or tuple(content.clean.shape[1:])
        times, noise = self._draws(epochs, samples, shape)
        weight = np.ones(len(samples), dtype=np.float32)
        weight[[*content.bad]] = 0.0
        return MicroBatch(
            clean=content.clean,
            conditions=content.conditions,
            dropped=torch.from_numpy(content.dropped),
            time_normal=times,
            noise=noise,
            weight=torch.from_numpy(weight),
            samples=torch.from_numpy(samples.copy()),
            epochs=torch.from_numpy(epochs.copy()),
            keys=tuple(content.keys),
            captions=tuple(content.captions),
            bad=[
                {"key": content.keys[i], "sample": int(samples[i]), "reason": error.reason, "detail": str(error)}
                for i, error in sorted(content.bad.items())
            ],
        )

    def _draws(
        self, epochs: np.ndarray, samples: np.ndarray, shape: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``time_normal`` (m,) and ``noise`` (m, *shape), standard normal, float32."""
        times = np.empty(len(samples), dtype=np.float32)
        tensor, noise = self._buffers.tensor((len(samples), *shape), np.float32)
        for_noise, for_time = Draws(self.seed, "noise"), Draws(self.seed, "time")
        for i, (epoch, sample) in enumerate(zip(epochs.tolist(), samples.tolist(), strict=True)):
            for_noise.of(epoch, sample).standard_normal(out=noise[i], dtype=np.float32)
            times[i] = for_time.of(epoch, sample).standard_normal()
        return torch.from_numpy(times), tensor

    def _features(self, epochs: np.ndarray, samples: np.ndarray) -> _Content:
        """Latents as stored, and text features or tokens."""
        layout = self.features
        assert layout is not None
        count = len(samples)
        clean, latents = self._buffers.tensor((count, *layout.latent), layout.latent_dtype)
        into = FeatureBatch(latents, None, None, [""] * count, [""] * count)
        content = _Content(clean, {}, into.keys, into.captions, np.zeros(count, dtype=bool), into.bad)
        if self._reads_text and layout.text is not None:
            dtype = layout.text_dtype or layout.latent_dtype
            content.conditions["text"], into.text = self._buffers.tensor((count, *layout.text), dtype)
            into.mask = np.empty((count, self.n_txt), dtype=np.uint8)

        def choose(slot: int, captions: Captions) -> int:
            return self._choose(captions, int(epochs[slot]), int(samples[slot]))

        cast(FeatureSource, self.source).read_features(range(count), samples, into, choose)
        self._tell(epochs, samples, content)
        for slot in np.flatnonzero(content.dropped):
            if into.text is not None and into.mask is not None and self._empty is not None:
                into.text[slot], into.mask[slot] = self._empty
        for array in (latents, into.text, into.mask):
            if array is not None:
                array[[*into.bad]] = 0
        if into.mask is not None:
            content.conditions["text_mask"] = torch.from_numpy(into.mask.view(bool))
        return content

    def _pictures(self, epochs: np.ndarray, samples: np.ndarray) -> _Content:
        """Decoded pictures, and tokens."""
        count, (height, width) = len(samples), self.resolution
        clean, pixels = self._buffers.tensor((count, 3, height, width), np.float32)
        content = _Content(clean, {}, [""] * count, [""] * count, np.zeros(count, dtype=bool), {})
        draws = {purpose: Draws(self.seed, purpose) for purpose in ("flip", "crop")}
        for i, (epoch, sample) in enumerate(zip(epochs.tolist(), samples.tolist(), strict=True)):
            try:
                raw = self.source.read(sample)
                content.keys[i] = raw.key
                content.captions[i] = raw.captions[self._choose(raw.captions, epoch, sample)][0]
                flip = self.flip and bool(draws["flip"].of(epoch, sample).random() < 0.5)
                crop = None
                if self.crop == "random":
                    y, x = draws["crop"].of(epoch, sample).random(2).tolist()
                    crop = (y, x)
                picture = decode_image(
                    raw.image, resolution=self.resolution, max_pixels=self.max_pixels, flip=flip, crop=crop
                )
                np.multiply(picture.transpose(2, 0, 1), np.float32(1 / 127.5), out=pixels[i])
                pixels[i] -= np.float32(1.0)
            except BadSampleError as error:
                content.keys[i] = self.source.key(sample)
                content.bad[i] = error
        self._tell(epochs, samples, content)
        pixels[[*content.bad]] = 0.0
        return content

    def _tell(self, epochs: np.ndarray, samples: np.ndarray, content: _Content) -> None:
        """Tokens and dropout; bad samples lose their captions."""
        bad, captions, vocabulary = content.bad, content.captions, self.vocabulary
        truncate = self.too_long == "truncate"
        tokens = np.zeros((len(samples), self.n_txt), dtype=np.int64)
        if vocabulary is not None:
            content.conditions["tokens"] = torch.from_numpy(tokens)
            # Before dropout, which takes some of them, so that a bad caption is bad in every epoch.
            for i in range(len(samples)):
                if i not in bad:
                    try:
                        tokens[i] = vocabulary.encode(captions[i], self.n_txt, truncate=truncate)
                    except BadSampleError as error:
                        bad[i] = error
        if self.caption_dropout > 0.0:
            draws = Draws(self.seed, "dropout")
            for i, (epoch, sample) in enumerate(zip(epochs.tolist(), samples.tolist(), strict=True)):
                if i not in bad and draws.of(epoch, sample).random() < self.caption_dropout:
                    content.dropped[i], captions[i] = True, ""
                    if vocabulary is not None:
                        tokens[i] = vocabulary.encode("", self.n_txt, truncate=truncate)
        for i in bad:
            captions[i] = ""

    def _choose(self, captions: Captions, epoch: int, sample: int) -> int:
        """Which caption a sample takes in an epoch, by the weights' shares; one alone needs no draw."""
        if len(captions) == 1:
            return 0
        at = generator(self.seed, epoch, sample, "caption").random() * math.fsum(weight for _, weight in captions)
        for i, (_, weight) in enumerate(captions):
            at -= weight
            if at < 0:
                return i
        return len(captions) - 1


@dataclass
class _Content:
    """A micro-batch without what is only drawn; ``bad`` has the error of each slot that could not be filled."""

    clean: torch.Tensor
    conditions: dict[str, torch.Tensor]
    keys: list[str]
    captions: list[str]
    dropped: np.ndarray
    bad: dict[int, BadSampleError]


class Reader:
    """An endless iterator over global steps; each item is the list of this rank's ``accumulation`` micro-batches.

    ``cursor`` is where to begin, and at any time where the step after the last one handed out begins: what a checkpoint
    saves. ``workers`` = 0 assembles in threads of this process, otherwise in that many processes (``start_method``:
    ``spawn``, or ``forkserver``, which starts faster but ends when a whole process group is told to terminate);
    the order never depends on them. ``data_wait_seconds`` adds up the time that the consumer waited.

    Raises ``ConfigError`` for contradicting settings, ``DataError`` where plan and source do not fit or a worker died,
    and what the source raises when it stops at damage. Use as a context manager, or call ``close``.
    """

    def __init__(
        self,
        source: Source,
        plan: Plan,
        vocabulary: Vocabulary | None,
        *,
        resolution: tuple[int, int],
        n_txt: int,
        micro: int,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        seed: int = 0,
        caption_dropout: float = 0.0,
        flip: bool = False,
        crop: Literal["centre", "random"] = "centre",
        workers: int = 0,
        cursor: Cursor | None = None,
        too_long: Literal["error", "truncate"] = "error",
        latent_shape: tuple[int, int, int] | None = None,
        max_pixels: int = MAX_PIXELS,
        prefetch: int = 2,
        start_method: Literal["spawn", "forkserver"] = "spawn",
    ) -> None:
        if len(source) != plan.n_samples:
            raise DataError(f"the plan is for {plan.n_samples} samples, the source holds {len(source)}")
        if workers < 0 or prefetch < 1:
            raise ConfigError(f"workers {workers} must be 0 or more, prefetch {prefetch} 1 or more")
        cursor = cursor or plan.cursor()
        if cursor.n_samples not in (0, plan.n_samples):
            raise DataError(
                f"the cursor is of data with {cursor.n_samples} samples, the source holds {plan.n_samples}",
                cure="resume with the data of the run, or start a new run",
            )
        self.plan = plan
        self.rank, self.world, self.micro, self.accumulation = rank, world, micro, accumulation
        self.workers = workers
        self.prefetch = prefetch
        self.start_method = start_method
        self.cursor = replace(cursor, n_samples=plan.n_samples)
        self.data_wait_seconds = 0.0
        self.assembler = Assembler(
            source=source,
            vocabulary=vocabulary,
            resolution=(resolution[0], resolution[1]),
            n_txt=n_txt,
            seed=seed,
            caption_dropout=caption_dropout,
            flip=flip,
            crop=crop,
            too_long=too_long,
            latent_shape=latent_shape,
            max_pixels=max_pixels,
        )
        plan.slots(self.cursor, rank, world, micro, accumulation)  # refuses sizes that do not fit, before any work
        self._stream: _Threaded | _Processes | None = None

    def __iter__(self) -> Iterator[list[MicroBatch]]:
        return self

    def __next__(self) -> list[MicroBatch]:
        started = time.perf_counter()
        if self._stream is None:
            walk = _Walk(self.plan, self.cursor, self.rank, self.world, self.micro, self.accumulation)
            if self.workers:
                self._stream = _Processes(self.assembler, walk, self.workers, self.prefetch, self.start_method)
            else:
                self._stream = _Threaded(self.assembler, walk, self.prefetch * self.accumulation)
        try:
            batches = [self._stream.take() for _ in range(self.accumulation)]
        except BaseException:
            self.close()
            raise
        finally:
            self.data_wait_seconds += time.perf_counter() - started
        self.cursor = self.cursor.advance(self.plan.batch)
        return batches

    def seek(self, cursor: Cursor) -> None:
        """Goes on at ``cursor``; what was prepared ahead is thrown away."""
        self.close()
        self.cursor = replace(cursor, n_samples=self.plan.n_samples)

    def close(self) -> None:
        """Ends the thread or the workers; iterating again starts them anew at ``cursor``."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Walk(Sampler[Coordinates]):
    """The endless coordinates of one rank's micro-batches from a cursor on."""

    def __init__(self, plan: Plan, cursor: Cursor, rank: int, world: int, micro: int, accumulation: int) -> None:
        self.plan = plan
        self.cursor = cursor
        self.split = (rank, world, micro, accumulation)

    def __iter__(self) -> Iterator[Coordinates]:
        cursor = self.cursor
        while True:
            yield from self.plan.slots(cursor, *self.split)
            cursor = cursor.advance(self.plan.batch)


class _Threaded:
    """Assembles ahead in a few threads of this process; micro-batches come back in the order of the walk."""

    def __init__(self, assembler: Assembler, walk: _Walk, depth: int) -> None:
        self._walk = iter(walk)
        self._assemble = assembler.assemble
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="longskip-reader")
        self._ahead: deque[Future[MicroBatch]] = deque()
        for _ in range(depth):
            self._begin()

    def _begin(self) -> None:
        self._ahead.append(self._pool.submit(self._assemble, *next(self._walk)))

    def take(self) -> MicroBatch:
        self._begin()
        return self._ahead.popleft().result()

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class _Assembled(Dataset[Any]):
    """The assembler as a data set indexed by coordinates."""

    def __init__(self, assembler: Assembler) -> None:
        self.assembler = assembler

    def __getitem__(self, at: Coordinates) -> MicroBatch | LongskipError:
        try:
            return self.assembler.assemble(*at)
        except LongskipError as error:  # returned, not raised: torch would rebuild it from its traceback's text
            return error


def _start_worker(_: int) -> None:
    # A rank that is told to stop still needs its next batches to reach the step's border; it ends its workers itself.
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    # Last of all, when the queues are flushed, leave at once: a spawned process that unloads torch while one of its
    # threads still runs aborts now and then, and the parent would take that for a crash.
    multiprocessing.util.Finalize(None, os._exit, args=(0,), exitpriority=-100)


class _Processes:
    """Assembles in torch's data loader; batches come back in the order of the walk."""

    def __init__(self, assembler: Assembler, walk: _Walk, workers: int, prefetch: int, start_method: str) -> None:
        context = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            context.set_forkserver_preload([__name__])  # torch is imported once, not by every worker
        loader = DataLoader(
            _Assembled(assembler),
            sampler=walk,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=max(prefetch, -(-prefetch * walk.split[3] // workers)),
            persistent_workers=True,
            multiprocessing_context=context,
            worker_init_fn=_start_worker,
        )
        self._iterator: Any = iter(loader)

    def take(self) -> MicroBatch:
        try:
            item = next(self._iterator)
        except (RuntimeError, ConnectionError, FileNotFoundError, EOFError) as error:
            # The last three: its tensors were announced, but it died before it handed over their memory.
            if isinstance(error, RuntimeError) and "exited unexpectedly" not in str(error):
                raise
            raise DataError(
                f"a data worker died: {error}",
                cure="look for the out-of-memory killer, lower the number of workers, or read with workers: 0",
            ) from error
        if isinstance(item, LongskipError):
            raise item
        return item

    def close(self) -> None:
        iterator, self._iterator = self._iterator, None
        if iterator is not None:
            iterator._shutdown_workers()  # deleting it does the same, but a traceback may hold it for longer
