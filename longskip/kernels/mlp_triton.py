"""The feed-forward layers by our kernels: two custom ops each, which save x and what lies before the activation.

The activation is made in the epilogue of our own product (``mlp_gemm_triton``), or in one pass after cuBLAS's
(``mlp_pointwise_triton``): the tables say which, product by product; until they do, cuBLAS makes all products. Either
way it is not saved: the backward makes it again, in the pass that makes the gradient before it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longskip.kernels import jit, library
from longskip.kernels import mlp_gemm_triton as fused
from longskip.kernels import mlp_pointwise_triton as pointwise
from longskip.kernels.backends import Sizes, register
from longskip.kernels.formulas import mlp_forward, swiglu_forward
from longskip.kernels.gemm_triton import CHOICES, Configuration, choose, column_sums, flat, products, unfit_sizes

CONFIGURATIONS: dict[str, tuple[Configuration, ...]] = {
    f"{op}_{product}": CHOICES
    for op in ("mlp", "swiglu")
    for product in ("hidden", "out", "hidden_gradient", "input_gradient", "weight_gradient", "out_weight_gradient")
}
# Sums per thread at which the epilogues that read as well as write still hold everything in registers.
_EPILOGUE_SUMS = 64


def _empty(shape: tuple[int, ...] | torch.Size, like: Tensor, want: bool = True) -> Tensor:
    return jit.empty(shape if want else (0,), like.dtype, like.device)


def mlp_out(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, tanh: bool, keep: bool,
    configuration: Configuration | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out ``(..., h_out)``, the hidden values before the activation ``(rows, hidden)``: empty unless ``keep``)."""
    rows, (hidden, width) = flat(x), w1.shape
    out, pre = _empty((*x.shape[:-1], w2.shape[0]), x), _empty((rows.shape[0], hidden), x, keep)
    act = _empty((rows.shape[0], hidden), x)
    tile = choose("mlp_hidden", x, rows.shape[0], hidden, width, configuration)
    if tile is not None:
        fused.gelu_product(rows, w1, b1, pre if keep else None, act, tanh, tile)
    else:
        before = pre if keep else act
        products("mlp_hidden", [(rows, w1.t())], [before], bias=b1, configuration=configuration)
        pointwise.gelu_forward(before, act, tanh)
    products("mlp_out", [(act, w2.t())], [flat(out)], bias=b2, configuration=configuration)
    return out, pre


