"""The attention kernels, interpreted: head dims, lengths round the blocks, both forwards, both backwards, memory, refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from longskip import kernels
from longskip.errors import BackendError, KernelArgumentError
from longskip.kernels import attention_backward_triton, attention_forward_triton, jit, tables
from longskip.kernels.attention_tiles_triton import Call
from longskip.kernels.attention_triton import CONFIGURATIONS, HEAD_DIMS
from longskip.kernels.formulas import attention_backward_padded, attention_chunks, attention_forward_padded
from longskip.profiling.counting import count_flops
from tests.kernels.kernel_checks import FLOAT64, Case, eager_runs, judge, run
from tests.kernels.poison import check_poisoned

CPU = torch.device("cpu")


def packed(batch: int, tokens: int, heads: int, head_dim: int, **keywords: Any) -> Case:
    return Case("attention", "packed", {"q": (batch, tokens, 3, heads, head_dim)}, {}, keywords)


def cross(batch: int, queries: int, keys: int, head_dim: int, share: float | None = None, heads: int = 1) -> Case:
    """Separate tensors; ``share`` of the keys is attended to, and none of the first sample."""
    fixed = {}
    if share is not None:
        mask = torch.rand(batch, keys, generator=torch.Generator().manual_seed(2)) < share
        mask[0] = False
        fixed = {"key_mask": mask}
    of_keys = (batch, keys, heads, head_dim)
    return Case("attention", "cross", {"q": (batch, queries, heads, head_dim), "k": of_keys, "v": of_keys}, fixed)


def product(a: Tensor, b: Tensor) -> Tensor:
    """By numpy, as in the interpreter: its sums over many values are longer, and rounder, than torch's."""
    return torch.from_numpy(np.matmul(a.float().numpy(), b.float().numpy())).to(a.dtype)


def flash(values: dict[str, Tensor], case: Case, grad: Tensor) -> dict[str, Tensor]:
    """The same derivative in plain tensors: dS = P * (dP - sum of dO * O), which leaves a rounding where dS is 0."""
    q, k, v = (t.transpose(1, 2) for t in (values["q"].unbind(2) if "k" not in values else values.values()))
    scale = case.keywords.get("scale", q.shape[-1] ** -0.5)
    mask = case.fixed.get("key_mask")
    scores = product(q, k.mT) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)
    g = grad.to(q.dtype).transpose(1, 2)
    slopes = weights * (product(g, v.mT) - (g * product(weights, v)).sum(-1, keepdim=True)) * scale
    found = [t.transpose(1, 2) for t in (product(slopes, k), product(slopes.mT, q), product(weights.mT, g))]
    return {"dq": torch.stack(found, 2)} if "k" not in values else dict(zip(("dq", "dk", "dv"), found, strict=True))


