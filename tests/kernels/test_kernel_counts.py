"""Formulas = torch's counter on meta = scalar programs that count every operation, to the integer."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longskip import kernels
from longskip.errors import BackendError
from longskip.kernels import backends
from longskip.kernels.formulas import FORMULAS, OpCost
from tests.kernels import scalar_ops as s
from tests.kernels.kernel_checks import CASES, FLOAT64, PUBLIC, Case, run

CONTRACTIONS = [case for case in CASES if case.op in ("attention", "attention_varlen", "mlp", "swiglu", "skip_linear")]
OTHERS = [case for case in CASES if case not in CONTRACTIONS]


def counted_flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def on_meta(case: Case) -> tuple[dict[str, Tensor], Case]:
    values = {name: torch.empty(shape, device="meta", requires_grad=True) for name, shape in case.inputs.items()}
    # Offsets keep their values: what is counted hangs on them.
    fixed = {n: t if n.startswith("cu_seqlens") else t.to("meta") for n, t in case.fixed.items()}
    return values, Case(case.op, case.label, case.inputs, fixed, case.keywords)


def cost(case: Case, direction: Any = "forward") -> OpCost:
    values, meta = on_meta(case)
    return kernels.op_cost(case.op, **values, **meta.fixed, **meta.keywords, direction=direction)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_forward_macs_equal_the_dispatch_count(case: Case, backend: str) -> None:
    values, meta = on_meta(case)
    with kernels.use(backend):
        assert cost(case).flops == counted_flops(lambda: meta.call(values))
    assert (cost(case).macs > 0) == (case in CONTRACTIONS)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_backward_macs_equal_the_dispatch_count(case: Case) -> None:
    values, meta = on_meta(case)
    with kernels.use("reference"):
        outputs = meta.call(values)
        flops = counted_flops(
            lambda: torch.autograd.grad(
                outputs, list(values.values()), [torch.empty_like(o) for o in outputs], allow_unused=True
            )
        )
    assert cost(case, "backward").flops == flops


@pytest.mark.parametrize("needs", ["needs_input", "needs_weight"])
@pytest.mark.parametrize("op", ["mlp", "swiglu", "skip_linear"])
def test_backward_macs_where_a_gradient_is_not_needed(op: str, needs: str) -> None:
    case = next(c for c in CASES if c.op == op)
    values, meta = on_meta(case)
    rows = {"x", "skip"}
    wanted = [v for name, v in values.items() if (name in rows) == (needs == "needs_input")]
    for value in values.values():
        value.requires_grad_(any(value is w for w in wanted))
    with kernels.use("reference"):
        (out,) = meta.call(values)
        flops = counted_flops(lambda: torch.autograd.grad(out, wanted, torch.empty_like(out)))
    shapes = _shapes(case)
    other = {"needs_input": "needs_weight", "needs_weight": "needs_input"}[needs]
    backward = FORMULAS[op].backward
    assert backward is not None
    assert backward(**shapes, **{needs: True, other: False}).flops == flops


def _shapes(case: Case) -> dict[str, int]:
    values, meta = on_meta(case)
    return backends._SHAPES[case.op](**values, **meta.fixed, **meta.keywords)


# --- the scalar programs -------------------------------------------------------------------------------------------


def nums(tensor: Tensor) -> Any:
    return s.Num(tensor.item()) if tensor.ndim == 0 else [nums(t) for t in tensor]


def floats(value: Any) -> Any:
    return value.value if isinstance(value, s.Num) else [floats(v) for v in value]


def close(ours: Any, tensor: Tensor) -> None:
    result = torch.tensor(floats(ours), dtype=FLOAT64)
    torch.testing.assert_close(result.reshape(tensor.shape), tensor, rtol=1e-10, atol=1e-12)


@pytest.fixture(autouse=True)
def tally() -> Iterator[None]:
    s.TALLY.clear()
    yield
    s.TALLY.clear()


def spent(case: Case, direction: str) -> None:
    expected = cost(case, direction)
    assert (s.TALLY["macs"], s.TALLY["elementwise"]) == (expected.macs, expected.elementwise), direction
    s.TALLY.clear()


def tiny(op: str, inputs: dict[str, tuple[int, ...]], fixed: Any = None, **keywords: Any) -> Case:
    return Case(op, "tiny", inputs, fixed or {}, keywords)


def exact(case: Case) -> tuple[dict[str, Any], dict[str, Tensor], list[Tensor]]:
    """(inputs as nested numbers, outputs and gradients, cotangents), all by the definition in float64."""
    values = case.values()
    named, cotangents = run(case, values, "reference")
    return {name: nums(value) for name, value in values.items()}, named, cotangents


@pytest.mark.parametrize("masked", [False, True])
def test_scalar_attention(masked: bool) -> None:
    mask = torch.tensor([[True, False, True, True], [True, True, False, True]])
    fixed = {"key_mask": mask} if masked else {}
    case = tiny("attention", {"q": (2, 3, 2, 5), "k": (2, 4, 2, 5), "v": (2, 4, 2, 5)}, fixed, scale=0.3)
    n, named, (do,) = exact(case)
    pairs = [(b, h) for b in range(2) for h in range(2)]
    part = {(x, b, h): [row[h] for row in n[x][b]] for x in "qkv" for b, h in pairs}
    results = {
        (b, h): s.attention(*(part[x, b, h] for x in "qkv"), 0.3, mask[b].tolist() if masked else None)
        for b, h in pairs
    }
    spent(case, "forward")
    grads = {
        (b, h): s.attention_grads(nums(do[b, :, h]), *(part[x, b, h] for x in "qkv"), results[b, h][1], 0.3)
        for b, h in pairs
    }
    spent(case, "backward")
    for b, h in pairs:
        close(results[b, h][0], named["out0"][b, :, h])
        for name, grad in zip(("dq", "dk", "dv"), grads[b, h], strict=True):
            close(grad, named[name][b, :, h])


@pytest.mark.parametrize("parts", [(), ("weight",), ("weight", "bias"), ("weight", "bias", "residual"), ("residual",)])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_scalar_norms(op: str, parts: tuple[str, ...]) -> None:
    centre = op == "layer_norm"
    parts = tuple(p for p in parts if centre or p != "bias")
    sizes: dict[str, tuple[int, ...]] = {"weight": (5,), "bias": (5,), "residual": (3, 5)}
    case = tiny(op, {"x": (3, 5), **{p: sizes[p] for p in parts}}, eps=1e-3)
    n, named, cotangents = exact(case)
    out = s.norm(n["x"], n.get("weight"), n.get("bias"), n.get("residual"), 1e-3, centre)
    spent(case, "forward")
    close(out, named[f"out{len(cotangents) - 1}"])
    x = s.plus(n["x"], n["residual"]) if "residual" in parts else n["x"]
    stats = [s.normed(row, 1e-3, centre)[1:] for row in x]
    s.TALLY.clear()  # the statistics are the forward's
    ds = nums(cotangents[0]) if "residual" in parts else None
    grads = s.norm_grads(nums(cotangents[-1]), ds, x, stats, n.get("weight"), "bias" in parts)
    spent(case, "backward")
    for name, grad in zip(("dx", "dweight", "dbias"), grads, strict=True):
        if grad is not None:
            close(grad, named[name])


def test_scalar_adaln() -> None:
    case = tiny("adaln", {"x": (2, 3, 5), "shift": (2, 5), "scale": (2, 5)}, eps=1e-3)
    n, named, (g,) = exact(case)
    out = [s.adaln(*group, 1e-3) for group in zip(n["x"], n["shift"], n["scale"], strict=True)]
    spent(case, "forward")
    close(out, named["out0"])
    stats = [[s.normed(row, 1e-3, True)[1:] for row in x] for x in n["x"]]
    s.TALLY.clear()
    grads = [s.adaln_grads(*group) for group in zip(nums(g), n["x"], stats, n["scale"], strict=True)]
    spent(case, "backward")
    for at, name in enumerate(("dx", "dshift", "dscale")):
        close([grad[at] for grad in grads], named[name])


def test_scalar_gated_residual() -> None:
    case = tiny("gated_residual", {"x": (2, 3, 5), "y": (2, 3, 5), "gate": (2, 5)})
    n, named, (g,) = exact(case)
    out = [s.gated(*group) for group in zip(n["x"], n["y"], n["gate"], strict=True)]
    spent(case, "forward")
    close(out, named["out0"])
    grads = [s.gated_grads(*group) for group in zip(nums(g), n["y"], n["gate"], strict=True)]
    spent(case, "backward")
    close([grad[0] for grad in grads], named["dy"])
    close([grad[1] for grad in grads], named["dgate"])


def test_scalar_gated_adaln() -> None:
    vectors = dict.fromkeys(("gate", "shift", "scale"), (2, 5))
    case = tiny("gated_adaln", {"x": (2, 3, 5), "y": (2, 3, 5), **vectors}, eps=1e-3)
    n, named, cotangents = exact(case)
    sums = [s.gated(*group) for group in zip(n["x"], n["y"], n["gate"], strict=True)]
    out = [s.adaln(*group, 1e-3) for group in zip(sums, n["shift"], n["scale"], strict=True)]
    spent(case, "forward")
    close(sums, named["out0"])
    close(out, named["out1"])
    stats = [[s.normed(row, 1e-3, True)[1:] for row in x] for x in sums]
    s.TALLY.clear()
    ds, g = map(nums, cotangents)
    inner = [s.adaln_grads(*group) for group in zip(g, sums, stats, n["scale"], strict=True)]
    dx = [s.plus(grad[0], extra) for grad, extra in zip(inner, ds, strict=True)]
    outer = [s.gated_grads(*group) for group in zip(dx, n["y"], n["gate"], strict=True)]
    spent(case, "backward")
    close(dx, named["dx"])
    for name, at, grads in (("dshift", 1, inner), ("dscale", 2, inner), ("dy", 0, outer), ("dgate", 1, outer)):
        close([grad[at] for grad in grads], named[name])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_scalar_mlp(activation: str) -> None:
    tanh = activation == "gelu_tanh"
    case = tiny("mlp", {"x": (3, 2), "w1": (5, 2), "b1": (5,), "w2": (4, 5), "b2": (4,)}, activation=activation)
    n, named, (g,) = exact(case)
    before = s.linear(n["x"], n["w1"], n["b1"])
    out = s.linear([[s.gelu(v, tanh) for v in row] for row in before], n["w2"], n["b2"])
    spent(case, "forward")
    close(out, named["out0"])
    dy = nums(g)
    hidden = [[s.gelu(v, tanh) for v in row] for row in before]
    dhidden, dw2, db2 = s.linear_grads(dy, hidden, n["w2"], True)
    dbefore = [
        [s.gelu_grad(v, d, tanh) for v, d in zip(r, q, strict=True)] for r, q in zip(before, dhidden, strict=True)
    ]
    dx, dw1, db1 = s.linear_grads(dbefore, n["x"], n["w1"], True)
    spent(case, "backward")
    for name, grad in {"dx": dx, "dw1": dw1, "db1": db1, "dw2": dw2, "db2": db2}.items():
        close(grad, named[name])


def test_scalar_swiglu() -> None:
    case = tiny("swiglu", {"x": (3, 2), "w_gate": (5, 2), "w_up": (5, 2), "w_down": (4, 5)})
    n, named, (g,) = exact(case)
    gate, up = s.linear(n["x"], n["w_gate"], None), s.linear(n["x"], n["w_up"], None)
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(gate, up, strict=True)]
    out = s.linear([[s.swiglu_hidden(*pair) for pair in row] for row in pairs], n["w_down"], None)
    spent(case, "forward")
    close(out, named["out0"])
    dhidden = s.product(nums(g), s.columns(n["w_down"]))
    grads = [
        [s.swiglu_hidden_grads(*pair, d) for pair, d in zip(row, q, strict=True)]
        for row, q in zip(pairs, dhidden, strict=True)
    ]
    dgate, dup, hidden = ([[cell[at] for cell in row] for row in grads] for at in range(3))
    dw_down = s.product(s.columns(nums(g)), s.columns(hidden))
    dx1, dw_gate, _ = s.linear_grads(dgate, n["x"], n["w_gate"], False)
    dx2, dw_up, _ = s.linear_grads(dup, n["x"], n["w_up"], False)
    spent(case, "backward")
    for name, grad in {"dw_down": dw_down, "dw_gate": dw_gate, "dw_up": dw_up, "dx": s.plus(dx1, dx2)}.items():
        close(grad, named[name])


@pytest.mark.parametrize("bias", [False, True])
def test_scalar_skip_linear(bias: bool) -> None:
    case = tiny("skip_linear", {"x": (3, 2), "skip": (3, 2), "weight": (5, 4), **({"bias": (5,)} if bias else {})})
    n, named, (g,) = exact(case)
    pair = [a + b for a, b in zip(n["x"], n["skip"], strict=True)]
    out = s.linear(pair, n["weight"], n.get("bias"))
    spent(case, "forward")
    close(out, named["out0"])
    dpair, dweight, dbias = s.linear_grads(nums(g), pair, n["weight"], bias)
    spent(case, "backward")
    close([row[:2] for row in dpair], named["dx"])
    close([row[2:] for row in dpair], named["dskip"])
    close(dweight, named["dweight"])
    if dbias is not None:
        close(dbias, named["dbias"])


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer", None])
def test_scalar_rotary(norm: str | None, weights: bool) -> None:
    weights = weights and norm is not None
    angle = torch.outer(torch.arange(3.0, dtype=FLOAT64), torch.tensor([1.0, 0.3], dtype=FLOAT64))
    inputs: dict[str, tuple[int, ...]] = {"q": (2, 3, 2, 4), "k": (2, 3, 1, 4)}
    inputs |= {"q_weight": (4,), "k_weight": (4,)} if weights else {}
    case = tiny("qk_norm_rotary", inputs, {"cos": angle.cos(), "sin": angle.sin()}, norm=norm, eps=1e-3)
    n, named, cotangents = exact(case)
    places = [
        (x, b, t, h) for x, heads in (("q", 2), ("k", 1)) for b in range(2) for t in range(3) for h in range(heads)
    ]

    def table(t: int) -> tuple[list[float], list[float]]:
        return angle[t].cos().tolist(), angle[t].sin().tolist()

    for x, b, t, h in places:
        row = n[x][b][t][h]
        row = s.norm([row], n.get(f"{x}_weight"), None, None, 1e-3, norm == "layer")[0] if norm else row
        close(s.rotate(row, *table(t)), named["out0" if x == "q" else "out1"][b, t, h])
    spent(case, "forward")
    for x, cotangent in zip("qk", cotangents, strict=True):
        here = [place for place in places if place[0] == x]
        rows = [n[x][b][t][h] for _, b, t, h in here]
        before = s.TALLY.copy()
        stats = [s.normed(row, 1e-3, norm == "layer")[1:] for row in rows]
        s.TALLY.clear()
        s.TALLY.update(before)
        back = [s.rotate(nums(cotangent[b, t, h]), *table(t), back=True) for _, b, t, h in here]
        dx, dweight, _ = s.norm_grads(back, None, rows, stats, n.get(f"{x}_weight"), False) if norm else (back, None, 0)
        for (_, b, t, h), grad in zip(here, dx, strict=True):
            close(grad, named[f"d{x}"][b, t, h])
        if dweight is not None:
            close(dweight, named[f"d{x}_weight"])
    spent(case, "backward")


@pytest.mark.parametrize("kind", ["v", "x"])
def test_scalar_loss(kind: str) -> None:
    shape = (3, 5)
    fixed = {"time": torch.tensor([0.01, 0.4, 1.0]), "weight": torch.tensor([1.0, 0.0, 0.7])}
    case = tiny("diffusion_loss", dict.fromkeys(("prediction", "clean", "noise"), shape), fixed, prediction_kind=kind)
    n, named, (g,) = exact(case)
    floor = 0.05 if kind == "x" else None
    groups = list(zip(n["prediction"], n["clean"], n["noise"], nums(fixed["time"]), nums(fixed["weight"]), strict=True))
    out = [s.loss(*group, floor) for group in groups]
    spent(case, "forward")
    close(out, named["out0"])
    grad = [s.loss_grad(one, *group, floor) for one, group in zip(nums(g), groups, strict=True)]
    spent(case, "backward")
    close(grad, named["dprediction"])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_scalar_adamw(scaled: bool, ema: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    p, g, m, e = (torch.randn(5, generator=generator, dtype=FLOAT64) for _ in range(4))
    v = torch.rand(5, generator=generator, dtype=FLOAT64)
    results = []
    for one in zip(*map(nums, (p, g, m, v, e)), strict=True):
        grad = one[1] * 0.3 if scaled else one[1]
        new = s.adamw(one[0], grad, one[2], one[3], 0.1, (0.9, 0.99), 1e-6, 0.03, 3)
        results.append((*new, one[4] + (new[0] - one[4]) * (1 - 0.75)) if ema else new)
    settings: dict[str, Any] = {"emas": [e]} if ema else {}
    settings["grad_scale"] = 0.3 if scaled else 1.0
    expected = kernels.op_cost("adamw", [p], [g], [m], [v], **settings)
    assert (s.TALLY["macs"], s.TALLY["elementwise"]) == (expected.macs, expected.elementwise)
    assert expected.bytes == 8 * 5 * (9 if ema else 7)
    kernels.adamw([p], [g], [m], [v], lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.03, step=3, ema_decay=0.75,
                  **settings)  # fmt: skip
    for at, tensor in enumerate((p, m, v, e)[: len(results[0])]):
        close([result[at] for result in results], tensor)


# --- bytes, blocks, the registry -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if not c.wide], ids=lambda c: c.id)
def test_forward_bytes_are_operands_and_results(case: Case) -> None:
    """At one item size: every operand read once, every result written once."""
    values, meta = on_meta(case)
    unread = "noise" if case.keywords.get("prediction_kind") == "x" else ""
    moved = [value for name, value in values.items() if name != unread]
    tables = [t for name, t in meta.fixed.items() if name != "time" or case.keywords.get("prediction_kind") == "x"]
    sizes = [t.numel() * (1 if t.dtype == torch.bool else 4) for t in tables]
    total = sum(t.numel() * 4 for t in (*moved, *meta.call(values))) + sum(sizes)
    assert cost(case).bytes == total


@pytest.mark.parametrize(("h", "tokens"), [(1024, 334), (512, 258), (7, 3)])
def test_a_block_of_the_u_vit(h: int, tokens: int) -> None:
    rows = {"rows": tokens, "width": h}
    linear, attention, mlp, skip, norm = (
        FORMULAS[name].forward for name in ("linear", "attention", "mlp", "skip_linear", "layer_norm")
    )
    block = (
        2 * norm(**rows, weight=True, bias=True)
        + linear(**rows, out=3 * h)
        + attention(batch=1, queries=tokens, keys=tokens, heads=1, head_dim=h)
        + linear(**rows, out=h, bias=True)
        + mlp(**rows, hidden=4 * h, out=h)
    )
    assert block.macs == 12 * h * h * tokens + 2 * tokens * tokens * h
    assert skip(**rows, out=h).macs == 2 * h * h * tokens
    backward = FORMULAS["skip_linear"].backward
    assert backward is not None and backward(**rows, out=h).macs == 4 * h * h * tokens


def test_flash_backward_recomputes_one_contraction() -> None:
    shape = {"batch": 2, "queries": 5, "keys": 7, "heads": 3, "head_dim": 11}
    backward = FORMULAS["attention"].backward
    assert backward is not None
    assert backward(**shape).macs == 4 * 2 * 3 * 5 * 7 * 11
    assert backward(**shape, recompute=True).macs == 5 * 2 * 3 * 5 * 7 * 11


def test_costs_add_and_scale() -> None:
    assert OpCost(1, 2, 3) + OpCost(10, 20, 30) == OpCost(11, 22, 33)
    assert 3 * OpCost(1, 2, 3) == OpCost(1, 2, 3) * 3 == OpCost(3, 6, 9)
    assert OpCost(5).flops == 10


def test_registry_is_complete_and_integer() -> None:
    assert set(FORMULAS) == {*PUBLIC, "adamw", "linear"}
    for case in CASES:
        for direction in ("forward", "backward"):
            result = cost(case, direction)
            assert all(type(v) is int for v in (result.macs, result.elementwise, result.bytes)), case.id
    with pytest.raises(BackendError, match="no backward formula"):
        kernels.op_cost("adamw", [], [], [], [], direction="backward")


def test_formulas_import_without_torch() -> None:
    code = (
        "import sys, longskip.kernels, longskip.kernels.formulas as f;"
        "from longskip.kernels import FORMULAS, OpCost;"
        "assert FORMULAS is f.FORMULAS and OpCost is f.OpCost;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
