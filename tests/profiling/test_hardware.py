from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from longskip.errors import ConfigError
from longskip.profiling import hardware, hardware_file
from longskip.profiling.hardware import (
    DEVICES,
    DTYPES,
    NETWORKS,
    find,
    find_network,
    known,
    lookup,
    mfu_reason,
    user_file,
)

MINE: dict[str, Any] = {
    "name": "RTX 6000 Ada",
    "short": "rtx6000ada",
    "driver_names": ["NVIDIA RTX 6000 Ada Generation"],
    "teraflops": {"fp32": 91.1, "bf16": 364.2},
    "memory_gb": 48,
    "bandwidth_gb_s": 960,
    "watts": 300,
    "link_gb_s": 32,
    "link_name": "PCIe 4.0 x16",
    "source": "a datasheet",
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the rows of whoever runs it."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def write(path: Path, tree: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Through JSON, so that nothing stands in it twice as an alias.
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(json.loads(json.dumps(tree))), "utf-8")
    return path


@pytest.mark.parametrize(
    ("driver_name", "row"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("A100-SXM-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 PCIe 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA GB200", "GB200"),
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
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A100",
        "NVIDIA H100 NVL",
        "NVIDIA H100",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA H20",
        "NVIDIA H200 NVL",
        "NVIDIA GH200 480GB",
        "NVIDIA GB300",
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
    assert len({device.name for device in DEVICES}) == len({device.short for device in DEVICES}) == len(DEVICES) == 11
    for device in DEVICES:
        assert set(device.peak_flops) == set(DTYPES) and len(device.source) > 20 and not device.measured
        assert device.peak("bf16") == device.peak("fp16") >= device.peak("tf32") >= device.peak("fp32") > 10**13
        # The ridge point of every accelerator since 2020 lies between these many FLOPs per byte.
        assert 100 < device.peak("bf16") / device.bandwidth < 500
        # A joule buys between 0.3 and 2.5 TFLOP in bf16, and a link is between 1/80 and 1/3 of the memory's rate.
        assert device.watts and 0.3e12 < device.peak("bf16") / device.watts < 2.5e12
        assert device.link and device.link_name and 1 / 80 < device.link / device.bandwidth < 1 / 3
        assert sum(found is device for found in map(lookup, (d.name for d in DEVICES))) == 1


def test_figures_known_from_the_datasheets() -> None:
    a100, h100, h200, gb200 = (find(name) for name in ("a100-80gb", "h100", "h200", "gb200"))
    assert (a100.peak("bf16"), a100.peak("tf32"), a100.bandwidth) == (312 * 10**12, 156 * 10**12, 2039 * 10**9)
    assert 2 * h100.peak("bf16") == 1979 * 10**12  # the sheet prints it with sparsity
    assert h200.peak_flops == h100.peak_flops and h200.sold == 141 * 10**9
    # Links are printed as the sum of both directions: 600, 900, 900 and 1,800 GB/s.
    assert [2 * device.link for device in (a100, h100, h200, gb200)] == [n * 10**9 for n in (600, 900, 900, 1800)]  # type: ignore[operator]
    # A rack of 72: 360 PFLOP/s of bf16 with sparsity, 130 TB/s of NVLink (rounded up from 129.6), 576 TB/s, 13.4 TB.
    assert 2 * 72 * gb200.peak("bf16") == 360 * 10**15 and 72 * gb200.bandwidth == 576 * 10**12
    assert 72 * 2 * gb200.link == 129_600 * 10**9 and round(72 * gb200.sold / 10**11) == 134  # type: ignore[operator]
    # Seven links of 128 GB/s in both directions together.
    assert 2 * find("mi300x").link == 7 * 128 * 10**9  # type: ignore[operator]


def test_memory_is_what_drivers_report_and_the_source_says_so() -> None:
    reported = {
        "a100-40gb": 40_960, "a100-80gb": 81_920, "a100-pcie": 81_920, "h100": 81_559, "h100-pcie": 81_559,
        "h200": 143_771, "b200": 183_359, "gb200": 189_471, "l40s": 46_068, "rtx4090": 24_564,
    }  # fmt: skip
    for device in DEVICES:
        if device.short in reported:
            assert device.memory == reported[device.short] << 20
            assert f"nvidia-smi reports {reported[device.short]:,} MiB" in device.source
        assert "reports" in device.source and abs(device.memory / device.sold - 1) < 0.08
        assert device.host_link in (32 * 10**9, 64 * 10**9, 225 * 10**9)
    assert find("mi300x").memory == 206_141_652_992 and "206,141,652,992 B" in find("mi300x").source


def test_dtype_spellings() -> None:
    device = lookup("H200")
    assert device is not None
    assert device.peak("torch.bfloat16") == device.peak("bfloat16") == device.peak("bf16")
    with pytest.raises(ConfigError, match=r"int8.*H200[\s\S]*bf16"):
        device.peak("int8")


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("h200", "H200"),
        ("H100 SXM", "H100 SXM"),
        ("h100_sxm", "H100 SXM"),
        ("A100-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("rtx 4090", "RTX 4090"),
        ("MI300X", "MI300X"),
    ],
)
def test_names_of_the_command_line(name: str, row: str) -> None:
    assert find(name).name == row


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown device 'h20[\s\S]*did you mean 'h200'.*YAML"):
        find("h20")
    with pytest.raises(ConfigError, match=r"unknown device 'tpu-v5'[\s\S]*known: a100-40gb, "):
        find("tpu-v5")
    with pytest.raises(ConfigError, match=r"not measured[\s\S]*longskip bench machine"):
        find("this")
    with pytest.raises(ConfigError, match=r"unknown network 'nrd'[\s\S]*did you mean 'ndr'"):
        find_network("nrd")


def test_networks_are_shared_by_the_node_or_not() -> None:
    assert find_network("NDR").per_gpu(8) == 400e9 / 8 == find_network("ndr").per_gpu(1)
    assert find_network("100gbe").per_gpu(8) == 100e9 / 8 / 8
    assert all(len(network.source) > 20 for network in NETWORKS)
    with pytest.raises(ConfigError, match="0 GPUs"):
        find_network("ndr").per_gpu(0)


# -- the user's own rows -----------------------------------------------------------------------------------------------


def test_a_users_row_is_found_by_every_name_and_gives_an_mfu(tmp_path: Path) -> None:
    assert lookup("NVIDIA RTX 6000 Ada Generation") is None
    tree = {"devices": [MINE], "networks": [{"name": "my-net", "gigabits": 200, "per": "gpu", "source": "a page"}]}
    write(user_file(), tree)
    found = lookup("NVIDIA RTX 6000 Ada Generation")
    assert found is not None and found is not find("h200") and mfu_reason("NVIDIA RTX 6000 Ada Generation") is None
    assert find("rtx6000ada") == find("RTX 6000 Ada") == found
    assert (found.peak("bf16"), found.memory, found.bandwidth) == (364_200_000_000_000, 48 * 10**9, 960 * 10**9)
    assert (found.watts, found.link, found.link_name) == (300, 32 * 10**9, "PCIe 4.0 x16")
    assert found.host_link is None and found.sold == found.memory
    reported = {"devices": [{**MINE, "memory_mib": 46068, "host_link_gb_s": 32}]}
    again = find("rtx6000ada", write(tmp_path / "reported.yaml", reported))
    assert (again.memory, again.sold, again.host_link) == (46068 << 20, 48 * 10**9, 32 * 10**9)
    assert find_network("my-net").per_gpu(8) == 25e9
    assert lookup("RTX 6000 Ada Generation 2") is None  # the whole name, as for the package's rows


def test_the_file_of_the_command_goes_before_the_users_and_that_before_the_package(tmp_path: Path) -> None:
    def h200(rate: float, **more: Any) -> dict[str, Any]:
        return {"devices": [{**MINE, "name": "H200", "short": "h200", "teraflops": {"fp32": rate}, **more}]}

    write(user_file(), h200(1.5))
    given = write(tmp_path / "mine.yaml", h200(2.5))
    assert find("h200").peak("fp32") == 1_500_000_000_000
    assert find("h200", given).peak("fp32") == 2_500_000_000_000
    assert len(known(given).devices) == len(DEVICES) + 2


def test_names_are_matched_literally(tmp_path: Path) -> None:
    write(user_file(), {"devices": [{**MINE, "driver_names": ["Card (R) 1.0+"]}]})
    assert lookup("Card (R) 1.0+") is not None and lookup("Card (R) 100") is None


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in MINE.items() if name != key}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"device": [MINE]}, r"unknown key 'device'[\s\S]*did you mean 'devices'"),
        (
            {"devices": [{**MINE, "band_width_gb_s": 1}]},
            r"devices\[0\]: unknown key 'band_width_gb_s'[\s\S]*bandwidth_gb_s",
        ),
        (
            {"devices": [MINE, {**MINE, "short": "x", "memory": 1}]},
            r"devices\[1\]: unknown key 'memory'[\s\S]*memory_gb",
        ),
        ({"devices": [without("source")]}, r"source is missing"),
        ({"devices": [without("bandwidth_gb_s")]}, r"bandwidth_gb_s is missing"),
        ({"devices": [without("link_name")]}, r"belong together"),
        ({"devices": [{**MINE, "memory_gb": -48}]}, r"memory_gb = -48 is not above 0"),
        ({"devices": [{**MINE, "watts": 0}]}, r"watts = 0 is not above 0"),
        ({"devices": [{**MINE, "memory_gb": float("nan")}]}, r"memory_gb = nan is not above 0"),
        ({"devices": [{**MINE, "memory_gb": 48e9}]}, r"out of range[\s\S]*units"),
        ({"devices": [{**MINE, "memory_gb": "48 GB"}]}, r"'48 GB' is no number"),
        ({"devices": [{**MINE, "memory_gb": True}]}, r"True is no number"),
        ({"devices": [{**MINE, "teraflops": {"fp32": 1, "bf61": 2}}]}, r"teraflops: unknown key 'bf61'[\s\S]*bf16"),
        ({"devices": [{**MINE, "teraflops": {"bf16": 2}}]}, r"teraflops: fp32 is missing"),
        ({"devices": [{**MINE, "teraflops": 3}]}, r"not a mapping"),
        ({"devices": [{**MINE, "driver_names": "one"}]}, r"driver_names = 'one'"),
        ({"devices": [{**MINE, "measured": "yes"}]}, r"measured = 'yes'"),
        ({"devices": [{**MINE, "name": 4090}]}, r"name = 4090 is no text"),
        ({"devices": [MINE, MINE]}, r"'rtx6000ada' stands twice"),
        ({"devices": MINE}, r"devices is a dict, not a list"),
        ({"networks": [{"name": "n", "gigabits": 1, "per": "rack", "source": "s"}]}, r"per = 'rack'[\s\S]*gpu.*node"),
        ({"networks": [{"name": "n", "gigabits": 1, "per": "gpu"}]}, r"source is missing"),
        ([MINE], r"a list, not a mapping"),
        ("devices: [", r"not valid YAML"),
        ("devices: []\ndevices: []", r"'devices' stands twice"),
        ("a: &x [1]\ndevices: *x", r"alias"),
        ("devices: !!python/object/apply:os.getcwd []", r"not valid YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tree: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", tree)
    with pytest.raises(ConfigError, match=message) as raised:
        hardware_file.read(path)
    assert str(path) in str(raised.value) and raised.value.exit_code == 2
    with pytest.raises(ConfigError, match=message):
        find("h200", path)


