"""What must be the same on all ranks, as integers that are compared every so many steps.

A digest of tensors is Σ xᵢ·(2i + 1) mod 2⁶⁴ over the bits xᵢ of their elements as integers. It hangs on the order, is exact in
whatever order a device adds, and one flipped bit always changes it: by 2ᵏ times an odd number.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from longskip.engine.config import Config, leaves
from longskip.engine.shards import KINDS, Shards
from longskip.errors import DesyncError

PIECE = 1 << 20
"""Elements that are digested at a time: what is needed beside the tensors is two times as many 8-byte integers."""

# Settings that may differ from node to node: where the same things lie, and how many processes read them.
_OF_A_NODE = ("data.path", "data.mix", "data.validation", "data.cache", "data.workers", "encoders.vae.path",
              "encoders.text.path")  # fmt: skip

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(tensor: torch.Tensor, odd: torch.Tensor | None = None) -> torch.Tensor:
    """The digest of one tensor of any dtype and shape: a 0-d int64 tensor on its device.

    ``odd``: the odd numbers from 1 on, as many as there are elements in a piece, or more; made where they are not given.
    """
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    odd = odd_numbers(bits.numel(), bits.device) if odd is None else odd
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for number, piece in enumerate(bits.split(PIECE)):
        wide = piece.to(torch.int64)
        total = total + (wide * odd[: wide.numel()]).sum()
        if number:  # (2(i + number·PIECE) + 1) = (2i + 1) + 2·number·PIECE
            total = total + 2 * number * PIECE * wide.sum()
    return total


def odd_numbers(count: int, device: torch.device) -> torch.Tensor:
    """The first ``count`` odd numbers, or those of one piece."""
    return torch.arange(1, 2 * min(PIECE, count), 2, dtype=torch.int64, device=device)


def digest_text(value: Any) -> int:
    """A signed 64-bit integer of a JSON value: the first 8 bytes of its BLAKE2."""
    text = json.dumps(value, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def of_config(config: Config) -> int:
    """The digest of all settings that every node must have alike."""
    tree = leaves(config.model_dump(mode="json"))
    return digest_text({key: value for key, value in tree if not key.startswith(_OF_A_NODE)})


def replicated(shards: Shards) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and views of what every rank has whole.

    What the model computes with at stages 0 to 2; at stage 0 the fp32 weights, moments and EMA as well; at stage 3 the
    small parameters that DeepSpeed leaves gathered between steps.
    """
    for name, parameter, start, shape in shards.model.canonical():
        if shards.stage < 3 or _gathered(parameter):
            yield f"weights {name}", parameter.detach().view(-1)[start : start + math.prod(shape)]
    if shards.stage == 0:
        own = {id(parameter) for parameter in shards.parameters}
        for item in shards.slices:
            for kind in KINDS:
                if kind != "weight" or id(item.master) not in own:
                    yield f"{kind} {item.name}", shards.tensor(item, kind)


def flip(shards: Shards) -> None:
    """Flip one bit of this rank's copy of what all ranks have: what the fault action ``flip`` does."""
    _, first = next(replicated(shards))
    first.view(_INTEGERS[first.element_size()])[0] ^= 1


def _gathered(parameter: Any) -> bool:
    return parameter.ds_persist and parameter.numel() == parameter.ds_numel  # type: ignore[no-any-return]


def compare(
    figures: dict[str, int], tensors: Iterable[tuple[str, torch.Tensor]], step: int, device: torch.device
) -> None:
    """Return where ``figures`` and ``tensors`` are the same on all ranks, else raise DesyncError on all of them.

    One small collective; a second one, where tensors differ, to name the first that does. Every rank gives the same names
    in the same order.
    """
    named = list(tensors)
    largest = max((tensor.numel() for _, tensor in named), default=0)
    odd = {place: odd_numbers(largest, place) for place in {tensor.device for _, tensor in named}}
    each = [digest(tensor, odd[tensor.device]).to(device) for _, tensor in named]
    whole = digest(torch.stack(each)) if each else torch.zeros((), dtype=torch.int64, device=device)
    own = torch.cat([torch.tensor(list(figures.values()), dtype=torch.int64, device=device), whole.view(1)])
    table = _everyone(own)
    found = [told for number, name in enumerate(figures) if (told := _difference(name, [row[number] for row in table]))]
    if len({row[-1] for row in table}) > 1:
        columns = list(zip(*_everyone(torch.stack(each)), strict=True))
        differing = [(name, column) for (name, _), column in zip(named, columns, strict=True) if len(set(column)) > 1]
        more = f" ({len(differing)} tensors differ)" if len(differing) > 1 else ""
        found += [_difference(name, column) + more for name, column in differing[:1]]
    if found:
        error = DesyncError(
            f"ranks differ at step {step} in what must be the same on all: {'; '.join(found)}; nothing was saved since "
            "ranks were last found alike",
            cure="start the run again: all ranks load the last checkpoint; where it happens again, look for a rank with "
            "failing memory or another version of the software",
        )
        error.alike = True
        raise error


def _everyone(own: torch.Tensor) -> list[list[int]]:
    """Every rank's int64 vector, in rank order."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [own.tolist()]
    parts = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own)
    return [part.tolist() for part in parts]


def _difference(name: str, values: Sequence[int]) -> str:
    """Which ranks have another value than most, and both; empty where all have the same."""
    (common, count), *others = Counter(values).most_common()
    if not others:
        return ""
    ranks = [rank for rank, value in enumerate(values) if value != common]
    shown = ", ".join(map(str, ranks[:8])) + (", …" if len(ranks) > 8 else "")
    own = values[ranks[0]]
    rest = f"rank {values.index(common)}" if count == 1 else f"{count} ranks"
    return f"{name}: rank {shown} has {_shown(own)}, {rest} {_shown(common)}"


def _shown(value: int) -> str:
    return str(value) if abs(value) < 1 << 40 else f"{value % (1 << 64):016x}"
