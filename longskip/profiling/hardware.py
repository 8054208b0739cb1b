"""Datasheet figures of accelerators: dense peak FLOP/s per dtype, memory and bandwidth, each row with its source.

A device is recognised by its whole name only. A 40 GB A100, an "H100 NVL", a laptop's 4090 or a MIG slice is another
device than the row with the similar name: it is unknown here, and an unknown device has no MFU.

Vendors print tensor-core rates with 2:4 sparsity; where only those are printed, the row holds half of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from longskip.errors import ConfigError

DTYPES = ("fp32", "tf32", "bf16", "fp16")
_TERA = 10**12
_GB = 10**9
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
    sold (decimal GB); ``bandwidth`` of that memory in bytes/s; ``pattern`` matches the whole driver name.
    """

    name: str
    peak_flops: Mapping[str, int]
    memory: int
    bandwidth: int
    source: str
    pattern: re.Pattern[str] = field(repr=False, compare=False)

    def peak(self, dtype: str) -> int:
        """Dense peak FLOP/s for ``dtype`` (``fp32 tf32 bf16 fp16`` or torch's spelling); ConfigError when unknown."""
        key = dtype.removeprefix("torch.").lower()
        key = _SPELLINGS.get(key, key)
        if key not in self.peak_flops:
            raise ConfigError(
                f"dtype {dtype!r} has no peak for {self.name}", cure=f"use one of {', '.join(self.peak_flops)}"
            )
        return self.peak_flops[key]


def _row(
    name: str,
    pattern: str,
    *,
    fp32: float,
    tf32: float,
    bf16: float,
    fp16: float,
    gigabytes: int,
    gb_per_second: int,
    source: str,
) -> Device:
    rates = {"fp32": fp32, "tf32": tf32, "bf16": bf16, "fp16": fp16}
    return Device(
        name=name,
        peak_flops=MappingProxyType({dtype: round(tera * 1000) * _TERA // 1000 for dtype, tera in rates.items()}),
        memory=gigabytes * _GB,
        bandwidth=gb_per_second * _GB,
        source=source,
        pattern=re.compile(pattern, re.IGNORECASE),
    )


# TFLOP/s, GB, GB/s. Patterns are matched against the whole name without the vendor's word.
DEVICES: tuple[Device, ...] = (
    _row(
        "A100 SXM 80GB", r"A100[- ]SXM4?[- ]80 ?GB",
        fp32=19.5, tf32=156, bf16=312, fp16=312, gigabytes=80, gb_per_second=2039,
        source="NVIDIA A100 Tensor Core GPU datasheet (A100 80GB SXM), dense figures as printed",
    ),
    _row(
        "H100 SXM", r"H100 (80 ?GB HBM3|SXM5?( 80 ?GB)?)",
        fp32=67, tf32=494.5, bf16=989.5, fp16=989.5, gigabytes=80, gb_per_second=3350,
        source="NVIDIA H100 Tensor Core GPU datasheet (H100 SXM), half of the rates printed with sparsity",
    ),
    _row(
        "H100 PCIe", r"H100 PCIe( 80 ?GB)?",
        fp32=51, tf32=378, bf16=756.5, fp16=756.5, gigabytes=80, gb_per_second=2000,
        source="NVIDIA H100 Tensor Core GPU datasheet (H100 PCIe), half of the rates printed with sparsity",
    ),
    _row(
        "H200", r"H200( SXM)?( 141 ?GB)?( HBM3e)?",
        fp32=67, tf32=494.5, bf16=989.5, fp16=989.5, gigabytes=141, gb_per_second=4800,
        source="NVIDIA H200 Tensor Core GPU datasheet (H200 SXM), half of the rates printed with sparsity",
    ),
    _row(
        "B200", r"B200( SXM)?( 180 ?GB)?( HBM3e)?",
        fp32=75, tf32=1125, bf16=2250, fp16=2250, gigabytes=180, gb_per_second=8000,
        source="NVIDIA HGX B200 and DGX B200 datasheets, one eighth of the board, half of the rates with sparsity",
    ),
    _row(
        "L40S", r"L40S",
        fp32=91.6, tf32=183, bf16=362.05, fp16=362.05, gigabytes=48, gb_per_second=864,
        source="NVIDIA L40S datasheet, dense figures as printed",
    ),
    _row(
        "RTX 4090", r"(GeForce )?RTX 4090",
        fp32=82.6, tf32=82.6, bf16=165.2, fp16=165.2, gigabytes=24, gb_per_second=1008,
        source="NVIDIA Ada GPU architecture whitepaper, table of the GeForce RTX 4090, fp32 accumulation, dense",
    ),
    _row(
        "MI300X", r"(Instinct )?MI300X( OAM)?",
        fp32=163.4, tf32=653.7, bf16=1307.4, fp16=1307.4, gigabytes=192, gb_per_second=5300,
        source="AMD Instinct MI300X accelerator data sheet, matrix rates without sparsity",
    ),
)  # fmt: skip


def lookup(device_name: str) -> Device | None:
    """The row of the device with this driver name (as ``torch.cuda.get_device_name`` gives it), or None.

    None for every device that is not in the table, CPUs included: a similar name is another device.
    """
    bare = re.sub(r"^(NVIDIA|AMD)\s+", "", " ".join(device_name.split()), flags=re.IGNORECASE)
    for device in DEVICES:
        if device.pattern.fullmatch(bare):
            return device
    return None


def mfu_reason(device_name: str) -> str | None:
    """Why there is no MFU on this device, as a sentence for people; None when there is one."""
    if lookup(device_name) is not None:
        return None
    shown = device_name.strip() or "(no name)"
    return f"no datasheet peak for “{shown}” in the hardware table, therefore no MFU"
