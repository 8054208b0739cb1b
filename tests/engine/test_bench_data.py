"""The reader's benchmark: what it compares, what it refuses to compare; no time is asserted."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from longskip.engine import bench_data, bench_pipelines
from longskip.engine.bench_pipelines import BATCH, Batch, Contender
from longskip.engine.data.index import load_index
from longskip.errors import ConfigError, LongskipError
from tests.figures import figure

COUNT = 2 * 2 * BATCH


@pytest.fixture(scope="module")
def result() -> Iterator[dict[str, Any]]:
    """Both kinds, as small as they come, and not to be believed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_pipelines, "SHUFFLE", 64)
        patch.setattr(bench_pipelines, "WARM_UP", 0)
        patch.setattr(bench_data, "SECONDS", 0.1)  # many of the clock's ticks
        patch.setattr(bench_data, "SHARDS", 2)
        patch.setattr(bench_data, "PICTURES", 2)
        patch.setattr(bench_data, "RESUMES", 1)
        yield bench_data.bench_data(samples=COUNT, repeats=1, workers=0)


def test_every_contender_hands_out_the_same_batches(result: dict[str, Any]) -> None:
    names = {"longskip", "longskip-draws", "default", "tuned-2", "tuned-0"}
    for kind, count in (("features", COUNT), ("jpeg", COUNT // 2)):
        found = result["kinds"][kind]
        assert found["samples"] == count and set(found["contenders"]) == names
        assert all(figures["same_batches"] for figures in found["contenders"].values()), kind
        for line in found["comparisons"]:
            assert line["ratio"]["median"] > 0, line
    figure(f"bench data: {len(names)} pipelines hand out the same {COUNT} feature samples and {COUNT // 2} pictures")


def test_the_result_is_plain_json_and_a_page(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    page = bench_data.to_markdown(result)
    assert result["command"] in page and "webdataset, default" in page and "WRONG" not in page
    assert "≥ 25" in page and "≥ 12" in page and "≤ 50" in page
    assert page.count("| as stored |") == 10
    assert page.count("Floor: ") == 1  # of features


def test_the_floor_reads_every_byte_that_is_read_and_ours_is_a_share_of_it(
    result: dict[str, Any], shards: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert result["kinds"]["jpeg"]["floors"] == []
    for floor, processes in zip(result["kinds"]["features"]["floors"], (1, 2), strict=True):
        assert floor["processes"] == processes
        assert floor["share_of_cpu"]["median"] > 0 and floor["share_of_rate"]["median"] > 0
    rates = [{"samples_per_second": rate, "cpu_us": 1e6 / rate} for rate in (100.0, 50.0)]
    found = bench_data.shares(1, [rates[0]], [rates[1]])
    assert found["share_of_rate"]["median"] == found["share_of_cpu"]["median"] == 0.5
    read: list[int] = []
    crc32 = bench_pipelines.crc32
    monkeypatch.setattr(bench_pipelines, "crc32", lambda data: read.append(crc32(data)))
    count, _, _ = bench_pipelines._floor(shards[0], 1e-9, 0)
    wanted = []
    for path in sorted(shards[0].glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [(one.name.partition(".")[0], one.offset_data, one.size) for one in tar]
        data = path.read_bytes()
        for key in sorted({name for name, _, _ in members}):
            places = [(at, at + size) for name, at, size in members if name == key]
            wanted.append(zlib.crc32(data[min(at for at, _ in places) : max(end for _, end in places)]))
    assert count == len(wanted) and sorted(read) == sorted(wanted)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("bench") / "features"
    return folder, bench_data.make_shards(folder, "features", 2 * BATCH)


def test_the_shards_are_what_was_asked_for(shards: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, made = shards
    index = load_index(folder)
    assert index.total == len(made) == 2 * BATCH and len(index.shards) == bench_data.SHARDS
    assert all(shard.members["latent.npy"] == shard.members["text.npy"] == shard.count for shard in index.shards)
    bench_data.make_shards(tmp_path / "jpeg", "jpeg", 16)
    sizes = [shard.bytes / shard.count for shard in load_index(tmp_path / "jpeg").shards]
    assert 110_000 < np.mean(sizes) < 140_000  # about the 126 KB of a photograph


def test_wrong_batches_get_no_ratio(shards: tuple[Path, dict[str, str]]) -> None:
    folder, made = shards

    def changed(folder: Path, kind: Any, workers: int, endless: bool) -> Iterator[Batch]:
        for batch in bench_pipelines.ours(folder, kind, workers, endless):
            batch.arrays[0][3, 1, 2, 3] += 1
            yield batch

    def fewer(folder: Path, kind: Any, workers: int, endless: bool) -> Iterator[Batch]:
        yield next(bench_pipelines.ours(folder, kind, workers, endless))

    def twice(folder: Path, kind: Any, workers: int, endless: bool) -> Iterator[Batch]:
        yield from bench_pipelines.ours(folder, kind, workers, False)
        yield from bench_pipelines.ours(folder, kind, workers, False)

    def contents(batches: Any) -> dict[str, Any]:
        return bench_pipelines.contents(Contender("x", "x", batches, 0), folder, "features")

    ours = contents(bench_pipelines.ours)
    assert bench_data.agrees("features", ours, made, ours)
    assert not bench_data.agrees("features", contents(changed), made, ours)
    assert not bench_data.agrees("features", contents(fewer), made, ours)
    with pytest.raises(ValueError, match="came twice"):
        contents(twice)
    runs = {
        name: [{"samples_per_second": 1.0, "cpu_us": 1.0}]
        for name in ("longskip", "longskip-draws", "default", "tuned-0")
    }
    for line in bench_data.comparisons("features", runs, {name: name != "default" for name in runs}):
        assert (line["ratio"] is None) == (line["theirs"] == "default")
        assert "met" not in line or line["ratio"] is not None


def test_pictures_of_another_decoder_must_be_nearly_the_same() -> None:
    def found(sha256: str, mean: float) -> dict[str, Any]:
        return {"a": {"sha256": sha256, "coarse": [mean, 0.0]}}

    assert bench_data.agrees("jpeg", found("1", 0.0), {"a": ""}, found("1", 0.0))
    assert bench_data.agrees("jpeg", found("2", 0.01), {"a": ""}, found("1", 0.0))
    assert not bench_data.agrees("jpeg", found("2", 0.03), {"a": ""}, found("1", 0.0))
    assert not bench_data.agrees("jpeg", found("1", 0.0), {"a": "", "b": ""}, found("1", 0.0))


def test_ratios_are_of_the_same_repeat_and_of_the_faster_tuned_one() -> None:
    rates = {
        "longskip": (24, 30, 60),
        "longskip-draws": (2, 2, 2),
        "default": (1, 1, 2),
        "tuned-2": (4, 1, 2),
        "tuned-0": (2, 2, 6),
    }
    runs = {name: [{"samples_per_second": float(rate), "cpu_us": 12.0 / rate} for rate in values]
            for name, values in rates.items()}  # fmt: skip
    lines = bench_data.comparisons("features", runs, dict.fromkeys(runs, True))
    found = {(line["ours"], line["theirs"], line["by"]): line for line in lines}
    assert len(found) == 8
    for by in ("wall clock", "processor time"):
        assert found["longskip", "default", by]["ratio"]["median"] == pytest.approx(30)  # of 24, 30, 30
        assert found["longskip", "default", by]["met"] is True
    assert found["longskip", "tuned-2", "wall clock"]["ratio"]["median"] == pytest.approx(30)  # of 6, 30, 30
    assert found["longskip-draws", "default", "wall clock"]["asked"] is None


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match="--samples 100"):
        bench_data.bench_data(samples=100)
    with pytest.raises(ConfigError, match="--repeats 0"):
        bench_data.bench_data(repeats=0)

    def failing(folder: Path) -> None:
        raise RuntimeError(f"of {folder}")

    def dying(folder: Path) -> None:
        import os

        os._exit(3)

    with pytest.raises(LongskipError, match="RuntimeError: of here"):
        bench_data.in_process(failing, Path("here"))
    with pytest.raises(LongskipError, match="ended without a result"):
        bench_data.in_process(dying, Path("here"))
    assert bench_data.in_process(abs, -3) == 3


def test_our_undrawn_batches_are_the_drawn_ones(shards: tuple[Path, dict[str, str]]) -> None:
    folder, _ = shards
    plain, drawn = (
        next(batches(folder, "features", 0, True))
        for batches in (bench_pipelines.ours, bench_pipelines.ours_with_draws)
    )
    assert plain.keys == drawn.keys
    assert all(torch.equal(one, other) for one, other in zip(plain.arrays, drawn.arrays, strict=True))
    assert [tuple(array.shape) for array in plain.arrays] == [(BATCH, 4, 32, 32), (BATCH, 77, 768), (BATCH, 77)]


def test_the_command_refuses_other_kinds() -> None:
    from longskip.launcher.cli_bench import app

    found = CliRunner().invoke(app, ["data", "--kind", "videos"])
    assert found.exit_code != 0 and isinstance(found.exception, ConfigError)