def mlp_gradients(
    g: Tensor, x: Tensor, pre: Tensor, w1: Tensor, w2: Tensor, tanh: bool, wants: list[bool],
    configuration: Configuration | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, w1, b1, w2 and b2; empty where ``wants`` says no."""
    want_x, want_w1, want_b1, want_w2, want_b2 = wants
    rows, of_out = flat(x), flat(g)
    dx, dw1, dw2 = _empty(x.shape, x, want_x), _empty(w1.shape, x, want_w1), _empty(w2.shape, x, want_w2)
    db1 = None
    act = _empty(pre.shape, x) if want_w2 else None
    if want_x or want_w1 or want_b1:
        dpre = _empty(pre.shape, x)
        sizes = rows.shape[0], w1.shape[0], w2.shape[0]
        tile = choose("mlp_hidden_gradient", x, *sizes, configuration, most_sums=_EPILOGUE_SUMS)
        if tile is not None:
            db1 = fused.gelu_gradient_product(of_out, w2, pre, dpre, act, tanh, tile, sums=want_b1)
        else:
            products("mlp_hidden_gradient", [(of_out, w2)], [dpre], configuration=configuration)
            db1 = pointwise.gelu_backward(pre, dpre, act, tanh, sums=want_b1)
        if want_x:
            products("mlp_input_gradient", [(dpre, w1)], [flat(dx)], configuration=configuration)
        if want_w1:
            pairs = [(dpre.t(), rows)]
            products("mlp_weight_gradient", pairs, [dw1], of_weight=True, configuration=configuration)
    elif act is not None:
        pointwise.gelu_forward(pre, act, tanh)
    if act is not None:
        pairs = [(of_out.t(), act)]
        products("mlp_out_weight_gradient", pairs, [dw2], of_weight=True, configuration=configuration)
    db2 = column_sums(of_out) if want_b2 else _empty((0,), x)
    return dx, dw1, _empty((0,), x) if db1 is None else db1, dw2, db2


def swiglu_out(
    x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, keep: bool, configuration: Configuration | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(out ``(..., h_out)``, gate and up before the activation, ``(rows, hidden)`` each: empty unless ``keep``)."""
    rows, (hidden, width) = flat(x), w_gate.shape
    shape = (rows.shape[0], hidden)
    out, act = _empty((*x.shape[:-1], w_down.shape[0]), x), _empty(shape, x)
    gate, up = _empty(shape, x, keep), _empty(shape, x, keep)
    tile = choose("swiglu_hidden", x, *shape, width, configuration, accumulators=2)
    if tile is not None:
        fused.gated_product(rows, w_gate, w_up, gate if keep else None, up if keep else None, act, tile)
    else:
        before = (gate, up) if keep else (act, _empty(shape, x))
        pairs = [(rows, w_gate.t()), (rows, w_up.t())]
        products("swiglu_hidden", pairs, before, configuration=configuration)
        pointwise.gated_forward(*before, act)
    products("swiglu_out", [(act, w_down.t())], [flat(out)], configuration=configuration)
    return out, gate, up


def swiglu_gradients(
    g: Tensor, x: Tensor, gate: Tensor, up: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, wants: list[bool],
    configuration: Configuration | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of x, w_gate, w_up and w_down; empty where ``wants`` says no."""
    want_x, want_gate, want_up, want_down = wants
    rows, of_out = flat(x), flat(g)
    weights = zip((w_gate, w_up, w_down), wants[1:], strict=True)
    dx, (dw_gate, dw_up, dw_down) = _empty(x.shape, x, want_x), [_empty(w.shape, x, want) for w, want in weights]
    act = _empty(gate.shape, x) if want_down else None
    if want_x or want_gate or want_up:
        dgate, dup = _empty(gate.shape, x), _empty(gate.shape, x)
        sizes = rows.shape[0], w_gate.shape[0], w_down.shape[0]
        tile = choose("swiglu_hidden_gradient", x, *sizes, configuration, most_sums=_EPILOGUE_SUMS)
        if tile is not None:
            fused.gated_gradient_product(of_out, w_down, gate, up, dgate, dup, act, tile)
        else:
            products("swiglu_hidden_gradient", [(of_out, w_down)], [dgate], configuration=configuration)
            pointwise.gated_backward(gate, up, dgate, dup, act)
        if want_x:
            pairs = [(dgate, w_gate), (dup, w_up)]
            products("swiglu_input_gradient", pairs, [flat(dx)], configuration=configuration)
        chosen = [(d, out) for d, out, want in ((dgate, dw_gate, want_gate), (dup, dw_up, want_up)) if want]
        pairs = [(d.t(), rows) for d, _ in chosen]
        outs = [out for _, out in chosen]
        products("swiglu_weight_gradient", pairs, outs, of_weight=True, configuration=configuration)
    elif act is not None:
        pointwise.gated_forward(gate, up, act)
    if act is not None:
        pairs = [(of_out.t(), act)]
        products("swiglu_out_weight_gradient", pairs, [dw_down], of_weight=True, configuration=configuration)
    return dx, dw_gate, dw_up, dw_down


# --- the custom ops --------------------------------------------------------------------------------------------------


def _mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, tanh: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    return mlp_out(x, w1, b1, w2, b2, tanh, keep)


def _fake_mlp(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, tanh: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    pre = (x.numel() // x.shape[-1], w1.shape[0]) if keep else (0,)
    return x.new_empty((*x.shape[:-1], w2.shape[0])), x.new_empty(pre)


def _mlp_flops(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, tanh: bool, keep: bool) -> int:
    rows, (hidden, width), out = x.numel() // x.shape[-1], w1.shape, w2.shape[0]
    return mlp_forward(rows=rows, width=width, hidden=hidden, out=out).flops


def _mlp_backward(
    g: Tensor, x: Tensor, pre: Tensor, w1: Tensor, w2: Tensor, tanh: bool, wants: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return mlp_gradients(g, x, pre, w1, w2, tanh, wants)


def _fake_mlp_backward(
    g: Tensor, x: Tensor, pre: Tensor, w1: Tensor, w2: Tensor, tanh: bool, wants: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    dx, dw1, db1, dw2, db2 = (x.new_empty(s if want else (0,)) for s, want in zip(shapes, wants, strict=True))
    return dx, dw1, db1, dw2, db2


def _mlp_backward_flops(
    g: Tensor, x: Tensor, pre: Tensor, w1: Tensor, w2: Tensor, tanh: bool, wants: list[bool]
) -> int:
    want_x, want_w1, want_b1, want_w2, _ = wants
    (hidden, width), out = w1.shape, w2.shape[0]
    macs = (want_x or want_w1 or want_b1) * out + (want_x + want_w1) * width + want_w2 * out
    return 2 * (x.numel() // width) * hidden * macs


mlp_op = library.custom("mlp", _mlp, _fake_mlp, flops=_mlp_flops)
mlp_backward_op = library.custom("mlp_backward", _mlp_backward, _fake_mlp_backward, flops=_mlp_backward_flops)


def _save_mlp(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, w1, _, w2, _, ctx.tanh, _ = inputs
    ctx.save_for_backward(x, output[1], w1, w2)
    ctx.set_materialize_grads(False)


def _differentiate_mlp(ctx, g, _):  # type: ignore[no-untyped-def]
    wants = list(ctx.needs_input_grad[:5])
    if g is None:
        return (None,) * 7
    gradients = mlp_backward_op(g, *ctx.saved_tensors, ctx.tanh, wants)
    return *(grad if want else None for grad, want in zip(gradients, wants, strict=True)), None, None


library.differentiable(mlp_op, mlp_backward_op, _differentiate_mlp, _save_mlp)


def _swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    return swiglu_out(x, w_gate, w_up, w_down, keep)


def _fake_swiglu(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    kept = (x.numel() // x.shape[-1], w_gate.shape[0]) if keep else (0,)
    return x.new_empty((*x.shape[:-1], w_down.shape[0])), x.new_empty(kept), x.new_empty(kept)


def _swiglu_flops(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, keep: bool) -> int:
    rows, (hidden, width), out = x.numel() // x.shape[-1], w_gate.shape, w_down.shape[0]
    return swiglu_forward(rows=rows, width=width, hidden=hidden, out=out).flops


def _swiglu_backward(
    g: Tensor, x: Tensor, gate: Tensor, up: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, wants: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return swiglu_gradients(g, x, gate, up, w_gate, w_up, w_down, wants)


def _fake_swiglu_backward(
    g: Tensor, x: Tensor, gate: Tensor, up: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, wants: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shapes = (x.shape, w_gate.shape, w_up.shape, w_down.shape)
    dx, dw_gate, dw_up, dw_down = (x.new_empty(s if want else (0,)) for s, want in zip(shapes, wants, strict=True))
    return dx, dw_gate, dw_up, dw_down


def _swiglu_backward_flops(
    g: Tensor, x: Tensor, gate: Tensor, up: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor, wants: list[bool]
) -> int:
    want_x, want_gate, want_up, want_down = wants
    (hidden, width), out = w_gate.shape, w_down.shape[0]
    macs = (want_x or want_gate or want_up) * out + (2 * want_x + want_gate + want_up) * width + want_down * out
    return 2 * (x.numel() // width) * hidden * macs


swiglu_op = library.custom("swiglu", _swiglu, _fake_swiglu, flops=_swiglu_flops)
swiglu_backward_op = library.custom(
    "swiglu_backward", _swiglu_backward, _fake_swiglu_backward, flops=_swiglu_backward_flops
)


def _save_swiglu(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, w_gate, w_up, w_down, _ = inputs
    ctx.save_for_backward(x, output[1], output[2], w_gate, w_up, w_down)
    ctx.set_materialize_grads(False)


def _differentiate_swiglu(ctx, g, *_):  # type: ignore[no-untyped-def]
    wants = list(ctx.needs_input_grad[:4])
    if g is None:
        return (None,) * 5
    gradients = swiglu_backward_op(g, *ctx.saved_tensors, wants)
    return *(grad if want else None for grad, want in zip(gradients, wants, strict=True)), None


library.differentiable(swiglu_op, swiglu_backward_op, _differentiate_swiglu, _save_swiglu)


def _unfit(dtype: torch.dtype, sizes: Sizes) -> str | None:
    return unfit_sizes(dtype, sizes["rows"], sizes["width"], sizes["hidden"], sizes["out"])


def _keeps(*tensors: Tensor | None) -> bool:
    """Whether a backward may come, which needs what lies before the activation."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


@register("mlp", "triton", unusable=jit.unusable, unfit=_unfit)
def mlp_triton(
    x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *, activation: str = "gelu"
) -> Tensor:
    """Saves x, ``(rows, hidden)`` values before the activation and the weights."""
    tensors = (x, w1, b1, w2, b2)
    library.plain("mlp", *tensors)
    out: Tensor = mlp_op(*tensors, activation == "gelu_tanh", _keeps(*tensors))[0]
    return out


@register("swiglu", "triton", unusable=jit.unusable, unfit=_unfit)
def swiglu_triton(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    """Saves x, twice ``(rows, hidden)`` values before the activation and the weights."""
    tensors = (x, w_gate, w_up, w_down)
    library.plain("swiglu", *tensors)
    out: Tensor = swiglu_op(*tensors, _keeps(*tensors))[0]
    return out
