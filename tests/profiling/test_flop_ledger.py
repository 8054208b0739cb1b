"""The FLOP ledger's closed form against the dispatch count, scalar loops, the models' formulas and published figures."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from longskip import kernels
from longskip.errors import ConfigError, SpecError
from longskip.kernels import jit
from longskip.kernels.formulas import OpCost
from longskip.models.calls import Call
from longskip.models.conditioning import Conditioning
from longskip.models.presets import PRESETS, preset
from longskip.models.specs import TextEncoderSpec, UViTSpec
from longskip.models.text import WordEncoder
from longskip.models.uvit import UViT
from longskip.profiling.counting import FlopCount, count_flops
from longskip.profiling.flop_ledger import FlopLedger, flop_ledger, loss_rows, optimizer_row, rows_of
from longskip.profiling.padding import Padding, padding_on
from tests.figures import figure

SMALL = UViTSpec(width=64, depth=4, n_heads=2, channels=3, latent_size=(8, 6), n_txt=5, text_width=12)


def counted(
    spec: UViTSpec,
    *,
    batch: int = 1,
    latent_size: tuple[int, int] | None = None,
    n_txt: int | None = None,
    checkpointing: int = 0,
    trained_text: bool = False,
    masked: bool = False,
    train: bool = True,
    device: str = "meta",
) -> FlopCount:
    """What one pass of the built model dispatches."""
    model = UViT(spec, device=device)
    model.checkpointing = checkpointing
    n = spec.n_txt if n_txt is None else n_txt
    latents = torch.zeros(batch, spec.channels, *(latent_size or spec.latent_size), device=device)
    text = torch.zeros(batch, n, spec.text_width, device=device, requires_grad=trained_text) if spec.n_txt else None
    mask = torch.ones(batch, n, dtype=torch.bool, device=device) if masked else None
    label = torch.zeros(batch, dtype=torch.long, device=device) if spec.n_classes else None
    cond = Conditioning(text=text, text_mask=mask, label=label)
    time = torch.zeros(batch, device=device)

    def run() -> None:
        with torch.set_grad_enabled(train):
            out = model(latents, time, cond)
        if train:
            out.sum().backward()

    return count_flops(run)


def check(spec: UViTSpec, backend: str, **run: Any) -> FlopLedger:
    """Forward, exact backward, recomputation and hardware FLOPs are those dispatched, to the integer.

    On meta tensors torch's attention is unfused and repeats nothing; a CPU fuses it.
    """
    ledger = flop_ledger(spec, backend=backend, **run)
    with kernels.use(backend):
        step = counted(spec, **run)
        forward = counted(spec, **run | {"checkpointing": 0}, train=False)
    assert ledger.forward_flops == forward.flops
    unfused = backend == "torch" and not step.recomputed_macs
    assert ledger.hardware_flops == step.flops + (ledger.repeated_flops if unfused else 0)
    assert unfused or ledger.repeated_flops == 2 * step.recomputed_macs
    assert (
        ledger.forward_flops + ledger.backward_flops + ledger.recomputed_flops == step.flops - 2 * step.recomputed_macs
    )
    assert ledger.model_flops == 3 * forward.flops
    assert ledger.per_unit().hardware_flops == ledger.hardware_flops
    for shares in (ledger.forward_by_tokens(), ledger.forward_by_parameters()):
        assert sum(shares.values()) == ledger.forward_flops
    return ledger


@st.composite
def specs(draw: st.DrawFn) -> UViTSpec:
    heads = draw(st.integers(1, 3))
    patch = draw(st.sampled_from([1, 2, 4]))
    side = st.integers(1, 3).map(lambda n: n * patch)
    text = draw(st.sampled_from([(0, 0), (3, 8), (7, 20)]))
    flags = {name: draw(st.booleans()) for name in ("time_mlp", "conv", "skips", "qk_norm", "adaln")}
    return UViTSpec(
        width=heads * draw(st.sampled_from([32, 64])),
        depth=draw(st.integers(1, 6)),
        n_heads=heads,
        patch=patch,
        channels=draw(st.integers(1, 4)),
        out_channels=draw(st.sampled_from([None, 2, 5])),
        latent_size=(draw(side), draw(side)),
        n_txt=text[0],
        text_width=text[1],
        n_classes=draw(st.sampled_from([0, 10])),
        mlp_ratio=draw(st.integers(1, 4)),
        **flags,
    )


# Counting is slow to shrink; the spec that is printed says enough.
@settings(max_examples=40, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    spec=specs(),
    backend=st.sampled_from(["torch", "reference", "triton"]),
    batch=st.integers(1, 3),
    checkpointing=st.integers(0, 3),
    scale=st.sampled_from([None, 2]),
    trained_text=st.booleans(),
    data=st.data(),
)
def test_any_model_costs_what_it_dispatches(
    spec: UViTSpec,
    backend: str,
    batch: int,
    checkpointing: int,
    scale: int | None,
    trained_text: bool,
    data: st.DataObject,
) -> None:
    size = (spec.latent_size[0] * scale, spec.latent_size[1]) if scale else None
    n_txt = data.draw(st.integers(1, spec.n_txt)) if spec.n_txt else None
    masked = spec.n_txt > 0 and data.draw(st.booleans())
    check(
        spec, backend, batch=batch, latent_size=size, n_txt=n_txt, checkpointing=checkpointing,
        trained_text=trained_text and spec.n_txt > 0, masked=masked,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
@pytest.mark.parametrize("name", ["uvit-0.3b", "uvit-8b", "uvit-h2-imagenet256", "uvit-s2-cifar10", "uvit-tiny"])
def test_presets(name: str, backend: str) -> None:
    check(preset(name), backend, checkpointing=1 if name == "uvit-8b" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("latent_size", [(32, 32), (64, 64), (128, 128), (96, 160)])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_at_every_resolution(name: str, latent_size: tuple[int, int]) -> None:
    spec = preset(name)
    size = tuple(-(-side // spec.patch) * spec.patch for side in latent_size)
    for backend, checkpointing in zip(("torch", "reference", "triton"), (0, 1, 2), strict=True):
        run = {"latent_size": size, "n_txt": spec.n_txt // 2 or None, "checkpointing": checkpointing}
        check(spec, backend, **run, trained_text=bool(spec.n_txt and checkpointing))


@pytest.mark.parametrize("masked", [False, True])
def test_on_a_cpu_it_is_what_a_cpu_executes(masked: bool) -> None:
    with kernels.use("torch"):
        step = counted(SMALL, batch=2, masked=masked, device="cpu")
    assert flop_ledger(SMALL, batch=2, masked=masked).hardware_flops == step.flops


# --- scalar loops -----------------------------------------------------------------------------------------------------


def loops(spec: UViTSpec) -> dict[str, int]:
    """Multiply-adds of a forward pass of one image, one by one, from what the paper's figure says a block is."""
    h, (rows, cols) = spec.width, spec.grid(spec.latent_size)
    tokens, dim = spec.n_extra + rows * cols, spec.width // spec.n_heads

    def product(*axes: int) -> int:
        return sum(1 for _ in itertools.product(*map(range, axes)))

    found = {
        "patch": product(rows * cols, h, spec.patch, spec.patch, spec.channels),
        "text": product(spec.n_txt, h, spec.text_width),
        "linear": product(tokens, h, spec.patch, spec.patch, spec.c_out),
        "conv": product(*spec.latent_size, spec.c_out, spec.c_out, 3, 3),
    }
    for _ in range(spec.n_blocks):
        for name, macs in {
            "attn.qkv": product(tokens, 3 * h, h),
            "attn": 2 * product(spec.n_heads, tokens, tokens, dim),
            "attn.proj": product(tokens, h, h),
            "mlp": 2 * product(tokens, spec.mlp_ratio * h, h),
        }.items():
            found[name] = found.get(name, 0) + macs
    found["skip"] = spec.n_skips * product(tokens, h, 2, h)
    return found