def against_float64(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Outputs and gradients by the rule of ``judge``; the gradients also beside plain torch by the same formula."""
    values = case.cast(case.values(), dtype)
    ours, cotangents = run(case, values, "triton")
    rounded = [c.to(dtype).to(FLOAT64) for c in cotangents]
    exact, _ = run(case, {name: value.to(FLOAT64) for name, value in values.items()}, "reference", rounded)
    eagers = eager_runs(case, values, "triton", cotangents)
    plain = flash(values, case, rounded[0])
    for name, tensor in exact.items():
        others = [eager[name] for eager in eagers] + ([plain[name]] if name in plain else [])
        judge(f"{case.id} {name}", ours[name], others, tensor)


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two backward kernels and streamed keys at any length."""
    monkeypatch.setattr(attention_backward_triton, "LONGEST_SHORT", 0)
    monkeypatch.setattr(attention_forward_triton, "LONGEST_RESIDENT", 0)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim(head_dim: int) -> None:
    """Two blocks of keys, the second not full.

    At 256 the scores are kept small: numpy's float32 sums over 256 products differ by 10 roundings with the blocks' shapes,
    so that weights made again in the backward do not quite sum to 1.
    """
    against_float64(packed(1, 67, 1, head_dim, scale=0.1 if head_dim < 256 else 0.02))


@pytest.mark.parametrize(
    "head_dim", [d if d in (64, 72) else pytest.param(d, marks=pytest.mark.slow) for d in HEAD_DIMS]
)
def test_every_head_dim_in_half_precision(head_dim: int) -> None:
    against_float64(packed(1, 67, 1, head_dim, scale=0.1), torch.float16)


@pytest.mark.parametrize(
    "tokens", [1, 16, 63, 64, 65, *(pytest.param(n, marks=pytest.mark.slow) for n in (127, 128, 129))]
)
@pytest.mark.parametrize("path", ["short", "long"])
def test_lengths_round_the_blocks(tokens: int, path: str, request: pytest.FixtureRequest) -> None:
    if path == "long":
        request.getfixturevalue("long")
    against_float64(packed(1, tokens, 3, 32))


@pytest.mark.parametrize("head_dim", [64, 72])
def test_334_tokens(head_dim: int) -> None:
    against_float64(packed(1, 334, 1, head_dim))


@pytest.mark.parametrize("share", [None, 0.5, 0.02])
@pytest.mark.parametrize(("queries", "keys"), [(7, 131), (131, 9)])
@pytest.mark.parametrize("head_dim", [32, 80])
def test_cross_and_masked(head_dim: int, queries: int, keys: int, share: float | None) -> None:
    """Two per cent of the keys leaves whole blocks without one."""
    against_float64(cross(2, queries, keys, head_dim, share))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_turn_the_order_of_scores(scale: float) -> None:
    against_float64(Case("attention", "scale", {"q": (3, 9, 3, 1, 48)}, {}, {"scale": scale}))


@pytest.mark.parametrize("head_dim", [64, 96])
def test_packed_heads_and_strides_are_read_in_place(head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v as views of one tensor, at an odd offset, batch and tokens exchanged: nothing is copied, same bits."""
    storage = torch.randn(1 + 5 * 2 * 3 * 2 * head_dim)
    whole = storage[1:].view(5, 2, 3, 2, head_dim).transpose(0, 1)
    plain = whole.contiguous()
    monkeypatch.setattr(Tensor, "contiguous", lambda self: pytest.fail("copied"))
    with kernels.use("triton"):
        expected = kernels.attention(plain)
        assert torch.equal(kernels.attention(whole), expected)
        assert torch.equal(kernels.attention(*whole.unbind(2)), expected)


def test_packed_gradients_are_one_tensor() -> None:
    q = torch.randn(2, 5, 3, 2, 32, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, kernels.use("triton"):
        kernels.attention(q).sum().backward()
    assert q.grad is not None and q.grad.is_contiguous() and q.grad.shape == q.shape
    assert not {event.key for event in profile.key_averages()} & {"aten::stack", "aten::cat"}


@pytest.mark.parametrize(
    ("name", "constants"), [(name, constants) for name in sorted(CONFIGURATIONS) for constants in CONFIGURATIONS[name]]
)
def test_every_configuration_gives_the_result(
    name: str, constants: dict[str, Any], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if name not in ("_attention_backward_short", "_attention_forward_resident"):
        request.getfixturevalue("long")
    launched: list[tuple[str, dict[str, Any]]] = []
    plain = jit.launch

    def launch(kernel: Any, *rest: Any, **options: Any) -> None:
        launched.append((kernel.fn.__name__, options))
        plain(kernel, *rest, **options)

    monkeypatch.setattr(jit, "launch", launch)
    with tables.forced({name: constants}):
        against_float64(cross(3, 9, 65, 48, None if name == "_attention_forward_resident" else 0.7))
    mine = [options for kernel, options in launched if kernel == name]
    assert mine
    assert all(constants.items() <= options.items() for options in mine)


# --- variable length ------------------------------------------------------------------------------------------------

OFFSETS = torch.tensor([0, 1, 1, 17, 82, 85])
OFFSETS_K = torch.tensor([0, 7, 9, 9, 74, 75])


@pytest.mark.parametrize("path", ["short", "long"])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_varlen_is_every_sequence_by_itself(head_dim: int, path: str, request: pytest.FixtureRequest) -> None:
    """Bit for bit, gradients too: an empty sequence, one without keys, several blocks."""
    if path == "long":
        request.getfixturevalue("long")
    q = torch.randn(85, 1, head_dim, requires_grad=True)
    k, v = (torch.randn(75, 1, head_dim, requires_grad=True) for _ in range(2))
    g = torch.randn(85, 1, head_dim)
    with kernels.use("triton"):
        out = kernels.attention_varlen(q, k, v, cu_seqlens=OFFSETS, cu_seqlens_k=OFFSETS_K.int())
        grads = torch.autograd.grad(out, (q, k, v), g)
        spans = zip(OFFSETS.tolist(), OFFSETS[1:].tolist(), OFFSETS_K.tolist(), OFFSETS_K[1:].tolist(), strict=False)
        for a, b, c, d in spans:
            one = kernels.attention(q[None, a:b], k[None, c:d], v[None, c:d])
            parts = torch.autograd.grad(one, (q, k, v), g[None, a:b])
            torch.testing.assert_close(out[a:b], one[0], rtol=0, atol=0)
            for whole, part, (first, last) in zip(grads, parts, ((a, b), (c, d), (c, d)), strict=True):
                torch.testing.assert_close(whole[first:last], part[first:last], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("offsets", "says"),
    [
        ([1, 4, 9], r"cu_seqlens\[0\] is 1"),
        ([0, 4, 8], r"cu_seqlens\[-1\] is 8"),
        ([0, 6, 4, 9], r"cu_seqlens\[2\] is 4 after 6"),
        ([], r"of shape \(0,\)"),
        ([[0, 9]], r"of shape \(1, 2\)"),
        ([0.0, 9.0], "of dtype torch.float32"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_offsets_are_refused_before_any_launch(
    backend: str, offsets: list[Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jit, "launch", lambda *args, **options: pytest.fail("launched"))
    values = torch.tensor(offsets) if offsets else torch.zeros(0, dtype=torch.int64)
    q = torch.randn(9, 3, 2, 32)
    with (
        kernels.use(backend),
        pytest.raises(KernelArgumentError, match=rf"attention_varlen: cu_seqlens.*{says}|{says}"),
    ):
        kernels.attention_varlen(q, cu_seqlens=values)


def test_offsets_of_keys_are_refused() -> None:
    q, k = torch.randn(9, 2, 32), torch.randn(7, 2, 32)
    nine, seven = torch.tensor([0, 4, 9]), torch.tensor([0, 7])
    for keywords, says in (
        ({}, "cu_seqlens_k is None; allowed: offsets from 0 to the 7 keys"),
        ({"cu_seqlens_k": seven}, "cu_seqlens_k is of shape"),
        ({"cu_seqlens_k": nine}, r"cu_seqlens_k\[-1\] is 9"),
    ):
        with pytest.raises(KernelArgumentError, match=says):
            kernels.attention_varlen(q, k, k, cu_seqlens=nine, **keywords)
    with pytest.raises(KernelArgumentError, match="given with q packed"):
        kernels.attention_varlen(torch.randn(9, 3, 1, 32), cu_seqlens=nine, cu_seqlens_k=nine)


# --- memory, order, edges ---------------------------------------------------------------------------------------------

MEMORY = [
    packed(1, 67, 3, 64),
    packed(1, 67, 1, 72),
    cross(3, 9, 67, 48, 0.5),
    Case("attention_varlen", "varlen", {"q": (70, 3, 1, 80)}, {"cu_seqlens": torch.tensor([0, 3, 3, 70])}),
]


@pytest.mark.parametrize("case", MEMORY, ids=lambda c: "-".join(map(str, c.inputs["q"])))
def test_poisoned_memory(case: Case) -> None:
    check_poisoned(case)


@pytest.mark.parametrize("calls", [5, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [packed(1, 16, 3, 64), packed(1, 16, 1, 72)], ids=["short", "long"])
def test_repeated_calls_are_bit_equal(case: Case, calls: int) -> None:
    values = case.cast(case.values(), torch.float32)
    first, cotangents = run(case, values, "triton")
    for _ in range(calls - 1):
        again, _ = run(case, values, "triton", cotangents)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("head_dim", [32, 72])
@pytest.mark.parametrize("masked", [False, True])
def test_nan_and_infinity_go_where_the_definition_takes_them(head_dim: int, masked: bool) -> None:
    q, k, v = torch.randn(3, 3, 66, 1, head_dim)
    mask = torch.rand(3, 66, generator=torch.Generator().manual_seed(0)) < 0.5 if masked else None
    if mask is not None:
        mask[:, 3], mask[:, 4], mask[2] = True, False, False
    for tensor, value in (
        (q, float("nan")),
        (q, float("inf")),
        (k, float("nan")),
        (k, float("inf")),
        (v, float("nan")),
    ):
        for token in (4, 65):
            bad = tensor.clone()
            bad[:, token, 0, 5] = value
            given = [bad if t is tensor else t for t in (q, k, v)]
            with kernels.use("reference"):
                expected = kernels.attention(*given, key_mask=mask)
            with kernels.use("triton"):
                out = kernels.attention(*given, key_mask=mask)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("head_dim", [32, 72])
def test_rows_without_keys_have_no_gradient_even_of_nan(head_dim: int) -> None:
    values = {name: torch.randn(2, 5, 1, head_dim) for name in "qkv"}
    values["q"][0, 1] = float("nan")
    case = Case("attention", "nan", {}, {"key_mask": torch.tensor([[False] * 5, [True] * 5])})
    ours, cotangents = run(case, values, "triton")
    theirs, _ = run(case, values, "reference", cotangents)
    assert not ours["out0"][0].any()
    assert not ours["dq"][0].any()
    for name in theirs:
        torch.testing.assert_close(ours[name][1], theirs[name][1])


@pytest.mark.parametrize("wanted", [("q",), ("k", "v"), ("v",)])
def test_gradients_of_some_inputs(wanted: tuple[str, ...]) -> None:
    values = {name: torch.randn(2, 5, 1, 32) for name in "qkv"}
    grads = {}
    for backend in ("triton", "reference"):
        leaves = {name: value.clone().requires_grad_(name in wanted) for name, value in values.items()}
        with kernels.use(backend):
            kernels.attention(**leaves).square().sum().backward()
        grads[backend] = {name: leaf.grad for name, leaf in leaves.items()}
    for name in "qkv":
        ours, theirs = grads["triton"][name], grads["reference"][name]
        assert (ours is None) == (name not in wanted)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


# --- contractions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def dots(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Multiply-adds of every ``tl.dot`` that the interpreter executes."""
    from triton.runtime.interpreter import InterpreterBuilder

    found: list[int] = []
    plain = InterpreterBuilder.create_dot

    def counted(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        found.append(a.data.shape[-2] * a.data.shape[-1] * b.data.shape[-1])
        return plain(self, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    return found  # type: ignore[return-value]


def blocks_of(kernel: str, case: Case) -> tuple[int, int]:
    """The blocks of queries and keys that a launch of the kernel takes for the case."""
    values = case.cast(case.values(), torch.float32)
    found: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jit, "launch", lambda kernel, grid, *rest, **options: found.append((kernel.fn.__name__, options)))
        run(case, values, "triton")
    options = next(options for name, options in found if name.startswith(kernel))
    return options["BLOCK_Q"], options["BLOCK_K"]


@pytest.mark.parametrize("head_dim", [64, 72])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (67, 129), (64, 64), (5, 0), (0, 5)])
def test_executed_contractions_equal_the_padded_closed_form(
    head_dim: int, queries: int, keys: int, dots: list[int]
) -> None:
    case = cross(1, queries, keys, head_dim, heads=2)
    sizes = {"batch": 1, "queries": queries, "keys": keys, "heads": 2, "head_dim": head_dim}
    values = case.cast(case.values(), torch.float32)
    with kernels.use("triton"):
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        (out,) = case.call(leaves)
        forward = sum(dots)
        dots.clear()
        torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))
    backward = sum(dots)
    q, k = blocks_of("_attention_forward", case)
    assert forward == attention_forward_padded(**sizes, block_q=q, block_k=k)
    if head_dim <= 64:
        q, k = blocks_of("_attention_backward_short", case)
        assert backward == attention_backward_padded(**sizes, block_q=q, block_k=k)
    else:
        q, k = blocks_of("_attention_backward_keys", case)
        others = blocks_of("_attention_backward_queries", case)
        assert backward == attention_backward_padded(**sizes, block_q=q, block_k=k, of_queries=others)


