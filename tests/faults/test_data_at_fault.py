"""Faults of data, met by a training on two ranks: damaged shards, broken pictures and captions, too few shards."""

from __future__ import annotations

import io
import json
import resource
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longskip.engine import checkpoint
from longskip.engine.config import Config
from longskip.engine.data.captions import MAX_TEXT_BYTES
from longskip.engine.data.pack import write_shards
from longskip.engine.data.shapes import write_shapes
from longskip.errors import EXIT_FAILED
from tests.engine.test_agreement import _train_with_a_dying_worker
from tests.engine.test_decode import encoded, raw_png
from tests.engine.test_elastic import samples_of, train_and_tell
from tests.engine.test_training import losses
from tests.figures import figure
from tests.ranks import run_ranks, small_config, train_ranks

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def config_of(data: Path, steps: int = 6, /, **groups: Any) -> Config:
    given = {"train": {"steps": steps}, "checkpoint": {"every": 3}, "logging": {"every": 1}} | groups
    return small_config(data, **given)


def bad_lines(run: Path) -> list[dict[str, Any]]:
    path = run / "bad_samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def counted(run: Path) -> int:
    """The bad samples that the newest checkpoint has counted."""
    return int(checkpoint.read_state(checkpoint.steps_in(run / "checkpoints")[-1])["bad_samples"])


# --- 25: damaged bytes ------------------------------------------------------------------------------------------------


def flip_every_third_picture(folder: Path) -> set[str]:
    """One byte in the middle of each third picture flipped; returns their keys."""
    (shard,) = folder.glob("*.tar")
    with tarfile.open(shard) as archive:
        pictures = [member for member in archive.getmembers() if member.name.endswith(".png")][::3]
    with open(shard, "r+b") as file:
        for member in pictures:
            place = member.offset_data + member.size // 2
            file.seek(place)
            (value,) = file.read(1)
            file.seek(place)
            file.write(bytes([value ^ 1]))
    return {member.name.removesuffix(".png") for member in pictures}


@pytest.mark.slow
def test_damage_is_skipped_and_counted_alike_on_any_number_of_ranks(tmp_path: Path) -> None:
    """A third of the pictures have a flipped byte; one epoch by one rank and by two: the same samples, the same losses."""
    write_shapes(tmp_path / "train", 48, seed=0)
    write_shapes(tmp_path / "validation", 16, seed=1, held_out=None)
    damaged = flip_every_third_picture(tmp_path / "train")
    config = config_of(tmp_path, 6, data={"on_damage": "skip", "max_bad_share": 0.5})
    told = []
    for world in (1, 2):
        run = tmp_path / f"run-{world}"
        assert train_ranks(world, config, run) == [0] * world
        lines = bad_lines(run)
        assert {line["key"] for line in lines} == damaged and {line["reason"] for line in lines} == {"shard_crc"}
        assert len(lines) == counted(run) == len(damaged) == 16
        told.append((sorted((line["step"], line["sample"]) for line in lines), losses(run)))
    assert told[0][0] == told[1][0]
    assert all(abs(told[0][1][s] - told[1][1][s]) <= 1e-6 * told[0][1][s] for s in told[0][1])


@pytest.mark.parametrize("cut", ["border", "data", "empty"])
def test_a_truncated_shard_is_refused_by_all_ranks_before_the_first_step(
    tmp_path: Path, cut: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_shapes(tmp_path / "train", 48, seed=0)
    write_shapes(tmp_path / "validation", 16, seed=1, held_out=None)
    (shard,) = (tmp_path / "train").glob("*.tar")
    with tarfile.open(shard) as archive:
        border = archive.getmembers()[60].offset
    whole, size = shard.stat().st_size, {"border": border, "data": border + 600, "empty": 0}[cut]
    with open(shard, "r+b") as file:
        file.truncate(size)
    assert train_ranks(2, config_of(tmp_path), tmp_path / "run") == [EXIT_FAILED, EXIT_FAILED]
    said = capfd.readouterr().out
    for rank in (0, 1):
        assert f"rank {rank}: ShardError" in said
    assert said.count(f"is truncated: expected {whole} bytes, found {size}") == 2
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# --- 26: broken pictures and captions ---------------------------------------------------------------------------------


def _animation() -> bytes:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    return encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])


def _cmyk() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PICTURE).convert("CMYK").save(buffer, "JPEG")
    return buffer.getvalue()


