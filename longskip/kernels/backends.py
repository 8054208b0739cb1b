"""Which implementation serves an op: registration, configuration, resolution.

A backend is a function with the op's signature, registered under (op, backend name) by the op's file, or by the file of
its Triton half beside it. The public function calls ``serve``, which resolves the backend in plain Python, outside any op:
nothing of the choice is seen by autograd, ``vmap`` or a compiled graph. Settings are ``auto``, ``reference``, ``torch``,
``triton`` or ``require:NAME`` (any registered name), given for ``all`` ops, for one of the eight families (a file of this
room) or for one function. A setting that cannot be served raises BackendError: nothing falls back silently.

The state is the process's, not the thread's. A context manager around a forward does not reach a recomputation that
activation checkpointing runs later, in the backward: put both inside.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from longskip.errors import BackendError
from longskip.kernels import jit, tables
from longskip.kernels.formulas import FORMULAS, OpCost

logger = logging.getLogger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])

FAMILIES: dict[str, tuple[str, ...]] = {
    "attention": ("attention", "attention_varlen"),
    "norm": ("layer_norm", "rms_norm"),
    "adaln": ("adaln", "gated_adaln", "gated_residual"),
    "mlp": ("mlp", "swiglu"),
    "skip_linear": ("skip_linear",),
    "rotary": ("qk_norm_rotary",),
    "loss": ("diffusion_loss",),
    "adamw": ("adamw",),
}
_FAMILY_OF = {op: family for family, ops in FAMILIES.items() for op in ops}
_NAMES = ("auto", "reference", "torch", "triton")

# What `auto` takes before anything was measured on a device. The optimizer's kernel is one pass over memory where every
# other form takes several, so nothing has to be measured to know.
_AUTO_DEFAULT = "torch"
_AUTO_DEFAULTS = {("cuda", "adamw"): "triton"}

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class _Backend:
    function: Callable[..., Any]
    unusable: Callable[[torch.device], str | None] | None = None
    unfit: Callable[[torch.dtype, Sizes], str | None] | None = None

    def why_not(self, device: torch.device, dtype: torch.dtype | None, sizes: Sizes) -> str | None:
        reason = self.unusable(device) if self.unusable is not None else None
        if reason is None and self.unfit is not None and dtype is not None:
            reason = self.unfit(dtype, sizes)
        return reason


_REGISTRY: dict[str, dict[str, _Backend]] = {op: {} for op in _FAMILY_OF}
_SHAPES: dict[str, Callable[..., dict[str, int]]] = {}
_CHOICE: dict[str, Callable[..., dict[str, int]]] = {}  # of the ops that are chosen by other sizes than they cost by
_SETTINGS: dict[str, str] = dict.fromkeys(_FAMILY_OF, "auto")
_RESOLVED: dict[tuple[Any, ...], Callable[..., Any]] = {}
_SERVED: dict[str, dict[str, str]] = {}  # op -> {backend: reason}, of the calls since `configure`
_CHOSEN: dict[str, dict[str, str]] = {}  # op -> {bucket: backend}, what `auto` took
_FIXED: dict[tuple[str, str], str] = {}  # (op, device type) -> what `auto` takes in compiled code
_KEPT: dict[str, dict[str, str]] = {}  # the same of an earlier attempt, which `auto` keeps to


def register(
    op: str,
    backend: str,
    *,
    unusable: Callable[[torch.device], str | None] | None = None,
    unfit: Callable[[torch.dtype, Sizes], str | None] | None = None,
) -> Callable[[Function], Function]:
    """Decorator: the function serves ``op`` as ``backend``.

    ``unusable(device)`` returns the reason why the backend cannot run there, ``unfit(dtype, sizes)`` why it cannot serve a
    call of these sizes (those the public function names); None when it can.
    """
    _known_op(op)

    def keep(function: Function) -> Function:
        _REGISTRY[op][backend] = _Backend(function, unusable, unfit)
        _RESOLVED.clear()
        return function

    return keep


def register_triton(family: str) -> None:
    """The last line of an op's file: its Triton half registers itself where Triton runs; elsewhere the reason is kept."""
    if jit.loads():
        importlib.import_module(f"longskip.kernels.{family}_triton")
        return
    for op in FAMILIES[family]:
        if "triton" not in _REGISTRY[op]:
            register(op, "triton", unusable=_not_loaded)(_absent)


def _not_loaded(device: torch.device) -> str:
    return jit.unusable(device) or "its kernels were not loaded when longskip was imported, for want of a GPU"


def _absent(*args: Any, **kwargs: Any) -> Any:
    raise BackendError("the Triton kernels were not loaded")


def register_formula(
    op: str, shapes: Callable[..., dict[str, int]], choice: Callable[..., dict[str, int]] | None = None
) -> None:
    """Tie an op to its formula: ``shapes`` takes the public function's arguments and returns the formula's integers.

    ``choice``: the same of the sizes by which a backend is chosen, where those are others.
    """
    _known_op(op)
    _SHAPES[op] = shapes
    if choice is not None:
        _CHOICE[op] = choice


