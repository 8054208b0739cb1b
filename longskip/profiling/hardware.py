"""Datasheet figures of accelerators, each row with its source, and of the usual networks between nodes.

A device is recognised by its whole name only. An "H100 NVL", a laptop's 4090 or a MIG slice is another device than the
row with the similar name: it is unknown here, and an unknown device has no MFU. Users add rows of their own in YAML
(``hardware_file.py``): one file in their configuration folder, which every command reads, or ``--hardware FILE``.

Vendors print tensor-core rates with 2:4 sparsity; where only those are printed, the row holds half of them. They print a
link's bandwidth as the sum of both directions; the row holds one direction. They sell memory in GB, and a driver reports
another number: the row holds the driver's, and its source says so.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from longskip.errors import ConfigError, did_you_mean

DTYPES = ("fp32", "tf32", "bf16", "fp16")
THIS = "this"  # the short name of the machine that `longskip bench machine` has measured
_TERA = 10**12
_GB = 10**9
_MIB = 1 << 20
_SPELLINGS = {
    "float32": "fp32",
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float": "fp32",
    "tensorfloat32": "tf32",
}


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator of the table.

    ``peak_flops``: dtype → dense peak in FLOP/s (2 per multiply-add) with fp32 accumulation; ``memory`` in bytes as
    the driver reports them, or where that is not known as ``sold`` (decimal GB); ``bandwidth`` of that memory in bytes/s;
    ``watts``: the board's power limit (TDP), ``link``: bytes/s to the other devices of its node, one direction, over
    ``link_name``; ``host_link``: to the host's memory, one direction; each None where the row does not say.
    ``short``: what it is asked for by on the command line; ``pattern`` matches the whole driver name. ``measured``: the
    rates were measured and are no datasheet's, so that there is no MFU.
    """

    name: str
    peak_flops: Mapping[str, int]
    memory: int
    bandwidth: int
    source: str
    pattern: re.Pattern[str] = field(repr=False, compare=False)
    watts: int | None = None
    link: int | None = None
    link_name: str = ""
    short: str = ""
    measured: bool = False
    sold: int = 0
    host_link: int | None = None

    def peak(self, dtype: str) -> int:
        """Dense peak FLOP/s for ``dtype`` (``fp32 tf32 bf16 fp16`` or torch's spelling); ConfigError when unknown."""
        key = dtype.removeprefix("torch.").lower()
        key = _SPELLINGS.get(key, key)
        if key not in self.peak_flops:
            raise ConfigError(
                f"dtype {dtype!r} has no peak for {self.name}", cure=f"use one of {', '.join(self.peak_flops)}"
            )
        return self.peak_flops[key]


@dataclass(frozen=True, slots=True)
class Network:
    """A network between nodes: bytes/s in one direction, for every GPU (``per`` "gpu") or for a whole node ("node")."""

    name: str
    bytes_per_second: int
    per: Literal["gpu", "node"]
    source: str

    def per_gpu(self, gpus_per_node: int) -> float:
        """Bytes/s in one direction that each GPU of a node has when all send at once."""
        if gpus_per_node < 1:
            raise ConfigError(f"{gpus_per_node} GPUs in a node", cure="give at least 1")
        return self.bytes_per_second / (gpus_per_node if self.per == "node" else 1)


def row(
    name: str,
    pattern: str,
    *,
    short: str,
    teraflops: Mapping[str, float],
    gigabytes: float,
    gb_per_second: float,
    source: str,
    watts: int | None = None,
    link: tuple[str, float] | None = None,
    measured: bool = False,
    mebibytes: float | None = None,
    host_link: float | None = None,
) -> Device:
    """A device from figures as datasheets print them: TFLOP/s, GB, GB/s, watts; ``link``: its name and GB/s
    in one direction, ``host_link``: GB/s to the host's memory. ``mebibytes``: the memory as the driver reports it."""
    sold = round(gigabytes * _GB)
    return Device(
        name=name,
        peak_flops=MappingProxyType({dtype: round(tera * _TERA / 10**6) * 10**6 for dtype, tera in teraflops.items()}),
        memory=sold if mebibytes is None else round(mebibytes * _MIB),
        bandwidth=round(gb_per_second * _GB),
        source=source,
        pattern=re.compile(pattern, re.IGNORECASE),
        watts=watts,
        link=None if link is None else round(link[1] * _GB),
        link_name="" if link is None else link[0],
        short=short,
        measured=measured,
        sold=sold,
        host_link=None if host_link is None else round(host_link * _GB),
    )


def _rates(fp32: float, tf32: float, half: float) -> dict[str, float]:
    return {"fp32": fp32, "tf32": tf32, "bf16": half, "fp16": half}


_A100, _HOPPER = _rates(19.5, 156, 312), _rates(67, 494.5, 989.5)
_A100_SHEET = "NVIDIA A100 Tensor Core GPU datasheet"
_PCIE4, _PCIE5 = ("PCIe 4.0 x16", 32.0), ("PCIe 5.0 x16", 64.0)


