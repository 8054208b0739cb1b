"""Which weights ZeRO-3 gathers when: DeepSpeed's walk through the modules of a micro-batch, without torch.

DeepSpeed (0.19.8, ``partitioned_param_coordinator``) takes down the order of the modules in the first micro-batch. From the
second on it fetches what a module needs and does not have, fetches ahead along that order until the prefetch bucket is
full, and lets go of what is not needed again soon. What is fetched at once is one all-gather.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["Call", "Coordinator", "Gather", "Passes", "passes"]


class Call(NamedTuple):
    """A module is entered: ``unit`` None is one that holds no parameters itself. ``ends``: the unit's hook for letting go
    comes before the next call."""

    unit: str | None
    backward: bool
    ends: bool = False


class Passes(NamedTuple):
    """A micro-batch: the calls in order, and the units whose backward pass has no hook at its end."""

    calls: tuple[Call, ...]
    open_ended: frozenset[str]


class Gather(NamedTuple):
    """One all-gather: ``elements`` with the padding to equal shares, in which pass, on demand or ahead of it."""

    elements: int
    backward: bool
    ahead: bool


def passes(units: Sequence[str], *, text: bool, checkpointing: int, time_gradient: bool) -> Passes:
    """The calls of a backbone of ``units`` (in order: embed, blocks.0, …, head), with a trained text encoder or not.

    Every ``checkpointing``-th block is entered once more in the backward pass, after it has been gathered for that; it is
    computed only up to the last tensor that is needed, so that no end of a forward pass is seen. ``time_gradient``: the
    embedding's second output has a gradient too, which enters it twice. A unit without an input that has a gradient (the
    text encoder, or the embedding without one) is let go when the whole backward pass is over.
    """
    open_ended = frozenset({"text"} if text else units[:1])
    holders = [Call(None, False), *([Call("text", False, True)] if text else []), Call(None, False)]
    calls = holders + [Call(unit, False, True) for unit in units] + [Call(None, True), Call(None, True)]
    for index in range(len(units) - 1, -1, -1):
        unit = units[index]
        block = unit.removeprefix("blocks.")
        again = bool(checkpointing) and block.isdecimal() and int(block) % checkpointing == 0
        twice = again or (index == 0 and time_gradient)
        calls += [Call(unit, True)] * twice + [Call(unit, True, unit not in open_ended)]
    return Passes(tuple(calls + ([Call("text", True)] if text else [])), open_ended)


@dataclass(frozen=True)
class Limits:
    """In elements: what is small enough to stay gathered between steps, how far to fetch ahead, how much may be gathered
    at a time before fetching ahead stops, within how many elements a tensor that comes again is kept."""

    persistence: int
    prefetch: int
    max_live: int
    max_reuse: int


class Coordinator:
    """What is gathered, micro-batch by micro-batch; ``tensors``: unit → elements of each of its stored tensors."""

    def __init__(self, tensors: Mapping[str, Sequence[int]], walk: Passes, world: int, limits: Limits) -> None:
        self.walk, self.limits = walk, limits
        self.sizes = [size for unit in tensors.values() for size in unit]
        self.padded = [size + -size % world for size in self.sizes]
        first, self.of = 0, dict[str | None, range]({None: range(0)})
        for unit, own in tensors.items():
            self.of[unit] = range(first, first + len(own))
            first += len(own)
        self.small = {index for index, size in enumerate(self.sizes) if size <= limits.persistence}
        self.available: set[int] = set()
        self.most = 0  # elements that were gathered at once in the last backward pass that was walked through
        self.micro_batches = 0
        # DeepSpeed decides once for each place in the order what to let go of there, and remembers it.
        self._let_go: dict[int, frozenset[int]] = {}
        self._last: tuple[set[int], list[Gather]] | None = None
        self._passed = [0]  # elements of the modules before each call
        for call in walk.calls:
            self._passed.append(self._passed[-1] + sum(self.sizes[index] for index in self.of[call.unit]))

    def micro_batch(self) -> list[Gather]:
        """The all-gathers of the next one, in order."""
        self.micro_batches += 1
        if self.micro_batches == 1:
            return list(self._first())
        if self._last is not None and self._last[0] == self.available:
            return self._last[1]  # the same place to start from, every decision remembered: the same again
        start, known = set(self.available), len(self._let_go)
        gathers = list(self._ordered())
        self._last = (start, gathers) if len(self._let_go) == known else None
        return gathers

    def update(self) -> list[int]:
        """The weights have changed: everything is dropped, and the small tensors are gathered one by one."""
        self.available = set(self.small)
        return [self.padded[index] for index in sorted(self.small)]

    def _first(self) -> Iterator[Gather]:
        """The order is taken down: every unit for itself in each pass, and let go of with its small tensors."""
        for call in self.walk.calls:
            yield from self._gather([index for index in self.of[call.unit] if index not in self.available], call, False)
            if call.ends:
                self.available.difference_update(self.of[call.unit])
        self._end()

    def _ordered(self) -> Iterator[Gather]:
        self.most = 0
        queue = deque((index, at) for at, call in enumerate(self.walk.calls) for index in self.of[call.unit])
        reached: dict[int, int] = {}  # tensor → the furthest call for which the queue has given it out
        live = 0
        for at, call in enumerate(self.walk.calls):
            missing = [index for index in self.of[call.unit] if index not in self.available]
            live += sum(self.sizes[index] for index in missing)
            yield from self._gather(missing, call, False)
            for _ in [index for index in self.of[call.unit] if reached.get(index, -1) < at]:
                index, place = queue.popleft()
                reached[index] = place
            ahead, elements = list[int](), 0
            room = min(self.limits.max_live - live, self.limits.prefetch)
            while queue and elements < room:
                index, place = queue.popleft()
                reached[index] = max(reached.get(index, -1), place)
                if index not in self.available and index not in ahead:
                    ahead.append(index)
                    elements += self.sizes[index]
            live += elements
            yield from self._gather(ahead, call, True)
            if call.backward:
                self.most = max(self.most, sum(self.padded[index] for index in self.available))
            if call.ends:
                if at not in self._let_go:
                    self._let_go[at] = self._not_needed_soon(at, reached)
                gone = self._let_go[at] & self.available
                live -= sum(self.sizes[index] for index in gone)
                self.available -= gone
        self._end()

    def _not_needed_soon(self, at: int, reached: Mapping[int, int]) -> frozenset[int]:
        unit = self.walk.calls[at].unit
        again = next(
            (later for later in range(at + 1, len(self.walk.calls)) if self.walk.calls[later].unit == unit), None
        )
        if again is not None and self._passed[again] - self._passed[at + 1] < self.limits.max_reuse:
            return frozenset()
        return frozenset(i for i in self.of[unit] if i not in self.small and reached.get(i, -1) <= at + 1)

    def _gather(self, indices: Sequence[int], call: Call, ahead: bool) -> Iterator[Gather]:
        if indices:
            self.available.update(indices)
            yield Gather(sum(self.padded[index] for index in indices), call.backward, ahead)

    def _end(self) -> None:
        for unit in self.walk.open_ended:
            self.available.difference_update(index for index in self.of[unit] if index not in self.small)
