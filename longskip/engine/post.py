"""What a thread of a rank tells the first rank without a collective: through the store that the ranks met at."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from longskip.engine.distributed import lost_neighbour
from longskip.errors import PeerLostError

EVERY = 0.01  # seconds between two looks


class Post:
    """One text of every rank to the first one, by name. A connection of its own: no other user of the store waits for it.

    All values are JSON. Raises PeerLostError where the store is gone, which ends with the first rank's node.
    """

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world = rank, world
        self._store: Any = None
        if world > 1:
            self._store = torch.distributed.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]

    def tell(self, name: str, value: Any) -> None:
        """From a rank other than the first; returns when the store has it."""
        self._ask(lambda store: store.set(_key(name, self.rank), json.dumps(value)))
        self._ask(lambda store: store.add(_key(name, "told"), 1))  # answers: a set alone is sent, and waits for nothing

    def hear(self, name: str, own: Any, pause: Callable[[float], None]) -> list[Any]:
        """Every rank's value in their order, ``own`` the first; ``pause(seconds)`` waits between looks, and may raise."""
        if self.world == 1:
            return [own]
        while self._ask(lambda store: store.add(_key(name, "told"), 0)) < self.world - 1:
            pause(EVERY)
        return [own, *self._ask(lambda store: _taken(store, name, self.world))]

    def _ask(self, act: Callable[[Any], Any]) -> Any:
        try:
            return act(self._store)
        except RuntimeError as error:
            raise lost_neighbour(error, "between two steps") or PeerLostError(
                f"the store that the ranks met at does not answer ({str(error).splitlines()[0][:200]})",
                cure="look at how rank 0 ended; the same command goes on from the last commit",
            ) from None


def _key(name: str, what: int | str) -> str:
    return f"longskip/{name}/{what}"


def _taken(store: Any, name: str, world: int) -> list[Any]:
    keys = [_key(name, rank) for rank in range(1, world)]
    values = [json.loads(value) for value in store.multi_get(keys)]
    for key in (*keys, _key(name, "told")):
        store.delete_key(key)
    return values
