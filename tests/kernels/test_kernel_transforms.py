"""The definitions under every transform, and the public functions under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from longskip import kernels
from tests.kernels.kernel_checks import CASES, FLOAT64, SMALL, Case

NO_BIAS: dict[str, Any] = {"b1": None, "b2": None}

TINY = [
    Case("attention", "packed", {"q": (1, 3, 3, 1, 2)}),
    Case(
        "attention",
        "masked",
        {"q": (2, 2, 1, 2), "k": (2, 3, 1, 2), "v": (2, 3, 1, 2)},
        {"key_mask": torch.tensor([[True, False, True], [False, False, False]])},
    ),
    Case("attention_varlen", "packed", {"q": (4, 3, 1, 2)}, {"cu_seqlens": torch.tensor([0, 1, 1, 4])}),
    Case("layer_norm", "all", {"x": (2, 3), "weight": (3,), "bias": (3,), "residual": (2, 3)}),
    Case("rms_norm", "all", {"x": (2, 3), "weight": (3,), "residual": (2, 3)}),
    Case("gated_adaln", "all", {"x": (1, 2, 3), "y": (1, 2, 3), "gate": (1, 3), "shift": (1, 3), "scale": (1, 3)}),
    Case("adaln", "all", {"x": (1, 2, 3), "shift": (1, 3), "scale": (1, 3)}),
    Case("gated_residual", "all", {"x": (1, 2, 3), "y": (1, 2, 3), "gate": (1, 3)}),
    Case("mlp", "erf", {"x": (2, 2), "w1": (3, 2), "b1": (3,), "w2": (2, 3), "b2": (2,)}),
    Case("mlp", "tanh", {"x": (2, 2), "w1": (3, 2), "w2": (2, 3)}, {}, {**NO_BIAS, "activation": "gelu_tanh"}),
    Case("swiglu", "all", {"x": (2, 2), "w_gate": (3, 2), "w_up": (3, 2), "w_down": (2, 3)}),
    Case("skip_linear", "all", {"x": (2, 2), "skip": (2, 2), "weight": (2, 4), "bias": (2,)}),
    Case(
        "qk_norm_rotary",
        "rms",
        {"q": (1, 2, 1, 4), "k": (1, 2, 1, 4), "q_weight": (4,)},
        {"cos": torch.rand(2, 2, dtype=FLOAT64), "sin": torch.rand(2, 2, dtype=FLOAT64)},
    ),
    Case("qk_norm_rotary", "layer", {"q": (1, 2, 1, 3), "k": (1, 2, 1, 3)}, {}, {"norm": "layer"}),
    Case(
        "diffusion_loss",
        "x",
        {"prediction": (2, 3), "clean": (2, 3), "noise": (2, 3)},
        {"time": torch.tensor([0.01, 0.5]), "weight": torch.tensor([1.0, 0.5])},
        {"prediction_kind": "x"},
    ),
]


def positional(case: Case) -> tuple[Callable[..., tuple[Tensor, ...]], tuple[Tensor, ...]]:
    values = case.values()
    names = list(values)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        return case.call(dict(zip(names, tensors, strict=True)))

    return call, tuple(value.requires_grad_() for value in values.values())


@pytest.mark.parametrize("case", TINY, ids=lambda c: c.id)
def test_reference_derivatives_of_first_and_second_order(case: Case) -> None:
    """Backward and forward mode against finite differences, then the backward's own backward."""
    call, leaves = positional(case)
    with kernels.use("reference"):
        assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(call, leaves, check_fwd_over_rev=True)


@pytest.mark.parametrize("case", TINY, ids=lambda c: c.id)
def test_torch_backend_is_differentiable(case: Case) -> None:
    call, leaves = positional(case)
    with kernels.use("torch"):
        assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("case", TINY, ids=lambda c: c.id)
def test_jvp_is_the_transpose_of_vjp(case: Case) -> None:
    call, leaves = positional(case)
    leaves = tuple(leaf.detach() for leaf in leaves)
    generator = torch.Generator().manual_seed(1)
    tangents = tuple(torch.randn(leaf.shape, generator=generator, dtype=FLOAT64) for leaf in leaves)
    with kernels.use("reference"):
        outputs, moved = torch.func.jvp(call, leaves, tangents)
        _, pull = torch.func.vjp(call, *leaves)
        cotangents = tuple(torch.randn(o.shape, generator=generator, dtype=FLOAT64) for o in outputs)
        pulled = pull(cotangents)
    forward = sum((c * m).sum() for c, m in zip(cotangents, moved, strict=True))
    backward = sum((p * t).sum() for p, t in zip(pulled, tangents, strict=True))
    torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-10)
    assert any(m.abs().max() > 0 for m in moved), "a silently zero tangent"


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("case", TINY, ids=lambda c: c.id)
def test_vmap_equals_a_loop(case: Case, backend: str) -> None:
    call, leaves = positional(case)
    generator = torch.Generator().manual_seed(4)
    stacks = tuple(torch.randn((3, *leaf.shape), generator=generator, dtype=FLOAT64) for leaf in leaves)
    with kernels.use(backend):
        together = torch.func.vmap(call)(*stacks)
        apart = [call(*(stack[at] for stack in stacks)) for at in range(3)]
    for number, out in enumerate(together):
        torch.testing.assert_close(out, torch.stack([one[number] for one in apart]), rtol=1e-10, atol=1e-12)


FIRST_OF_OP = list({case.op: case for case in reversed(SMALL)}.values())


@pytest.mark.parametrize("case", FIRST_OF_OP, ids=lambda c: c.id)
def test_public_functions_compile_into_one_graph(case: Case) -> None:
    """Validation and resolution leave no graph break, and the result is eager's."""
    torch._dynamo.reset()
    values = case.cast(case.values(), torch.float32)
    compiled = torch.compile(case.call, backend="eager", fullgraph=True)
    # Sequences of variable length are traced as one masked call, whose sums are rounded otherwise.
    tolerance = 1e-6 if case.op == "attention_varlen" else 0.0
    for got, wanted in zip(compiled(values), case.call(values), strict=True):
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_a_compiled_function_follows_the_settings() -> None:
    torch._dynamo.reset()
    graphs: list[str] = []

    def record(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    x = torch.randn(2, 17, 3, 2, 4)
    compiled = torch.compile(lambda q: kernels.attention(q), backend=record, fullgraph=True)
    for setting in ("torch", "reference", "torch", "auto"):
        with kernels.use(setting):
            compiled(x)
    assert len(graphs) == 3, "one graph for each setting: torch again costs none"
    assert "scaled_dot_product" in graphs[0]
    assert "scaled_dot_product" not in graphs[1]
    kernels.attention(x)  # an eager call in between must not cost a new graph
    count = len(graphs)
    compiled(x)
    assert len(graphs) == count


def test_a_misshaped_argument_is_refused_while_compiling() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w: kernels.layer_norm(x, w), backend="eager")
    with pytest.raises(Exception, match="layer_norm: weight is of shape"):
        compiled(torch.randn(2, 3), torch.randn(4))


def test_the_tiny_cases_cover_every_op() -> None:
    assert {case.op for case in TINY} == {case.op for case in CASES}
