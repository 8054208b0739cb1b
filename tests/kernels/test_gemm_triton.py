"""skip_linear, mlp and swiglu by our own products: every tile, layout and epilogue against float64 and against cuBLAS's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from triton.runtime import interpreter

from longskip import kernels
from longskip.errors import BackendError
from longskip.kernels import formulas, gemm_triton, jit, mlp_pointwise_triton, mlp_triton, skip_linear_triton, tables
from tests.kernels.kernel_checks import FLOAT64, Case, _mlp, eager_runs, judge, run
from tests.kernels.poison import GUARD_BYTES, check_poisoned, poisoned
from tests.kernels.test_kernel_numbers import exact, layout

SMALL_TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}
PRODUCTS = [*skip_linear_triton.CONFIGURATIONS, *mlp_triton.CONFIGURATIONS]


def forced(tile: dict[str, Any] | None) -> Any:
    """Inside, every product is our own, of this tile; None: by cuBLAS (here torch's CPU products)."""
    chosen = gemm_triton.BLAS if tile is None else {"gemm": "triton", **tile}
    return tables.forced(dict.fromkeys(PRODUCTS, chosen))


def _swiglu(rows: tuple[int, ...], h: int, m: int, out: int) -> dict[str, tuple[int, ...]]:
    return {"x": (*rows, h), "w_gate": (m, h), "w_up": (m, h), "w_down": (out, m)}


def _skip(rows: tuple[int, ...], h: int, out: int, bias: bool = True) -> dict[str, tuple[int, ...]]:
    inputs = {"x": (*rows, h), "skip": (*rows, h), "weight": (out, 2 * h)}
    return inputs | ({"bias": (out,)} if bias else {})


# Several tiles of SMALL_TILE in every axis, none of them full; h = 40 ends inside a tile of both halves.
CASES = [
    Case("skip_linear", "straddling", _skip((3, 15), 40, 35)),
    Case("skip_linear", "one-tile", _skip((5,), 7, 3, bias=False)),
    Case("skip_linear", "even", _skip((64,), 32, 64)),
    Case("mlp", "erf", _mlp((3, 15), 41, 70, 37)),
    Case("mlp", "tanh", _mlp((3, 15), 41, 70, 37), {}, {"activation": "gelu_tanh"}),
    Case("mlp", "no-bias", {"x": (37, 33), "w1": (35, 33), "w2": (34, 35)}, {}, {"b1": None, "b2": None}),
    Case("mlp", "even", _mlp((64,), 32, 64, 32)),
    Case("swiglu", "odd", _swiglu((3, 15), 41, 70, 37)),
    Case("swiglu", "even", _swiglu((64,), 32, 64, 32)),
]
FEW = [
    Case("skip_linear", "few", _skip((33,), 9, 18)),
    Case("mlp", "few", _mlp((33,), 9, 18, 9)),
    Case("swiglu", "few", _swiglu((33,), 9, 18, 9)),
]
ODD = [CASES[0], CASES[3], CASES[7]]
CASE = pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
EACH = pytest.mark.parametrize("case", ODD, ids=lambda c: c.id)


def check(case: Case, dtype: torch.dtype, values: dict[str, Tensor] | None = None) -> None:
    """Output and gradients by name: MEASURING's rule against float64."""
    values = case.cast(case.values(), dtype) if values is None else values
    plain = {name: value.clone(memory_format=torch.contiguous_format) for name, value in values.items()}
    ours, cotangents = run(case, values, "triton")
    eagers = eager_runs(case, plain, "triton", cotangents)
    reference = exact(case, plain, [c.to(dtype).to(FLOAT64) for c in cotangents])
    for name, tensor in reference.items():
        assert ours[name].dtype == dtype
        judge(f"{case.id} {name}", ours[name], [eager[name] for eager in eagers], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@CASE
def test_several_tiles_in_every_axis(case: Case, dtype: torch.dtype) -> None:
    with forced(SMALL_TILE):
        check(case, dtype)


@pytest.mark.parametrize("tile", gemm_triton.CHOICES[1:], ids=lambda t: "x".join(str(v) for v in list(t.values())[1:]))
@EACH
def test_every_tile(case: Case, tile: dict[str, Any]) -> None:
    """float16, whose tiles are bfloat16's; a tile that does not fit is replaced, as it is on a device."""
    with forced(tile):
        check(case, torch.float16)


@pytest.mark.parametrize("kind", ["strided", "transposed", "offset", "expanded"])
@EACH
def test_layouts(case: Case, kind: str) -> None:
    values = {name: layout(value, kind) for name, value in case.cast(case.values(), torch.float32).items()}
    with forced(SMALL_TILE):
        check(case, torch.float32, values)


def test_rows_that_lie_apart_are_read_in_place() -> None:
    """Column slices of wider matrices, as x and skip of a packed tensor would be: the same bits as of copies."""
    both = torch.randn(33, 2, 48)
    x, skip = both[:, 0, 3:43], both[:, 1, :40]
    weight = torch.randn(50, 80)
    with forced(SMALL_TILE), kernels.use("triton"):
        apart = kernels.skip_linear(x, skip, weight)
        assert torch.equal(apart, kernels.skip_linear(x.contiguous(), skip.contiguous(), weight))
    last, views = gemm_triton.oriented(x, skip)
    assert last
    assert [view.data_ptr() for view in views] == [x.data_ptr(), skip.data_ptr()]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["triton", "blas"])
@pytest.mark.parametrize("case", FEW, ids=lambda c: c.id)
def test_a_hundred_calls_give_the_same_bits(case: Case, by: str) -> None:
    values = case.cast(case.values(), torch.float16)
    with forced(SMALL_TILE if by == "triton" else None):
        first, cotangents = run(case, values, "triton")
        for _ in range(100):
            again, _ = run(case, values, "triton", cotangents)
            for name, tensor in first.items():
                assert torch.equal(again[name], tensor), name


@pytest.mark.parametrize("by", ["triton", "blas"])
@CASE
def test_poisoned_memory(case: Case, by: str) -> None:
    with forced(SMALL_TILE if by == "triton" else None):
        check_poisoned(case)


@EACH
def test_nothing_outside_the_operands_is_read(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that is read past an edge may be dropped again unseen; on a device the address may be nobody's."""
    plain_load = interpreter.InterpreterBuilder.create_masked_load
    values = case.cast(case.values(), torch.float32)
    with forced(SMALL_TILE), poisoned() as memory:

        def checked(self: Any, at: Any, mask: Any, *rest: Any) -> Any:
            read = at.data[mask.data]
            inside = np.zeros(read.shape, dtype=bool)
            for block, _ in memory.blocks:
                start = block.data_ptr() + GUARD_BYTES
                inside |= (read >= start) & (read < start + block.numel() - 2 * GUARD_BYTES)
            assert inside.all(), "a load out of bounds"
            return plain_load(self, at, mask, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", checked)
        inputs = {name: memory.guarded(value).requires_grad_() for name, value in values.items()}
        with kernels.use("triton"):
            (out,) = case.call(inputs)
            torch.autograd.grad(out, list(inputs.values()), memory.guarded(torch.ones_like(out)))


@CASE
def test_the_two_ways_agree(case: Case) -> None:
    """Fused epilogues against cuBLAS and a pass: in float32 they differ by the order of sums alone."""
    values = case.cast(case.values(), torch.float32)
    with forced(SMALL_TILE):
        fused, cotangents = run(case, values, "triton")
    with forced(None):
        apart, _ = run(case, values, "triton", cotangents)
    for name, tensor in fused.items():
        torch.testing.assert_close(apart[name], tensor, rtol=1e-5, atol=1e-5 * tensor.abs().max().item())


# --- the activation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("configuration", mlp_pointwise_triton.CONFIGURATIONS["mlp_pointwise_rows"], ids=str)
@pytest.mark.parametrize("tanh", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gelu_and_its_slope_over_the_line(dtype: torch.dtype, tanh: bool, configuration: dict[str, int]) -> None:
    """Within the dtype's rounding and 4e-7 of the definition in float64, from where it vanishes to where it is x."""
    x = torch.linspace(-12, 12, 20013).to(dtype).view(3, -1)
    exactly = x.to(FLOAT64).requires_grad_()
    value = torch.nn.functional.gelu(exactly, approximate="tanh" if tanh else "none")
    (slope,) = torch.autograd.grad(value.sum(), exactly)
    act, grad = torch.empty_like(x), torch.ones_like(x)
    sums = mlp_pointwise_triton.gelu_backward(x, grad, act, tanh, sums=True, configuration=configuration)
    again = torch.empty_like(x)
    for options in mlp_pointwise_triton.CONFIGURATIONS["mlp_pointwise"]:
        mlp_pointwise_triton.gelu_forward(x, again, tanh, options)
        assert torch.equal(act, again)
    eps = torch.finfo(dtype).eps / 2
    tiny = 6e-8 if dtype == torch.float16 else 0.0
    for ours, reference in ((act, value.detach()), (grad, slope)):
        error = (ours.to(FLOAT64) - reference).abs()
        assert (error <= eps * reference.abs() + 4e-7 * x.abs().clamp(min=1).to(FLOAT64) + tiny).all(), error.max()
    assert sums is not None
    torch.testing.assert_close(sums.to(FLOAT64), slope.sum(0), rtol=eps * 2, atol=3e-6)


def test_gelu_far_out() -> None:
    x = torch.tensor([[1e4, -1e4, torch.nan, torch.inf]])
    for tanh in (False, True):
        act = torch.empty_like(x)
        mlp_pointwise_triton.gelu_forward(x, act, tanh)
        assert torch.equal(act[0, :2], torch.tensor([1e4, 0.0]))
        assert act[0, 2].isnan()
        assert act[0, 3] == torch.inf


# --- what is saved, computed and counted -----------------------------------------------------------------------------


def saved_bytes(call: Callable[[], Tensor], *leaves: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, beside the leaves, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = call()
    for leaf in leaves:
        kept.pop(leaf.untyped_storage().data_ptr(), None)
    del out
    return sum(kept.values())


@pytest.mark.parametrize("by", ["triton", "blas"])
@EACH
def test_saved_activations(case: Case, by: str) -> None:
    """mlp keeps 1 hidden tensor of eager's 2, swiglu 2 of 4; skip_linear nothing at all of eager's concatenation."""
    leaves = {name: value.requires_grad_() for name, value in case.cast(case.values(), torch.float32).items()}
    size: dict[str, int] = {}
    for backend in ("torch", "triton"):
        with forced(SMALL_TILE if by == "triton" else None), kernels.use(backend):
            size[backend] = saved_bytes(lambda: case.call(leaves)[0], *leaves.values())
    hidden = 45 * 70 * 4
    assert size["triton"] == {"skip_linear": 0, "mlp": hidden, "swiglu": 2 * hidden}[case.op]
    assert size["torch"] > 0
    assert size["triton"] <= 0.5 * size["torch"]


@EACH
def test_without_gradients_nothing_is_kept(case: Case) -> None:
    values = case.cast(case.values(), torch.float32)
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    for tile in (SMALL_TILE, None):
        with forced(tile), kernels.use("triton"):
            assert saved_bytes(lambda: case.call(values)[0], *values.values()) == 0
            assert torch.equal(case.call(values)[0], case.call(leaves)[0])


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Multiply-adds of the dots that the interpreter runs, and the numbers of calls of torch's products."""
    tally: Counter[str] = Counter()
    dot = interpreter.InterpreterBuilder.create_dot

    def counted(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        tally["macs"] += int(np.prod(a.data.shape)) * b.data.shape[1]
        return dot(self, a, b, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    yield tally


FORMS = {
    "mlp": (formulas.mlp_forward_padded, formulas.mlp_backward_padded),
    "swiglu": (formulas.swiglu_forward_padded, formulas.swiglu_backward_padded),
    "skip_linear": (formulas.skip_linear_forward_padded, formulas.skip_linear_backward_padded),
}


def sizes_of(case: Case) -> dict[str, int]:
    meta = {name: torch.empty(shape, device="meta") for name, shape in case.inputs.items()}
    shapes = kernels.backends._SHAPES[case.op](**meta, **case.keywords)
    return {name: shapes[name] for name in ("rows", "width", "hidden", "out") if name in shapes}


@CASE
def test_executed_multiply_adds_are_the_padded_closed_form(case: Case, executed: Counter[str]) -> None:
    """To the integer for any shape; the declared ones where every size is a multiple of its block."""
    blocks = {name.lower(): SMALL_TILE[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")}
    values = case.cast(case.values(), torch.float32)
    leaves = {name: value.requires_grad_() for name, value in values.items()}
    with forced(SMALL_TILE), kernels.use("triton"), FlopCounterMode(display=False) as counter:
        (out,) = case.call(leaves)
        forward, counted = executed["macs"], counter.get_total_flops()
        torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
        backward = executed["macs"] - forward
        declared = (counted, counter.get_total_flops() - counted)
    padded = [form(**sizes_of(case), **blocks) for form in FORMS[case.op]]
    assert [forward, backward] == padded
    of_op = formulas.FORMULAS[case.op]
    assert of_op.backward is not None
    assert declared == (of_op.forward(**sizes_of(case)).flops, of_op.backward(**sizes_of(case)).flops)
    assert (2 * forward, 2 * backward) == declared or case.label != "even"
    assert 2 * forward >= declared[0] and 2 * backward >= declared[1]


@pytest.mark.parametrize("by", ["triton", "blas"])
@pytest.mark.parametrize("case", FEW, ids=lambda c: c.id)
def test_products_that_nobody_wants_are_not_made(case: Case, by: str, executed: Counter[str]) -> None:
    """One input at a time: the gradient is bitwise that of the whole backward, and the FLOPs are its own products'."""
    rows, width, hidden, out = (sizes_of(case).get(name, 0) for name in ("rows", "width", "hidden", "out"))
    wanted = {
        "skip_linear": {"x": width * out, "skip": width * out, "weight": 2 * width * out, "bias": 0},
        "mlp": {
            "x": hidden * (out + width), "w1": hidden * (out + width), "b1": hidden * out, "w2": hidden * out, "b2": 0,
        },
        "swiglu": {
            "x": hidden * (out + 2 * width), "w_gate": hidden * (out + width), "w_up": hidden * (out + width),
            "w_down": hidden * out,
        },
    }[case.op]  # fmt: skip
    assert set(wanted) == set(case.inputs)
    values = case.cast(case.values(), torch.float32)
    with forced(SMALL_TILE if by == "triton" else None), kernels.use("triton"):
        whole, (cotangent,) = run(case, values, "triton")
        for name, macs in wanted.items():
            leaves = {other: value.detach().requires_grad_(other == name) for other, value in values.items()}
            (result,) = case.call(leaves)
            with FlopCounterMode(display=False) as counter:
                (grad,) = torch.autograd.grad(result, [leaves[name]], cotangent.float())
            assert counter.get_total_flops() == 2 * rows * macs, name
            assert torch.equal(grad, whole[f"d{name}"]), name
    assert bool(executed["macs"]) == (by == "triton")


# --- transforms, compile, refusals -----------------------------------------------------------------------------------


@EACH
def test_transforms_are_refused(case: Case) -> None:
    values = case.cast(case.values(), torch.float32)
    names, tensors = list(values), tuple(values.values())

    def call(*inputs: Tensor) -> Tensor:
        return case.call(dict(zip(names, inputs, strict=True)))[0]

    with kernels.use("triton"):
        with pytest.raises(BackendError, match=r"torch\.func"):
            torch.func.vmap(call)(*(t.expand(2, *t.shape) for t in tensors))
        with pytest.raises(BackendError, match=r"torch\.func|forward-mode"):
            torch.func.jvp(call, tensors, tensors)
        leaves = [t.clone().requires_grad_() for t in tensors]
        grads = torch.autograd.grad(call(*leaves).square().sum(), leaves, create_graph=True)
        with pytest.raises(BackendError, match="second derivative"):
            torch.autograd.grad(sum(g.sum() for g in grads), leaves)


@EACH
def test_compiled_equals_eager(case: Case) -> None:
    torch._dynamo.reset()
    values = case.cast(case.values(), torch.float32)

    def both(call: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
        (out,) = call(leaves)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), list(leaves.values()))]

    with kernels.use("triton"):
        eager = both(case.call)
        compiled = both(torch.compile(case.call, backend="aot_eager", fullgraph=True))
    for ours, theirs in zip(compiled, eager, strict=True):
        assert torch.equal(ours, theirs)


@EACH
def test_fakes_have_the_shapes_of_the_results(case: Case) -> None:
    values = {name: value.requires_grad_() for name, value in case.cast(case.values(), torch.float32).items()}
    op, host = {
        "skip_linear": (skip_linear_triton.forward_op, ()),
        "mlp": (mlp_triton.mlp_op, (False, True)),
        "swiglu": (mlp_triton.swiglu_op, (True,)),
    }[case.op]
    torch.library.opcheck(getattr(torch.ops.longskip, op.name).default, (*values.values(), *host))


def test_sizes_beyond_the_addresses_are_refused() -> None:
    for rows, width, part in (
        (1, gemm_triton.WIDEST + 1, str(gemm_triton.WIDEST)),
        (gemm_triton.MOST_ROWS + 1, 8, "rows"),
    ):
        why = gemm_triton.unfit_sizes(torch.float16, rows, width)
        assert why is not None
        assert part in why
    with kernels.use("triton"), pytest.raises(BackendError, match="float64"):
        x = torch.randn(2, 4, dtype=FLOAT64)
        kernels.skip_linear(x, x, torch.randn(3, 8, dtype=FLOAT64))


@pytest.mark.parametrize("target", sorted(jit.TARGETS))
@pytest.mark.parametrize("dtype", jit.KERNEL_DTYPES, ids=str)
def test_chosen_tiles_fit_the_device(dtype: torch.dtype, target: int) -> None:
    """Every choice, or what replaces it, leaves its stages in the device's shared memory and its sums in registers."""
    like = torch.empty(0, dtype=dtype, device="meta")
    with jit.captured(jit.TARGETS[target]):
        for choice in (*gemm_triton.CHOICES, {"gemm": "triton"}):
            for sizes in ((10688, 1024, 4096), (334, 1024, 1024), (3072, 12288, 10688), (1, 1, 1)):
                for accumulators in (1, 2):
                    tile = gemm_triton.choose("mlp_out", like, *sizes, choice, accumulators=accumulators)
                    assert (tile is None) == (choice["gemm"] == "blas")
                    if tile is not None:
                        m, n, k = (tile[f"BLOCK_{axis}"] for axis in "MNK")
                        staged = tile["num_stages"] * (m + accumulators * n) * k * dtype.itemsize
                        assert staged < jit.TARGETS[target].shared_bytes
                        assert accumulators * m * n <= 128 * 32 * tile["num_warps"]
    with jit.captured(jit.TARGETS[90]):
        large = gemm_triton.choose("x", torch.empty(0, dtype=torch.bfloat16), 10688, 4096, 1024, {"gemm": "triton"})
        few = gemm_triton.choose("x", torch.empty(0, dtype=torch.bfloat16), 334, 1024, 1024, {"gemm": "triton"})
    assert large is not None
    assert few is not None
    assert large["BLOCK_M"] * large["BLOCK_N"] > few["BLOCK_M"] * few["BLOCK_N"]
