"""The FLOP ledger: what a training step executes, op by op, in closed form from the model's own declaration (no torch).

Four kinds of work stand apart and are never mixed:

- **model**: 3 × the forward's contractions, nothing recomputed. C, MFU and the budget mean this.
- **hardware**: the contractions that are really executed: forward, the gradients that something needs, what activation
  checkpointing computes again, what a fused attention's backward repeats, frozen encoders that run along.
- **elementwise**: everything that is no contraction, by the table of ``kernels.formulas`` and ``models.formulas``.
- **padded**: products that our Triton kernels make on tiles beyond the edges of the shapes (``padding.py``).

Contractions are multiply-adds (MACs); FLOPs are 2 per multiply-add. The independent counter (``counting.py``) agrees to
the integer with forward, backward and recomputation, for every attention backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

from longskip.errors import ConfigError
from longskip.kernels.formulas import OpCost
from longskip.models.calls import TOKENS, Call, Counted, TokenClass, UnitCalls
from longskip.models.formulas import FORMULAS

__all__ = ["BACKENDS", "FlopLedger", "Row", "flop_ledger", "loss_rows", "optimizer_row", "rows_of"]

Part = Literal["model", "text", "encoders", "loss", "optimizer"]
BACKENDS = ("reference", "torch", "triton", "flash_attn", "xformers")
_SHORT = (512, 64)  # tokens and head dim up to which the Triton backward is one kernel (attention_backward_triton)
_NOTHING = OpCost()


class Beyond(Protocol):
    """Multiply-adds of a call beyond its shape (``profiling.padding.Padding``)."""

    @property
    def forward(self) -> int: ...
    @property
    def backward(self) -> int: ...


@dataclass(frozen=True)
class Row:
    """An op of units that do the same; all costs are of all ``units`` together.

    ``forward``, ``backward`` (the gradients that something needs) and ``recomputed`` (by activation checkpointing) hold
    multiply-adds, elementwise FLOPs and bytes; ``repeated_macs`` of the backward are a fused attention's second QKᵀ.
    ``padded_macs``: beyond the edges of the tiles. ``tokens``: rows per image by class; ``parameters``: how often the
    weights act (``models.calls``).
    """

    units: tuple[str, ...]
    name: str
    op: str
    forward: OpCost
    backward: OpCost = _NOTHING
    recomputed: OpCost = _NOTHING
    repeated_macs: int = 0
    padded_macs: int = 0
    tokens: Mapping[TokenClass, int] = field(default_factory=dict)
    parameters: str | None = None
    part: Part = "model"
    sizes: Mapping[str, int] = field(default_factory=dict)

    @property
    def trained(self) -> bool:
        return self.part in ("model", "text")

    @property
    def hardware_macs(self) -> int:
        return self.forward.macs + self.backward.macs + self.recomputed.macs + self.repeated_macs

    @property
    def elementwise(self) -> int:
        return self.forward.elementwise + self.backward.elementwise + self.recomputed.elementwise

    @property
    def bytes(self) -> int:
        return self.forward.bytes + self.backward.bytes + self.recomputed.bytes

    @property
    def intensity(self) -> float:
        """Executed FLOPs (contractions and elementwise) per byte moved."""
        return (2 * self.hardware_macs + self.elementwise) / self.bytes if self.bytes else 0.0

    @property
    def kind(self) -> str:
        """The kind of unit: ``embed``, ``block``, ``skip block``, ``head``; elsewhere the part."""
        if self.part != "model":
            return self.part
        return self.units[0] if not self.units[0].startswith("blocks.") else "blocks"


@dataclass(frozen=True)
class FlopLedger:
    """The rows of one step of ``batch`` images, and their sums. All FLOPs are exact integers."""

    rows: tuple[Row, ...]
    batch: int

    def _sum(self, of: Callable[[Row], int]) -> int:
        return sum(map(of, self.rows))

    @cached_property
    def forward_flops(self) -> int:
        """Contractions of the trained model's forward pass."""
        return 2 * self._sum(lambda row: row.forward.macs if row.trained else 0)

    @property
    def model_flops(self) -> int:
        """3 × the forward: C of this step."""
        return 3 * self.forward_flops

    @cached_property
    def backward_flops(self) -> int:
        """The exact backward: the gradients that something needs, nothing repeated or recomputed."""
        return 2 * self._sum(lambda row: row.backward.macs)

    @cached_property
    def recomputed_flops(self) -> int:
        """What activation checkpointing computes again."""
        return 2 * self._sum(lambda row: row.recomputed.macs)

    @cached_property
    def repeated_flops(self) -> int:
        """What a fused attention's backward computes again."""
        return 2 * self._sum(lambda row: row.repeated_macs)

    @cached_property
    def hardware_flops(self) -> int:
        """Everything that is executed, frozen encoders included; without padding."""
        return 2 * self._sum(lambda row: row.hardware_macs)

    @cached_property
    def elementwise_flops(self) -> int:
        return self._sum(lambda row: row.elementwise)

    @cached_property
    def padded_flops(self) -> int:
        """Products beyond the edges, in the tiles of our Triton kernels."""
        return 2 * self._sum(lambda row: row.padded_macs)

    @cached_property
    def bytes(self) -> int:
        """Bytes moved when every op reads its operands and writes its results once."""
        return self._sum(lambda row: row.bytes)

    def by(self, key: Callable[[Row], str | None]) -> dict[str, FlopLedger]:
        """The ledger in parts: rows with the same ``key(row)``, in the order of their first row; None: left out."""
        parts: dict[str, list[Row]] = {}
        for row in self.rows:
            if (name := key(row)) is not None:
                parts.setdefault(name, []).append(row)
        return {name: replace(self, rows=tuple(rows)) for name, rows in parts.items()}

    def forward_by_tokens(self) -> dict[TokenClass, int]:
        """The trained forward's contractions in FLOPs, shared out by the rows each class of token brings."""
        shares = dict.fromkeys(TOKENS, 0)
        for row in self.rows:
            total = sum(row.tokens.values())
            if row.trained and total:
                for name, count in row.tokens.items():
                    shares[name] += 2 * row.forward.macs * count // total  # exact: contractions go by rows
        return shares

    def forward_by_parameters(self) -> dict[str, int]:
        """The trained forward's contractions in FLOPs by how often their weights act: on every token (``token``), once
        per image (``image``), on one kind of token (``partial``), or without weights (``none``: attention)."""
        shares = dict.fromkeys(("token", "image", "partial", "none"), 0)
        for row in self.rows:
            if row.trained:
                shares[row.parameters or "none"] += 2 * row.forward.macs
        return shares

    def per_unit(self) -> FlopLedger:
        """The same with a row for every unit by itself, in the units' order, so that blocks stand one by one."""
        rows = []
        for row in self.rows:
            rows += [_share(row, unit) for unit in row.units]
        order = {unit: at for at, unit in enumerate(_in_order(row.units for row in self.rows))}
        return replace(self, rows=tuple(sorted(rows, key=lambda row: order[row.units[0]])))

    def with_rows(self, rows: Iterable[Row]) -> FlopLedger:
        """With further rows: frozen encoders, the loss, the optimizer."""
        return replace(self, rows=(*self.rows, *rows))