def test_scalar_loops_count_the_same() -> None:
    spec = UViTSpec(width=8, depth=2, n_heads=2, channels=3, latent_size=(4, 6), n_txt=2, text_width=5, mlp_ratio=2)
    by_name = {name: part.forward_flops for name, part in flop_ledger(spec).by(lambda row: row.name).items()}
    assert {name: flops for name, flops in by_name.items() if flops} == {k: 2 * v for k, v in loops(spec).items()}


def test_tokens_and_parameters_share_the_forward_out() -> None:
    """A linear layer's share by rows; attention's by queries; what acts once per image belongs to the time token."""
    spec = replace(SMALL, adaln=True, conv=True, n_classes=3)
    ledger = flop_ledger(spec, batch=2)
    by_tokens, h = ledger.forward_by_tokens(), spec.width
    tokens, image, skips = spec.n_tokens, spec.n_img, spec.n_skips
    per_row = spec.n_blocks * (12 * h * h + 2 * tokens * h) + skips * 2 * h * h + h * spec.patch**2 * spec.c_out
    once = (6 * spec.n_blocks + 2) * h * h
    only_image = image * spec.patch**2 * spec.channels * h + 9 * spec.c_out**2 * 8 * 6
    assert by_tokens == {
        "label": 2 * 2 * per_row,
        "time": 2 * 2 * (per_row + once),
        "text": 2 * 2 * (5 * per_row + 5 * spec.text_width * h),
        "image": 2 * 2 * (image * per_row + only_image),
    }
    by_parameters = ledger.forward_by_parameters()
    assert by_parameters["image"] == 2 * 2 * once
    assert by_parameters["none"] == 2 * 2 * spec.n_blocks * 2 * tokens**2 * h
    assert by_parameters["partial"] == 2 * 2 * (only_image + 5 * spec.text_width * h)


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_name_units_ops_and_costs() -> None:
    ledger = flop_ledger(SMALL, checkpointing=2)
    assert list(dict.fromkeys(row.units[0] for row in ledger.per_unit().rows)) == [
        "embed", *(f"blocks.{index}" for index in range(5)), "head",
    ]  # fmt: skip
    blocks = ledger.per_unit().by(lambda row: row.units[0])
    assert [bool(blocks[f"blocks.{index}"].recomputed_flops) for index in range(5)] == [True, False, True, False, True]
    assert {row.kind for row in ledger.rows} == {"embed", "blocks", "head"}
    row = next(row for row in ledger.rows if row.name == "attn.qkv")
    tokens, h = SMALL.n_tokens, SMALL.width
    assert row.forward == len(row.units) * OpCost(3 * h * h * tokens, 0, 4 * (tokens * 4 * h + 3 * h * h))
    assert row.intensity == (2 * row.hardware_macs + row.elementwise) / row.bytes


