"""How many bytes of tensors live at most while something runs, whoever makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Within it, ``peak`` is the most bytes of storages made inside that lived at once; those made before do not count.

    Storages on the meta device are none. ``look_inside``: also what our custom ops make for themselves. ``set_apart``
    takes a tensor out of ``peak_apart``, from its beginning on, when it turns out later what it is.
    """

    def __init__(self, look_inside: bool = False) -> None:
        super().__init__()
        self.peak = 0
        self._look_inside = look_inside
        self._made: dict[int, tuple[StorageWeakRef, int, int]] = {}
        self._events: list[tuple[int, int]] = []  # (number of the storage, bytes that come or go)
        self._apart: set[int] = set()
        self._count = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(value)._cdata for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)}
        self._bury()
        if self._look_inside and op.namespace == "longskip":
            with self:
                out = OPDEFS[op._schema.name]._init_fn(*args, **(kwargs or {}))
        else:
            out = op(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if not isinstance(value, torch.Tensor) or value.device.type == "meta":
                continue
            storage = _storage(value)
            if storage._cdata not in given | self._made.keys():
                self._count += 1
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes(), self._count)
                self._events.append((self._count, storage.nbytes()))
        self.peak = max(self.peak, sum(size for _, size, _ in self._made.values()))
        return out

    def _bury(self) -> None:
        for key in [key for key, (reference, _, _) in self._made.items() if reference.expired()]:
            _, size, number = self._made.pop(key)
            self._events.append((number, -size))

    def now(self) -> int:
        """Bytes that live at this moment."""
        self._bury()
        return sum(size for _, size, _ in self._made.values())

    def set_apart(self, tensor: torch.Tensor) -> None:
        """Leave the tensor's storage out of ``peak_apart``; nothing where it was made before."""
        made = self._made.get(_storage(tensor)._cdata)
        if made is not None:
            self._apart.add(made[2])

    @property
    def peak_apart(self) -> int:
        """The most bytes at once, without what was set apart."""
        live = most = 0
        for number, size in self._events:
            live += 0 if number in self._apart else size
            most = max(most, live)
        return most


def _storage(value: torch.Tensor) -> torch.UntypedStorage:
    return value.untyped_storage()
