"""Every op, every gradient by name, both backends, odd sizes and layouts: judged against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longskip import kernels
from tests.kernels.kernel_checks import CASES, FLOAT64, MANY_ROWS, PUBLIC, SMALL, Case, eager_runs, judge, run, served

HALF_TOO = (torch.float32, torch.bfloat16, torch.float16)


def exact(case: Case, values: dict[str, Tensor], cotangents: list[Tensor] | None = None) -> dict[str, Tensor]:
    return run(case, {name: value.to(FLOAT64) for name, value in values.items()}, "reference", cotangents)[0]


@pytest.mark.parametrize(("case", "backend", "dtype"), served(CASES, *HALF_TOO))
def test_outputs_and_gradients(case: Case, backend: str, dtype: torch.dtype) -> None:
    values = case.cast(case.values(), dtype)
    ours, cotangents = run(case, values, backend)
    eagers = eager_runs(case, values, backend, cotangents)
    rounded = [c.to(ours[f"out{at}"].dtype).to(FLOAT64) for at, c in enumerate(cotangents)]
    reference = exact(case, values, rounded)
    for name, tensor in reference.items():
        assert ours[name].dtype == (values[name[1:]].dtype if name[1:] in values else ours["out0"].dtype), name
        judge(f"{case.id} {name}", ours[name], [eager[name] for eager in eagers], tensor)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_float64_backends_agree(case: Case) -> None:
    """In float64 the two implementations are independent of each other and equal to 1e-12 of the result's size."""
    ours, cotangents = run(case, case.values(), "torch")
    other = exact(case, case.values(), cotangents)
    for name, tensor in other.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-11, atol=1e-12 * max(1.0, tensor.abs().max().item()))


@pytest.mark.parametrize(("case", "backend", "dtype"), served(MANY_ROWS, *HALF_TOO))
def test_sums_over_many_rows_are_kept_wide(case: Case, backend: str, dtype: torch.dtype) -> None:
    """A parameter's gradient is a sum over n rows of terms of either sign, of size |sum| / sqrt(n) each.

    Rounding every term to the dtype moves the sum by about u |sum|, and n float32 additions by at most n u32 |sum|.
    Sums kept in the dtype itself are off by 7% in bfloat16 and 1% in float16 here.
    """
    values = case.cast(case.values(), dtype)
    ours, cotangents = run(case, values, backend)
    reference = exact(case, values, [c.to(dtype).to(FLOAT64) for c in cotangents])
    rows = 4099
    limit = 8 * torch.finfo(dtype).eps / 2 + rows * torch.finfo(torch.float32).eps / 2
    for name in values:
        if rows not in values[name].shape:
            error = (ours[f"d{name}"].to(FLOAT64) - reference[f"d{name}"]).abs().max()
            assert error <= limit * reference[f"d{name}"].abs().max(), name


def _width_2(op: str, *vectors: str) -> Case:
    shapes: dict[str, tuple[int, ...]] = {"x": (1, 33, 2)} | ({"y": (1, 33, 2)} if op == "gated_adaln" else {})
    return Case(op, "width-2", {**shapes, **dict.fromkeys(vectors, (1, 2))}, {}, {"eps": 1e-2})


WIDTH_2 = [
    _width_2("adaln", "shift", "scale"),
    _width_2("gated_adaln", "gate", "shift", "scale"),
    _width_2("layer_norm"),
]


@pytest.mark.parametrize(("case", "backend", "dtype"), served(WIDTH_2, torch.bfloat16, torch.float16))
def test_saved_statistics_are_float32(case: Case, backend: str, dtype: torch.dtype) -> None:
    """Rows of width 2: x̂ is ±1 and dx is a difference of nearly equal numbers, lost if rstd was kept in half.

    dx is then eps rstd³ times the gradients' difference, so an rstd that is off by u moves dx by u rstd |g|, which is
    larger by var / eps. In float32 the result is right to the dtype's rounding, here within 4 of its steps.
    """
    op = case.op
    values = case.cast(case.values(), dtype)
    if op == "gated_adaln":
        values["y"].zero_()  # the sum is x to the bit, whatever rounds
    # No gradient into the sum itself: adding one to dx in half precision may cancel, which is not the statistics' doing.
    silent = [torch.zeros(1, 33, 2)] * (op == "gated_adaln")
    ours, cotangents = run(case, values, backend, [*silent, _signs()])
    reference = exact(case, values, cotangents)
    torch.testing.assert_close(
        ours["dx"].to(FLOAT64), reference["dx"], rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps * 0.01
    )