@pytest.mark.parametrize(("head_dim", "products"), [(64, 5), (128, 7)])
def test_declared_contractions_are_the_executed_ones_of_whole_blocks(
    head_dim: int, products: int, dots: list[int]
) -> None:
    """128 queries and keys are whole blocks; counters see the same on the meta device, recomputation apart."""
    case = packed(1, 128, 1, head_dim)
    once = 128 * 128 * head_dim

    def call(device: str) -> Callable[[], Any]:
        q = torch.empty(case.inputs["q"], device=device).normal_().requires_grad_()
        return lambda: kernels.attention(q).sum().backward()

    with kernels.use("triton"):
        call("cpu")()
        assert sum(dots) == (2 + products) * once
        for device in ("cpu", "meta"):
            with FlopCounterMode(display=False) as counter:
                call(device)()
            assert counter.get_total_flops() == 2 * (2 + products) * once
            count = count_flops(call(device))
            assert (count.macs, count.recomputed_macs) == ((2 + products) * once, (products - 4) * once)
        offsets = torch.tensor([0, 0, 128])
        q = torch.empty(128, 3, 1, head_dim, device="meta", requires_grad=True)
        count = count_flops(lambda: kernels.attention_varlen(q, cu_seqlens=offsets).sum().backward())
        assert (count.macs, count.recomputed_macs) == ((2 + products) * once, (products - 4) * once)