def flop_ledger(
    spec: Counted,
    *,
    batch: int = 1,
    latent_size: tuple[int, int] | None = None,
    n_txt: int | None = None,
    checkpointing: int = 0,
    backend: str | Mapping[str, str] = "torch",
    trained_text: bool = False,
    masked: bool = False,
    itemsize: int = 4,
    padding: Callable[[Call], Beyond] | None = None,
) -> FlopLedger:
    """The ledger of one training step of ``batch`` images, forward and backward.

    ``latent_size`` (H, W) in latents and ``n_txt`` for another resolution or shorter texts; ``checkpointing`` k: every
    k-th block is computed again in the backward pass (0: none). ``backend``: what serves the ops (``reference``,
    ``torch``, ``triton``, or a mapping op → backend with ``all`` for the others): it decides what attention's backward
    repeats and where checkpointing can stop. ``trained_text``: gradients go on into the text features; ``masked``:
    attention is given a key mask. ``itemsize``: bytes per activation and weight (4 float32, 2 bfloat16). ``padding``:
    multiply-adds of a call's tiles beyond its shape on a device (``padding.padding_on``), for ops that Triton serves;
    None books none. ConfigError for a backend that is not known.
    """
    units = spec.calls(batch, latent_size=latent_size, n_txt=n_txt, trained_text=trained_text, masked=masked)
    rows = rows_of(units, checkpointing=checkpointing, backend=backend, itemsize=itemsize, padding=padding)
    return FlopLedger(tuple(rows), batch)


def rows_of(
    units: Sequence[UnitCalls],
    *,
    checkpointing: int = 0,
    backend: str | Mapping[str, str] = "torch",
    itemsize: int = 4,
    padding: Callable[[Call], Beyond] | None = None,
    part: Part = "model",
) -> list[Row]:
    """The rows of declared units; see ``flop_ledger``. A checkpointed unit and one that is not have rows of their own."""
    if checkpointing < 0:
        raise ConfigError(
            f"checkpointing {checkpointing} is below its limit 0", cure="0 none, 1 every block, k every k-th"
        )
    served = {"all": backend} if isinstance(backend, str) else dict(backend)
    for name in served.values():
        if name not in BACKENDS:
            raise ConfigError(f"backend {name!r} is not known", cure=f"one of {', '.join(BACKENDS)}")
    rows: list[Row] = []
    for unit in units:
        again = unit.checkpointed and checkpointing
        kept = tuple(name for name in unit.units if not again or int(name.rpartition(".")[2]) % checkpointing)
        recomputed = tuple(name for name in unit.units if name not in kept) if again else ()
        for names, once_more in ((kept, False), (recomputed, True)):
            if names:
                rows += [
                    _row(
                        call, names, once_more, served.get(call.op, served.get("all", "torch")), itemsize, padding, part
                    )
                    for call in unit.calls
                ]
    return rows


