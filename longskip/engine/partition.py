"""Which rank holds what under ZeRO-3, in closed form and without torch: the same slices that DeepSpeed will make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from longskip.engine.config import Config
from longskip.models.specs import ParamSpec

ALIGN = 64  # elements, as ``models.packed``


class Shard(NamedTuple):
    """``numel`` elements from ``offset`` on of the flattened tensor ``name`` of ``shape``, kept by ``rank``."""

    rank: int
    name: str
    shape: tuple[int, ...]
    offset: int
    numel: int


def tables(config: Config, vocabulary_size: int) -> Iterator[tuple[str, tuple[ParamSpec, ...]]]:
    """(canonical prefix, parameters) of every unit that ZeRO gathers at once, in the model's order."""
    for unit in config.backbone().parameters().values():
        yield "backbone", unit
    text = config.text_encoder(vocabulary_size)
    if text is not None:
        yield "text", text.parameters()["embedding"]


def storages(config: Config, vocabulary_size: int) -> Iterator[list[tuple[str, tuple[int, ...], int]]]:
    """The tensors that are really there, each as its [(canonical name, shape, offset in it)]; padding has no name."""
    for prefix, unit in tables(config, vocabulary_size):
        if config.engine.layout == "named":
            yield from ([(f"{prefix}.{spec.name}", spec.shape, 0)] for spec in unit)
            continue
        for decay in (True, False):
            parts, offset = [], 0
            for spec in unit:
                if spec.decay == decay:
                    parts.append((f"{prefix}.{spec.name}", spec.shape, offset))
                    offset += spec.numel + -spec.numel % ALIGN
            if parts:
                yield parts


def shards(config: Config, vocabulary_size: int, world: int) -> Iterator[Shard]:
    """Every slice of every rank, rank by rank: each tensor is cut into ``world`` equal pieces, the last one padded."""
    laid = [(parts, _size(parts, config.engine.layout == "flat")) for parts in storages(config, vocabulary_size)]
    for rank in range(world):
        for parts, size in laid:
            piece = -(-size // world)
            start, stop = rank * piece, min((rank + 1) * piece, size)
            for name, shape, offset in parts:
                low, high = max(offset, start), min(offset + _numel(shape), stop)
                if low < high:
                    yield Shard(rank, name, shape, low - offset, high - low)


def _size(parts: list[tuple[str, tuple[int, ...], int]], aligned: bool) -> int:
    _, shape, offset = parts[-1]
    end = offset + _numel(shape)
    return end + (-end % ALIGN if aligned else 0)


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
