"""The predicted peak of a step's activations against tensors that really lived, and against the closed form of specs."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.errors import SpecError
from longskip.kernels import jit
from longskip.models.presets import preset
from longskip.models.specs import UViTSpec
from longskip.profiling.activations import activations
from tests.activation_trace import trace
from tests.figures import figure

BASE = UViTSpec(64, 6, 2, channels=3, latent_size=(16, 12), n_txt=5, text_width=16)
CHANGES: list[dict[str, Any]] = [
    {},
    {"skips": False, "conv": False},
    {"qk_norm": True, "n_classes": 5},
    {"adaln": True},
    {"adaln": True, "time_mlp": True, "qk_norm": True, "mlp_ratio": 3},
    {"time_mlp": True, "n_txt": 0, "text_width": 0, "depth": 1, "mlp_ratio": 1},
]


@pytest.mark.parametrize("checkpointing", [0, 1, 2, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_the_peak_is_what_lived_to_the_byte(change: dict[str, Any], checkpointing: int) -> None:
    spec = replace(BASE, **change)
    form = activations(spec, 2, 4, checkpointing, gradients="apart")
    assert form.peak == trace(spec, 2, checkpointing=checkpointing)
    assert form.saved == spec.saved_bytes(2, 4, checkpointing).total
    assert form.weight_gradients == 0


SPECS = st.builds(
    lambda heads, dim, **rest: UViTSpec(heads * dim, n_heads=heads, n_txt=rest.pop("text"), text_width=8, **rest)
    if rest["text"]
    else UViTSpec(heads * dim, n_heads=heads, **{k: v for k, v in rest.items() if k != "text"}),
    heads=st.integers(1, 3), dim=st.sampled_from([4, 8, 12]), depth=st.integers(1, 5), patch=st.sampled_from([2, 4]),
    channels=st.integers(1, 4), latent_size=st.tuples(st.sampled_from([8, 16]), st.sampled_from([16, 20])),
    text=st.integers(0, 9), n_classes=st.sampled_from([0, 3]), mlp_ratio=st.integers(1, 5), time_mlp=st.booleans(),
    conv=st.booleans(), skips=st.booleans(), qk_norm=st.booleans(), adaln=st.booleans(),
)  # fmt: skip


@settings(max_examples=15, deadline=None)
@given(spec=SPECS, batch=st.integers(1, 4), checkpointing=st.integers(0, 4), prediction=st.sampled_from(["v", "x"]))
def test_any_shape_within_a_hundredth(spec: UViTSpec, batch: int, checkpointing: int, prediction: Any) -> None:
    if spec.n_tokens < 16:  # the CPU's attention of so few keys is the definition, which keeps T² scores
        spec = replace(spec, latent_size=(16, 20), patch=2)
    form = activations(spec, batch, 4, checkpointing, prediction=prediction, gradients="apart")
    lived = trace(spec, batch, checkpointing=checkpointing, prediction=prediction)
    assert abs(form.peak - lived) <= 0.01 * lived, (form, lived)


@pytest.mark.parametrize("layout", ["named", "flat"])
@pytest.mark.parametrize(("batch", "checkpointing"), [(1, 0), (8, 0), (1, 1), (8, 1)])
@pytest.mark.parametrize("change", [{}, {"adaln": True, "time_mlp": True}])
def test_with_the_gradients_of_weights_on_their_way(
    layout: Any, batch: int, checkpointing: int, change: dict[str, Any]
) -> None:
    """At few tokens the flat layout's worst moment is the joining of a block's gradients."""
    spec = replace(BASE, **change)
    form = activations(spec, batch, 4, checkpointing, layout=layout, gradients="given")
    lived = trace(spec, batch, checkpointing=checkpointing, layout=layout, apart=False)
    assert abs(form.peak - lived) <= 0.01 * lived, (form, lived)


def test_where_the_worst_moment_is() -> None:
    def moment(spec: UViTSpec, batch: int = 8, checkpointing: int = 0, **given: Any) -> str:
        return activations(spec, batch, 4, checkpointing, gradients="apart", **given).moment

    assert moment(BASE) == "blocks.6 fc2"  # the last block's
    assert moment(BASE, kernels="triton") == "blocks.6 mlp"
    assert moment(BASE, checkpointing=1) == "blocks.4 fc2"  # the lowest that takes a skip
    assert moment(replace(BASE, adaln=True)) == "head adaln1"
    assert moment(replace(BASE, width=8, patch=4, channels=8, depth=1)) == "loss loss"
    few = activations(BASE, 1, 4, layout="flat")
    assert few.moment.endswith("join") and few.weight_gradients > few.saved / 10


def test_the_closed_form_of_the_peak() -> None:
    """S − 2 + 1 + r rows for a plain model, less the head's statistics and picture; S + 3 with adaLN; S + 2r with ours."""
    row = 8 * BASE.n_tokens * BASE.width * 4
    form = activations(BASE, 8, 4, gradients="apart")
    statistics, picture = 2 * 8 * BASE.n_tokens * 4, form.batch - 3 * 8 * 3 * 16 * 12 * 4 - 104
    assert form.temporaries == (1 + BASE.mlp_ratio - 2) * row - statistics - picture
    modulated = activations(replace(BASE, adaln=True), 8, 4, gradients="apart")
    vector = 8 * BASE.width * 4
    assert abs(modulated.temporaries - (3 * row - picture)) <= 2 * vector
    ours = activations(BASE, 8, 4, kernels="triton", gradients="apart")
    assert ours.temporaries == 2 * BASE.mlp_ratio * row - statistics - picture


