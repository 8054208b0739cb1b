"""What a model calls in one forward pass, op by op, declared by its shape alone: the source of every cost (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

__all__ = ["TOKENS", "Call", "Counted", "ParameterClass", "TokenClass", "UnitCalls"]

TokenClass = Literal["label", "time", "text", "image"]
ParameterClass = Literal["token", "image", "partial"]
TOKENS: tuple[TokenClass, ...] = ("label", "time", "text", "image")


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an op in a unit's forward pass.

    ``name`` is its role in the unit, as its parameters are named (``attn.qkv``). ``op`` is a key of
    ``models.formulas.FORMULAS``; ``sizes`` are that formula's keywords for the whole batch. ``tokens``: how many rows
    per image it works on, by class, in proportion to which its contractions are shared out (attention's by query).
    ``parameters``: how often its weights act (see ``ParamCounts``), None without any. ``needs_input``: whether its
    input needs a gradient; ``tail``: whether it ends its unit in a product whose result the backward pass does not need,
    so that activation checkpointing does not compute it again.
    """

    name: str
    op: str
    sizes: Mapping[str, int]
    tokens: Mapping[TokenClass, int]
    parameters: ParameterClass | None = None
    needs_input: bool = True
    tail: bool = False


@dataclass(frozen=True, slots=True)
class UnitCalls:
    """The calls of units that all do the same: ``units`` are their names (``blocks.0``, ``blocks.1``, …).

    ``checkpointed``: whether activation checkpointing can compute these units again.
    """

    units: tuple[str, ...]
    calls: tuple[Call, ...]
    checkpointed: bool = field(default=False)


class Counted(Protocol):
    """A backbone's spec that declares its calls; ``latent_size`` and ``n_txt`` None are the spec's own."""

    def calls(
        self,
        batch: int = 1,
        latent_size: tuple[int, int] | None = None,
        n_txt: int | None = None,
        *,
        trained_text: bool = False,
        masked: bool = False,
    ) -> tuple[UnitCalls, ...]: ...
