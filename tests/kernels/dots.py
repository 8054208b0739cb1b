"""An interpreter that counts: the multiply-adds of every ``tl.dot`` that a kernel executes, padding included."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from triton.runtime.interpreter import InterpreterBuilder


class Dots:
    """``macs`` executed so far, and the ``shapes`` (m, n, k) of the products."""

    def __init__(self) -> None:
        self.macs = 0
        self.shapes: set[tuple[int, int, int]] = set()


@contextlib.contextmanager
def counted() -> Iterator[Dots]:
    dots = Dots()
    create = InterpreterBuilder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any, **keywords: Any) -> Any:
        (m, k), n = a.data.shape, b.data.shape[1]
        dots.macs += m * n * k
        dots.shapes.add((m, n, k))
        return create(self, a, b, *rest, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_dot", create_dot)
        yield dots
