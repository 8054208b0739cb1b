"""AdamW with a weight average, on lists of tensors (Loshchilov & Hutter 2019; eps outside the root, decoupled decay).

    g <- grad_scale * g
    m <- beta1 m + (1 - beta1) g,     v <- beta2 v + (1 - beta2) g²
    p <- (1 - lr * decay) p - lr * (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)
    ema <- ema + (1 - ema_decay) (p - ema)

``step`` counts from 1. ``adamw_reference`` is a pure function of its arguments and differentiable (hypergradients go
through it); ``adamw`` updates in place and reads the gradients only. A learning rate of exactly 0 leaves p as it is:
the arithmetic alone would turn -0 into 0 and would let a non-finite gradient through a step that takes none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw  # torch.optim deletes the attribute of that name

from longskip.kernels.arguments import check_device, check_float, check_shape, refuse
from longskip.kernels.backends import register, register_formula, register_triton, serve

Tensors = Sequence[Tensor]


def adamw_reference(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
    emas: Tensors | None = None,
    ema_decay: float = 0.0,
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor] | None]:
    """The definition of ``adamw`` as a pure function: new (params, exp_avgs, exp_avg_sqs, emas or None)."""
    beta1, beta2 = betas
    grads = [g * grad_scale for g in grads]
    new_m = [beta1 * m + (1 - beta1) * g for m, g in zip(exp_avgs, grads, strict=True)]
    new_v = [beta2 * v + (1 - beta2) * g * g for v, g in zip(exp_avg_sqs, grads, strict=True)]
    new_p = []
    for p, m, v in zip(params, new_m, new_v, strict=True):
        if not isinstance(lr, Tensor) and lr == 0.0:
            new_p.append(p.clone())
            continue
        update = (m / (1 - beta1**step)) / ((v / (1 - beta2**step)).sqrt() + eps)
        new_p.append((1 - lr * weight_decay) * p - lr * update)
    if emas is None:
        return new_p, new_m, new_v, None
    return new_p, new_m, new_v, [e + (1 - ema_decay) * (p - e) for e, p in zip(emas, new_p, strict=True)]


@register("adamw", "reference")
def _adamw_in_place(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    emas: Tensors | None = None,
    copies: Tensors | None = None,
    **settings: float | Tensor | tuple[float, float] | int,
) -> None:
    """``adamw_reference``, its results copied over its arguments."""
    new = adamw_reference(params, grads, exp_avgs, exp_avg_sqs, emas=emas, **settings)  # type: ignore[arg-type]
    for old, fresh in zip((params, exp_avgs, exp_avg_sqs, emas), new, strict=True):
        if old is not None and fresh is not None:
            for target, source in zip(old, fresh, strict=True):
                target.copy_(source)
    for target, source in zip(copies or (), params, strict=copies is not None):
        target.copy_(source)


# The CPU kernel of fused AdamW computes whole vectors and the rest of a tensor one value at a time, and the two round
# differently: cutting a 10,007-element tensor in two changes last bits. Padding the rest to this many values makes an
# element's result independent of where its tensor was cut, which re-sharding over other ranks relies on.
_VECTOR = 16
# Scaled gradients go through a scratch of this many values: a whole copy of a large gradient costs more than the step.
_CHUNK = 1 << 18


@register("adamw", "torch")
def _adamw_torch(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
    emas: Tensors | None = None,
    ema_decay: float = 0.0,
    copies: Tensors | None = None,
) -> None:
    """torch's fused AdamW (2.6 to 7.9 times faster than its foreach form on one CPU core) and one foreach lerp."""
    scaled = isinstance(grad_scale, Tensor) or grad_scale != 1.0
    moved = [p.clone() for p in params] if lr == 0.0 else params

    def run(p: Tensors, g: Tensors, m: Tensors, v: Tensors) -> None:
        # The functional adds 1 to its steps, which are tensors of its own type.
        torch_adamw(
            list(p),
            list(g),
            list(m),
            list(v),
            [],
            [torch.tensor(float(step - 1), device=t.device) for t in p],
            fused=True,
            amsgrad=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=eps,
            maximize=False,
        )

    if params[0].device.type != "cpu":
        run(moved, torch._foreach_mul(list(grads), grad_scale) if scaled else grads, exp_avgs, exp_avg_sqs)
    else:
        _run_cut(run, moved, grads, exp_avgs, exp_avg_sqs, grad_scale if scaled else None)
    if emas:
        torch._foreach_lerp_(list(emas), list(params), 1.0 - ema_decay)
    if copies:
        torch._foreach_copy_(list(copies), list(params))