def _reported(mebibytes: int, by: str = "nvidia-smi") -> str:
    return f"; {by} reports {mebibytes:,} MiB of memory"


# TFLOP/s, GB, GB/s, watts. Patterns are matched against the whole name without the vendor's word.
DEVICES: tuple[Device, ...] = (
    row(
        "A100 SXM 40GB", r"A100[- ]SXM4?[- ]40 ?GB", short="a100-40gb",
        teraflops=_A100, gigabytes=40, gb_per_second=1555, watts=400, link=("NVLink 3", 300),
        mebibytes=40960, host_link=32,
        source=f"{_A100_SHEET} of 2020 (A100 40GB SXM), dense figures as printed"
        + _reported(40960),
    ),
    row(
        "A100 SXM 80GB", r"A100[- ]SXM4?[- ]80 ?GB", short="a100-80gb",
        teraflops=_A100, gigabytes=80, gb_per_second=2039, watts=400, link=("NVLink 3", 300),
        mebibytes=81920, host_link=32,
        source=f"{_A100_SHEET} (A100 80GB SXM), dense figures as printed"
        + _reported(81920),
    ),
    row(
        "A100 PCIe 80GB", r"A100 (80 ?GB PCIe|PCIe 80 ?GB)", short="a100-pcie",
        teraflops=_A100, gigabytes=80, gb_per_second=1935, watts=300, link=_PCIE4,
        mebibytes=81920, host_link=32,
        source=f"{_A100_SHEET} (A100 80GB PCIe), dense figures as printed; without the bridge that joins two cards"
        + _reported(81920),
    ),
    row(
        "H100 SXM", r"H100 (80 ?GB HBM3|SXM5?( 80 ?GB)?)", short="h100",
        teraflops=_HOPPER, gigabytes=80, gb_per_second=3350, watts=700, link=("NVLink 4", 450),
        mebibytes=81559, host_link=64,
        source="NVIDIA H100 Tensor Core GPU datasheet (H100 SXM), half of the rates printed with sparsity"
        + _reported(81559),
    ),
    row(
        "H100 PCIe", r"H100 PCIe( 80 ?GB)?", short="h100-pcie",
        teraflops=_rates(51, 378, 756.5), gigabytes=80, gb_per_second=2000, watts=350,
        link=_PCIE5,
        mebibytes=81559, host_link=64,
        source="NVIDIA H100 Tensor Core GPU datasheet (H100 PCIe), half of the rates printed with sparsity; without the "
        "bridge that joins two cards"
        + _reported(81559),
    ),
    row(
        "H200", r"H200( SXM)?( 141 ?GB)?( HBM3e)?", short="h200",
        teraflops=_HOPPER, gigabytes=141, gb_per_second=4800, watts=700, link=("NVLink 4", 450),
        mebibytes=143771, host_link=64,
        source="NVIDIA H200 Tensor Core GPU datasheet (H200 SXM), half of the rates printed with sparsity"
        + _reported(143771),
    ),
    row(
        "B200", r"B200( SXM)?( 180 ?GB)?( HBM3e)?", short="b200",
        teraflops=_rates(75, 1125, 2250), gigabytes=180, gb_per_second=8000, watts=1000,
        link=("NVLink 5", 900),
        mebibytes=183359, host_link=64,
        source="NVIDIA HGX B200 and DGX B200 datasheets, one eighth of the board, half of the rates with sparsity"
        + _reported(183359),
    ),
    row(
        "GB200", r"GB200( 186 ?GB)?( HBM3e)?", short="gb200",
        teraflops=_rates(80, 1250, 2500), gigabytes=186, gb_per_second=8000, watts=1200,
        link=("NVLink 5", 900),
        mebibytes=189471, host_link=225,
        source="NVIDIA GB200 NVL72 datasheet, one GPU of 72 (half a superchip, its CPU's power apart; half of the "
        "450 GB/s of NVLink-C2C in one direction), half of the rates with sparsity; "
        "power: NVIDIA Blackwell architecture technical brief"
        + _reported(189471),
    ),
    row(
        "MI300X", r"(Instinct )?MI300X( OAM)?", short="mi300x",
        teraflops=_rates(163.4, 653.7, 1307.4), gigabytes=192, gb_per_second=5300, watts=750,
        link=("Infinity Fabric, 7 links", 448),
        mebibytes=206_141_652_992 / _MIB, host_link=64,
        source="AMD Instinct MI300X accelerator data sheet, matrix rates without sparsity; links of the platform of 8; "
        "rocm-smi reports 206,141,652,992 B of memory",
    ),
    row(
        "L40S", r"L40S", short="l40s",
        teraflops=_rates(91.6, 183, 362.05), gigabytes=48, gb_per_second=864, watts=350, link=_PCIE4,
        mebibytes=46068, host_link=32,
        source="NVIDIA L40S datasheet, dense figures as printed"
        + _reported(46068),
    ),
    row(
        "RTX 4090", r"(GeForce )?RTX 4090", short="rtx4090",
        teraflops=_rates(82.6, 82.6, 165.2), gigabytes=24, gb_per_second=1008, watts=450, link=_PCIE4,
        mebibytes=24564, host_link=32,
        source="NVIDIA Ada GPU architecture whitepaper, table of the GeForce RTX 4090, fp32 accumulation, dense"
        + _reported(24564),
    ),
)  # fmt: skip

