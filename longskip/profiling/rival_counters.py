"""FLOP counters that others would use, each asked in its own way for the same model and inputs.

What a counter's figure means is stated once, here (``Counter.unit``, ``Counter.of``), and converted to FLOPs by 2 per
multiply-add. Nothing is corrected: a counter that lacks attention lacks it in its row, one that crashes raises. Several
of them replace functions of torch while they run and do not put them back when they fail, so that whoever compares
them gives each failure's successor a fresh process (``engine/bench_counters.py``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from longskip import kernels
from longskip.models.conditioning import Conditioning
from longskip.models.specs import UViTSpec
from longskip.models.uvit import UViT
from longskip.profiling.counting import count_flops
from longskip.profiling.flop_ledger import flop_ledger
from longskip.profiling.fvcore_handles import handles

__all__ = ["COUNTERS", "Case", "Counter", "Tensors", "exact_flops", "inputs_of", "uvit_case", "version"]

Tensors = Mapping[str, Tensor]  # a model's arguments by name, in their order


@dataclass(frozen=True)
class Case:
    """A model and what it is called with; counters get it as ``model(*inputs)`` or ``model(**inputs)``."""

    model: nn.Module
    inputs: Tensors

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return tuple(self.inputs.values())


@dataclass(frozen=True)
class Counter:
    """One figure of one counter.

    ``package`` is the distribution it comes from, ``called`` the word it uses for its figure, ``unit`` what the figure
    is, and ``of`` what it covers: a forward pass, or a step (forward and backward). ``kernels``: what serves our ops
    meanwhile; Triton's need a process in which they are interpreted, or a GPU.
    """

    name: str
    package: str
    called: str
    unit: Literal["FLOPs", "MACs"]
    of: Literal["forward", "step"]
    ask: Callable[[Case], float]
    kernels: Literal["torch", "triton"] = "torch"

    def count(self, case: Case) -> float:
        """The figure, as the counter gives it. Raises what the counter raises."""
        with kernels.use(self.kernels):
            figure = self.ask(case)
        return int(figure) if figure == int(figure) else float(figure)

    def to_flops(self, figure: float) -> float:
        """The figure in FLOPs, 2 per multiply-add."""
        return 2 * figure if self.unit == "MACs" else figure


class _Positional(nn.Module):
    """A U-ViT that is called with tensors alone, as tracers and summaries want it."""

    def __init__(self, model: UViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor, time: Tensor, condition: Tensor | None = None) -> Tensor:
        """Latents (B, C, H, W), time (B,), and the text features (B, n_txt, E) or labels (B,) of the spec."""
        name = "text" if self.model.spec.n_txt else "label"
        cond = Conditioning(**{name: condition} if condition is not None else {})
        return cast(Tensor, self.model(latents, time, cond))


def uvit_case(spec: UViTSpec, device: str, batch: int = 1) -> Case:
    """Our model of the spec, on "cpu" or "meta", with ``batch`` pictures."""
    return Case(_Positional(UViT(spec, device=device)), inputs_of(spec, device, batch))


def inputs_of(spec: UViTSpec, device: str, batch: int = 1) -> dict[str, Tensor]:
    """Latents, times in [0, 1] and the spec's condition: text features, or labels, or none."""
    inputs = {
        "latents": torch.zeros(batch, spec.channels, *spec.latent_size, device=device),
        "time": torch.zeros(batch, device=device),
    }
    if spec.n_txt:
        inputs["condition"] = torch.zeros(batch, spec.n_txt, spec.text_width, device=device)
    elif spec.n_classes:
        inputs["condition"] = torch.zeros(batch, dtype=torch.int64, device=device)
    return inputs


def exact_flops(spec: UViTSpec, *, trained_text: bool = False, batch: int = 1) -> dict[str, int]:
    """The closed form, by what a counter may cover: ``forward``, and ``step`` with the gradients that something needs."""
    ledger = flop_ledger(spec, batch=batch, trained_text=trained_text)
    return {"forward": ledger.forward_flops, "step": ledger.forward_flops + ledger.backward_flops}


def version(package: str) -> str | None:
    """The installed version of a package; None where it is missing."""
    if importlib.util.find_spec(package) is None:
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# -- ours --------------------------------------------------------------------------------------------------------------


def _ours(case: Case) -> float:
    return count_flops(case.model, *case.arguments).flops


def _our_step(case: Case) -> float:
    counted = count_flops(_step, case)
    return 2 * (counted.macs - counted.recomputed_macs)  # without what a fused attention repeats


def _step(case: Case) -> None:
    case.model(*case.arguments).sum().backward()


# -- torch -------------------------------------------------------------------------------------------------------------


def _torch(case: Case) -> float:
    with FlopCounterMode(display=False) as counter:
        case.model(*case.arguments)
    return counter.get_total_flops()


def _torch_step(case: Case) -> float:
    with FlopCounterMode(display=False) as counter:
        _step(case)
    return counter.get_total_flops()