def test_a_missing_file_that_was_asked_for_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no hardware table at"):
        find("h200", tmp_path / "nowhere.yaml")


def test_a_damaged_file_of_the_user_is_told_and_not_passed_over() -> None:
    write(user_file(), "devices: {")
    with pytest.raises(ConfigError, match="not valid YAML"):
        lookup("NVIDIA H200")


def test_the_example_of_the_documentation_is_read(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "hardware.md").read_text("utf-8")
    path = write(tmp_path / "mine.yaml", page.partition("```yaml\n")[2].partition("```")[0])
    assert find("rtx6000ada", path).watts == 300 and find_network("my-net", path).per == "gpu"


def test_adding_a_device_replaces_its_row_and_keeps_the_others() -> None:
    path = user_file()
    hardware_file.add_device(MINE, path)
    hardware_file.add_device({**MINE, "name": "Other", "short": "other"}, path)
    hardware_file.add_device({**MINE, "memory_gb": 96}, path)
    assert sorted((d.short, d.memory) for d in hardware_file.read(path).devices) == [
        ("other", 48 * 10**9),
        ("rtx6000ada", 96 * 10**9),
    ]
    with pytest.raises(ConfigError, match="memory_gb"):
        hardware_file.add_device({**MINE, "memory_gb": -1}, path)
    assert len(hardware_file.read(path).devices) == 2
    write(path, "devices: {")
    with pytest.raises(ConfigError, match="not valid YAML"):
        hardware_file.add_device(MINE, path)
    assert path.read_text() == "devices: {"


def test_a_measured_machine_is_found_by_name_but_gives_no_mfu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "processor", lambda: "Some CPU")
    hardware_file.add_device(
        {**without("driver_names"), "name": "Some CPU", "short": "this", "measured": True}, user_file()
    )
    assert find("this").measured and find("this").name == "Some CPU"
    assert lookup("Some CPU") is None
    assert mfu_reason("Some CPU") is not None
    monkeypatch.setattr(hardware, "processor", lambda: "Another CPU")
    with pytest.raises(ConfigError, match=r"another machine: 'Some CPU'; here is 'Another CPU'[\s\S]*bench machine"):
        find("this")