def test_chunks() -> None:
    chunks = {d: attention_chunks(d) for d in HEAD_DIMS}
    assert chunks == {
        32: (32, 0), 48: (32, 16), 64: (64, 0), 72: (64, 16), 80: (64, 16), 96: (64, 32), 128: (128, 0),
        160: (128, 32), 256: (256, 0),
    }  # fmt: skip


# --- refusals, transforms, compile ------------------------------------------------------------------------------------


def test_other_head_dims_are_refused_and_go_elsewhere_by_auto() -> None:
    q = torch.randn(1, 5, 3, 1, 40)
    with kernels.use("triton"), pytest.raises(BackendError, match=r"head dims 32, 48, .*, not 40"):
        kernels.attention(q)
    with kernels.use("auto"):
        kernels.attention(q)


def test_transforms_are_refused() -> None:
    q = torch.randn(1, 5, 3, 1, 32)
    offsets = torch.tensor([0, 5])
    for call in (kernels.attention, lambda x: kernels.attention_varlen(x[0], cu_seqlens=offsets)):
        with kernels.use("triton"):
            with pytest.raises(BackendError, match=r"torch\.func"):
                torch.func.vmap(call)(q[None])
            with pytest.raises(BackendError, match=r"jvp|torch.func"):
                torch.func.jvp(call, (q,), (q,))
            leaf = q.clone().requires_grad_()
            (grad,) = torch.autograd.grad(call(leaf).square().sum(), leaf, create_graph=True)
            with pytest.raises(BackendError, match="second derivative"):
                torch.autograd.grad(grad.sum(), leaf)


