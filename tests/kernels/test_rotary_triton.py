"""The Triton kernels of queries' and keys' norm and rotation: packed views, head dims, weights' sums, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from longskip import kernels
from longskip.errors import BackendError
from longskip.kernels import jit, rotary_triton
from tests.kernels.kernel_checks import FLOAT64, Case, check_against_float64, run
from tests.kernels.poison import check_poisoned


def angles(tokens: int, half: int) -> dict[str, Tensor]:
    angle = torch.outer(torch.arange(tokens, dtype=FLOAT64), 0.8 ** torch.arange(half, dtype=FLOAT64))
    return {"cos": angle.cos(), "sin": angle.sin()}


def case(norm: str | None, dim: int, *, batch: int = 2, tokens: int = 5, heads: int = 3, turn: bool = True) -> Case:
    inputs: dict[str, tuple[int, ...]] = dict.fromkeys(("q", "k"), (batch, tokens, heads, dim))
    if norm is not None:
        inputs |= dict.fromkeys(("q_weight", "k_weight"), (dim,))
    fixed = angles(tokens, dim // 2) if turn else {}
    return Case("qk_norm_rotary", f"{norm}-{dim}", inputs, fixed, {"norm": norm, "eps": 0.1 if dim == 2 else 1e-3})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dim", [2, 32, 72, 80, 96, 128])
@pytest.mark.parametrize("norm", ["rms", "layer", None])
def test_head_dims(norm: str | None, dim: int, dtype: torch.dtype) -> None:
    check_against_float64(case(norm, dim), dtype, seeds=3 if dim == 2 else 1)


@pytest.mark.parametrize("dim", [1, 7, 65])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_odd_head_dims_without_rotation(norm: str, dim: int) -> None:
    check_against_float64(case(norm, dim, turn=False), seeds=3)


@pytest.mark.parametrize("configuration", [0, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 2))])
@pytest.mark.parametrize("norm", ["rms", "layer", None])
def test_every_configuration_over_several_chunks(
    norm: str | None, configuration: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """520 rows of head dim 256: two chunks and more for the weights' sums, not all of whole tiles."""
    for kernel, known in rotary_triton.CONFIGURATIONS.items():
        assert len(known) == 3
        monkeypatch.setitem(rotary_triton.CONFIGURATIONS, kernel, (known[configuration],))
    check_against_float64(case(norm, 256, batch=1, tokens=104, heads=5))


def test_keys_of_other_tokens_and_heads() -> None:
    one = Case(
        "qk_norm_rotary",
        "cross",
        {"q": (2, 3, 4, 12), "k": (2, 11, 1, 12), "q_weight": (12,), "k_weight": (12,)},
        {},
        {"norm": "rms"},
    )
    check_against_float64(one, seeds=3)