def _signs() -> Tensor:
    return torch.tensor([1.0, -0.5], dtype=FLOAT64).expand(1, 33, 2)


def layout(value: Tensor, kind: str) -> Tensor:
    """The same values laid out otherwise."""
    if kind == "strided":
        return torch.stack((value, torch.full_like(value, float("nan"))), dim=-1)[..., 0]
    if kind == "transposed":
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == "offset":
        return torch.cat((torch.full((1,), float("nan"), dtype=value.dtype), value.flatten()))[1:].view(value.shape)
    return value[:1].expand(value.shape)


@pytest.mark.parametrize("kind", ["strided", "transposed", "offset", "expanded"])
@pytest.mark.parametrize(("case", "backend"), served(SMALL))
def test_layouts(case: Case, backend: str, kind: str) -> None:
    if kind == "expanded" and case.op == "attention_varlen":
        pytest.skip("equal keys: exact gradients of 0, which leave no error to compare with")
    laid = {name: layout(value, kind) for name, value in case.cast(case.values(), torch.float32).items()}
    plain = {name: value.clone(memory_format=torch.contiguous_format) for name, value in laid.items()}
    ours, cotangents = run(case, laid, backend)
    eagers = [run(case, plain, other, cotangents)[0] for other in ("torch", "reference")]
    reference = exact(case, plain, [c.float().to(FLOAT64) for c in cotangents])
    for name, tensor in reference.items():
        judge(f"{case.id} {name} {kind}", ours[name], [eager[name] for eager in eagers], tensor)


@pytest.mark.parametrize(("case", "backend"), served(SMALL))
def test_inputs_are_left_alone_and_calls_repeat(case: Case, backend: str) -> None:
    values = case.cast(case.values(), torch.float32)
    before = {name: value.clone() for name, value in values.items()}
    first, cotangents = run(case, values, backend)
    second, _ = run(case, values, backend, cotangents)
    for name in values:
        assert torch.equal(values[name], before[name])
    for name in first:
        assert torch.equal(first[name], second[name]), name


# For each op: the input that has rows, and the axes of the output over which one row must stay by itself.
ROWS = {
    "attention": ("q", 1),
    "attention_varlen": ("q", 0),
    "layer_norm": ("x", 1),
    "rms_norm": ("x", 1),
    "adaln": ("x", 2),
    "gated_adaln": ("x", 2),
    "gated_residual": ("y", 2),
    "mlp": ("x", 1),
    "swiglu": ("x", 1),
    "skip_linear": ("skip", 1),
    "qk_norm_rotary": ("q", 3),
    "diffusion_loss": ("prediction", 1),
}


@pytest.mark.parametrize(("case", "backend"), served(SMALL))
def test_row_depends_on_its_row_only_and_nan_propagates(case: Case, backend: str) -> None:
    name, axes = ROWS[case.op]
    values = case.cast(case.values(), torch.float32)
    last = (-1,) * values[name].ndim  # the last row: `attention` masks the first sample
    with kernels.use(backend):
        before = case.call(values)
        changed = dict(values)
        changed[name] = values[name].clone()
        changed[name][last] = float("nan")
        after = case.call(changed)
    touched = 0
    for old, new in zip(before, after, strict=True):
        touched += int(new.isnan().sum())
        if axes:
            rest = torch.ones(new.shape[:axes], dtype=torch.bool)
            rest[(-1,) * axes] = False
            assert torch.equal(old[rest], new[rest]), "another row changed"
    masked = case.fixed.get("key_mask")
    if masked is None or masked[-1].any():
        assert touched > 0, "the NaN was lost"


ROWWISE = [
    next(c for c in CASES if c.op == op) for op in ("layer_norm", "adaln", "mlp", "skip_linear", "swiglu", "rms_norm")
]


@pytest.mark.parametrize(("case", "backend"), served(ROWWISE))
def test_nan_fills_exactly_its_row(case: Case, backend: str) -> None:
    values = case.cast(case.values(), torch.float32)
    values["x"][1, 2, 3] = float("nan")
    with kernels.use(backend):
        out = case.call(values)[-1]
    expected = torch.zeros(out.shape, dtype=torch.bool)
    expected[1, 2] = True
    assert torch.equal(out.isnan(), expected)


