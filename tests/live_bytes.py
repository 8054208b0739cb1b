"""How many bytes of tensors live at most while something runs, whoever makes them."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Within it, ``peak`` is the most bytes of storages made inside that lived at once; those made before do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_storage(value)._cdata for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)}
        self._made = {key: made for key, made in self._made.items() if not made[0].expired()}
        out = op(*args, **(kwargs or {}))
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor) and _storage(value)._cdata not in given | self._made.keys():
                storage = _storage(value)
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._made.values()))
        return out


def _storage(value: torch.Tensor) -> torch.UntypedStorage:
    return value.untyped_storage()