@pytest.mark.parametrize("norm", ["rms", "layer", None])
def test_packed_views_are_read_in_place(norm: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied before the launch, and the gradient of qkv is the reference's."""
    seen: list[tuple[Tensor, Tensor]] = []
    launch = jit.launch

    def spy(kernel: Any, grid: Any, *arguments: Any, **constants: Any) -> None:
        if kernel is rotary_triton._rotary_forward:
            seen.append(arguments[:2])
        launch(kernel, grid, *arguments, **constants)

    monkeypatch.setattr(jit, "launch", spy)
    packed = torch.randn(2, 7, 3, 3, 24, generator=torch.Generator().manual_seed(0))
    fixed = angles(7, 12)

    def gradient(backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        leaf = packed.clone().requires_grad_()
        with kernels.use(backend):
            q, k = kernels.qk_norm_rotary(leaf[:, :, 0], leaf[:, :, 1], norm=norm, **fixed)
        return q.detach(), k.detach(), torch.autograd.grad((q * k.sin()).sum(), leaf)[0], leaf

    q, k, slope, leaf = gradient("triton")
    assert [t.data_ptr() for t in seen[0]] == [leaf[:, :, 0].data_ptr(), leaf[:, :, 1].data_ptr()]
    assert q.is_contiguous() and k.is_contiguous()
    for ours, wanted in zip((q, k, slope), gradient("reference"), strict=False):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("norm", ["rms", None])
def test_one_of_two_results_used(norm: str | None, used: int) -> None:
    one = case(norm, 12)
    values = one.cast(one.values(), torch.float32)

    def gradients(backend: str) -> list[Tensor | None]:
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        with kernels.use(backend):
            out = one.call(leaves)[used]
        return list(torch.autograd.grad(out.sin().sum(), list(leaves.values()), allow_unused=True))

    for name, ours, wanted in zip(values, gradients("triton"), gradients("reference"), strict=True):
        assert (ours is None) == (wanted is None), name
        if ours is not None and wanted is not None:
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("dim", [6, 72])
@pytest.mark.parametrize("norm", ["rms", "layer", None])
def test_memory_is_its_own(norm: str | None, dim: int) -> None:
    check_poisoned(case(norm, dim, tokens=9))


def test_rows_outside_a_tile_do_not_spoil_the_weights_sums_at_eps_0() -> None:
    one = case("rms", 6, tokens=3)
    one.keywords["eps"] = 0.0
    ours, _ = run(one, one.cast(one.values(), torch.float32), "triton")
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())


@pytest.mark.slow
def test_a_hundred_calls_are_equal_bit_for_bit() -> None:
    one = case("rms", 24, tokens=200, heads=2)
    values = one.cast(one.values(), torch.float32)
    first, cotangents = run(one, values, "triton")
    for _ in range(99):
        again, _ = run(one, values, "triton", cotangents)
        assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_row_depends_on_its_row_only() -> None:
    """Alone in its sample, or among others: the same bits, of its gradient too."""
    one = case("rms", 20, tokens=7)
    part = Case(
        "qk_norm_rotary", "part", {**one.inputs, "q": (1, 7, 3, 20), "k": (1, 7, 3, 20)}, one.fixed, one.keywords
    )
    values = one.cast(one.values(), torch.float32)
    whole, cotangents = run(one, values, "triton")
    second = {name: value[1:] if value.ndim == 4 else value for name, value in values.items()}
    alone, _ = run(part, second, "triton", [c[1:] for c in cotangents])
    for name in ("out0", "out1", "dq", "dk"):
        assert torch.equal(alone[name], whole[name][1:]), name


@pytest.fixture
def triton_only() -> Iterator[None]:
    with kernels.use("triton"):
        yield


def positional() -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    one = case("rms", 4)
    values = one.cast(one.values(), torch.float32)
    return lambda *t: one.call(dict(zip(values, t, strict=True))), tuple(values.values())


@pytest.mark.usefixtures("triton_only")
class TestRefusals:
    def test_second_derivatives(self) -> None:
        call, values = positional()
        leaves = tuple(value.requires_grad_() for value in values)
        q, k = call(*leaves)
        grads = torch.autograd.grad((q * k).sum(), leaves, create_graph=True)
        with pytest.raises(BackendError, match="no rule for a second derivative"):
            torch.autograd.grad(grads[0].sum(), leaves)

    def test_transforms(self) -> None:
        call, values = positional()
        with pytest.raises(BackendError, match="no rule for a transform"):
            torch.func.jvp(call, values, values)
        with pytest.raises(BackendError, match="no rule for a transform"):
            torch.func.vmap(call)(*(torch.stack((value, value)) for value in values))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(values[0], values[0])
            with pytest.raises(BackendError, match="forward-mode"):
                call(dual, *values[1:])

    def test_gradients_of_the_tables(self) -> None:
        q, table = torch.randn(1, 2, 1, 4), torch.ones(2, 2, requires_grad=True)
        with pytest.raises(BackendError, match="no gradient to cos or sin"):
            kernels.qk_norm_rotary(q, q, cos=table, sin=table)

    def test_head_dims_too_large(self) -> None:
        q = torch.randn(1, 2, 1, 514)
        with pytest.raises(BackendError, match="head dims up to 512, not 514"):
            kernels.qk_norm_rotary(q, q)


@pytest.mark.usefixtures("triton_only")
def test_nothing_to_do_launches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "launch", None)
    q = torch.randn(1, 2, 1, 3)
    assert all(torch.equal(out, q) for out in kernels.qk_norm_rotary(q, q, norm=None))


@pytest.mark.usefixtures("triton_only")
def test_compiled_into_one_graph_equals_eager() -> None:
    torch._dynamo.reset()
    call, values = positional()

    def gradients(function: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        leaves = tuple(value.detach().requires_grad_() for value in values)
        q, k = function(*leaves)
        return [q, k, *torch.autograd.grad((q * k).sum(), leaves)]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(gradients(compiled), gradients(call), strict=True):
        assert torch.equal(ours, wanted)


def test_custom_ops_keep_their_promises() -> None:
    """torch's own check of schema and fake."""
    qkv, w, table = torch.randn(2, 3, 3, 2, 8), torch.randn(8), torch.rand(3, 4)
    q, k, upper = qkv[:, :, 0], qkv[:, :, 1], torch.randn(2, 3, 2, 8)
    for op, arguments in (
        (rotary_triton.forward_op, (q, k, w, None, table, table, "rms", 1e-6)),
        (rotary_triton.backward_op, (q, k, upper, None, w, w, table, table, "layer", 1e-6)),
        (rotary_triton.backward_op, (q, k, upper, upper, None, w, None, None, "rms", 1e-6)),
    ):
        torch.library.opcheck(op._op, arguments, test_utils=("test_schema", "test_faketensor"))
