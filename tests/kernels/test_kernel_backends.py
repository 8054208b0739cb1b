"""Registration, settings, resolution; the package's face."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import longskip.kernels
from longskip import kernels
from longskip.errors import BackendError
from longskip.kernels import backends

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def settings_restored() -> Iterator[None]:
    kernels.choices(CPU)  # every op's file is loaded
    registry = {op: dict(table) for op, table in backends._REGISTRY.items()}
    yield
    backends._REGISTRY.update(registry)
    kernels.configure({})


def names() -> dict[str, str]:
    return {op: name for op, (name, _) in kernels.choices("cpu").items()}


def test_auto_takes_torch_on_the_cpu_and_says_so() -> None:
    assert set(names().values()) == {"torch"}
    assert all(reason.startswith("auto") for _, reason in kernels.choices("cpu").values())
    assert set(names()) == {op for ops in backends.FAMILIES.values() for op in ops}


def test_every_op_has_a_definition_and_a_fast_form() -> None:
    for op in names():
        assert set(backends.available(op, CPU)) >= {"reference", "torch"}


def test_the_narrower_key_wins_in_any_order() -> None:
    for settings in (
        {"all": "reference", "norm": "torch", "rms_norm": "reference"},
        {"rms_norm": "reference", "norm": "torch", "all": "reference"},
    ):
        kernels.configure(settings)
        assert {op for op, name in names().items() if name == "torch"} == {"layer_norm"}
    kernels.configure({"mlp": "reference"})
    assert {op for op, name in names().items() if name == "reference"} == {"mlp", "swiglu"}
    kernels.configure({})
    assert set(names().values()) == {"torch"}


def test_use_nests_covers_some_ops_and_restores_after_an_error() -> None:
    with kernels.use("reference", ops=["attention", "norm"]):
        norms = {"layer_norm", "rms_norm"}
        assert {op for op, name in names().items() if name == "reference"} == {"attention", "attention_varlen", *norms}
        with kernels.use("torch", "attention"):
            assert names()["attention"] == "torch"
            assert names()["layer_norm"] == "reference"
        assert names()["attention"] == "reference"
    with pytest.raises(RuntimeError, match="inside"), kernels.use("reference"):
        raise RuntimeError("inside")
    assert set(names().values()) == {"torch"}

    @kernels.use("reference")
    def decorated() -> dict[str, str]:
        return names()

    assert set(decorated().values()) == {"reference"}
    assert set(names().values()) == {"torch"}


def test_the_call_itself_is_served_by_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    @backends.register("gated_residual", "triton")
    def spy(x: Any, y: Any, gate: Any) -> Any:
        calls.append("spy")
        return x

    x, gate = torch.randn(2, 3, 4), torch.randn(2, 4)
    kernels.gated_residual(x, x, gate)
    assert calls == []
    with kernels.use("triton", "gated_residual"):
        assert kernels.gated_residual(x, x, gate) is x
    with kernels.use("require:triton", "gated_residual"):
        kernels.gated_residual(x, x, gate)
        assert kernels.choices("cpu")["gated_residual"] == ("triton", "required")
    kernels.gated_residual(x, x, gate)
    assert calls == ["spy", "spy"]


def test_registering_again_replaces_what_was_resolved() -> None:
    x, gate = torch.randn(2, 3, 4), torch.randn(2, 4)
    assert kernels.gated_residual(x, x, gate) is not x
    backends.register("gated_residual", "torch")(lambda x, y, gate: x)
    assert kernels.gated_residual(x, x, gate) is x


def test_a_backend_that_cannot_serve_is_an_error_and_not_a_fallback() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)
    with kernels.use("triton", "loss"):
        with pytest.raises(
            BackendError, match=r"'triton' cannot serve op 'diffusion_loss' on cpu: its kernels take float32"
        ):
            kernels.diffusion_loss(x, x, x, x[:, 0], x[:, 0])
        with pytest.raises(BackendError, match="available: reference, torch"):
            kernels.diffusion_loss(x, x, x, x[:, 0], x[:, 0])
    kernels.diffusion_loss(x, x, x, x[:, 0], x[:, 0])
    with pytest.raises(BackendError, match="op 'attention' has no backend 'nvfuser'; registered: "):
        kernels.configure({"attention": "require:nvfuser"})
    with pytest.raises(BackendError, match="no backend 'nvfuser'"), kernels.use("require:nvfuser"):
        raise AssertionError("entered")
    assert set(names().values()) == {"torch"}


def test_an_unusable_backend_says_why() -> None:
    @backends.register("attention", "triton", unusable=lambda device: f"no kernels for {device.type}")
    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("called")

    assert backends.available("attention", CPU)["triton"] == "no kernels for cpu"
    assert names()["attention"] == "torch"
    for setting in ("triton", "require:triton"):
        kernels.configure({"attention": setting})
        with pytest.raises(BackendError, match="no kernels for cpu") as caught:
            kernels.attention(torch.randn(1, 2, 3, 1, 4))
        assert "auto or to one of reference, torch" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"all": "tritn"}, "did you mean 'triton'"),
        ({"all": "require:"}, "allowed: auto, reference, torch, triton, require:NAME"),
        ({"all": "nvfuser"}, "require:nvfuser"),
        ({"atention": "torch"}, "did you mean 'attention'"),
        ({"attention": "require:tortch"}, "did you mean 'torch'"),
    ],
)
def test_bad_settings_are_refused_and_change_nothing(settings: dict[str, str], message: str) -> None:
    kernels.configure({"norm": "reference"})
    before = names()
    with pytest.raises(BackendError, match=message):
        kernels.configure(settings)
    assert names() == before


def test_unknown_ops_are_refused() -> None:
    with pytest.raises(BackendError, match="did you mean 'mlp'"):
        kernels.resolve("mpl", CPU)
    with pytest.raises(BackendError, match="unknown op"):
        kernels.register("nothing", "torch")
    with pytest.raises(BackendError, match="unknown op"):
        kernels.op_cost("nothing")
    with pytest.raises(BackendError, match="names the op"), kernels.use("torch", "nothing"):
        raise AssertionError("entered")


def run(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_shows_functions_whichever_was_imported_first() -> None:
    run(
        "import longskip.kernels.attention, longskip.kernels.adamw, longskip.kernels.mlp\n"
        "from longskip import kernels\n"
        "from longskip.kernels import skip_linear, adaln\n"
        "from longskip.kernels.attention import attention\n"
        "assert kernels.attention is attention\n"
        "import types\n"
        "for name in kernels.__all__:\n"
        "    assert not isinstance(getattr(kernels, name), types.ModuleType), name\n"
        "    assert name in dir(kernels)\n"
        "assert callable(skip_linear) and callable(adaln) and callable(kernels.mlp)\n"
    )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = longskip.kernels.nothing


def test_resolving_by_name_loads_the_op() -> None:
    run(
        "import torch\n"
        "from longskip import kernels\n"
        "kernels.configure({'loss': 'require:reference'})\n"
        "assert kernels.resolve('diffusion_loss', torch.device('cpu')).__name__ == 'diffusion_loss_reference'\n"
        "assert len(kernels.choices('cpu')) == 13\n"
    )


def test_the_room_imports_torch_triton_and_the_cellar_only() -> None:
    folder = Path(longskip.kernels.__file__).parent
    for path in folder.glob("*.py"):
        allowed = {*sys.stdlib_module_names, "torch", "triton"}
        if path.name == "attention_adapters.py":
            allowed |= {"flash_attn", "xformers"}
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                own = module.startswith(("longskip.kernels", "longskip.errors"))
                assert own or module.split(".")[0] in allowed, f"{path.name} imports {module}"


def test_what_served_is_told_with_its_reason_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.configure({})
    x = torch.randn(2, 3, 4)
    kernels.adaln(x, x[:, 0], x[:, 0])
    with kernels.use("reference", "norm"):
        kernels.layer_norm(x)
    assert kernels.served()["layer_norm"] == {"reference": "configured"}
    assert kernels.served()["adaln"] == {"torch": "auto: the default on cpu, nothing measured there"}
    assert backends.chosen() == {"adaln": {"float32 batch=2 tokens=4 width=4": "torch"}}
    try:
        backends.keep({"adaln": {"float32 batch=2 tokens=4 width=4": "reference"}})
        kernels.adaln(x, x[:, 0], x[:, 0])
        assert kernels.served()["adaln"]["reference"] == "auto: kept from the run's first attempt"
        backends.keep({"adaln": {"float32 batch=2 tokens=4 width=4": "flash"}})
        kernels.configure({})
        kernels.adaln(x, x[:, 0], x[:, 0])
        assert set(kernels.served()["adaln"]) == {"torch"}, "what cannot serve is not kept to"
    finally:
        backends.keep({})