def _row(
    call: Call,
    units: tuple[str, ...],
    recomputed: bool,
    backend: str,
    itemsize: int,
    padding: Callable[[Call], Beyond] | None,
    part: Part,
) -> Row:
    formula, times = FORMULAS[call.op], len(units)
    forward = formula.forward(**call.sizes, itemsize=itemsize)
    backward, repeated = _NOTHING, 0
    if formula.backward is not None and (call.needs_input or call.parameters is not None):
        needs: dict[str, Any] = {} if call.needs_input else {"needs_input": False}
        if call.op == "attention":
            needs = {"recompute": backend != "reference"}
        backward = formula.backward(**call.sizes, itemsize=itemsize, **needs)
        if needs.get("recompute"):
            once = backward.macs - formula.backward(**call.sizes).macs
            backward = replace(backward, macs=backward.macs - once)
            repeated = once * (3 if backend == "triton" and not _short(call) else 1)
    again = _again(call, forward, backend, itemsize) if recomputed else _NOTHING
    padded = 0
    if padding is not None and backend == "triton":
        beyond = padding(call)
        padded = (1 + bool(again.macs)) * beyond.forward + beyond.backward
    return Row(
        units=units,
        name=call.name,
        op=call.op,
        forward=times * forward,
        backward=times * backward,
        recomputed=times * again,
        repeated_macs=times * repeated,
        padded_macs=times * padded,
        tokens=call.tokens,
        parameters=call.parameters,
        part=part,
        sizes=call.sizes,
    )


def _short(call: Call) -> bool:
    longest, widest = _SHORT
    return max(call.sizes["queries"], call.sizes["keys"]) <= longest and call.sizes["head_dim"] <= widest


def _again(call: Call, forward: OpCost, backend: str, itemsize: int) -> OpCost:
    """What checkpointing computes again of a call: all of it, or up to the last tensor that the backward pass needs.

    That is the input of the MLP's second layer where nothing needs its output; a fused MLP is one op and runs whole.
    """
    if not call.tail:
        return forward
    if call.op != "mlp":
        return _NOTHING
    if backend == "triton":
        return forward
    sizes = call.sizes
    rows, hidden = sizes["rows"], sizes["hidden"]
    first = FORMULAS["linear"].forward(rows=rows, width=sizes["width"], out=hidden, bias=1, itemsize=itemsize)
    return first + FORMULAS["gelu"].forward(values=rows * hidden, itemsize=itemsize)


def _in_order(groups: Iterable[Sequence[str]]) -> list[str]:
    """Units as tokens pass them: blocks by their number, whatever rows they stand in, between what comes before and after."""
    seen = dict.fromkeys(unit for group in groups for unit in group)
    blocks = iter(sorted((u for u in seen if u.startswith("blocks.")), key=lambda u: int(u.rpartition(".")[2])))
    return [next(blocks) if unit.startswith("blocks.") else unit for unit in seen]


def _share(row: Row, unit: str) -> Row:
    times = len(row.units)

    def one(cost: OpCost) -> OpCost:
        return OpCost(cost.macs // times, cost.elementwise // times, cost.bytes // times)

    return replace(
        row,
        units=(unit,),
        forward=one(row.forward),
        backward=one(row.backward),
        recomputed=one(row.recomputed),
        repeated_macs=row.repeated_macs // times,
        padded_macs=row.padded_macs // times,
    )


def loss_rows(values: int, batch: int, *, x_kind: bool = False, itemsize: int = 4) -> list[Row]:
    """Noising, and the loss with its gradient, of ``batch`` samples of ``values`` values each."""
    sizes = {"batch": batch, "values": values, "x_kind": int(x_kind)}
    noised = {"values": batch * values}
    loss = FORMULAS["diffusion_loss"]
    assert loss.backward is not None
    return [
        Row(("loss",), "noising", "noising", FORMULAS["noising"].forward(**noised, itemsize=itemsize), part="loss",
            sizes=noised,
        ),
        Row(
            ("loss",), "loss", "diffusion_loss", loss.forward(**sizes, itemsize=itemsize),
            loss.backward(**sizes, itemsize=itemsize), part="loss", sizes=sizes,
        ),
    ]  # fmt: skip


def optimizer_row(n_parameters: int, *, ema: bool = True, clip: bool = True, copies: int = 0) -> Row:
    """AdamW over all parameters, in float32, with the gradient's clip factor and the weights' average; ``copies`` bytes
    of low precision are written back per parameter."""
    sizes = {"values": n_parameters, "scaled": int(clip), "emas": int(ema), "copies": copies}
    return Row(("optimizer",), "adamw", "adamw", FORMULAS["adamw"].forward(**sizes), part="optimizer", sizes=sizes)
