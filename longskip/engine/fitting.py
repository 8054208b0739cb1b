"""What a rank needs in memory at each ZeRO stage, and the smallest stage that fits (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from longskip.engine.config import Config
from longskip.engine.partition import ALIGN
from longskip.errors import ConfigError

Stage = Literal[0, 1, 2, 3]
STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
MARGIN = 0.9  # of the free memory: workspaces, fragmentation and the process itself are not in the sums
MIB, GIB = 1 << 20, 1 << 30


def readable(n_bytes: int) -> str:
    """``3.21 GiB``, or ``45.6 MiB`` below one."""
    return f"{n_bytes / GIB:.2f} GiB" if n_bytes >= GIB else f"{n_bytes / MIB:.1f} MiB"


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, on its device and in host memory.

    ``weights``, ``gradients`` and ``states`` (fp32 masters beside bf16 weights, Adam's moments, the EMA) as the stage
    shares them out (1910.02054); ``gathered``: the largest unit and its prefetched successor at stage 3;
    ``activations``: what autograd keeps at the micro-batch; ``buffers``: DeepSpeed's reduction bucket. Validation and
    samples keep less than a step: no more pictures at a time, no gradients, no second copy of the weights.
    """

    weights: int
    gradients: int
    states: int
    gathered: int
    activations: int
    buffers: int
    host: int

    @property
    def device(self) -> int:
        return self.weights + self.gradients + self.states + self.gathered + self.activations + self.buffers


def memory(config: Config, stage: Stage, *, world: int, micro: int, n_parameters: int) -> Memory:
    """The estimate for one of ``world`` ranks at micro-batch ``micro``."""
    spec = config.backbone()
    size = 2 if config.train.dtype == "bf16" else 4
    share = -(-n_parameters // world)
    largest = max(sum(p.numel for p in unit) for unit in spec.parameters().values())
    weights = size * (share if stage == 3 else n_parameters)
    gradients = size * (share if stage >= 2 else n_parameters)
    owned = share if stage >= 1 else n_parameters
    adam = owned * (8 + (4 if size == 2 else 0))
    ema = owned * 4
    host = 0
    if config.deepspeed.offload_optimizer == "cpu":
        host, adam = host + adam + 4 * owned, 0  # with the gradients that the step on the host reads
    if config.deepspeed.offload_param == "cpu":
        host, weights = host + weights, 0
    if config.engine.ema_device == "cpu" or config.deepspeed.offload_optimizer == "cpu":
        host, ema = host + ema, 0
    sizes = [(bucket[0] // config.factor, bucket[1] // config.factor) for bucket in config.buckets] or [
        spec.latent_size
    ]
    activations = max(spec.saved_bytes(micro, size, config.engine.checkpointing, each).peak for each in sizes)
    gathered = 2 * largest * size if stage == 3 else 0
    buffers = size * reduce_bucket(config, n_parameters) if stage else 0
    return Memory(weights, gradients, adam + ema, gathered, activations, buffers, host)


def reduce_bucket(config: Config, n_parameters: int) -> int:
    """Elements of DeepSpeed's reduction bucket: all of the model as it is stored, at most 5e8, never less than a unit.

    A bucket that is smaller by the flat layout's padding alone would be emptied twice a step. It is allocated whole.
    """
    flat = config.engine.layout == "flat"

    def stored(numel: int) -> int:
        return numel + -numel % ALIGN if flat else numel

    backbone = config.backbone()
    units = [sum(stored(spec.numel) for spec in unit) for unit in backbone.parameters().values()]
    encoder = config.text_encoder(1)
    layers = [spec.numel for spec in encoder.parameters()["embedding"][1:]] if encoder else []
    table = max(0, n_parameters - backbone.param_counts().total - sum(layers))  # of word vectors, of any length
    text = stored(table) + sum(map(stored, layers))
    return max(*units, min(int(5e8), sum(units) + text))


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

    Raises ConfigError naming what stage 3 would need when none does.
    """
    needed = None
    for stage in STAGES:
        if stage < 3 and config.deepspeed.offload_param == "cpu":
            continue
        if stage < 1 and config.deepspeed.offload_optimizer == "cpu":
            continue
        needed = memory(config, stage, world=world, micro=micro, n_parameters=n_parameters)
        if free.holds(needed):
            return cast("Stage", stage)
    assert needed is not None
    raise ConfigError(
        f"deepspeed.zero_stage auto: even stage 3 on {world} rank(s) needs {readable(needed.device)} a rank "
        f"and {readable(needed.host)} of host memory; free are {free}, of which {MARGIN:.0%} may be used",
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
