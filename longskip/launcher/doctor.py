"""``longskip doctor``: what this machine has, what of it longskip can use, and why not where it cannot."""

from __future__ import annotations

import os
import shutil
import sys
from importlib import metadata, util
from pathlib import Path
from typing import Any

REQUIRED = (
    "torch", "triton", "deepspeed", "webdataset", "fvcore", "numpy", "scipy", "pillow", "safetensors", "isal", "pydantic",
    "PyYAML", "typer", "rich", "jinja2", "matplotlib", "tensorboard", "psutil",
)  # fmt: skip
OPTIONAL = {
    "xformers": "attention backend ([gpu])",
    "flash-attn": "attention backend ([flash])",
    "nvidia-ml-py": "energy and device health ([gpu])",
    "diffusers": "VAEs and export ([hub])",
    "transformers": "T5 and CLIP ([hub])",
    "torchmetrics": "FID and KID ([eval])",
}
_IMPORTS = {"pillow": "PIL", "PyYAML": "yaml", "flash-attn": "flash_attn", "nvidia-ml-py": "pynvml"}


def examine() -> list[dict[str, Any]]:
    """Findings ``{"what", "version", "usable", "required", "note"}``, without changing anything."""
    findings = [_python()]
    findings += [
        _package(name, required=True, note="") for name in REQUIRED if name != "triton" or sys.platform == "linux"
    ]
    findings += [_package(name, required=False, note=note) for name, note in OPTIONAL.items()]
    findings += [_devices(), _backends(), _executed(), _emoji_font(), _disk()]
    return findings


def _finding(what: str, version: str | None, usable: bool, note: str, *, required: bool = False) -> dict[str, Any]:
    return {"what": what, "version": version, "usable": usable, "required": required, "note": note}


def _python() -> dict[str, Any]:
    version = ".".join(map(str, sys.version_info[:3]))
    return _finding("python", version, sys.version_info >= (3, 10), "3.10 or newer", required=True)


def _package(name: str, *, required: bool, note: str) -> dict[str, Any]:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return _finding(name, None, False, f"not installed{'; ' + note if note else ''}", required=required)
    found = util.find_spec(_IMPORTS.get(name, name)) is not None
    return _finding(name, version, found, note if found else "installed, but it cannot be found", required=required)


def _devices() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return _finding("devices", f"{len(names)} × CUDA", True, ", ".join(sorted(set(names))))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _finding(
        "devices", "CPU", True, f"{cores} cores, no GPU: training runs, on gloo; speed figures are no claims"
    )


def _backends() -> dict[str, Any]:
    import torch

    from longskip.kernels import backends

    served = backends.choices(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    summary: dict[str, list[str]] = {}
    for op, (backend, _) in served.items():
        summary.setdefault(backend, []).append(op)
    note = "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in summary.items())
    return _finding("kernels", None, True, note)


def _executed() -> dict[str, Any]:
    from longskip.kernels.executed import EXECUTED, tested

    return _finding("backends run so far", None, True, "; ".join(f"{name}: {tested(name)}" for name in EXECUTED))


def _emoji_font() -> dict[str, Any]:
    from longskip.engine.data.emoji import find_font
    from longskip.errors import DataError

    try:
        return _finding("emoji font", None, True, str(find_font()))
    except DataError as error:
        return _finding("emoji font", None, False, error.cure or error.message)


def _disk() -> dict[str, Any]:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return _finding("disk here", f"{free:.0f} GiB free", free > 1, "runs and checkpoints go under ./runs")


def print_examination(findings: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    table = Table("", "what", "version", Column("note", overflow="fold"), box=box.SIMPLE_HEAD, pad_edge=False)
    for found in findings:
        mark = "[green]✓[/]" if found["usable"] else ("[red]✗[/]" if found["required"] else "[yellow]–[/]")
        table.add_row(mark, found["what"], found["version"] or "", escape(found["note"]))
    Console().print(table)
