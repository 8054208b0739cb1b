"""Before a run: does it fit, how is it best shared out, how long does it take, and what does it cost? No torch, no GPU.

Every combination of ZeRO stage, micro-batch and activation checkpointing is put through the same closed forms that a run
is held against afterwards: memory (``fitting.py``), FLOPs (``profiling.flop_ledger``), collectives
(``profiling.traffic``), and the time of a step (``profiling.step_time``), measured where the device was, else assumed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from longskip.engine import fitting
from longskip.engine.config import Config, divisors
from longskip.engine.costs import step_cost
from longskip.engine.fitting import GIB, MARGIN, Memory, Stage
from longskip.engine.profiled import subject_of
from longskip.errors import ConfigError
from longskip.profiling import efficiency
from longskip.profiling.flop_ledger import FlopLedger, optimizer_row
from longskip.profiling.hardware import Device, Network
from longskip.profiling.step_time import GPUS_PER_NODE, HostWork, StepTime, step_time
from longskip.profiling.subjects import Subject
from longskip.profiling.traffic import Zero, traffic

__all__ = ["Cluster", "Option", "Plan", "options", "pareto", "plan"]

MOST_DEVICES = 65_536
MOST_PRICE = 1e6  # of a device and hour
MOST_HOST_GIB = 1e6  # of a node
CHECKPOINTING = (0, 2, 1)


@dataclass(frozen=True)
class Cluster:
    """``devices`` GPUs, ``per_node`` of them in a node, ``network`` between the nodes (None: one node). ``host_memory``:
    bytes of a node, None where it is not known and nothing is held against it."""

    device: Device
    devices: int
    per_node: int
    network: Network | None = None
    host_memory: int | None = None

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.per_node)

    def host_bytes(self, memory: Memory) -> int:
        """Bytes of a node's host memory that its GPUs' ranks need."""
        return memory.host * min(self.per_node, self.devices)

    def holds(self, memory: Memory) -> bool:
        """Whether a rank fits its device, and a node's ranks their host; a processor's memory is its host's."""
        if self.device.measured:
            return memory.device + memory.host <= MARGIN * self.device.memory
        host = self.host_memory is None or self.host_bytes(memory) <= MARGIN * self.host_memory
        return host and memory.device <= MARGIN * self.device.memory

    @classmethod
    def of(
        cls,
        device: Device,
        devices: int,
        nodes: int | None,
        network: Network | None,
        host_gib: float | None = None,
    ) -> Cluster:
        """``host_gib``: GiB of a node's host memory. ConfigError for numbers that are none, or devices that do not spread
        evenly over the nodes."""
        if host_gib is not None and not 0 < host_gib <= MOST_HOST_GIB:
            raise ConfigError(
                f"--host-memory {host_gib} is outside 0..{MOST_HOST_GIB:,.0f}", cure="give the GiB that a node has"
            )
        host = None if host_gib is None else round(host_gib * GIB)
        for name, value in (("--gpus", devices), ("--nodes", nodes)):
            if value is not None and not 1 <= value <= MOST_DEVICES:
                raise ConfigError(f"{name} {value} is outside 1..{MOST_DEVICES:,}", cure="give how many there are")
        if device.measured and device.link is None and devices > 1:
            raise ConfigError(
                f"{device.name} is the machine that was measured, one processor; {devices} of it have no link",
                cure="--gpus 1",
            )
        if nodes is None:
            return cls(device, devices, min(devices, GPUS_PER_NODE), network, host)
        if devices % nodes:
            raise ConfigError(
                f"{devices} GPUs do not spread evenly over {nodes} nodes", cure="give a multiple of the nodes"
            )
        return cls(device, devices, devices // nodes, network, host)


@dataclass(frozen=True)
class Option:
    """One way to share the run out: what it needs of a device, and the step it makes."""

    stage: Stage
    micro: int
    accumulation: int
    checkpointing: int
    memory: Memory
    fits: bool
    step: StepTime

    def overrides(self) -> list[str]:
        """What ``longskip train`` takes to run it so."""
        return [
            f"deepspeed.zero_stage={self.stage}", f"train.micro_batch={self.micro}",
            f"engine.checkpointing={self.checkpointing}",
        ]  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """``best``: the option with the most images per second of those that fit, None where none does, and then ``enough`` is
    the smallest number of devices (a power of two times those asked for) that would do. ``given``: the configuration's own
    stage, micro-batch and checkpointing, where it names them. ``steps``, images, tokens and FLOPs are of the whole run.
    ``more_to_host``: settings, not yet made, that put more off to host memory. ``notes``: what is not known of the run."""

    cluster: Cluster
    options: tuple[Option, ...]
    best: Option | None
    given: Option | None
    enough: int | None
    steps: int
    images: int
    tokens: int
    model_flops: int
    six_nd: int
    n_parameters: int
    price_per_hour: float | None
    currency: str
    more_to_host: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> Option | None:
        """What times and costs are of: the configuration's own way where it fits, else the best."""
        return self.given if self.given is not None and self.given.fits else self.best

    def seconds(self, option: Option) -> float:
        """Of all steps, nothing but steps: no evaluation, no checkpoint, no failure."""
        return self.steps * option.step.seconds

    def device_hours(self, option: Option) -> float:
        return self._hours(option.step.seconds)

    def cost(self, option: Option) -> float | None:
        return self._cost(option.step.seconds)

    def kilowatt_hours(self, option: Option) -> float | None:
        """At the boards' power limit; processors, network and cooling come on top."""
        return self._kilowatt_hours(option.step.seconds)

    def ends(self, option: Option) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of what follows from the step's time, every assumption at one end or the other."""
        step = option.step
        least, most = step.fastest, step.slowest
        found = {
            "seconds_per_step": (least, most),
            "images_per_second": (step.images / most, step.images / least),
            "days": (self.steps * least / 86400, self.steps * most / 86400),
            "device_hours": (self._hours(least), self._hours(most)),
        }
        for name, share in (("mfu", step.mfu), ("hfu", step.hfu)):
            if share is not None:
                found[name] = (share * step.seconds / most, share * step.seconds / least)
        for name, of in (("cost", self._cost), ("kilowatt_hours", self._kilowatt_hours)):
            low, high = of(least), of(most)
            if low is not None and high is not None:
                found[name] = (low, high)
        return found

    def _hours(self, step: float) -> float:
        return self.steps * step * self.cluster.devices / 3600

    def _cost(self, step: float) -> float | None:
        return None if self.price_per_hour is None else self._hours(step) * self.price_per_hour

    def _kilowatt_hours(self, step: float) -> float | None:
        watts = self.cluster.device.watts
        return None if watts is None else self._hours(step) * watts / 1000


def plan(
    config: Config,
    cluster: Cluster,
    *,
    name: str = "",
    price_per_hour: float | None = None,
    measured: efficiency.Efficiencies | None = None,
    encoders: str = "auto",
) -> Plan:
    """The plan of a run on a cluster; prices per device and hour go before the configuration's. ``name``: the run's, where
    the configuration has none, whose words are counted if it is there already. ``encoders``: as ``subject_of``.

    ConfigError where ``train.batch_size`` does not divide over the devices, the device has no rate for the dtype, or a
    number is beyond all that can be meant.
    """
    price = config.budget.price_per_device_hour if price_per_hour is None else price_per_hour
    _check(price)
    subject = subject_of(config, name, encoders)
    n_parameters = subject.parameters
    found = options(config, cluster, subject, measured=measured)
    fitting_ones = [option for option in found if option.fits]
    batch = config.batch(cluster.devices, None if config.train.micro_batch or config.train.accumulation else 1)
    cost = step_cost(config, batch, n_parameters)
    steps = config.train.steps
    return Plan(
        cluster=cluster,
        options=tuple(found),
        best=min(fitting_ones, key=_order, default=None),
        given=_given(config, cluster, found),
        enough=None if fitting_ones else _enough(config, cluster, n_parameters),
        steps=steps,
        images=steps * cost.images,
        tokens=steps * cost.tokens,
        model_flops=steps * cost.model_flops,
        six_nd=steps * cost.six_nd,
        n_parameters=n_parameters,
        price_per_hour=price,
        currency=config.budget.currency,
        more_to_host=_more_to_host(config),
        notes=tuple(note for note in subject.notes if note.startswith(("the captions", "the data"))),
    )


def _check(price: float | None) -> None:
    if price is not None and not 0 <= price <= MOST_PRICE:
        raise ConfigError(
            f"a price of {price} a device and hour is outside 0..{MOST_PRICE:,.0f}",
            cure="give what one GPU costs in an hour (--price, budget.price_per_device_hour)",
        )


def _more_to_host(config: Config) -> tuple[str, ...]:
    """What could still be put off to the host."""
    own = config.deepspeed
    ways = (
        ("engine.ema_device=cpu", config.engine.ema_device == "cpu" or own.offload_optimizer == "cpu"),
        ("deepspeed.offload_optimizer=cpu", own.offload_optimizer == "cpu" or own.zero_stage == 0),
        ("deepspeed.offload_param=cpu", own.offload_param == "cpu" or own.zero_stage not in (3, "auto")),
    )
    return tuple(way for way, done in ways if not done)


def _order(option: Option) -> tuple[float, int, int]:
    """The fastest first, of equally fast ones (in six figures) the one that needs the least memory."""
    return -float(f"{option.step.images_per_second:.6g}"), option.memory.device, option.memory.host


def options(
    config: Config, cluster: Cluster, subject: Subject, *, measured: efficiency.Efficiencies | None = None
) -> list[Option]:
    """Every stage × micro-batch × checkpointing that the batch and the configuration allow, those that do not fit too."""
    if measured is None:
        measured = efficiency.of_device(cluster.device.name, config.train.dtype)
    return [
        _option(each, cluster, stage, micro, subject, measured)
        for each in _checkpointed(config)
        for stage in _stages(config)
        for micro in _micros(config, cluster.devices)
    ]


def pareto(found: Iterable[Option]) -> list[Option]:
    """Of the options that fit those that no other beats in both memory and images per second, the fastest first."""
    best: list[Option] = []
    least = math.inf
    for option in sorted(found, key=_order):
        if option.fits and option.memory.device < least:
            best.append(option)
            least = option.memory.device
    return best


def _micros(config: Config, world: int) -> list[int]:
    total = config.train.batch_size
    if total % world:
        raise ConfigError(
            f"train.batch_size {total} does not divide over {world} GPUs",
            cure=f"take one of {', '.join(map(str, divisors(total)[-8:]))} GPUs, or another batch",
        )
    return divisors(total // world)


def _stages(config: Config) -> Iterator[Stage]:
    for stage in fitting.STAGES:
        if stage < 3 and config.deepspeed.offload_param == "cpu":
            continue
        if stage < 1 and config.deepspeed.offload_optimizer == "cpu":
            continue
        yield stage


def _checkpointed(config: Config) -> list[Config]:
    wanted = dict.fromkeys((*CHECKPOINTING, config.engine.checkpointing))
    return [
        config.model_copy(update={"engine": config.engine.model_copy(update={"checkpointing": every})})
        for every in wanted
    ]


def _option(
    config: Config,
    cluster: Cluster,
    stage: Stage,
    micro: int,
    subject: Subject,
    measured: efficiency.Efficiencies | None,
) -> Option:
    spec, world, dtype = subject.spec, cluster.devices, config.train.dtype
    accumulation = config.train.batch_size // (world * micro)
    needed = fitting.memory(config, stage, world=world, micro=micro, n_parameters=subject.parameters)
    subject = replace(subject, batch=micro, checkpointing=config.engine.checkpointing)
    owned = -(-subject.parameters // world) if stage else subject.parameters
    ledger, host = _put_off(config, subject.ledger(updated=owned), cluster.device, owned, accumulation, subject)
    collectives = traffic(
        spec.parameters(),
        text=subject.text.parameters()["embedding"] if subject.text else (),
        world=world,
        stage=stage,
        dtype_bytes=subject.itemsize,
        layout=config.engine.layout,
        accumulation=accumulation,
        checkpointing=config.engine.checkpointing,
        clip=config.optim.clip > 0,
        zero=Zero(overlap=not cluster.device.measured, offload=config.deepspeed.offload_optimizer == "cpu"),
    )
    step = step_time(
        ledger,
        cluster.device,
        dtype=dtype,
        measured=measured,
        accumulation=accumulation,
        world=world,
        collectives=collectives,
        gpus_per_node=cluster.per_node,
        network=cluster.network,
        host=host,
    )
    return Option(stage, micro, accumulation, config.engine.checkpointing, needed, cluster.holds(needed), step)


def _put_off(
    config: Config, ledger: FlopLedger, device: Device, owned: int, accumulation: int, subject: Subject
) -> tuple[FlopLedger, HostWork | None]:
    """The ledger without what the host does, and that: bytes that cross, bytes that the host's processor moves.

    Of ``owned`` parameters, ``size`` bytes each as they are trained. The states put off: gradients go down in every
    micro-batch, in all but the first their sum comes up to be added to, updated weights come up; AdamW's pass is the
    host's. The weights put off: up for forward and backward of every micro-batch, and down after a step of the device. The
    average alone: fp32 weights go down, and three values a parameter are read or written. A device that is the host
    itself has no way to go, and its ledger has the work.
    """
    states, weights = config.deepspeed.offload_optimizer == "cpu", config.deepspeed.offload_param == "cpu"
    average = config.engine.ema_device == "cpu" and not states
    if device.measured or not (states or weights or average):
        return ledger, None
    size = subject.itemsize
    transferred = touched = 0
    if weights:
        transferred += size * owned * (2 * accumulation + (0 if states else 1))
    if states:
        touched += sum(row.forward.bytes for row in ledger.rows if row.part == "optimizer")
        transferred += size * owned * (2 * accumulation - 1 + (0 if weights else 1))
    elif average:
        transferred, touched = transferred + 4 * owned, touched + 12 * owned
        kept = [row for row in ledger.rows if row.part != "optimizer"]
        step = optimizer_row(owned, ema=False, clip=subject.clip, copies=0 if size == 4 else size)
        ledger = replace(ledger, rows=(*kept, step))
    return ledger, HostWork(transferred, touched, optimizer=states)


def _given(config: Config, cluster: Cluster, found: Sequence[Option]) -> Option | None:
    """The option that the configuration names by its micro-batch or accumulation, and by its stage."""
    if config.train.micro_batch is None and config.train.accumulation is None:
        return None
    micro = config.batch(cluster.devices).micro
    alike = [o for o in found if o.micro == micro and o.checkpointing == config.engine.checkpointing]
    stage = config.deepspeed.zero_stage
    if stage == "auto":
        return next((o for o in alike if o.fits), None)
    return next((o for o in alike if o.stage == stage), None)


def _enough(config: Config, cluster: Cluster, n_parameters: int) -> int | None:
    """More devices on which stage 3, with every block checkpointed and one picture at a time, fits."""
    frugal = _checkpointed(config)[CHECKPOINTING.index(1)]
    world = cluster.devices
    while (world := 2 * world) <= min(MOST_DEVICES, config.train.batch_size):
        if config.train.batch_size % world:
            continue
        needed = fitting.memory(frugal, cast("Stage", 3), world=world, micro=1, n_parameters=n_parameters)
        per_node = min(world, max(cluster.per_node, GPUS_PER_NODE)) if cluster.nodes == 1 else cluster.per_node
        if replace(cluster, devices=world, per_node=per_node).holds(needed):
            return world
    return None


def as_json(found: Plan) -> dict[str, Any]:
    """The plan as JSON values: sums, the chosen option in full, every option in short."""
    cluster, chosen = found.cluster, found.chosen

    def short(option: Option) -> dict[str, Any]:
        return {
            "zero_stage": option.stage, "micro_batch": option.micro, "accumulation": option.accumulation,
            "checkpointing": option.checkpointing, "fits": option.fits, "memory_bytes": option.memory.device,
            "host_bytes": option.memory.host, "host_bytes_per_node": cluster.host_bytes(option.memory),
            "seconds_per_step": option.step.seconds,
            "images_per_second": option.step.images_per_second, "mfu": option.step.mfu, "hfu": option.step.hfu,
            "binds": option.step.binds, "seconds_per_step_low": option.step.fastest,
            "seconds_per_step_high": option.step.slowest,
        }  # fmt: skip

    whole = None
    if chosen is not None:
        parts = {name: getattr(chosen.memory, name) for name in MEMORY_PARTS}
        whole = short(chosen) | {
            "memory": parts,
            "seconds_by_phase": dict(chosen.step.by_phase), "seconds_by_term": dict(chosen.step.by_term),
            "days": found.seconds(chosen) / 86400, "device_hours": found.device_hours(chosen),
            "cost": found.cost(chosen), "kilowatt_hours": found.kilowatt_hours(chosen),
            "overrides": chosen.overrides(), "assumptions": list(chosen.step.assumptions),
            "measured_share": chosen.step.measured_share,
            "low": {name: low for name, (low, _) in found.ends(chosen).items()},
            "high": {name: high for name, (_, high) in found.ends(chosen).items()},
        }  # fmt: skip
    return {
        "device": cluster.device.name, "devices": cluster.devices, "nodes": cluster.nodes,
        "network": cluster.network.name if cluster.network and cluster.nodes > 1 else None,
        "device_memory_bytes": cluster.device.memory, "usable_share": MARGIN,
        "host_memory_bytes_per_node": cluster.host_memory, "device_source": cluster.device.source,
        "notes": list(found.notes),
        "steps": found.steps, "images": found.images, "tokens": found.tokens, "parameters": found.n_parameters,
        "model_flops": found.model_flops, "six_nd": found.six_nd,
        "price_per_device_hour": found.price_per_hour, "currency": found.currency,
        "chosen": whole, "best": short(found.best) if found.best else None,
        "given": short(found.given) if found.given else None, "enough_devices": found.enough,
        "options": [short(option) for option in found.options],
        "pareto": [short(option) for option in pareto(found.options)],
    }  # fmt: skip


MEMORY_PARTS = ("weights", "gradients", "states", "gathered", "activations", "buffers")


def parts_of(memory: Memory) -> str:
    """Where a device's memory goes, in a line."""
    return ", ".join(f"{name} {getattr(memory, name) / GIB:.1f}" for name in MEMORY_PARTS if getattr(memory, name))