@pytest.mark.parametrize("checkpointing", [0, 2])
@pytest.mark.parametrize("change", CHANGES[:5])
def test_our_kernels(change: dict[str, Any], checkpointing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the ops make, their own workspaces included; what the kernels would compute does not matter, and is left out.
    Not predicted are the partial sums of biases, whose number depends on the device."""
    monkeypatch.setattr(jit, "launch", lambda *args, **constants: None)
    spec = replace(BASE, **change)
    form = activations(spec, 4, 4, checkpointing, kernels="triton", gradients="apart")
    lived = trace(spec, 4, checkpointing=checkpointing, backend="triton")
    assert 0 <= lived - form.peak <= 0.01 * lived
    assert form.saved == spec.saved_bytes(4, 4, checkpointing, kernels="triton").total


@given(spec=SPECS, batch=st.integers(1, 4), checkpointing=st.integers(0, 4), size=st.sampled_from([2, 4]),
       kernels=st.sampled_from(["torch", "triton"]))  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_two_forms_of_what_is_saved_agree(
    spec: UViTSpec, batch: int, checkpointing: int, size: int, kernels: Any
) -> None:
    form = activations(spec, batch, size, checkpointing, kernels=kernels)
    assert form.saved == spec.saved_bytes(batch, size, checkpointing, kernels=kernels).total


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [0, 1])
def test_uvit_03b_at_256(checkpointing: int) -> None:
    """The recipe's shape at one picture, 77 text tokens of 1024, in fp32 on the CPU."""
    spec = preset("uvit-0.3b", n_txt=77, text_width=1024)
    form = activations(spec, 1, 4, checkpointing, gradients="apart")
    lived = trace(spec, 1, checkpointing=checkpointing)
    figure(f"uvit-0.3b at 256², checkpointing {checkpointing}: {form.peak:,} predicted, {lived:,} lived")
    assert abs(form.peak - lived) <= 0.01 * lived


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SpecError, match="kernels 'cuda' are unknown"):
        activations(BASE, 1, 4, kernels="cuda")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="layout 'flat' with gradients 'lost'"):
        activations(BASE, 1, 4, layout="flat", gradients="lost")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="divisible"):
        activations(BASE, 1, 4, latent_size=(15, 16))


def test_the_largest_model_is_quick() -> None:
    spec = preset("uvit-8b", n_txt=256, text_width=2048)
    activations(spec, 1, 2)
    seconds = []
    for _ in range(5):
        begin = time.process_time()
        activations(spec, 2, 2, 2)
        seconds.append(time.process_time() - begin)
    figure(f"activations of uvit-8b: {1e3 * min(seconds):.1f} ms of processor time")
    assert min(seconds) < 0.05
