"""The row-wise Triton kernels: widths round powers of two, several chunks per sample, memory, order, refusals."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from longskip import kernels
from longskip.errors import BackendError
from longskip.kernels import jit, rows_triton
from tests.kernels.kernel_checks import Case, check_against_float64, run
from tests.kernels.poison import check_poisoned

OPS = ("layer_norm", "rms_norm", "adaln", "gated_adaln", "gated_residual")


def case(op: str, samples: int, tokens: int, width: int, **keywords: Any) -> Case:
    """All optional inputs of an op given."""
    rows, vector, of_sample = (samples, tokens, width), (width,), (samples, width)
    inputs: dict[str, tuple[int, ...]] = {"x": rows}
    inputs |= {
        "layer_norm": {"weight": vector, "bias": vector, "residual": rows},
        "rms_norm": {"weight": vector, "residual": rows},
        "adaln": {"shift": of_sample, "scale": of_sample},
        "gated_adaln": {"y": rows, "gate": of_sample, "shift": of_sample, "scale": of_sample},
        "gated_residual": {"y": rows, "gate": of_sample},
    }[op]
    return Case(op, f"{samples}x{tokens}x{width}", inputs, {}, keywords)


WIDTHS = [(width, torch.float32) for width in (1, 37, 127, 129, 1024, 1152)]
WIDTHS += [(width, torch.float16) for width in (37, 1152)]


@pytest.mark.parametrize(("width", "dtype"), WIDTHS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_widths(op: str, width: int, dtype: torch.dtype) -> None:
    """Rows of one piece and of two, padded and not; an eps at which a width of 1 does not cancel."""
    keywords = {} if op == "gated_residual" else {"eps": 0.1}
    check_against_float64(case(op, 2, 3, width, **keywords), dtype, seeds=2 if width < 100 else 1)


@pytest.mark.parametrize("tokens", [1, 7, 33, 200])
@pytest.mark.parametrize("op", OPS)
def test_tokens_in_several_chunks(op: str, tokens: int) -> None:
    """33 tokens are two chunks, 200 are four, neither a multiple of a chunk's tiles."""
    chunks = rows_triton.chunks_of(3, tokens, jit.target_of(torch.device("cpu")).multiprocessors)
    assert chunks == {1: 1, 7: 1, 33: 2, 200: 4}[tokens]
    check_against_float64(case(op, 3, tokens, 36))


CONFIGURATIONS = [
    pytest.param(kernel, configuration, id="-".join(map(str, (kernel, *configuration.values()))))
    for kernel, known in rows_triton.CONFIGURATIONS.items()
    for configuration in known
]