def op_cost(op: str, *args: Any, direction: Literal["forward", "backward"] = "forward", **kwargs: Any) -> OpCost:
    """Cost of one call of the public function ``op`` with these (possibly meta) tensors, by its formula.

    Raises BackendError for an unknown op or for the backward of an op that has none (``adamw``).
    """
    _load(op)
    formula = FORMULAS[op]
    count = formula.forward if direction == "forward" else formula.backward
    if count is None:
        raise BackendError(f"op {op!r} has no {direction} formula", cure="count its forward")
    return count(**_SHAPES[op](*args, **kwargs))


def resolve(
    op: str, device: torch.device, dtype: torch.dtype | None = None, sizes: Sizes = MappingProxyType({})
) -> Callable[..., Any]:
    """The function that serves a call of ``op`` on ``device`` under the present settings.

    ``sizes`` are the call's integers by name, as the op's formula names them. Raises BackendError when the setting names a
    backend that is not registered, not usable there or not made for such a call.
    """
    if torch.compiler.is_compiling():
        # Traced: the graph's guards then hang on the settings, and not on what earlier calls left in the cache.
        return _REGISTRY[op][_choose(op, device, dtype, sizes)[0]].function
    key = (op, _SETTINGS.get(op), device.type, device.index, dtype, *sizes.values())
    function = _RESOLVED.get(key)
    if function is None:
        name, reason = _choose(op, device, dtype, sizes)
        function = _RESOLVED[key] = _REGISTRY[op][name].function
        if _SETTINGS[op] == "auto" and dtype is not None:
            _CHOSEN.setdefault(op, {})[tables.bucket(dtype, sizes)] = name
        if name not in _SERVED.setdefault(op, {}):
            _SERVED[op][name] = reason
            logger.debug("%s on %s: %s (%s)", op, device.type, name, reason)
    return function


def chosen() -> dict[str, dict[str, str]]:
    """``{op: {bucket: backend}}``: what `auto` took in the calls so far; ``keep`` takes it back."""
    return {op: dict(found) for op, found in _CHOSEN.items()}


def keep(choices: Mapping[str, Mapping[str, str]]) -> None:
    """From now on `auto` takes these backends in these buckets, whatever the tables say, where they can serve."""
    _KEPT.clear()
    _KEPT.update({op: dict(found) for op, found in choices.items()})
    _RESOLVED.clear()


def family_of(op: str) -> str:
    """The family (the file of this room) that holds an op."""
    _known_op(op)
    return _FAMILY_OF[op]


def sizes_of(op: str, *args: Any, **kwargs: Any) -> dict[str, int]:
    """The sizes of a call by which its backend is chosen, from the public function's (possibly meta) arguments."""
    _load(op)
    return _CHOICE.get(op, _SHAPES[op])(*args, **kwargs)


def settle(device: torch.device) -> None:
    """Before code is compiled for ``device``: per op, the backend that was measured fastest in most buckets there."""
    measured = tables.of_device(tables.target_of(device).name).get("backends", {}) if device.type == "cuda" else {}
    for op in _FAMILY_OF:
        _load(op)
        wins = Counter(found["backend"] for found in measured.get(op, {}).values())
        _FIXED[op, device.type] = max(
            wins, key=lambda name: wins[name], default=_AUTO_DEFAULTS.get((device.type, op), _AUTO_DEFAULT)
        )


def serve(op: str, like: Tensor, /, *args: Any, **kwargs: Any) -> Any:
    """Call the function that serves ``op`` for these arguments, on the device and in the dtype of ``like``."""
    return resolve(op, like.device, like.dtype, _SHAPES[op](*args, **kwargs))(*args, **kwargs)


def served() -> dict[str, dict[str, str]]:
    """``{op: {backend: reason}}`` of the calls since ``configure``: what really ran, and why."""
    return {op: dict(names) for op, names in _SERVED.items()}


def configure(settings: Mapping[str, str]) -> None:
    """Replace the settings: ``{"all": ..., family: ..., function: ...}``; the narrower key wins, the rest is ``auto``.

    ``require:NAME`` is refused here when an op it covers has no backend NAME at all; plain names when the op is used.
    Raises BackendError for an unknown op or an unknown setting; the earlier settings then stay.
    """
    chosen = dict.fromkeys(_FAMILY_OF, "auto")
    for key in sorted(settings, key=_breadth):
        chosen.update(_asked(key, settings[key]))
    _SETTINGS.update(chosen)
    for record in (_RESOLVED, _SERVED, _CHOSEN):
        record.clear()


@contextlib.contextmanager
def use(backend: str, ops: str | Iterable[str] | None = None) -> Iterator[None]:
    """Context manager (and decorator): inside, ``ops`` (None: all) are served by ``backend``, a setting as above."""
    keys = ("all",) if ops is None else (ops,) if isinstance(ops, str) else tuple(ops)
    before = dict(_SETTINGS)
    for chosen in [_asked(key, backend) for key in keys]:
        _SETTINGS.update(chosen)
    try:
        yield
    finally:
        _SETTINGS.update(before)