def _run_cut(
    run: Callable[[Tensors, Tensors, Tensors, Tensors], None],
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    grad_scale: float | Tensor | None,
) -> None:
    """``run`` on pieces whose length is a multiple of the vector's; each tensor's tail is padded to one vector."""
    bodies: list[tuple[Tensor, ...]] = []
    tails: list[tuple[Tensor, ...]] = []
    for group in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        flat = tuple(t.view(-1) for t in group)
        whole = flat[0].numel() // _VECTOR * _VECTOR
        if whole:
            bodies.append(tuple(t[:whole] for t in flat))
        if whole < flat[0].numel():
            tails.append(tuple(t[whole:] for t in flat))
    if grad_scale is None:
        if bodies:
            run(*zip(*bodies, strict=True))
    elif bodies:
        scratch = torch.empty(min(_CHUNK, max(p.numel() for p, *_ in bodies)), dtype=params[0].dtype)
        for body in bodies:
            for p, g, m, v in zip(*(t.split(_CHUNK) for t in body), strict=True):
                piece = scratch[: g.numel()]
                run([p], [torch.mul(g, grad_scale, out=piece)], [m], [v])
    if tails:
        # One row of a padded table per tail; the padding is zeros, whose update is finite and is thrown away.
        tables = [torch.zeros(len(tails), _VECTOR, dtype=params[0].dtype) for _ in range(4)]
        for row, tail in enumerate(tails):
            for table, t in zip(tables, tail, strict=True):
                table[row, : t.numel()].copy_(t)
        if grad_scale is not None:
            tables[1].mul_(grad_scale)
        run(*([table] for table in tables))
        for row, tail in enumerate(tails):
            for at in (0, 2, 3):
                tail[at].copy_(tables[at][row, : tail[at].numel()])


@torch.no_grad()
def adamw(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float | Tensor = 1.0,
    emas: Tensors | None = None,
    ema_decay: float = 0.0,
    copies: Tensors | None = None,
) -> None:
    """One AdamW step in place on params, exp_avgs, exp_avg_sqs (and emas); the gradients are only read.

    Lists of contiguous float32 (or all float64) tensors, equally long, of equal shapes; ``step >= 1`` is the count of
    this step; ``grad_scale`` (a number, or a 0-dim tensor so that no device need be waited for) multiplies the
    gradients first. ``emas <- emas + (1 - ema_decay)(new params - emas)``; ``copies``, of any floating dtype, take the new
    params. With lr = 0 the parameters keep their bits.
    Raises KernelArgumentError on anything that does not fit, before anything is written.
    """
    op = "adamw"
    lists = {"grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if emas is not None:
        lists["emas"] = emas
    _check_tensors(op, params, lists)
    if copies is not None:
        _check_copies(op, params, copies)
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= value < math.inf:
            refuse(op, name, value, "a finite number >= 0")
    for name, value in (("betas[0]", betas[0]), ("betas[1]", betas[1])):
        if not 0.0 <= value < 1.0:
            refuse(op, name, value, "0 <= beta < 1")
    if not 0.0 <= ema_decay <= 1.0:
        refuse(op, "ema_decay", ema_decay, "0 <= ema_decay <= 1")
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        refuse(op, "step", step, "an int >= 1", "count the first step as 1")
    if isinstance(grad_scale, Tensor):
        if grad_scale.ndim:
            refuse(op, "grad_scale", f"of shape {tuple(grad_scale.shape)}", "a number or a 0-dim tensor")
    elif not 0.0 <= grad_scale < math.inf:
        refuse(op, "grad_scale", grad_scale, "a finite number >= 0", "skip the step of a non-finite gradient norm")
    if not params:
        return
    serve(
        op,
        params[0],
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        step=step,
        grad_scale=grad_scale,
        emas=emas,
        ema_decay=ema_decay,
        copies=copies,
    )


def _check_tensors(op: str, params: Tensors, lists: dict[str, Tensors]) -> None:
    for name, tensors in lists.items():
        if len(tensors) != len(params):
            refuse(op, name, f"a list of {len(tensors)}", f"{len(params)} tensors, as many as params")
    for name, tensors in {"params": params, **lists}.items():
        for at, (param, tensor) in enumerate(zip(params, tensors, strict=True)):
            if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != params[0].dtype:
                refuse(op, f"{name}[{at}]", f"of dtype {tensor.dtype}", "float32 (or float64) in all lists")
            check_shape(op, f"{name}[{at}]", tensor, param.shape, f"the shape of params[{at}]")
            check_device(op, f"{name}[{at}]", tensor, "params[0]", params[0])
            if not tensor.is_contiguous():
                refuse(op, f"{name}[{at}]", f"of strides {tensor.stride()}", "contiguous tensors", "pass a flat view")


def _check_copies(op: str, params: Tensors, copies: Tensors) -> None:
    if len(copies) != len(params):
        refuse(op, "copies", f"a list of {len(copies)}", f"{len(params)} tensors, as many as params")
    for at, (param, copy) in enumerate(zip(params, copies, strict=True)):
        check_float(op, f"copies[{at}]", copy, param.shape, f"the shape of params[{at}]")
        check_device(op, f"copies[{at}]", copy, "params[0]", params[0])
        if not copy.is_contiguous():
            refuse(op, f"copies[{at}]", f"of strides {copy.stride()}", "contiguous tensors", "pass a flat view")


def _shapes(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    grad_scale: float | Tensor = 1.0,
    emas: Tensors | None = None,
    copies: Tensors | None = None,
    **settings: object,
) -> dict[str, int]:
    return {
        "values": sum(p.numel() for p in params),
        "tensors": len(params),
        "scaled": isinstance(grad_scale, Tensor) or grad_scale != 1.0,
        "emas": emas is not None,
        "copies": 0 if copies is None else copies[0].element_size() if copies else 0,
        "itemsize": params[0].element_size() if params else 4,
    }


register_formula("adamw", _shapes)
register_triton("adamw")
