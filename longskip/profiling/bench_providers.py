"""Who computes an op in ``bench kernels``: our kernels, eager torch, torch.compile, and the libraries that are there.

A provider is a function of the case's tensors that returns the outputs of the public op. Torch and triton only; a rival
that is not installed, or does not serve a case, says why.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longskip import kernels
from longskip.profiling import bench_packed
from longskip.profiling.bench_packed import PADDED, Call, Layout
from longskip.profiling.kernel_cases import KernelCase


@dataclass(frozen=True)
class Provider:
    """``make(case)`` gives the call, or a text that says why there is none; ``layout``: of its tensors, where it has one."""

    name: str
    version: str
    make: Callable[[KernelCase], Call | str]
    ours: bool = False
    layout: Layout | None = None


def _version(package: str) -> str | None:
    return importlib.metadata.version(package) if importlib.util.find_spec(package.replace("-", "_")) else None


def by_backend(backend: str) -> Callable[[KernelCase], Call | str]:
    """The public function under a ``kernels.backend`` setting."""

    def make(case: KernelCase) -> Call:
        def call(leaves: Mapping[str, Any], extra: Mapping[str, Any]) -> tuple[Tensor, ...]:
            with kernels.use(backend, case.op):
                return case.call(leaves, extra)

        return call

    return make


def compiled(mode: str) -> Callable[[KernelCase], Call | str]:
    """torch.compile of the plain torch form, with static shapes."""

    def make(case: KernelCase) -> Call | str:
        if case.sweep:
            return "not in a sweep"
        if case.op == "attention_varlen":
            return "offsets have no values there: its plain form multiplies all pairs of tokens"
        graph = torch.compile(case.call, mode=mode, dynamic=False, fullgraph=True)

        def call(leaves: Mapping[str, Any], extra: Mapping[str, Any]) -> tuple[Tensor, ...]:
            with kernels.use("torch", case.op):
                return graph(leaves, extra)  # type: ignore[no-any-return]

        return call

    return make


def sdpa(name: str) -> Callable[[KernelCase], Call | str]:
    """``scaled_dot_product_attention`` with one backend of torch's."""

    def make(case: KernelCase) -> Call | str:
        if case.op != "attention":
            return "attention only"
        backend = getattr(torch.nn.attention.SDPBackend, name)

        def call(leaves: Mapping[str, Any], extra: Mapping[str, Any]) -> tuple[Tensor, ...]:
            q, k, v = (t.transpose(1, 2) for t in leaves["q"].unbind(2))
            mask = extra["key_mask"][:, None, None] if "key_mask" in extra else None
            with torch.nn.attention.sdpa_kernel(backend):
                return (F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2),)

        return call

    return make


def flash_attn(case: KernelCase) -> Call | str:
    """The flash-attn package's packed call."""
    if case.op == "attention_varlen":
        return bench_packed.flash_attn(case)
    if case.op != "attention" or case.data:
        return "attention without a mask only"
    from flash_attn import flash_attn_qkvpacked_func

    return lambda leaves, extra: (flash_attn_qkvpacked_func(leaves["q"]),)


def xformers(case: KernelCase) -> Call | str:
    """xformers' memory-efficient attention."""
    if case.op == "attention_varlen":
        return bench_packed.xformers(case)
    if case.op != "attention" or case.data:
        return "attention without a mask only"
    from xformers.ops import memory_efficient_attention

    return lambda leaves, extra: (memory_efficient_attention(*leaves["q"].unbind(2)),)


def liger(case: KernelCase) -> Call | str:
    """Liger's norms (with torch's modulation behind its layer norm) and its SwiGLU product."""
    if case.op in ("layer_norm", "adaln"):
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction

        if case.op == "layer_norm":
            return lambda leaves, extra: (
                LigerLayerNormFunction.apply(leaves["x"], leaves["weight"], leaves["bias"], 1e-5),
            )

        def modulated(leaves: Mapping[str, Any], extra: Mapping[str, Any]) -> tuple[Tensor, ...]:
            x, shift, scale = leaves["x"], leaves["shift"], leaves["scale"]
            one, zero = x.new_ones(x.shape[-1]), x.new_zeros(x.shape[-1])
            normed = LigerLayerNormFunction.apply(x, one, zero, 1e-6)
            return (torch.addcmul(shift[:, None], normed, (1 + scale)[:, None]),)

        return modulated
    if case.op == "rms_norm":
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda leaves, extra: (LigerRMSNormFunction.apply(leaves["x"], leaves["weight"], 1e-6),)
    if case.op == "swiglu":
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        def product(leaves: Mapping[str, Any], extra: Mapping[str, Any]) -> tuple[Tensor, ...]:
            gate, up = F.linear(leaves["x"], leaves["w_gate"]), F.linear(leaves["x"], leaves["w_up"])
            return (F.linear(LigerSiLUMulFunction.apply(gate, up), leaves["w_down"]),)

        return product
    return "it has no such op"


def providers(device: torch.device, inductor: Sequence[str] = ("default",)) -> tuple[list[Provider], dict[str, str]]:
    """(those that can be asked on the device, {name: why not} of the others); ``inductor``: torch.compile's modes."""
    found = [Provider("torch", torch.__version__, by_backend("torch"))]
    missing: dict[str, str] = {}
    if device.type != "cuda":
        missing |= dict.fromkeys(
            ("triton", "compile", "compile-max", "sdpa", "liger", "xformers", "flash-attn"), "needs a GPU"
        )
        return found, missing
    found.insert(0, Provider("triton", str(_version("triton")), by_backend("require:triton"), ours=True))
    found.append(Provider("auto", str(_version("triton")), by_backend("auto"), ours=True))
    for name, mode in (("compile", "default"), ("compile-max", "max-autotune-no-cudagraphs")):
        if ("max" if name == "compile-max" else "default") in inductor:
            found.append(Provider(name, torch.__version__, compiled(mode)))
        else:
            missing[name] = "not asked for"
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION"):
        found.append(Provider(f"sdpa-{name.split('_')[0].lower()}", torch.__version__, sdpa(name)))
    found.append(Provider("sdpa-padded", torch.__version__, bench_packed.padded, layout=PADDED))
    found.append(Provider("sdpa-nested", torch.__version__, bench_packed.nested))
    found.append(Provider("torch-varlen", torch.__version__, bench_packed.by_offsets))
    rivals: dict[str, tuple[str, Callable[[KernelCase], Call | str]]] = {
        "liger": ("liger-kernel", liger),
        "xformers": ("xformers", xformers),
        "flash-attn": ("flash-attn", flash_attn),
    }
    for name, (package, make) in rivals.items():
        module = "liger_kernel" if name == "liger" else package.replace("-", "_")
        if importlib.util.find_spec(module) is None:
            missing[name] = "not installed"
        else:
            found.append(Provider(name, importlib.metadata.version(package), make))
    return found, missing