def _by_math(ask: Callable[[Case], float]) -> Callable[[Case], float]:
    def under_math(case: Case) -> float:
        with sdpa_kernel(SDPBackend.MATH):
            return ask(case)

    return under_math


# -- others ------------------------------------------------------------------------------------------------------------


def _fvcore(case: Case) -> float:
    return _fvcore_total(case, {})


def _fvcore_with_handles(case: Case) -> float:
    return _fvcore_total(case, handles())


def _fvcore_total(case: Case, known: Mapping[str, Any]) -> float:
    from fvcore.nn import FlopCountAnalysis

    analysis = FlopCountAnalysis(case.model, case.arguments)
    analysis.unsupported_ops_warnings(False).tracer_warnings("none")
    return cast(float, analysis.set_op_handle(**known).total())


def _deepspeed(which: int) -> Callable[[Case], float]:
    def ask(case: Case) -> float:
        from deepspeed.profiling.flops_profiler import get_model_profile

        found = get_model_profile(case.model, args=list(case.arguments), print_profile=False, as_string=False)
        return cast(float, found[which])

    return ask


def _calflops(which: int) -> Callable[[Case], float]:
    def ask(case: Case) -> float:
        from calflops import calculate_flops

        arguments = list(case.arguments)
        return cast(
            float, calculate_flops(case.model, args=arguments, print_results=False, output_as_string=False)[which]
        )

    return ask


def _thop(case: Case) -> float:
    import thop

    return cast(float, thop.profile(case.model, inputs=case.arguments, verbose=False)[0])


def _torchinfo(case: Case) -> float:
    import torchinfo

    device = case.arguments[0].device
    return cast(
        float, torchinfo.summary(case.model, input_data=list(case.arguments), verbose=0, device=device).total_mult_adds
    )


def _ptflops(backend: str) -> Callable[[Case], float]:
    def ask(case: Case) -> float:
        from ptflops import get_model_complexity_info

        with contextlib.redirect_stdout(io.StringIO()) as printed:
            macs, _ = get_model_complexity_info(
                case.model,
                (1,),
                print_per_layer_stat=False,
                as_strings=False,
                input_constructor=lambda _: dict(case.inputs),
                backend=backend,
            )
        if macs is None:  # it prints what went wrong and goes on
            raise RuntimeError(printed.getvalue().strip().splitlines()[-1])
        return cast(float, macs)

    return ask


def _torch_flops(case: Case) -> float:
    from torch_flops import TorchFLOPsByFX

    counter = TorchFLOPsByFX(case.model)
    counter.propagate(*case.arguments)
    return cast(float, counter.print_total_flops(show=False))


# What each figure is, by the counter's documentation and source. fvcore counts one per multiply-add and says flops.
# DeepSpeed's and calflops's flops include elementwise work beside contractions, their MACs do not.
COUNTERS: tuple[Counter, ...] = (
    Counter("longskip, dispatch count", "longskip", "flops", "FLOPs", "forward", _ours),
    Counter("longskip, dispatch count, step", "longskip", "flops", "FLOPs", "step", _our_step),
    Counter("FlopCounterMode", "torch", "FLOPs", "FLOPs", "forward", _torch),
    Counter("FlopCounterMode, math attention", "torch", "FLOPs", "FLOPs", "forward", _by_math(_torch)),
    Counter("FlopCounterMode, step", "torch", "FLOPs", "FLOPs", "step", _torch_step),
    Counter("FlopCounterMode, step, math attention", "torch", "FLOPs", "FLOPs", "step", _by_math(_torch_step)),
    Counter("fvcore", "fvcore", "flops", "MACs", "forward", _fvcore),
    Counter("fvcore with our handles", "fvcore", "flops", "MACs", "forward", _fvcore_with_handles),
    Counter("fvcore, Triton kernels", "fvcore", "flops", "MACs", "forward", _fvcore, "triton"),
    Counter(
        "fvcore with our handles, Triton kernels", "fvcore", "flops", "MACs", "forward", _fvcore_with_handles, "triton"
    ),
    Counter("DeepSpeed profiler, flops", "deepspeed", "flops", "FLOPs", "forward", _deepspeed(0)),
    Counter("DeepSpeed profiler, MACs", "deepspeed", "MACs", "MACs", "forward", _deepspeed(1)),
    Counter("calflops, flops", "calflops", "FLOPs", "FLOPs", "forward", _calflops(0)),
    Counter("calflops, MACs", "calflops", "MACs", "MACs", "forward", _calflops(1)),
    Counter("thop", "thop", "total_ops", "MACs", "forward", _thop),
    Counter("torchinfo", "torchinfo", "mult-adds", "MACs", "forward", _torchinfo),
    Counter("ptflops", "ptflops", "MACs", "MACs", "forward", _ptflops("pytorch")),
    Counter("ptflops, aten backend", "ptflops", "MACs", "MACs", "forward", _ptflops("aten")),
    Counter("torch_flops", "torch_flops", "flops", "FLOPs", "forward", _torch_flops),
)