# 8 bits a byte; what a protocol adds is part of the efficiency, not of the rate.
NETWORKS: tuple[Network, ...] = (
    Network("ndr", 50 * _GB, "gpu", "InfiniBand NDR, one port of 400 Gb/s a GPU (NVIDIA DGX H100 datasheet)"),
    Network("hdr", 25 * _GB, "gpu", "InfiniBand HDR, one port of 200 Gb/s a GPU (NVIDIA DGX A100 datasheet)"),
    Network("roce-100", 12_500_000_000, "gpu", "RoCE v2 over one 100 Gb/s Ethernet port a GPU (IEEE 802.3 rate)"),
    Network(
        "100gbe", 12_500_000_000, "node", "one 100 Gb/s Ethernet port a node, shared by its GPUs (IEEE 802.3 rate)"
    ),
)


def lookup(device_name: str) -> Device | None:
    """The row of the device with this driver name (as ``torch.cuda.get_device_name`` gives it), or None.

    The user's rows go before the package's; measured rows are no datasheets and are left out. None for every device that
    is in neither, CPUs included: a similar name is another device. ConfigError when the user's file is damaged.
    """
    bare = _bare(device_name)
    for device in known().devices:
        if not device.measured and device.pattern.fullmatch(bare):
            return device
    return None


def mfu_reason(device_name: str) -> str | None:
    """Why there is no MFU on this device, as a sentence for people; None when there is one."""
    if lookup(device_name) is not None:
        return None
    shown = device_name.strip() or "(no name)"
    return f"no datasheet peak for “{shown}” in the hardware table, therefore no MFU"


@dataclass(frozen=True, slots=True)
class Table:
    """Devices and networks; of two rows with one name the first counts."""

    devices: tuple[Device, ...]
    networks: tuple[Network, ...]


def known(file: Path | None = None) -> Table:
    """The rows of ``file`` (``--hardware``), then those of the user's configuration folder, then the package's."""
    users = user_file()
    files = [path for path in (file, users if users.is_file() else None) if path is not None]
    tables = []
    if files:
        from longskip.profiling.hardware_file import read  # here: most calls do without YAML

        tables = [read(path) for path in files]
    tables.append(Table(DEVICES, NETWORKS))
    return Table(tuple(d for t in tables for d in t.devices), tuple(n for t in tables for n in t.networks))


def user_file() -> Path:
    """The user's own rows: ``$XDG_CONFIG_HOME/longskip/hardware.yaml``."""
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "longskip" / "hardware.yaml"


def find(name: str, file: Path | None = None) -> Device:
    """The device that ``--gpu NAME`` means: a short name (``h200``), a row's name (``H100 SXM``) or a driver's name, in
    any case; ``this`` is the machine measured last by ``longskip bench machine``. ``file`` holds further rows.

    ConfigError for a name in no row, with the nearest; for ``this`` where nothing, or another machine, was measured.
    """
    devices = known(file).devices
    asked = _plain(name)
    for device in devices:
        if asked in (_plain(device.short), _plain(device.name)) or device.pattern.fullmatch(_bare(name)):
            if device.short == THIS and device.name != processor():
                raise ConfigError(
                    f"--gpu {THIS} was measured on another machine: {device.name!r}; here is {processor()!r}",
                    cure="longskip bench machine measures this one",
                )
            return device
    if asked == THIS:
        raise ConfigError(f"--gpu {THIS}: this machine was not measured", cure="longskip bench machine measures it")
    raise ConfigError(
        f"unknown device {name!r}: no rates, so no time and no MFU",
        cure=f"{did_you_mean(name, [device.short for device in devices])}; others can be described in YAML (--hardware FILE)",
    )


def find_network(name: str, file: Path | None = None) -> Network:
    """The network that ``--network NAME`` means; ConfigError with the nearest name for an unknown one."""
    networks = known(file).networks
    for network in networks:
        if _plain(network.name) == _plain(name):
            return network
    raise ConfigError(
        f"unknown network {name!r}",
        cure=f"{did_you_mean(name, [network.name for network in networks])}; others can be described in YAML (--hardware FILE)",
    )


def processor() -> str:
    """The name of this machine's processor, as Linux gives it; elsewhere its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _bare(name: str) -> str:
    return re.sub(r"^(NVIDIA|AMD)\s+", "", " ".join(name.split()), flags=re.IGNORECASE)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