READABLE: dict[str, dict[str, Any]] = {
    "cmyk": {"jpg": _cmyk(), "txt": "cyan"},
    "sixteen": {"png": encoded(Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40)), "txt": "grey"},
    "animated": {"webp": _animation(), "txt": "moving"},
    "one": {"png": encoded(np.zeros((1, 1, 3), np.uint8)), "txt": "a dot"},
}
BROKEN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "broken": ({"png": b"\x89PNG\r\n\x1a\n" + bytes(100), "txt": "x"}, ("image_decode",)),
    "truncated": ({"png": encoded(PICTURE)[:2000], "txt": "x"}, ("image_decode",)),
    "nothing": ({"png": raw_png(0, 0, b""), "txt": "x"}, ("image_decode", "image_size")),
    "bomb": ({"png": raw_png(9000, 9000), "txt": "x"}, ("image_too_large",)),
    "gif": ({"png": encoded(PICTURE, "GIF"), "txt": "x"}, ("image_format",)),
    "long": ({"png": encoded(PICTURE), "txt": b"word " * (MAX_TEXT_BYTES // 5 + 1)}, ("text_too_large",)),
    "latin": ({"png": encoded(PICTURE), "txt": b"caf\xe9"}, ("caption_encoding",)),
    "silent": ({"png": encoded(PICTURE)}, ("caption_missing",)),
}


def samples(good: int) -> Iterator[dict[str, Any]]:
    """``good`` sound samples, then every odd and every broken one."""
    for i in range(good):
        yield {"__key__": f"good-{i:03d}", "png": encoded(np.roll(PICTURE, i, axis=1)), "txt": "a red circle"}
    for name, parts in READABLE.items():
        yield {"__key__": f"odd-{name}", **parts}
    for name, (parts, _) in BROKEN.items():
        yield {"__key__": f"bad-{name}", **parts}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 samples, of which 8 are broken and 4 odd; 16 sound ones to validate on."""
    folder = tmp_path_factory.mktemp("mixed")
    write_shards(samples(48 - len(READABLE) - len(BROKEN)), folder / "train")
    write_shapes(folder / "validation", 16, seed=1, held_out=None)
    return folder


def _train_and_measure(config: Config, run: Path) -> int:
    from longskip.engine.trainer import train

    try:
        return train(config, run)
    finally:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        with open(f"{run}.peaks", "a") as file:
            file.write(f"{peak}\n")


@pytest.mark.slow
def test_broken_samples_are_skipped_with_their_reasons(mixed: Path, tmp_path: Path) -> None:
    """One epoch on two ranks: each broken sample is told once with its reason, each odd one is read; memory is bounded."""
    clean = tmp_path / "clean"
    write_shapes(clean / "train", 48, seed=0)
    write_shapes(clean / "validation", 16, seed=1, held_out=None)
    peaks = []
    for data, run in ((clean, tmp_path / "plain"), (mixed, tmp_path / "run")):
        assert run_ranks(2, _train_and_measure, config_of(data, 6, data={"max_bad_share": 0.5}), run) == [0, 0]
        peaks.append(max(map(float, Path(f"{run}.peaks").read_text().split())))
    lines = bad_lines(tmp_path / "run")
    told = {line["key"]: line["reason"] for line in lines}
    assert told.keys() == {f"bad-{name}" for name in BROKEN} and len(lines) == len(BROKEN)
    assert all(told[f"bad-{name}"] in reasons for name, (_, reasons) in BROKEN.items()), told
    assert counted(tmp_path / "run") == len(BROKEN)
    assert all(np.isfinite(loss) for loss in losses(tmp_path / "run").values())
    figure(
        f"reasons {dict(Counter(told.values()))}; peak memory of a rank {peaks[1]:.0f} MiB, {peaks[0]:.0f} without them"
    )
    assert peaks[1] < peaks[0] + 60  # the bomb alone would take 231 MiB


@pytest.mark.slow
def test_too_many_broken_samples_stop_both_ranks_at_the_same_step(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every sample is broken: above 5% of the first hundred seen, all ranks stop and say where the list is."""
    bad = [{"__key__": f"bad-{i:03d}", "png": encoded(PICTURE)[:2000], "txt": "x"} for i in range(48)]
    write_shards(bad, tmp_path / "train")
    write_shapes(tmp_path / "validation", 16, seed=1, held_out=None)
    run = tmp_path / "run"
    assert train_ranks(2, config_of(tmp_path, 6, train={"steps": 6}), run) == [EXIT_FAILED, EXIT_FAILED]
    said = capfd.readouterr().out
    for rank in (0, 1):
        assert f"rank {rank}: DataError: 8 of 8 samples were bad (" in said
    assert said.count("above data.max_bad_share 0.05") == 2
    assert "bad_samples.jsonl" in said and len(bad_lines(run)) == 8


# --- 29: too few shards, dead workers ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("shuffle", ["full", "window"])
def test_fewer_shards_than_ranks_times_workers(tmp_path: Path, shuffle: str) -> None:
    """One shard of 20 pictures for 2 ranks × 2 workers over three epochs: the steps and ids of one rank without workers."""
    write_shapes(tmp_path / "train", 20, seed=0)
    write_shapes(tmp_path / "validation", 16, seed=1, held_out=None)
    window = {"window_shards": 1} if shuffle == "window" else {}
    seen = []
    for world, workers in ((1, 0), (2, 2)):
        run = tmp_path / f"run-{world}"
        config = config_of(tmp_path, 7, data={"shuffle": shuffle, "workers": workers, **window})
        assert run_ranks(world, train_and_tell, config, run) == [0] * world
        seen.append((samples_of(run), losses(run)))
    assert seen[0][0] == seen[1][0] and list(seen[0][0]) == list(range(1, 8))
    assert all(abs(seen[0][1][s] - seen[1][1][s]) <= 1e-6 * seen[0][1][s] for s in seen[0][1])


@pytest.mark.slow
def test_after_a_dead_worker_the_same_command_ends_where_the_unbroken_run_ends(tmp_path: Path) -> None:
    write_shapes(tmp_path / "train", 48, seed=0)
    write_shapes(tmp_path / "validation", 16, seed=1, held_out=None)
    run, straight = tmp_path / "run", tmp_path / "straight"
    config = config_of(tmp_path, 9, data={"workers": 1})
    assert run_ranks(2, _train_with_a_dying_worker, config, run) == [EXIT_FAILED, EXIT_FAILED]
    assert train_ranks(2, config, run) == [0, 0]
    assert train_ranks(2, config, straight) == [0, 0]
    assert losses(run) == losses(straight)
