"""The dispatch count against scalar loops that count every multiply-add, and against torch's own counter."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from longskip.profiling.counting import Contraction, UndeclaredOpError, count_flops, declare


def loop_conv_macs(x: tuple, weight: tuple, stride: int, padding: int, groups: int) -> int:
    """Multiply-adds of a 2-D convolution, one by one, those on the padding included."""
    batch, _, height, width = x
    out_channels, per_group, kh, kw = weight
    rows = (height + 2 * padding - kh) // stride + 1
    columns = (width + 2 * padding - kw) // stride + 1
    assert out_channels % groups == 0
    every = itertools.product(*map(range, (batch, out_channels, rows, columns, per_group, kh, kw)))
    return sum(1 for _ in every)


def loop_attention_macs(b: int, h: int, tq: int, tk: int, d: int, dv: int) -> int:
    macs = 0
    for _ in itertools.product(range(b), range(h), range(tq), range(tk)):
        macs += sum(1 for _ in range(d))  # q·k
        macs += sum(1 for _ in range(dv))  # p·v
    return macs


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_products(device: str) -> None:
    a, b = torch.randn(3, 5, device=device), torch.randn(5, 7, device=device)
    c, d = torch.randn(2, 3, 5, device=device), torch.randn(2, 5, 7, device=device)
    v = torch.randn(5, device=device)
    assert count_flops(torch.mm, a, b).macs == 3 * 5 * 7
    assert count_flops(torch.addmm, torch.randn(7, device=device), a, b).flops == 2 * 3 * 5 * 7
    assert count_flops(torch.bmm, c, d).macs == 2 * 3 * 5 * 7
    assert count_flops(torch.baddbmm, torch.randn(2, 3, 7, device=device), c, d).macs == 2 * 3 * 5 * 7
    assert count_flops(torch.addbmm, torch.randn(3, 7, device=device), c, d).macs == 2 * 3 * 5 * 7
    assert count_flops(torch.mv, a, v).macs == 3 * 5
    assert count_flops(torch.dot, v, v).macs == 5
    assert count_flops(torch.einsum, "bij,bjk->bik", c, d).macs == 2 * 3 * 5 * 7
    assert count_flops(lambda: torch.randn(3, 7, device=device).addmm_(a, b)).macs == 3 * 5 * 7
    assert count_flops(lambda: torch.mm(a, b, out=torch.empty(3, 7, device=device))).macs == 3 * 5 * 7


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("stride", "padding", "groups"), [(1, 0, 1), (1, 1, 1), (2, 1, 1), (1, 1, 2)])
def test_convolution_forward_and_each_gradient(device: str, stride: int, padding: int, groups: int) -> None:
    x = torch.randn(2, 4, 6, 5, device=device)
    layer = torch.nn.Conv2d(4, 6, 3, stride=stride, padding=padding, groups=groups, device=device)
    once = loop_conv_macs(tuple(x.shape), tuple(layer.weight.shape), stride, padding, groups)
    assert count_flops(layer, x).macs == once
    assert count_flops(lambda: layer(x).sum().backward()).macs == 2 * once  # x needs no gradient
    x.requires_grad_()
    assert count_flops(lambda: layer(x).sum().backward()).macs == 3 * once


def test_transposed_convolution() -> None:
    x = torch.randn(2, 4, 5, 3, device="meta", requires_grad=True)
    layer = torch.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, device="meta")
    once = 2 * 5 * 3 * 4 * (6 // 2) * 3 * 3  # every input element meets its group's outputs in every tap
    assert count_flops(layer, x).macs == once
    assert count_flops(lambda: layer(x).sum().backward()).macs == 3 * once


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, None])
@pytest.mark.parametrize("shape", [(2, 3, 5, 5, 4, 4), (1, 2, 3, 7, 8, 8)])
def test_attention_is_counted_whatever_serves_it(device: str, backend: SDPBackend | None, shape: tuple) -> None:
    b, h, tq, tk, d, dv = shape
    q = torch.randn(b, h, tq, d, device=device, requires_grad=True)
    k = torch.randn(b, h, tk, d, device=device, requires_grad=True)
    v = torch.randn(b, h, tk, dv, device=device, requires_grad=True)
    forward = loop_attention_macs(*shape)
    with sdpa_kernel(backend or [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
        assert count_flops(F.scaled_dot_product_attention, q, k, v).macs == forward
        both = count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert both.macs - both.recomputed_macs == 3 * forward
    assert both.recomputed_macs in (0, b * h * tq * tk * d)  # a fused backward computes QKᵀ once more
    if backend is SDPBackend.MATH:
        assert both.recomputed_macs == 0


def test_fused_backward_with_values_of_another_width() -> None:
    b, h, tq, tk, d, dv = 2, 3, 5, 7, 4, 6
    sizes = {"q": (b, h, tq, d), "k": (b, h, tk, d), "v": (b, h, tk, dv), "out": (b, h, tq, dv), "lse": (b, h, tq)}
    t = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
    seed = torch.empty((), dtype=torch.long, device="meta")

    def backward() -> None:
        torch.ops.aten._scaled_dot_product_efficient_attention_backward(
            t["out"], t["q"], t["k"], t["v"], None, t["out"], t["lse"], seed, seed, 0.0, [True, True, True, False]
        )

    with FlopCounterMode(display=False) as theirs:
        backward()
    ours = count_flops(backward)
    assert ours.flops == theirs.get_total_flops()
    # dQ, dK and the scores once more over q's width; dV and dP over v's.
    assert ours.macs - ours.recomputed_macs == 2 * loop_attention_macs(b, h, tq, tk, d, dv)
    assert ours.recomputed_macs == b * h * tq * tk * d


def test_the_cpu_default_is_the_case_torch_counts_as_free() -> None:
    q = torch.randn(1, 2, 8, 4)
    with FlopCounterMode(display=False) as theirs:
        F.scaled_dot_product_attention(q, q, q)
    ours = count_flops(F.scaled_dot_product_attention, q, q, q)
    assert ours.macs == 2 * (1 * 2 * 8 * 8 * 4)
    assert theirs.get_total_flops() in (0, ours.flops)  # 0 in torch 2.13


def test_a_transformer_block_agrees_with_torchs_counter_to_the_integer() -> None:
    block = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, device="meta")
    x = torch.randn(2, 5, 16, device="meta", requires_grad=True)

    def train() -> None:
        block(x).sum().backward()

    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as theirs:
            train()
        ours = count_flops(train)
    tokens, forward = 10, 10 * (4 * 16 * 16 + 2 * 16 * 32) + 2 * (2 * 5 * 5 * 16)
    assert tokens == x.shape[0] * x.shape[1]
    assert ours.flops == theirs.get_total_flops() == 2 * 3 * forward


def test_composite_ops_under_inference_mode_and_compiled_functions() -> None:
    linear, x = torch.nn.Linear(6, 4), torch.randn(3, 6)
    with torch.inference_mode():
        assert count_flops(linear, x).macs == 3 * 6 * 4
        q = torch.randn(1, 1, 3, 2)
        assert count_flops(F.scaled_dot_product_attention, q, q, q).macs == 2 * 3 * 3 * 2
    compiled = torch.compile(linear, backend="aot_eager")
    compiled(x)
    assert count_flops(compiled, x).macs == 3 * 6 * 4


def test_recomputation_and_missing_gradients_are_seen() -> None:
    layer, x = torch.nn.Linear(6, 4, bias=False), torch.randn(3, 6)
    once = 3 * 6 * 4
    assert count_flops(lambda: layer(x).sum().backward()).macs == 2 * once  # no gradient to the input
    x.requires_grad_()

    assert count_flops(lambda: layer(x).sum().backward()).macs == 3 * once
    first, second = torch.nn.Linear(6, 8, bias=False), torch.nn.Linear(8, 4, bias=False)
    a, b = 3 * 6 * 8, 3 * 8 * 4

    def checkpointed(reentrant: bool) -> None:
        chain = torch.nn.Sequential(first, torch.nn.GELU(), second)
        torch.utils.checkpoint.checkpoint(chain, x, use_reentrant=reentrant).sum().backward()

    assert count_flops(checkpointed, True).macs == 4 * (a + b)
    # The other kind stops as soon as it has what the backward needs: before the last product.
    assert count_flops(checkpointed, False).macs == 4 * a + 3 * b


def test_what_was_not_counted_is_part_of_the_answer() -> None:
    x = torch.randn(4, 4)
    count = count_flops(lambda: torch.relu(torch.relu(x @ x)).sum())
    assert count.ops.keys() == {"aten::mm"} and count.ops["aten::mm"].calls == 1
    assert count.ops["aten::mm"].flops == count.flops == 2 * 4**3
    assert count.other_ops["aten::relu"] == 2 and count.other_ops["aten::sum"] == 1


@pytest.mark.parametrize(
    "contracts",
    [
        lambda x: torch.linalg.inv(x),
        lambda x: torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist"),
        lambda x: torch.fft.fft(x),
        lambda x: torch._int_mm(x.to(torch.int8), x.to(torch.int8)),
    ],
)
def test_an_undeclared_contraction_raises(contracts) -> None:
    with pytest.raises(UndeclaredOpError, match="would count 0"):
        count_flops(contracts, torch.eye(32))


def test_what_training_does_beside_contractions_is_free_and_known() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4), torch.nn.GELU(), torch.nn.Dropout(0.5))
    optimizer = torch.optim.AdamW(layer.parameters())

    def step() -> None:
        F.mse_loss(layer(torch.randn(3, 4)), torch.zeros(3, 4)).backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        F.interpolate(torch.randn(1, 2, 4, 4), scale_factor=2.0, mode="bilinear")

    assert count_flops(step).macs == 2 * 3 * 4 * 4


def test_custom_ops_must_be_declared() -> None:
    @torch.library.custom_op("longskip_counting_test::twice", mutates_args=())
    def twice(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b @ b

    @torch.library.custom_op("longskip_counting_test::registered", mutates_args=())
    def registered(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b

    a, b = torch.randn(3, 5), torch.randn(5, 5)
    with pytest.raises(UndeclaredOpError, match="longskip_counting_test::twice"):
        count_flops(twice, a, b)

    declare("longskip_counting_test::twice", lambda args, kwargs, out: Contraction(2 * args[0].numel() * 5))
    count = count_flops(twice, a, b)
    assert count.ops["longskip_counting_test::twice"].macs == count.macs == 2 * 3 * 5 * 5
    with pytest.raises(ValueError, match="already"):
        declare("longskip_counting_test::twice", lambda args, kwargs, out: Contraction(0))

    @register_flop_formula(torch.ops.longskip_counting_test.registered)
    def formula(a_shape, b_shape, out_shape=None, **kwargs) -> int:
        return 2 * a_shape[0] * a_shape[1] * b_shape[1]

    assert count_flops(registered, a, b).macs == 3 * 5 * 5
