"""Every op the models and the engine compute with: its definition, its fast forms, and the choice between them.

``kernels.attention`` and its siblings are the public functions. Some share their name with the file that holds them;
the package always shows the function, and ``from longskip.kernels.attention import attention`` works as well.
Importing this package, or ``longskip.kernels.formulas``, does not import torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longskip.kernels.adaln import adaln, gated_adaln, gated_residual
    from longskip.kernels.adamw import adamw
    from longskip.kernels.attention import attention, attention_varlen
    from longskip.kernels.backends import choices, configure, op_cost, register, resolve, served, use
    from longskip.kernels.formulas import FORMULAS, OpCost, OpFormula
    from longskip.kernels.loss import diffusion_loss
    from longskip.kernels.mlp import mlp, swiglu
    from longskip.kernels.norm import layer_norm, rms_norm
    from longskip.kernels.rotary import qk_norm_rotary
    from longskip.kernels.skip_linear import skip_linear

_HOME = {
    "adaln": "adaln",
    "gated_adaln": "adaln",
    "gated_residual": "adaln",
    "adamw": "adamw",
    "attention": "attention",
    "attention_varlen": "attention",
    "choices": "backends",
    "configure": "backends",
    "op_cost": "backends",
    "register": "backends",
    "resolve": "backends",
    "served": "backends",
    "use": "backends",
    "FORMULAS": "formulas",
    "OpCost": "formulas",
    "OpFormula": "formulas",
    "diffusion_loss": "loss",
    "mlp": "mlp",
    "swiglu": "mlp",
    "layer_norm": "norm",
    "rms_norm": "norm",
    "qk_norm_rotary": "rotary",
    "skip_linear": "skip_linear",
}

__all__ = [
    "FORMULAS",
    "OpCost",
    "OpFormula",
    "adaln",
    "adamw",
    "attention",
    "attention_varlen",
    "choices",
    "configure",
    "diffusion_loss",
    "gated_adaln",
    "gated_residual",
    "layer_norm",
    "mlp",
    "op_cost",
    "qk_norm_rotary",
    "register",
    "resolve",
    "rms_norm",
    "served",
    "skip_linear",
    "swiglu",
    "use",
]


class _Package(types.ModuleType):
    """Keeps ``kernels.attention`` the function: the import system would bind the submodule of that name over it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, types.ModuleType) and name in _HOME:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
