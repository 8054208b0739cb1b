"""The user's own devices and networks in YAML: read with every key checked, and written by ``longskip bench machine``.

    devices:
      - name: RTX 6000 Ada
        short: rtx6000ada                # for --gpu; otherwise the name in lower case
        driver_names: [NVIDIA RTX 6000 Ada Generation]
        teraflops: {fp32: 91.1, bf16: 364.2}      # dense
        memory_gb: 48
        memory_mib: 46068                # optional: what the driver reports, which then counts
        bandwidth_gb_s: 960
        watts: 300                       # optional
        link_gb_s: 32                    # optional: to the node's other devices, one direction
        link_name: PCIe 4.0 x16          # with it
        host_link_gb_s: 32               # optional: to the host's memory, one direction
        source: NVIDIA RTX 6000 Ada datasheet
    networks:
      - {name: my-net, gigabits: 200, per: gpu, source: the provider's page}     # per: gpu or node

Units are those of datasheets. No torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from longskip.errors import ConfigError, did_you_mean
from longskip.profiling.hardware import DTYPES, Device, Network, Table, row
from longskip.profiling.yamlfiles import read_yaml

__all__ = ["add_device", "read"]

_DEVICE = (
    "name", "short", "driver_names", "teraflops", "memory_gb", "bandwidth_gb_s", "watts", "link_gb_s", "link_name",
    "measured", "source", "memory_mib", "host_link_gb_s",
)  # fmt: skip
_NEEDED = ("name", "teraflops", "memory_gb", "bandwidth_gb_s", "source")
_NETWORK = ("name", "gigabits", "per", "source")


def read(path: Path) -> Table:
    """The file's rows; ConfigError that names file, row and key for anything that does not fit."""
    tree = read_yaml(path, "hardware table", cure="give the path of a YAML file")
    _keys(tree, ("devices", "networks"), (), str(path))
    devices = [_device(item, f"{path}: devices[{at}]") for at, item in enumerate(_list(tree, "devices", str(path)))]
    networks = [_network(item, f"{path}: networks[{at}]") for at, item in enumerate(_list(tree, "networks", str(path)))]
    for kind, names in (("device", [d.short for d in devices]), ("network", [n.name for n in networks])):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"{path}: {kind} {twice[0]!r} stands twice", cure="keep one of them")
    return Table(tuple(devices), tuple(networks))


def add_device(fields: Mapping[str, Any], path: Path) -> None:
    """Write a device into the file at ``path``, in place of the one with its short name; other rows stay.

    Comments are not kept. ConfigError where the file as it is, or the device, does not fit.
    """
    tree = read_yaml(path, "hardware table", cure="give the path of a YAML file") if path.is_file() else {}
    if path.is_file():
        read(path)
    new = _device(fields, f"{path}: {fields.get('name')!r}")
    rows = [item for item in tree.get("devices") or [] if _device(item, str(path)).short != new.short]
    tree["devices"] = [*rows, dict(fields)]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), "utf-8")
    os.replace(temporary, path)


def _device(item: Any, where: str) -> Device:
    item = _mapping(item, where)
    _keys(item, _DEVICE, _NEEDED, where)
    name = _text(item, "name", where)
    if ("link_gb_s" in item) != ("link_name" in item):
        raise ConfigError(f"{where}: link_gb_s and link_name belong together", cure="give both, or neither")
    rates = _mapping(item["teraflops"], f"{where}: teraflops")
    _keys(rates, DTYPES, ("fp32",), f"{where}: teraflops")
    drivers = item.get("driver_names", [name])
    if (
        not isinstance(drivers, list)
        or not drivers
        or not all(isinstance(text, str) and text.strip() for text in drivers)
    ):
        raise ConfigError(f"{where}: driver_names = {drivers!r}", cure="a list of the names that the driver gives")
    measured = item.get("measured", False)
    if not isinstance(measured, bool):
        raise ConfigError(f"{where}: measured = {measured!r}", cure="true or false")
    bare = (re.sub(r"^(NVIDIA|AMD)\s+", "", " ".join(text.split()), flags=re.IGNORECASE) for text in drivers)
    return row(
        name,
        "|".join(f"(?:{re.escape(text)})" for text in bare),
        short=_text(item, "short", where) if "short" in item else name.lower(),
        teraflops={dtype: _number(rates, dtype, f"{where}: teraflops") for dtype in rates},
        gigabytes=_number(item, "memory_gb", where),
        gb_per_second=_number(item, "bandwidth_gb_s", where),
        watts=round(_number(item, "watts", where)) if "watts" in item else None,
        link=(_text(item, "link_name", where), _number(item, "link_gb_s", where)) if "link_gb_s" in item else None,
        source=_text(item, "source", where),
        measured=measured,
        mebibytes=_number(item, "memory_mib", where) if "memory_mib" in item else None,
        host_link=_number(item, "host_link_gb_s", where) if "host_link_gb_s" in item else None,
    )


def _network(item: Any, where: str) -> Network:
    item = _mapping(item, where)
    _keys(item, _NETWORK, _NETWORK, where)
    per = item["per"]
    if per not in ("gpu", "node"):
        raise ConfigError(f"{where}: per = {per!r}", cure="gpu (every GPU has a port) or node (its GPUs share one)")
    rate = round(_number(item, "gigabits", where) * 10**9 / 8)
    return Network(_text(item, "name", where), rate, per, _text(item, "source", where))


def _keys(item: Mapping[str, Any], allowed: tuple[str, ...], needed: tuple[str, ...], where: str) -> None:
    for key in item:
        if key not in allowed:
            raise ConfigError(f"{where}: unknown key {key!r}", cure=did_you_mean(str(key), allowed))
    for key in needed:
        if key not in item:
            raise ConfigError(f"{where}: {key} is missing", cure=f"give {', '.join(needed)}")


def _mapping(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise ConfigError(
            f"{where}: a {type(item).__name__}, not a mapping", cure="keys and values, as in docs/hardware.md"
        )
    return dict(item)


def _list(tree: Mapping[str, Any], key: str, where: str) -> list[Any]:
    found = tree.get(key) or []
    if not isinstance(found, list):
        raise ConfigError(f"{where}: {key} is a {type(found).__name__}, not a list", cure="begin every row with a dash")
    return found


def _number(item: Mapping[str, Any], key: str, where: str) -> float:
    value = item[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{where}: {key} = {value!r} is no number", cure="write it as 989.5")
    if not 0 < value < math.inf:
        raise ConfigError(f"{where}: {key} = {value} is not above 0", cure="leave out what you do not know")
    if value > 1e7:
        raise ConfigError(f"{where}: {key} = {value} is out of range", cure="units: TFLOP/s, GB, GB/s, Gb/s, watts")
    return float(value)


def _text(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item[key]
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"{where}: {key} = {value!r} is no text", cure="write a name or a sentence")
    return value.strip()