def test_elementwise_work_stands_apart() -> None:
    """By the documented table, for the second norm of every block: 5 + weight + bias + residual per value, 4 per row."""
    ledger = flop_ledger(SMALL)
    row = next(row for row in ledger.rows if row.name == "norm2")
    tokens, h = SMALL.n_tokens, SMALL.width
    assert row.forward.elementwise == len(row.units) * tokens * (8 * h + 4)
    assert row.forward.macs == row.backward.macs == 0
    assert ledger.elementwise_flops == sum(row.elementwise for row in ledger.rows) > 0


def test_half_the_bytes_in_half_the_precision() -> None:
    assert flop_ledger(SMALL, itemsize=4).bytes == 2 * flop_ledger(SMALL, itemsize=2).bytes - 4  # the time, in float32


def test_text_loss_and_optimizer_have_rows_of_their_own() -> None:
    encoder = TextEncoderSpec(vocab_size=9, width=12, n_tokens=5, depth=2)
    model = flop_ledger(SMALL, batch=2, trained_text=True)
    whole = model.with_rows([*rows_of(encoder.calls(2), part="text"), *loss_rows(3 * 8 * 6, 2), optimizer_row(1000)])
    ids = torch.zeros(2, 5, dtype=torch.long, device="meta")
    words = WordEncoder(encoder, device="meta")
    assert whole.hardware_flops - model.hardware_flops == count_flops(lambda: words(ids).sum().backward()).flops
    assert whole.forward_flops - model.forward_flops == count_flops(words, ids).flops
    parts = whole.by(lambda row: row.part)
    assert list(parts) == ["model", "text", "loss", "optimizer"]
    assert parts["loss"].hardware_flops == parts["optimizer"].hardware_flops == 0
    assert parts["optimizer"].elementwise_flops == 1000 * (15 + 1 + 3)
    assert parts["loss"].elementwise_flops == 2 * (144 * 3 + 144 * 4 + 2) + 2 * (144 * 3 + 2)


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_h200() -> Iterator[Any]:
    yield padding_on(90, itemsize=4)  # the interpreter refuses bf16, and takes its tiles for float32


def test_padding_is_what_the_tiles_hold_beyond_the_shape(on_h200: Any) -> None:
    """334 tokens of head dim 64: the forward in blocks of queries and keys, the backward's five products."""
    spec = preset("uvit-0.3b")
    call = next(c for unit in spec.calls(batch=8) for c in unit.calls if c.op == "attention")
    padding = on_h200(call)
    whole = 384  # 6 blocks of 64, the next whole number of blocks of any of the choices (64 or 128)
    once = 8 * 16 * 64 * (whole * whole - 334 * 334)
    assert padding == Padding(2 * once, 5 * once)
    even = preset("uvit-s2-cifar10", latent_size=(32, 32), n_txt=127, text_width=8)  # 1 + 127 + 256 = 384 tokens
    call = next(c for unit in even.calls(batch=16) for c in unit.calls if c.op == "attention")
    assert on_h200(call) == Padding(0, 0)


