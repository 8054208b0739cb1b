from __future__ import annotations

import pytest

from longskip.errors import ConfigError
from longskip.profiling.hardware import DEVICES, DTYPES, lookup, mfu_reason


@pytest.mark.parametrize(
    ("driver_name", "row"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("A100-SXM-80GB", "A100 SXM 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("AMD Instinct MI300X", "MI300X"),
        *((device.name, device.name) for device in DEVICES),
    ],
)
def test_driver_names_find_their_row(driver_name: str, row: str) -> None:
    found = lookup(driver_name)
    assert found is not None and found.name == row
    assert mfu_reason(driver_name) is None


@pytest.mark.parametrize(
    "driver_name",
    [
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA A100 80GB PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H100",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H20",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA L40",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "AMD Instinct MI300A",
        "AMD EPYC 7B13",
        "cpu",
        "",
    ],
)
def test_another_device_is_never_taken_for_a_similar_one(driver_name: str) -> None:
    assert lookup(driver_name) is None
    reason = mfu_reason(driver_name)
    assert reason is not None and (driver_name in reason)


def test_every_row_is_plausible_and_sourced() -> None:
    assert len({device.name for device in DEVICES}) == len(DEVICES) == 8
    for device in DEVICES:
        assert set(device.peak_flops) == set(DTYPES) and len(device.source) > 20
        assert device.peak("bf16") == device.peak("fp16") >= device.peak("tf32") >= device.peak("fp32") > 10**13
        # The ridge point of every accelerator since 2020 lies between these many FLOPs per byte.
        assert 100 < device.peak("bf16") / device.bandwidth < 500
        assert sum(found is device for found in map(lookup, (d.name for d in DEVICES))) == 1


def test_figures_known_from_the_datasheets() -> None:
    a100, h100, h200 = lookup("A100 SXM 80GB"), lookup("H100 SXM"), lookup("H200")
    assert a100 and h100 and h200
    assert (a100.peak("bf16"), a100.peak("tf32"), a100.bandwidth) == (312 * 10**12, 156 * 10**12, 2039 * 10**9)
    assert 2 * h100.peak("bf16") == 1979 * 10**12  # the sheet prints it with sparsity
    assert h200.peak_flops == h100.peak_flops and h200.memory == 141 * 10**9


def test_dtype_spellings() -> None:
    device = lookup("H200")
    assert device is not None
    assert device.peak("torch.bfloat16") == device.peak("bfloat16") == device.peak("bf16")
    with pytest.raises(ConfigError, match=r"int8.*H200[\s\S]*bf16"):
        device.peak("int8")