@pytest.mark.parametrize(("kind", "head_dim"), [("packed", 64), ("packed", 72), ("masked", 64), ("varlen", 64)])
def test_compiled_whole_graphs_give_the_same_bits(kind: str, head_dim: int) -> None:
    torch._dynamo.reset()
    mask, offsets = torch.rand(2, 7) < 0.5, torch.tensor([0, 3, 7])

    def call(x: Tensor) -> Tensor:
        if kind == "varlen":
            return kernels.attention_varlen(x[0], cu_seqlens=offsets).sin()
        return kernels.attention(x, key_mask=mask if kind == "masked" else None).sin()

    found = []
    q = torch.randn(2, 7, 3, 1, head_dim)
    for function in (call, torch.compile(call, backend="aot_eager", fullgraph=True)):
        leaf = q.clone().requires_grad_()
        with kernels.use("triton"):
            out = function(leaf)
            found.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for ours, other in zip(*found, strict=True):
        assert torch.equal(ours, other)


def test_launches_for_devices_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """K and V of a head stay in shared memory on sm_90, and nowhere else; constants that suit no such call give way."""
    monkeypatch.setattr(jit, "INTERPRETED", False)
    q = torch.empty(16, 334, 3, 24, 64, dtype=torch.bfloat16, device="meta")
    call = Call(*q.unbind(2), None, None, (334, 334), 0.125)
    names = {}
    for capability, target in jit.TARGETS.items():
        with jit.captured(target) as launches:
            attention_forward_triton.forward(call)
        names[capability] = launches[0].kernel.fn.__name__
    assert names == {80: "_attention_forward", 90: "_attention_forward_resident", 100: "_attention_forward"}
    wide = CONFIGURATIONS["_attention_forward"][-1]  # of float32
    with jit.captured(jit.TARGETS[80]) as launches, tables.forced({"_attention_forward": wide}):
        attention_forward_triton.forward(call)
    assert launches[0].constants["BLOCK_K"] != wide["BLOCK_K"]