def test_a_mask_is_padded_in_the_tiles_that_serve_it(on_h200: Any) -> None:
    """Of a masked call the streamed forward, whose blocks of queries are 128, as captured."""
    spec = preset("uvit-0.3b", latent_size=(24, 24))  # 1 + 77 + 144 = 222 tokens: 256 queries, 256 keys
    plain, masked = (
        next(c for unit in spec.calls(batch=16, masked=mask) for c in unit.calls if c.op == "attention")
        for mask in (False, True)
    )
    assert masked.sizes["masked"] == 1 and plain.sizes["masked"] == 0
    with jit.captured(jit.TARGETS[90]) as launched, kernels.use("triton", "attention"):
        q = torch.empty(16, 222, 16, 64, device="meta")
        kernels.attention(q, q, q, key_mask=torch.ones(16, 222, dtype=torch.bool, device="meta"))
    (launch,) = launched
    assert launch.kernel.__name__ == "_attention_forward"
    queries, keys = (-(-222 // launch.constants[name]) * launch.constants[name] for name in ("BLOCK_Q", "BLOCK_K"))
    assert on_h200(masked).forward == 2 * 16 * 16 * 64 * (queries * keys - 222 * 222)


def test_the_ledger_books_padding_beside_the_declared(on_h200: Any) -> None:
    spec = preset("uvit-0.3b")
    plain = flop_ledger(spec, batch=8, backend="triton")
    ledger = flop_ledger(spec, batch=8, backend="triton", padding=on_h200)
    once = 8 * 16 * 64 * (384**2 - 334**2)
    assert ledger.padded_flops == spec.n_blocks * 2 * 7 * once
    assert ledger.hardware_flops == plain.hardware_flops
    assert flop_ledger(spec, batch=8, backend="torch", padding=on_h200).padded_flops == 0
    again = flop_ledger(spec, batch=8, backend="triton", padding=on_h200, checkpointing=1)
    assert again.padded_flops == spec.n_blocks * 2 * 9 * once


def test_a_fused_mlp_that_is_computed_again_pads_again() -> None:
    """The last op of a checkpointed block: as one op it runs whole, in plain torch it ends before its second product."""

    def beyond(call: Call) -> Padding:
        return Padding(5, 7) if call.op == "mlp" else Padding()

    blocks = SMALL.n_blocks
    for checkpointing, each in ((0, 5 + 7), (1, 2 * 5 + 7)):
        ledger = flop_ledger(SMALL, backend="triton", checkpointing=checkpointing, padding=beyond)
        assert ledger.padded_flops == 2 * blocks * each


def test_padding_of_our_own_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a table names our tile for a product, its edges are booked; cuBLAS's are not known."""
    from longskip.kernels import tables

    tile = {"gemm": "triton", "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    call = next(c for unit in replace(SMALL, width=96).calls() for c in unit.calls if c.op == "skip_linear")
    rows, h = call.sizes["rows"], 96
    assert padding_on(90, 4)(call) == Padding()
    from longskip.profiling import padding

    padding._padding.cache_clear()
    with tables.forced({"skip_linear_out": tile, "skip_linear_weight_gradient": tile}):
        found = padding_on(90, 4)(call)
    padding._padding.cache_clear()
    whole = -(-rows // 64) * 64
    assert found.forward == 2 * (whole * 128 * 96 - rows * h * h)
    assert found.backward == 2 * (128 * 128 * (-(-rows // 32) * 32) - h * h * rows)


# --- refusals and speed -----------------------------------------------------------------------------------------------


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="backend 'cuda' is not known"):
        flop_ledger(SMALL, backend="cuda")
    with pytest.raises(ConfigError, match="checkpointing -1"):
        flop_ledger(SMALL, checkpointing=-1)
    with pytest.raises(SpecError, match=r"n_txt = 6 is outside 0\.\.5"):
        flop_ledger(SMALL, n_txt=6)
    with pytest.raises(SpecError, match="not divisible by patch"):
        flop_ledger(SMALL, latent_size=(7, 6))
    with pytest.raises(ConfigError, match="compute capability 70"):
        padding_on(70)
    with pytest.raises(ConfigError, match="values of 8 bytes"):
        padding_on(90, itemsize=8)


def test_the_closed_form_needs_no_torch_and_is_quick() -> None:
    """``make figures`` prints the times; what is asserted here are bounds far above them."""
    code = (
        "import sys, time\n"
        "from longskip.models.presets import preset\n"
        "from longskip.profiling.flop_ledger import flop_ledger\n"
        "spec = preset('uvit-8b', latent_size=(128, 128))\n"
        "def once():\n"
        "    start = time.process_time()\n"
        "    ledger = flop_ledger(spec, checkpointing=1)\n"
        "    ledger.hardware_flops, ledger.elementwise_flops, ledger.per_unit().rows\n"
        "    return time.process_time() - start\n"
        "print(min(once() for _ in range(20)))\n"
        "start = time.process_time()\n"
        "for _ in range(200): flop_ledger(spec).hardware_flops\n"
        "print(200 / (time.process_time() - start))\n"
        "assert 'torch' not in sys.modules\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    figure(f"8B ledger at 1024²: {1e3 * float(out[0]):.2f} ms; sweep: {float(out[1]):,.0f} configurations/s")
    assert float(out[0]) < 0.5 and float(out[1]) > 100
