"""What really goes over the process groups: every collective with its dtype and bytes, and the time waited in them.

``Trace`` is for counting: it sees each collective at the last place before torch's process groups, whoever makes it and
through whatever function, but slows every op down. ``Waits`` is for a whole run: two looks at a clock per collective.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longskip.engine.config import Config
from longskip.errors import ConfigError, LongskipError
from longskip.profiling.traffic import Collective, Kind, Zero, traffic


class Payload(NamedTuple):
    """One kind of op of torch's ``c10d``: the collective that it is, and the argument whose bytes are its payload."""

    kind: Kind
    argument: int


# Convention of profiling.traffic: what is reduced or sent as it goes in, what is gathered as it comes out.
PAYLOADS = {
    "allreduce": Payload("all_reduce", 0),
    "allreduce_coalesced": Payload("all_reduce", 0),
    "allgather": Payload("all_gather", 0),
    "allgather_base": Payload("all_gather", 0),
    "allgather_coalesced": Payload("all_gather", 0),
    "allgather_into_tensor_coalesced": Payload("all_gather", 0),
    "reduce_scatter": Payload("reduce_scatter", 1),
    "reduce_scatter_base": Payload("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": Payload("reduce_scatter", 1),
    "reduce": Payload("reduce", 0),
    "broadcast": Payload("broadcast", 0),
    "barrier": Payload("barrier", -1),
}


class Call(NamedTuple):
    """One collective of this rank: ``op`` is torch's name for it, ``bytes`` its payload."""

    op: str
    kind: Kind
    dtype: str
    bytes: int


class Trace(TorchDispatchMode):
    """Records every collective that this process makes inside the ``with`` block, in order, in ``calls``.

    Raises LongskipError on an op of torch's process groups whose payload is not declared here: it must not count as 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "c10d":
            self.calls.append(_call(op._schema.name.removeprefix("c10d::").strip("_"), args))
        return op(*args, **(kwargs or {}))

    def by_op(self) -> Counter[str]:
        """How often each of torch's ops was called."""
        return Counter(call.op for call in self.calls)

    def by_kind(self) -> dict[Kind, tuple[int, int]]:
        """Kind → (count, bytes), as ``profiling.traffic.total`` gives them."""
        sums: dict[Kind, tuple[int, int]] = {}
        for call in self.calls:
            count, size = sums.get(call.kind, (0, 0))
            sums[call.kind] = (count + 1, size + call.bytes)
        return sums


def _call(op: str, args: Any) -> Call:
    payload = PAYLOADS.get(op)
    if payload is None:
        raise LongskipError(f"c10d::{op} is traced, but what it moves is not declared", cure="add it to trace.PAYLOADS")
    tensors = list(_tensors(args[payload.argument])) if payload.argument >= 0 else []
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors}
    return Call(op, payload.kind, "+".join(sorted(dtypes)), sum(tensor.nbytes for tensor in tensors))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Iterable):
        for item in value:
            yield from _tensors(item)


# -- time ----------------------------------------------------------------------------------------------------------------


class Waits:
    """``seconds`` that this process has stood in collectives, waits for ranks that were not there yet included.

    torch starts every collective in the background and waits for it in ``Work.wait``, at once or, where the caller asked
    for that, later, when what it brings is needed: only the second part of such a one is waited for, and counted. On CUDA
    it is a stream that waits and not the host, often one that runs beside the computation: what a step loses to its
    collectives cannot be read off there.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    def install(self) -> None:
        """From now on every ``Work.wait`` of this process counts."""
        wait, clock = torch.distributed.Work.wait, time.perf_counter

        def timed(work: Any, *args: Any, **kwargs: Any) -> Any:
            begin = clock()
            try:
                return wait(work, *args, **kwargs)
            finally:
                self.seconds += clock() - begin

        torch.distributed.Work.wait = timed  # type: ignore[assignment]


_waits: Waits | None = None


def waits_on(device: torch.device) -> Waits | None:
    """This process's ``Waits``, which count from the first time that they are asked for; None on CUDA."""
    global _waits
    if device.type == "cuda":
        return None
    if _waits is None:
        _waits = Waits()
        _waits.install()
    return _waits


# -- the prediction for a run ------------------------------------------------------------------------------------------

_FIXED = {
    "reduce_scatter": True,
    "contiguous_gradients": True,
    "round_robin_gradients": False,
    "stage3_model_persistence_threshold": None,
}


def predicted(
    config: Config, ds_config: Mapping[str, Any], vocabulary_size: int, world: int, **place: Any
) -> tuple[Collective, ...]:
    """``profiling.traffic`` of a run's step: the configuration, its resolved DeepSpeed JSON (``ds_config.json``), the words
    of its vocabulary (0 without one), its ranks. ``place``: ``logs``, ``step`` and ``gathered`` as there.

    Raises ConfigError where the JSON asks for something that is not predicted.
    """
    asked: dict[str, Any] = ds_config["zero_optimization"]
    odd = [key for key, usual in _FIXED.items() if asked.get(key, usual) != usual]
    odd += [key for key in ("communication_data_type",) if ds_config.get(key) is not None]
    if odd:
        raise ConfigError(f"the traffic of a step with {', '.join(odd)} is not predicted", cure="leave them out")
    text = config.text_encoder(vocabulary_size) if vocabulary_size else None
    names = {
        "reduce_bucket": "reduce_bucket_size",
        "prefetch": "stage3_prefetch_bucket_size",
        "persistence": "stage3_param_persistence_threshold",
        "max_live": "stage3_max_live_parameters",
        "max_reuse": "stage3_max_reuse_distance",
        "sub_group": "sub_group_size",
        "overlap": "overlap_comm",
    }
    return traffic(
        config.backbone().parameters(),
        text=text.parameters()["embedding"] if text else (),
        world=world,
        stage=asked["stage"],
        dtype_bytes=2 if config.train.dtype == "bf16" else 4,
        layout=config.engine.layout,
        accumulation=ds_config["gradient_accumulation_steps"],
        checkpointing=config.engine.checkpointing,
        clip=config.optim.clip > 0,
        zero=Zero(
            offload="offload_optimizer" in asked, **{name: asked[key] for name, key in names.items() if key in asked}
        ),
        **place,
    )