EMPTY = [
    Case("attention", "no-batch", {"q": (0, 5, 3, 2, 4)}),
    Case("attention", "no-tokens", {"q": (2, 0, 3, 2, 4)}),
    Case("attention", "no-keys", {"q": (2, 3, 2, 4), "k": (2, 0, 2, 4), "v": (2, 0, 2, 4)}),
    Case(
        "attention",
        "no-keys-masked",
        {"q": (2, 3, 2, 4), "k": (2, 0, 2, 4), "v": (2, 0, 2, 4)},
        {"key_mask": torch.ones(2, 0, dtype=torch.bool)},
    ),
    Case("attention", "no-keys-wide", {"q": (2, 3, 2, 72), "k": (2, 0, 2, 72), "v": (2, 0, 2, 72)}),
    Case("attention", "no-keys-narrow", {"q": (2, 3, 2, 32), "k": (2, 0, 2, 32), "v": (2, 0, 2, 32)}),
    Case("attention", "no-queries-wide", {"q": (2, 0, 2, 72), "k": (2, 3, 2, 72), "v": (2, 3, 2, 72)}),
    Case("attention", "no-queries-narrow", {"q": (2, 0, 2, 32), "k": (2, 3, 2, 32), "v": (2, 3, 2, 32)}),
    Case("attention", "no-queries", {"q": (2, 0, 2, 4), "k": (2, 3, 2, 4), "v": (2, 3, 2, 4)}),
    Case("attention_varlen", "no-tokens", {"q": (0, 3, 2, 32)}, {"cu_seqlens": torch.tensor([0, 0, 0])}),
    Case("attention_varlen", "no-sequences", {"q": (0, 3, 2, 32)}, {"cu_seqlens": torch.tensor([0])}),
    Case("layer_norm", "no-rows", {"x": (0, 7), "weight": (7,), "bias": (7,), "residual": (0, 7)}),
    Case("rms_norm", "no-rows", {"x": (3, 0, 7), "weight": (7,)}),
    Case("adaln", "no-tokens", {"x": (2, 0, 7), "shift": (2, 7), "scale": (2, 7)}),
    Case("gated_adaln", "no-batch", {"x": (0, 3, 7), "y": (0, 3, 7), "gate": (0, 7), "shift": (0, 7), "scale": (0, 7)}),
    Case("gated_residual", "no-tokens", {"x": (2, 0, 7), "y": (2, 0, 7), "gate": (2, 7)}),
    Case("mlp", "no-rows", {"x": (0, 3, 5), "w1": (4, 5), "b1": (4,), "w2": (5, 4), "b2": (5,)}),
    Case("swiglu", "no-rows", {"x": (0, 5), "w_gate": (4, 5), "w_up": (4, 5), "w_down": (5, 4)}),
    Case("skip_linear", "no-rows", {"x": (2, 0, 5), "skip": (2, 0, 5), "weight": (5, 10), "bias": (5,)}),
    Case("qk_norm_rotary", "no-batch", {"q": (0, 3, 2, 4), "k": (0, 3, 2, 4)}),
    Case(
        "qk_norm_rotary",
        "no-tokens",
        {"q": (2, 0, 2, 4), "k": (2, 0, 2, 4)},
        {"cos": torch.ones(0, 2), "sin": torch.ones(0, 2)},
    ),
    Case(
        "diffusion_loss",
        "no-batch",
        {"prediction": (0, 3), "clean": (0, 3), "noise": (0, 3)},
        {"time": torch.ones(0), "weight": torch.ones(0)},
    ),
]


@pytest.mark.parametrize(("case", "backend"), served(EMPTY))
def test_nothing_in_nothing_out(case: Case, backend: str) -> None:
    values = case.cast(case.values(), torch.float32)
    named, _ = run(case, values, backend)
    for name, tensor in named.items():
        if name.startswith("d"):
            assert tensor.shape == values[name[1:]].shape
        assert torch.equal(tensor, torch.zeros_like(tensor)), name
    if case.label.startswith("no-keys"):
        assert named["out0"].shape == case.inputs["q"]


def test_every_public_op_has_cases() -> None:
    assert {case.op for case in CASES} == set(PUBLIC) == {case.op for case in EMPTY}
