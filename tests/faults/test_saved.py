"""Faults of checkpoints, from the outside: slow ranks, flipped bits, strange files, other numbers of ranks, pickles."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from longskip.engine import checkpoint
from longskip.engine.faults import SLEEP_SECONDS
from longskip.errors import CheckpointError
from tests.engine.test_elastic import samples_of, train_and_tell
from tests.engine.test_resume import assert_same_run, config_of
from tests.engine.test_training import losses, relative
from tests.figures import figure
from tests.ranks import run_ranks, small_config, train_ranks

STEM = "step-00000006"
FILES = ("weights-00000.safetensors", "weights-00001.safetensors", "moments-00000.safetensors",
         "moments-00001.safetensors", "state.json", "manifest.json")  # fmt: skip


def _watch(checkpoints: Path, stop: Path, told: Path) -> None:
    """Write down when the folder of step 6 is begun and when it is there to be read, and whether it verifies then."""
    seen: dict[str, Any] = {}
    while not stop.exists() and "verified" not in seen:
        if "begun" not in seen and (checkpoints / f"{STEM}.tmp").exists():
            seen["begun"] = time.monotonic()
        latest = checkpoints / "latest"
        if "pointed" not in seen and latest.exists() and STEM in latest.read_text():
            seen["pointed"] = time.monotonic()
        if (checkpoints / STEM).exists():
            seen["there"] = time.monotonic()
            try:
                checkpoint.verify(checkpoints / STEM)
                seen["verified"] = True
            except CheckpointError as error:
                seen["verified"] = str(error)
        time.sleep(0.005)
    told.write_text(json.dumps(seen))


@pytest.mark.slow
def test_nothing_final_is_visible_before_a_slow_rank_is_done(shapes: Path, unbroken: Path, tmp_path: Path) -> None:
    """Rank 1 takes 5 s between its two files; another process looks on, 200 times a second."""
    run, stop, told = tmp_path / "run", tmp_path / "stop", tmp_path / "told"
    watcher = multiprocessing.get_context("fork").Process(target=_watch, args=(run / "checkpoints", stop, told))
    watcher.start()
    codes = train_ranks(2, config_of(shapes), run, "save.shard_half:sleep:rank=1:step=6")
    stop.touch()
    watcher.join()
    seen = json.loads(told.read_text())
    assert codes == [0, 0]
    assert seen["verified"] is True
    assert seen["there"] - seen["begun"] >= SLEEP_SECONDS - 0.5
    assert seen.get("pointed", seen["there"]) >= seen["there"] - 0.1
    assert_same_run(run, unbroken)


def _damaged(unbroken: Path, run: Path) -> Path:
    shutil.copytree(unbroken, run)
    return checkpoint.steps_in(run / "checkpoints")[-1]


def _passed_over(newest: Path, name: str) -> None:
    """The newest checkpoint is marked, the complaint names the file, and the one before is taken."""
    found, complaints = checkpoint.newest(newest.parent, mark_bad=True)
    assert found is not None and found.name == STEM
    assert len(complaints) == 1 and name in complaints[0], complaints
    assert newest.with_name(f"{newest.name}.bad").is_dir() and not newest.exists()


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_file(unbroken: Path, tmp_path: Path, name: str) -> None:
    newest = _damaged(unbroken, tmp_path / "run")
    data = bytearray((newest / name).read_bytes())
    data[len(data) // 2] ^= 1
    (newest / name).write_bytes(data)
    _passed_over(newest, name)


def test_no_bit_of_the_manifest_can_flip_unnoticed(unbroken: Path, tmp_path: Path) -> None:
    """Every byte of it in turn; a flip is refused, or leaves a manifest that says the same of everything."""
    newest = _damaged(unbroken, tmp_path / "run")
    path = newest / "manifest.json"
    whole, plain = path.read_bytes(), json.loads(path.read_bytes())
    unnoticed = []
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            said = checkpoint.read_manifest(newest)
            if any(said.get(part) != value for part, value in plain.items() if part != "sha256"):
                checkpoint.verify(newest)
                unnoticed.append(whole[max(0, place - 20) : place + 5].decode())
        except CheckpointError:
            continue
    figure(f"manifest of {len(whole)} bytes, one bit flipped in each in turn: {len(unnoticed)} unnoticed")
    assert not unnoticed, unnoticed[:5]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["truncated", "empty", "missing"])
def test_a_file_that_is_not_whole(unbroken: Path, tmp_path: Path, name: str, damage: str) -> None:
    newest = _damaged(unbroken, tmp_path / "run")
    data = (newest / name).read_bytes()
    (newest / name).unlink()
    if damage != "missing":
        (newest / name).write_bytes(data[: len(data) // 2] if damage == "truncated" else b"")
    _passed_over(newest, name)


def test_a_file_too_many(unbroken: Path, tmp_path: Path) -> None:
    newest = _damaged(unbroken, tmp_path / "run")
    (newest / "weights-00002.safetensors").write_bytes(b"")
    _passed_over(newest, "weights-00002.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["manifest", "extra"])
def test_after_damage_the_same_command_ends_where_the_unbroken_run_ends(
    shapes: Path, unbroken: Path, tmp_path: Path, damage: str
) -> None:
    run = tmp_path / "run"
    newest = _damaged(unbroken, run)
    if damage == "extra":
        (newest / "stranger").touch()
    else:
        (newest / "manifest.json").write_text("{}")
    assert train_ranks(2, config_of(shapes), run) == [0, 0]
    assert_same_run(run, unbroken)
    assert newest.with_name(f"{newest.name}.bad").is_dir()
    said = [json.loads(line) for line in (run / "incidents.jsonl").read_text().splitlines()]
    assert [entry["kind"] for entry in said] == ["bad_checkpoint"]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (2, 4), (1, 2)])
def test_other_numbers_of_ranks_read_the_same_samples(
    shapes: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, first: int, then: int
) -> None:
    """The same ids in the same global batches; losses within 1e-6 relative."""

    def config(steps: int) -> Any:
        return small_config(shapes, train={"steps": steps, "micro_batch": 2}, checkpoint={"every": 5})

    straight, changed = tmp_path / "straight", tmp_path / "changed"
    assert run_ranks(first, train_and_tell, config(10), straight) == [0] * first
    assert run_ranks(first, train_and_tell, config(5), changed) == [0] * first
    assert run_ranks(then, train_and_tell, config(10), changed) == [0] * then
    assert samples_of(changed) == samples_of(straight) and list(samples_of(changed)) == list(range(1, 11))
    worst = relative(losses(changed), losses(straight), 10)
    figure(f"{first} → {then} ranks: the same ids, worst relative loss difference {worst:.1e}")
    assert worst <= 1e-6


class _Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.mkdir, (self.mark,)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["weights-00001.safetensors", "state.json", "latest"])
def test_a_pickle_under_a_matching_manifest_is_not_unpickled(
    shapes: Path, unbroken: Path, tmp_path: Path, place: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A stranger who writes file and manifest: refused with a typed error, or passed over; nothing of his is run."""
    run, mark = tmp_path / "run", tmp_path / "it-ran"
    newest = _damaged(unbroken, run)
    hostile = pickle.dumps(_Trap(mark))
    if place == "latest":
        (newest.parent / "latest").write_bytes(hostile)
    else:
        hostile = hostile.ljust((newest / place).stat().st_size, b"\0")  # what follows a pickle is not read
        (newest / place).write_bytes(hostile)
        manifest = json.loads((newest / "manifest.json").read_text())
        del manifest["sha256"]  # as from before manifests named their own; a stranger might as well write the right one
        manifest["files"][place] = {"bytes": len(hostile), "sha256": hashlib.sha256(hostile).hexdigest()}
        (newest / "manifest.json").write_text(json.dumps(manifest))
    longer = small_config(shapes, train={"steps": 10}, checkpoint={"every": 3, "keep_last": 2}, logging={"every": 2})
    codes = train_ranks(2, longer, run)
    assert not mark.exists()
    said = capfd.readouterr()
    assert "Traceback" not in said.out + said.err
    assert codes == [0, 0] or (place != "latest" and set(codes) <= {1, 2} and "CheckpointError" in said.out)