@pytest.mark.parametrize(("kernel", "configuration"), CONFIGURATIONS)
@pytest.mark.parametrize("op", ["layer_norm", "gated_adaln"])
def test_every_configuration(
    op: str, kernel: str, configuration: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a table of measurements may choose gives the right numbers."""
    monkeypatch.setitem(rows_triton.CONFIGURATIONS, kernel, (configuration,))
    for tokens, width in ((33, 100), (3, 1152)):
        check_against_float64(case(op, 2, tokens, width))


@pytest.mark.parametrize("width", [1, 37, 1152])
@pytest.mark.parametrize("op", OPS)
def test_memory_is_its_own(op: str, width: int) -> None:
    check_poisoned(case(op, 2, 17 if width < 100 else 3, width))


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "gated_adaln"])
def test_the_sum_is_rounded_before_it_is_normed(op: str) -> None:
    """The result is that of the sum as it is returned, bit for bit."""
    one = case(op, 2, 7, 45)
    values = one.cast(one.values(), torch.float16)
    values["x"] *= 30
    with kernels.use("triton"):
        total, out = one.call(values)
        alone = {name: value for name, value in values.items() if name not in ("x", "y", "gate", "residual")}
        again = getattr(kernels, "adaln" if op == "gated_adaln" else op)(total, **alone)
    assert torch.equal(out, again)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_a_hundred_calls_are_equal_bit_for_bit(op: str) -> None:
    one = case(op, 1, 65, 24)
    values = one.cast(one.values(), torch.float32)
    first, cotangents = run(one, values, "triton")
    for _ in range(99):
        again, _ = run(one, values, "triton", cotangents)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("op", OPS)
def test_a_row_depends_on_its_row_only(op: str) -> None:
    """Also its gradient, and also where other samples and chunks come and go: bit for bit."""
    one, part = case(op, 3, 40, 20), case(op, 1, 40, 20)
    values = one.cast(one.values(), torch.float32)
    whole, cotangents = run(one, values, "triton")
    middle = {name: value[1:2] if value.shape[0] == 3 else value for name, value in values.items()}
    alone, _ = run(part, middle, "triton", [c[1:2] for c in cotangents])
    for name, tensor in alone.items():
        if tensor.ndim == 3:
            assert torch.equal(tensor[0], whole[name][1]), name


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
@pytest.mark.parametrize("op", OPS)
def test_gradients_of_expanded_and_transposed_inputs(op: str, kind: str) -> None:
    """The gradient arrives at the tensor that was laid out, as through the reference; cotangents are views too."""
    one = case(op, 3, 5, 6)
    generator = torch.Generator().manual_seed(2)

    def gradients(backend: str) -> list[Tensor]:
        generator.manual_seed(2)
        leaves, laid = [], {}
        for name, shape in one.inputs.items():
            if kind == "expanded":
                leaf = torch.randn((1, *shape[1:]), generator=generator).requires_grad_()
                laid[name] = leaf.expand(shape)
            else:
                leaf = torch.randn(shape[::-1], generator=generator).requires_grad_()
                laid[name] = leaf.permute(*range(leaf.ndim)[::-1])
            leaves.append(leaf)
        with kernels.use(backend):
            outputs = one.call(laid)
        upper = [torch.randn(o.shape[::-1], generator=generator).permute(2, 1, 0) for o in outputs]
        return list(torch.autograd.grad(outputs, leaves, upper))

    for ours, wanted in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("op", ["layer_norm", "rms_norm", "gated_adaln"])
def test_one_of_two_results_used(op: str, used: int) -> None:
    one = case(op, 2, 19, 12)
    values = one.cast(one.values(), torch.float32)

    def gradients(backend: str) -> list[Tensor | None]:
        leaves = {name: value.detach().requires_grad_() for name, value in values.items()}
        with kernels.use(backend):
            out = one.call(leaves)[used]
        return list(torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True))

    for name, ours, wanted in zip(values, gradients("triton"), gradients("reference"), strict=True):
        assert (ours is None) == (wanted is None), name
        if ours is not None and wanted is not None:
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("wanted", [("x",), ("weight",), ("bias",), ("x", "bias"), ("residual",)])
def test_only_the_gradients_asked_for(wanted: tuple[str, ...]) -> None:
    one = case("layer_norm", 2, 19, 12)
    values = one.cast(one.values(), torch.float32)

    def gradients(backend: str) -> tuple[Tensor, ...]:
        leaves = {name: value.detach().requires_grad_(name in wanted) for name, value in values.items()}
        with kernels.use(backend):
            total, out = one.call(leaves)
        return torch.autograd.grad((out * total).sum(), [leaves[name] for name in wanted])

    for ours, exact in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_a_gated_residual_s_x_is_not_copied() -> None:
    one = case("gated_residual", 1, 2, 3)
    leaves = {name: value.requires_grad_() for name, value in one.cast(one.values(), torch.float32).items()}
    with kernels.use("triton"):
        (out,) = one.call(leaves)
    upper = torch.ones_like(out)
    (dx,) = torch.autograd.grad(out, [leaves["x"]], upper)
    assert dx.data_ptr() == upper.data_ptr()


@pytest.fixture
def triton_only() -> Iterator[None]:
    with kernels.use("triton"):
        yield


def positional(op: str) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    one = case(op, 2, 3, 4)
    values = one.cast(one.values(), torch.float32)
    return lambda *t: one.call(dict(zip(values, t, strict=True))), tuple(values.values())


@pytest.mark.usefixtures("triton_only")
@pytest.mark.parametrize("op", OPS)
class TestRefusals:
    def test_second_derivatives(self, op: str) -> None:
        call, values = positional(op)
        leaves = tuple(value.requires_grad_() for value in values)
        total = functools.reduce(torch.add, (out.square().sum() for out in call(*leaves)))
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        with pytest.raises(BackendError, match=r"no rule for a second derivative\n.*use\(\"reference\"\)"):
            torch.autograd.grad(grads[-1].square().sum(), leaves)

    def test_forward_mode(self, op: str) -> None:
        call, values = positional(op)
        with pytest.raises(BackendError, match=r"no rule for a transform of torch\.func"):
            torch.func.jvp(call, values, values)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(values[0], values[0])
            with pytest.raises(BackendError, match="forward-mode"):
                call(dual, *values[1:])

    def test_vmap(self, op: str) -> None:
        call, values = positional(op)
        with pytest.raises(BackendError, match="no rule for a transform"):
            torch.func.vmap(call)(*(torch.stack((value, value)) for value in values))

    def test_too_wide(self, op: str) -> None:
        call, values = positional(op)
        wide = [value[..., :1].expand(*value.shape[:-1], rows_triton.MAX_WIDTH + 1) for value in values]
        with pytest.raises(BackendError, match="widths up to 4096, not 4097"):
            call(*wide)


@pytest.mark.usefixtures("triton_only")
@pytest.mark.parametrize("op", OPS)
def test_compiled_into_one_graph_equals_eager(op: str) -> None:
    torch._dynamo.reset()
    call, values = positional(op)

    def gradients(function: Callable[..., tuple[Tensor, ...]]) -> list[Tensor]:
        leaves = tuple(value.detach().requires_grad_() for value in values)
        outputs = function(*leaves)
        return [*outputs, *torch.autograd.grad(sum(out.sin().sum() for out in outputs), leaves)]

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for ours, wanted in zip(gradients(compiled), gradients(call), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.usefixtures("triton_only")
@pytest.mark.parametrize("op", OPS)
def test_on_meta(op: str) -> None:
    call, values = positional(op)
    leaves = tuple(value.to("meta").requires_grad_() for value in values)
    outputs = call(*leaves)
    grads = torch.autograd.grad(outputs, leaves, [torch.empty_like(out) for out in outputs])
    assert [g.shape for g in grads] == [value.shape for value in values]


def test_custom_ops_keep_their_promises() -> None:
    """torch's own check of schema, fake and autograd."""
    from longskip.kernels import adaln_triton, norm_triton

    x, v, w = torch.randn(2, 3, 8), torch.randn(2, 8), torch.randn(8)
    rstd = torch.rand(6)
    tests = ("test_schema", "test_faketensor")
    for op, arguments in (
        (norm_triton.forward_op, (x, x, w, None, 1e-5, False)),
        (norm_triton.forward_op, (x, None, w, w, 1e-5, True)),
        (norm_triton.backward_op, (x, x, None, w, w, rstd, rstd, True, False)),
        (adaln_triton.forward_op, (x, None, None, v, v, 1e-5)),
        (adaln_triton.forward_op, (x, x, v, v, v, 1e-5)),
        (adaln_triton.backward_op, (x, x, x, x, v, v, rstd, rstd)),
        (adaln_triton.gated_op, (x, x, v)),
        (adaln_triton.gated_backward_op, (x, x, v)),
    ):
        torch.library.opcheck(op._op, arguments, test_utils=tests)


@pytest.mark.parametrize("width", [1, 2, 37, 511, 512, 513, 768, 1024, 1152, 1280, 1536, 1921, 2560, 3072, 3584, 4096])
def test_pieces_hold_the_row_and_little_more(width: int) -> None:
    first, second = rows_triton.pieces(width)
    assert first + second >= width
    for piece in (first, second):
        assert piece & (piece - 1) == 0
    if width in (768, 1152, 1280, 1536, 2560, 3072):
        assert first + second == width
    assert first + second <= jit.next_power_of_2(width)


def test_chunks_depend_on_shapes_and_multiprocessors_and_fill_the_device() -> None:
    for samples, tokens in ((1, 100_000), (64, 334), (256, 334), (8, 4174), (1, 1), (3, 0)):
        for multiprocessors in (3, 108, 132):
            chunks = rows_triton.chunks_of(samples, tokens, multiprocessors)
            assert 1 <= chunks <= max(1, tokens // 16)
            places = 4 * multiprocessors
            rounds = -(-samples * chunks // places)
            # The rows that the busiest place goes through, against an even share of all.
            if samples * tokens >= 64 * places:
                assert rounds * -(-tokens // chunks) <= 1.35 * samples * tokens / places
