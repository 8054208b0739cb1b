"""What a run looks at while it trains: the loss on fixed pictures, noise and times, and pictures of fixed prompts.

Both compute with the EMA weights through whatever engine trains, all ranks in step, and touch no state of the training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from longskip.engine.config import Config
from longskip.engine.data.assembler import Assembler, MicroBatch
from longskip.engine.data.buckets import Size
from longskip.engine.data.draws import generator
from longskip.engine.data.shuffled import shuffled
from longskip.engine.data.sources import Source
from longskip.engine.diffusion import Objective, objective_of
from longskip.engine.distributed import World, agree, all_reduce_sum
from longskip.engine.drawing import Drawing, draw, repeats_of
from longskip.engine.grids import make_grid
from longskip.engine.inputs import Inputs
from longskip.engine.opening import open_data, sort_into_buckets
from longskip.engine.runs import write_atomic
from longskip.engine.shards import Shards
from longskip.engine.texts import NoTexts, StoredTexts, Texts
from longskip.errors import BadSampleError, DataError, LongskipError

Model = Callable[..., torch.Tensor]
DEFAULT_PROMPTS = 16
AT_ONCE = 64  # samples of a forward pass, where the run's micro-batch is not smaller


def fixed_times(samples: np.ndarray, bins: int, seed: int) -> np.ndarray:
    """Time of each validation sample: bin i mod ``bins`` of (0, 1), at a place in the bin drawn once for ever."""
    within = np.array([generator(seed, 0, int(i), "validation-time").random() for i in samples])
    return ((samples % bins + within) / bins).astype(np.float32)


class Validation:
    """Validation of one configuration; samples and prompts are shared out over the ranks.

    ``at_once``: the most samples that a rank computes with at a time, for which a run plans its memory.
    """

    def __init__(self, config: Config, world: World, inputs: Inputs, training: Source, at_once: int = AT_ONCE) -> None:
        self.at_once = min(at_once, AT_ONCE)
        self.config, self.world, self.inputs = config, world, inputs
        self.source = open_data(config, config.data.validation, check=world.is_main) if config.data.validation else None
        self.prompts = list(config.logging.prompts)
        if not inputs.pictures or not config.logging.samples_every:
            self.prompts = []
        elif not self.prompts:
            self.prompts = default_prompts(inputs.texts, self.source or training, config.train.seed)
        # A prompt that cannot be encoded is refused before the first step; later a rank alone must not fail.
        if self.prompts:
            inputs.texts.check(self.prompts)

    def check(self) -> None:
        """Try on one sample and one prompt what the run will look at, so that it is refused now and not after hours.

        Raises what the first evaluation and the first drawing would raise, whatever the model's weights.
        """
        if self.config.eval.every and self.source is not None:
            self.inputs.load(self.source)
            first = next(self._shares(), None)
            if first is None:
                raise DataError(
                    f"{self.config.data.validation} holds no sample for a bucket of this run among the first "
                    f"{self.count:,}",
                    cure="set data.validation to other data, or eval.every: 0",
                )
            bucket, samples, _ = first
            self._assembler.assemble(np.zeros(1, dtype=np.int64), samples[:1], bucket)
        if self.prompts:
            draw(_nothing, objective_of(self.config.diffusion), self.inputs, self.prompts[:1], [0], self._how)

    @property
    def count(self) -> int:
        """Validation samples that are looked at."""
        return min(self.config.eval.samples, len(self.source)) if self.source is not None else 0

    def loss(self, engine: Any, shards: Shards, objective: Objective) -> dict[str, Any] | None:
        """``validation/loss`` and per time bin with the EMA weights; None without validation data."""
        if self.source is None:
            return None
        engine.eval()
        try:
            with torch.no_grad(), shards.weights("ema"):
                return self.loss_of(engine, objective)
        finally:
            engine.train()

    def loss_of(self, model: Model, objective: Objective) -> dict[str, Any]:
        """The same for any model on this rank's device; ranks share the samples and add up.

        Raises DataError on all ranks where one of them cannot read its samples.
        """
        if self.source is None:
            raise DataError("this run names no validation data", cure="set data.validation")
        bins, seed = self.config.eval.time_bins, self.config.train.seed
        sums, weights = [0.0] * bins, [0.0] * bins
        for bucket, samples, own in self._shares():
            batch = self._read(samples, bucket)
            times = fixed_times(samples, bins, seed)
            time = objective.spread(torch.from_numpy(times).to(self.world.device))
            weight = batch.weight * torch.from_numpy(own).to(self.world.device)
            clean = batch.clean.float()
            noised = objective.noised(clean, batch.noise, time)
            prediction = model(noised, time, **batch.conditions)
            losses = objective.loss(prediction, clean, batch.noise, time, weight)
            for sample, value, w in zip(samples.tolist(), losses.tolist(), weight.tolist(), strict=True):
                sums[sample % bins] += value
                weights[sample % bins] += w
        totals = all_reduce_sum(sums + weights, self.world.device)
        sums, weights = totals[:bins], totals[bins:]
        per_bin = [s / w if w else None for s, w in zip(sums, weights, strict=True)]
        return {
            "validation/loss": sum(sums) / max(sum(weights), 1.0),
            "validation/loss_bins": per_bin,
            "validation/bin_edges": [i / bins for i in range(bins + 1)],
            "validation/samples": round(sum(weights)),
        }

    def _read(self, samples: np.ndarray, bucket: Size | None) -> MicroBatch:
        failure = None
        try:
            batch = self.inputs.ready(self._assembler.assemble(np.zeros_like(samples), samples, bucket))
        except LongskipError as error:
            failure = error
        agree(failure, f"read its samples of {self.config.data.validation}", self.world.device)
        return batch

    @cached_property
    def _assembler(self) -> Assembler:
        assert self.source is not None
        return self.inputs.assembler(self.source, buckets=tuple(bucket for bucket, _ in self._groups if bucket))

    @cached_property
    def _how(self) -> Drawing:
        return Drawing.of(
            self.config.eval,
            self.config.diffusion,
            sampler="auto",
            steps=self.config.logging.sample_steps,
            guidance=self.config.logging.guidance,
            seed=self.config.train.seed,
        )

    @cached_property
    def _groups(self) -> list[tuple[Size | None, np.ndarray]]:
        """The samples that are looked at, by aspect bucket; all of them under None without buckets."""
        assert self.source is not None
        count = self.count
        assignment = sort_into_buckets(self.config, self.source, 1)
        if assignment is None:
            return [(None, np.arange(count))]
        codes = assignment.codes[:count]
        groups = [(size, np.flatnonzero(codes == code)) for code, size in enumerate(assignment.buckets)]
        return [(size, samples) for size, samples in groups if len(samples)]

    def _shares(self) -> Iterator[tuple[Size | None, np.ndarray, np.ndarray]]:
        """(bucket, samples, which of them count) of this rank's forward passes.

        Every rank makes the same number of them (stage 3 gathers in each); slots past a group's end weigh nothing.
        """
        ranks, rank = self.world.size, self.world.rank
        for bucket, samples in self._groups:
            micro = max(1, min(self.at_once, -(-len(samples) // ranks)))
            for start in range(0, len(samples), micro * ranks):
                slots = np.arange(micro) + start + rank * micro
                yield bucket, samples[np.minimum(slots, len(samples) - 1)], slots < len(samples)

    def samples(self, engine: Any, shards: Shards, objective: Objective, run: Path, step: int) -> Path | None:
        """Draw the run's prompts with the EMA weights into ``samples/step-N/``; returns the folder."""
        config, world = self.config, self.world
        if not self.prompts:
            return None
        repeats = repeats_of(self.prompts)
        share = -(-len(self.prompts) // world.size)
        slots = [min(world.rank * share + i, len(self.prompts) - 1) for i in range(share)]
        engine.eval()
        failure = ""
        mine = np.zeros((share, *config.resolution, 3), dtype=np.uint8)
        try:
            with shards.weights("ema"):
                for start in range(0, share, self.at_once):
                    some = slots[start : start + self.at_once]
                    prompts, numbers = [self.prompts[i] for i in some], [repeats[i] for i in some]
                    try:
                        mine[start : start + len(some)] = draw(
                            engine, objective, self.inputs, prompts, numbers, self._how
                        )
                    except LongskipError as error:  # after its last forward pass: the ranks are still in step
                        failure = str(error)
        finally:
            engine.train()
        folder = run / "samples" / f"step-{step:08d}"
        pictures = _gather_pictures(mine, world)[: len(self.prompts)]
        if world.is_main and not failure:
            try:
                write_pictures(folder, pictures, self.prompts, self._how, weights="ema")
            except OSError as error:
                failure = str(error)
        if all_reduce_sum([float(bool(failure))], world.device)[0]:
            raise LongskipError(failure or "another rank could not draw its samples")
        return folder


def _nothing(latents: torch.Tensor, time: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
    """In place of a model, where all else is tried."""
    return torch.zeros_like(latents)


def write_pictures(folder: Path, pictures: np.ndarray, prompts: list[str], how: Drawing, *, weights: str) -> None:
    """``000.png`` …, ``grid.png`` and ``prompts.json`` in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{i:03d}.png" for i in range(len(prompts))]
    for name, picture in zip(files, pictures, strict=True):
        Image.fromarray(picture).save(folder / name)
    columns = min(8, len(prompts))
    make_grid(list(pictures), prompts, columns=columns, scale=max(1, 96 // pictures.shape[2])).save(folder / "grid.png")
    record = {"prompts": prompts, "files": files, "weights": weights} | how.to_json()
    write_atomic(folder / "prompts.json", json.dumps(record, ensure_ascii=False, indent=1))


def _gather_pictures(mine: np.ndarray, world: World) -> np.ndarray:
    if world.size == 1:
        return mine
    tensor = torch.from_numpy(np.ascontiguousarray(mine)).to(world.device)
    parts = [torch.empty_like(tensor) for _ in range(world.size)]
    torch.distributed.all_gather(parts, tensor)
    return np.concatenate([part.cpu().numpy() for part in parts])


def default_prompts(texts: Texts, source: Source, seed: int) -> list[str]:
    """Different captions of samples drawn by ``seed`` from all of the data, such as the text encoder takes."""
    if isinstance(texts, NoTexts):
        return [""] * DEFAULT_PROMPTS
    if isinstance(texts, StoredTexts):
        return [caption for caption in texts.known if caption][:DEFAULT_PROMPTS]
    prompts: list[str] = []
    for i in islice(shuffled(source, seed), 16 * DEFAULT_PROMPTS):
        with suppress(BadSampleError, LongskipError):
            caption = source.captions(i)[0][0]
            texts.check([caption])
            if caption not in prompts:
                prompts.append(caption)
        if len(prompts) == DEFAULT_PROMPTS:
            break
    return prompts