def choices(device: torch.device | str | None = None) -> dict[str, tuple[str, str]]:
    """``{op: (backend, reason)}`` for every op on ``device`` (None: the GPU where there is one, else the CPU).

    Raises BackendError when a setting cannot be served there.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {op: _choose(op, torch.device(device)) for op in _FAMILY_OF}


def available(op: str, device: torch.device) -> dict[str, str | None]:
    """``{backend: None, or why it cannot run on the device}`` for one op."""
    _load(op)
    return _state(op, device, None, {})


def _state(op: str, device: torch.device, dtype: torch.dtype | None, sizes: Sizes) -> dict[str, str | None]:
    return {name: backend.why_not(device, dtype, sizes) for name, backend in _REGISTRY[op].items()}


def _choose(
    op: str, device: torch.device, dtype: torch.dtype | None = None, sizes: Sizes = MappingProxyType({})
) -> tuple[str, str]:
    _load(op)
    setting = _SETTINGS[op]
    state = _state(op, device, dtype, sizes)
    if setting == "auto" and torch.compiler.is_compiling():
        # One choice per op: a graph is for many sizes, and reading tables is not for tracing.
        for name in (_FIXED.get((op, device.type), _AUTO_DEFAULT), _AUTO_DEFAULT):
            if state.get(name, "") is None:
                return name, "auto: settled before compilation"
    if setting == "auto":
        kept = _KEPT.get(op, {}).get(tables.bucket(dtype, sizes), "") if _KEPT and dtype is not None else ""
        if kept and state.get(kept, "") is None:
            return kept, "auto: kept from the run's first attempt"
        if device.type == "cuda" and dtype is not None:
            measured = tables.best_backend(device, op, tables.bucket(dtype, sizes))
            if measured is not None and state.get(measured[0], "") is None:
                return measured
        for name in (_AUTO_DEFAULTS.get((device.type, op), _AUTO_DEFAULT), _AUTO_DEFAULT):
            if state.get(name, "") is None:
                return name, f"auto: the default on {device.type}, nothing measured there"
        raise BackendError(f"op {op!r} has no backend for {device.type}; {_listing(state)}")
    name = setting.removeprefix("require:")
    why_not = state.get(name, "it is not registered")
    if why_not is not None:
        usable = [known for known, reason in state.items() if reason is None]
        raise BackendError(
            f"backend {name!r} cannot serve op {op!r} on {device.type}: {why_not}; {_listing(state)}",
            cure=f"set kernels.backend to auto or to one of {', '.join(usable)}",
        )
    return name, "required" if setting.startswith("require:") else "configured"


def _listing(state: Mapping[str, str | None]) -> str:
    return "available: " + ", ".join(name if reason is None else f"{name} ({reason})" for name, reason in state.items())


def _load(op: str) -> None:
    """Import the op's file, which registers its backends and its formula."""
    _known_op(op)
    if op not in _SHAPES:  # the file's last registration
        importlib.import_module(f"longskip.kernels.{_FAMILY_OF[op]}")


def _known_op(op: str) -> None:
    if op not in _FAMILY_OF:
        raise BackendError(f"unknown op {op!r}; known: {', '.join(_FAMILY_OF)}", cure=_nearest(op, _FAMILY_OF))


def _covered(key: str) -> tuple[str, ...]:
    """The functions that a settings key speaks of; a family's name means the whole family."""
    if key == "all":
        return tuple(_FAMILY_OF)
    if key in FAMILIES:
        return FAMILIES[key]
    if key in _FAMILY_OF:
        return (key,)
    known = ("all", *FAMILIES, *_FAMILY_OF)
    raise BackendError(
        f"kernels.backend names the op {key!r}; known: {', '.join(dict.fromkeys(known))}", cure=_nearest(key, known)
    )


def _breadth(key: str) -> int:
    return -len(_covered(key))


def _known_setting(setting: str) -> str:
    if setting in _NAMES or (setting.startswith("require:") and len(setting) > len("require:")):
        return setting
    raise BackendError(
        f"kernels.backend is {setting!r}; allowed: {', '.join(_NAMES)}, require:NAME",
        cure=_nearest(setting, _NAMES) or f"write require:{setting} to demand a backend by that name",
    )


def _asked(key: str, setting: str) -> dict[str, str]:
    """The settings that ``key: setting`` makes, by op.

    ``require:NAME`` for several ops speaks, in each family, of the functions that have a backend of that name; a family
    in which none has it is an error.
    """
    setting, ops = _known_setting(setting), _covered(key)
    if not setting.startswith("require:"):
        return dict.fromkeys(ops, setting)
    name, asked = setting.removeprefix("require:"), {}
    for family in dict.fromkeys(_FAMILY_OF[op] for op in ops):
        here = [op for op in ops if _FAMILY_OF[op] == family]
        for op in here:
            _load(op)
        having = [op for op in here if name in _REGISTRY[op]]
        if not having:
            raise BackendError(
                f"op {here[0]!r} has no backend {name!r}; registered: {', '.join(_REGISTRY[here[0]])}",
                cure=_nearest(name, _REGISTRY[here[0]]) or "name a registered backend, or auto",
            )
        asked.update(dict.fromkeys(having, setting))
    return asked


def _nearest(name: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else None
