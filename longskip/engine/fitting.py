"""What a rank needs in memory at each ZeRO stage, and the smallest stage that fits (no torch).

The arithmetic is ``profiling.memory``; here are the configuration's words for it, and the decision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longskip.engine.config import Config
from longskip.errors import ConfigError
from longskip.models.specs import TextEncoderSpec
from longskip.profiling import traffic
from longskip.profiling.memory import RankMemory, Stage, rank_memory
from longskip.profiling.traffic import Zero

STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
MARGIN = 0.9  # of the free memory: workspaces, fragmentation and the process itself are not in the sums
MIB, GIB = 1 << 20, 1 << 30


def readable(n_bytes: int) -> str:
    """``3.21 GiB``, or ``45.6 MiB`` below one."""
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:.1f} MiB"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its worst moment, on its device and in host memory.

    ``weights``, ``gradients`` and ``states`` (fp32 masters, Adam's moments, the EMA) as the stage shares them out
    (1910.02054); ``gathered``: what stage 3 has gathered; ``activations``: of the micro-batch, with the gradients that its
    derivatives make; ``buffers``: what DeepSpeed reduces, joins and converts. Which of them are large depends on which
    moment is the worst: the backward pass, the reduction of gradients or the optimizer's step (``profiling.memory``).
    Validation and samples keep less than a step: no more pictures at a time, no gradients, no second copy of the weights.
    ``snapshot``: host memory of a save in the background (fp32 weights, EMA, moments of what the rank writes), which decides
    nothing: a run that has no room for it saves in the foreground.
    """

    weights: int
    gradients: int
    states: int
    gathered: int
    activations: int
    buffers: int
    host: int
    snapshot: int = 0

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.states + self.gathered + self.activations + self.buffers


def memory(config: Config, stage: Stage, *, world: int, micro: int, n_parameters: int, overlap: bool = True) -> Memory:
    """The estimate for the one of ``world`` ranks that needs the most, at micro-batch ``micro``, of the largest bucket.

    ``overlap``: DeepSpeed overlaps communication, as the engine asks for on GPUs.
    """
    found = ranks_memory(config, stage, world=world, micro=micro, n_parameters=n_parameters, overlap=overlap)
    worst = found.worst
    # At stage 0 every rank has all states and writes its even part of them.
    written = found.owned if stage else -(-found.owned // world)
    return Memory(
        worst.weights, worst.gradients, worst.states, worst.gathered, worst.activations, worst.buffers, found.host,
        16 * written if config.checkpoint.background else 0,
    )  # fmt: skip


def ranks_memory(
    config: Config, stage: Stage, *, world: int, micro: int, n_parameters: int, overlap: bool = True
) -> RankMemory:
    """The same in full: every part, every moment."""
    accumulation = max(1, config.train.batch_size // (world * micro))
    sizes: list[tuple[int, int] | None] = [(h // config.factor, w // config.factor) for h, w in config.buckets]
    shape = shape_of(config, _words(config, n_parameters), accumulation=accumulation)
    zero = Zero(overlap=overlap)
    every = (
        rank_memory(**shape, world=world, stage=stage, micro=micro, latent_size=size, zero=zero)
        for size in sizes or [None]
    )
    return max(every, key=lambda found: found.peak)


def shape_of(config: Config, words: int, *, accumulation: int) -> dict[str, Any]:
    """What ``rank_memory`` takes from a configuration and its vocabulary of ``words``, whatever the ranks and the stage."""
    offload = config.deepspeed
    return {
        "spec": config.backbone(),
        "text": config.text_encoder(words),
        "dtype_bytes": 2 if config.train.dtype == "bf16" else 4,
        "layout": config.engine.layout,
        "accumulation": accumulation,
        "checkpointing": config.engine.checkpointing,
        "prediction": "v" if config.diffusion.prediction == "v" else "x",
        "offload_optimizer": offload.offload_optimizer == "cpu",
        "offload_weights": offload.offload_param == "cpu",
        "ema_on_host": config.engine.ema_device == "cpu",
    }


def _words(config: Config, n_parameters: int) -> int:
    """The vocabulary of a model of ``n_parameters``, whose table of word vectors may be of any length."""
    encoder = config.text_encoder(1)
    if encoder is None:
        return 0
    rest = n_parameters - config.backbone().param_counts().total - encoder.param_counts().by_part["layers"]
    return max(1, rest // encoder.width)


def reduce_bucket(config: Config, n_parameters: int) -> int:
    """Elements of DeepSpeed's reduction bucket: all of the model as it is stored, at most 5e8, never less than a unit.

    A bucket that is smaller by the flat layout's padding alone would be emptied twice a step. It is allocated whole.
    """
    encoder: TextEncoderSpec | None = config.text_encoder(_words(config, n_parameters))
    text = encoder.parameters()["embedding"] if encoder else ()
    return traffic.reduce_bucket(config.backbone().parameters(), text=text, layout=config.engine.layout)


@dataclass(frozen=True)
class Free:
    """Free bytes for one rank on its device, and in host memory; ``host`` None: the device is the host."""

    device: int
    host: int | None = None

    def holds(self, needed: Memory) -> bool:
        if self.host is None:
            return needed.device + needed.host <= MARGIN * self.device
        return needed.device <= MARGIN * self.device and needed.host <= MARGIN * self.host

    def __str__(self) -> str:
        host = "" if self.host is None else f" on the device and {readable(self.host)} of host memory"
        return f"{readable(self.device)}{host}"


def choose_stage(config: Config, *, world: int, micro: int, n_parameters: int, free: Free) -> Stage:
    """The smallest stage whose estimate ``free`` holds, with room to spare.

    Raises ConfigError naming the stage that would need the least when none does.
    """
    overlap = free.host is not None
    found: dict[Stage, Memory] = {}
    for stage in STAGES:
        if stage < 3 and config.deepspeed.offload_param == "cpu":
            continue
        if stage < 1 and config.deepspeed.offload_optimizer == "cpu":
            continue
        found[stage] = memory(config, stage, world=world, micro=micro, n_parameters=n_parameters, overlap=overlap)
        if free.holds(found[stage]):
            return stage
    least = min(found, key=lambda stage: found[stage].device + (0 if overlap else found[stage].host))
    raise ConfigError(
        f"deepspeed.zero_stage auto: even stage {least} on {world} rank(s) needs {readable(found[least].device)} a rank "
        f"and {readable(found[least].host)} of host memory; free are {free}, of which {MARGIN:.0%} may be used",
        cure="more ranks, a smaller train.micro_batch, engine.checkpointing: 1, dtype bf16, engine.ema_device: cpu or "
        "deepspeed.offload_optimizer: cpu",
    )


def check_offload(config: Config, stage: Stage, *, world: int, micro: int, n_parameters: int, free: Free) -> None:
    """Raise ConfigError where what is put off to host memory would not fit there."""
    host = memory(config, stage, world=world, micro=micro, n_parameters=n_parameters).host
    there = free.device if free.host is None else free.host
    if host > MARGIN * there:
        raise ConfigError(
            f"host memory would have to hold {readable(host)} of each rank; {readable(there)} of it are free, "
            f"of which {MARGIN:.0%} may be used",
            cure="more ranks, or less put off to the host (deepspeed.offload_optimizer, offload_param, engine.ema_device)",
        )
