"""Saves in the background: the same files, whatever is killed, full, slow or missing, and never a mix."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.engine import checkpoint, durable, fitting, saving, snapshot
from longskip.engine.distributed import gather_objects
from longskip.engine.job import Job
from longskip.engine.saving import Saved
from longskip.engine.shards import KINDS, Slice
from longskip.engine.snapshot import Snapshot
from tests.engine.bare_ranks import bare_ranks, bare_shards, check, fill, saving_of
from tests.engine.test_resume import assert_same_run, config_of
from tests.figures import figure
from tests.ranks import run_ranks, small_config, train_ranks

STEP = 3


def names(checkpoints: Path) -> list[str]:
    return sorted(path.name for path in checkpoints.iterdir() if path.name.startswith("step-"))


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """What is imported here need not be imported in every forked rank."""
    bare_shards()


class Gate:
    """Holds the thread that writes, before whatever it would do next, until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch | None = None) -> None:
        self.opened, plain = threading.Event(), durable.Disk._next

        def held(disk: durable.Disk) -> None:
            if threading.current_thread() is not threading.main_thread():
                self.opened.wait(60)
            plain(disk)

        patch = monkeypatch or pytest.MonkeyPatch()
        patch.setattr(durable.Disk, "_next", held)


# --- what is written --------------------------------------------------------------------------------------------------


def _both_ways(folder: Path) -> None:
    """Step 3 saved in the foreground, and in the background while its values are overwritten."""
    gate, shards = Gate(), bare_shards()
    fill(shards, STEP)
    checkpoint.save(folder / "fore", STEP, shards, {"step": STEP}, keep_last=1)
    saver = saving_of(folder / "back", shards)
    for step in (STEP - 1, STEP):  # the second time into memory that is there already
        fill(shards, step)
        assert saver.save(step, {"step": step}) is None
        fill(shards, STEP + 1)
        assert saver.figure == 0.0 and names(folder / "back")[-1] == f"step-{step:08d}.tmp"
        gate.opened.set()
        saver.settle()
        gate.opened.clear()


@pytest.mark.parametrize("world", [1, 2])
def test_a_save_in_the_background_writes_what_the_foreground_writes(tmp_path: Path, world: int) -> None:
    assert bare_ranks(world, tmp_path / "store", _both_ways, tmp_path) == [0] * world
    fore, back = (tmp_path / name / f"step-{STEP:08d}" for name in ("fore", "back"))
    assert check(back) == STEP
    there = sorted(path.name for path in fore.iterdir())
    assert there == sorted(path.name for path in back.iterdir()) and len(there) == 2 + 2 * world
    assert all((fore / name).read_bytes() == (back / name).read_bytes() for name in there)
    assert json.loads((tmp_path / "back" / "latest").read_text()) == back.name


def _snapshot_of_a_run(config: Any, run: Path) -> None:
    """Every slice of a rank at any stage, and that the memory is used again and not much more than needed."""
    from longskip.engine.distributed import join
    from longskip.engine.prepare import prepare

    job = prepare(config, run, join())
    job.step(job.read())
    copy = Snapshot(job.shards)
    places = None
    for _ in range(2):
        job.step(job.read())
        assert copy.reserve()
        copy.take()
        wanted = {
            (item.name, item.offset, kind): job.shards.tensor(item, kind).clone()
            for item in job.shards.owned()
            for kind in KINDS
        }
        job.step(job.read())
        for item in job.shards.owned():
            for kind in KINDS:
                assert torch.equal(torch.cat(list(copy.pieces(item, kind))), wanted[item.name, item.offset, kind])
        now = [part.data_ptr() for kept in copy._kept.values() for part in kept]
        assert places in (None, now)
        places = now
    owned, stage = sum(item.numel for item in job.shards.owned()), job.shards.stage
    gaps = 2 if stage else len(job.shards.owned())
    assert 16 * owned <= copy.bytes <= 16 * (1.01 * owned + gaps * snapshot.GAP)
    n_parameters = sum(math.prod(shape) for _, _, _, shape in job.shards.model.canonical())
    predicted = fitting.memory(config, stage, world=2, micro=job.batch.micro, n_parameters=n_parameters).snapshot
    assert 0 <= predicted - max(16 * each for each in gather_objects(owned)) <= 0.01 * predicted  # type: ignore[operator]
    if stage:
        assert len(copy._runs) <= 2 * len({id(item.master) for item in job.shards.owned()})
    job.close("done")


@pytest.mark.parametrize("stage", [3, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (0, 1, 2))])
def test_a_snapshot_is_what_was_at_that_step(shapes: Path, tmp_path: Path, stage: int) -> None:
    config = small_config(shapes, deepspeed={"zero_stage": stage}, train={"dtype": "bf16" if stage % 2 else "fp32"})
    assert run_ranks(2, _snapshot_of_a_run, config, tmp_path / "run") == [0, 0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 6000), st.integers(0, 6000)), min_size=1, max_size=8), st.integers(1, 5000))
def test_runs_cover_the_slices_in_pieces_of_any_size(layout: list[tuple[int, int]], piece: int) -> None:
    """Slices with gaps of any width in two masters: each comes back whole, and no wide gap is copied."""
    masters, owned, position = [torch.randn(100_000), torch.randn(100_000)], [], 0
    for number, (numel, gap) in enumerate(layout):
        master = masters[number % 2]
        owned.append(Slice(f"t{number}", (numel,), 0, numel, master, position))
        position += numel + gap
    shards: Any = type("Some", (), {"world": 1, "owned": lambda self: owned})()
    shards.tensor = lambda item, kind: item.master[item.position : item.position + item.numel] * (1 + KINDS.index(kind))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot, "PIECE", piece)
        copy = Snapshot(shards)
        assert copy.reserve()
        copy.take()
        for item in owned:
            for kind in KINDS:
                assert torch.equal(torch.cat(list(copy.pieces(item, kind))), shards.tensor(item, kind))
    assert sum(run.numel for run in copy._runs) <= sum(item.numel for item in owned) + len(owned) * snapshot.GAP


# --- killed -----------------------------------------------------------------------------------------------------------


def _two_saved(checkpoints: Path) -> None:
    shards = bare_shards()
    for step in (1, 2):
        fill(shards, step)
        checkpoint.save(checkpoints, step, shards, {"step": step}, keep_last=2)


def _third_in_the_background(checkpoints: Path) -> None:
    shards = bare_shards()
    fill(shards, STEP)
    record = checkpoints / "record"
    record.touch()
    saver = saving_of(checkpoints, shards, keep_last=2, records=(record,))
    saver.save(STEP, {"step": STEP})
    fill(shards, STEP + 1)
    saver.settle()


def _kill_at_every_operation(folder: Path, world: int, rank: int) -> dict[int, int]:
    """How many kills left which step as the newest; after each it verifies, and the next save works."""
    assert bare_ranks(world, folder / "store", _two_saved, folder / "base") == [0] * world
    newest: dict[int, int] = {1: 0, 2: 0, STEP: 0}
    for nth in range(1, 200):
        run = folder / f"{nth}"
        shutil.copytree(folder / "base", run)
        fault = f"save.io:kill:rank={rank}:step={STEP}:nth={nth}"
        codes = bare_ranks(world, folder / f"store-{nth}", _third_in_the_background, run, fault=fault)
        if codes == [0] * world:
            assert names(run) == ["step-00000002", "step-00000003"] and check(run / "step-00000003") == STEP
            return newest
        assert codes[rank] == -signal.SIGKILL
        found, complaints = checkpoint.newest(run)
        assert found is not None and not complaints, (nth, complaints)
        newest[check(found)] += 1
        checkpoint.sweep(run)
        assert all(
            check(path) for path in run.iterdir() if path.is_dir()
        )  # nothing else is left, and all of it is whole
        if rank == 0:
            shards = bare_shards()
            fill(shards, STEP)
            checkpoint.save(run, STEP, shards, {"step": STEP}, keep_last=1)
            assert names(run) == ["step-00000003"] and check(run / "step-00000003") == STEP
    raise AssertionError("it never came to an end")


@pytest.mark.parametrize(
    ("world", "rank"), [(1, 0), *(pytest.param(2, rank, marks=pytest.mark.slow) for rank in (0, 1))]
)
def test_killed_before_every_write_fsync_and_rename_in_turn(tmp_path: Path, world: int, rank: int) -> None:
    """FAULTS 4: the newest complete step is the old one or the new one, verified, bit for bit what it was."""
    newest = _kill_at_every_operation(tmp_path, world, rank)
    figure(f"{world} rank(s), rank {rank} killed before each operation of a save: newest step then {newest}")
    assert newest[1] == 0 and newest[2] >= 4
    if rank == 0:
        assert newest[2] >= 12 and newest[STEP] >= 5  # before the rename, and from it to the last removal


@pytest.fixture(scope="module")
def straight(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Unbroken runs that saved in the foreground, by the number of ranks."""
    folder = tmp_path_factory.mktemp("straight")
    runs = {world: folder / str(world) for world in (1, 2)}
    for world, run in runs.items():
        assert train_ranks(world, config_of(shapes, background=False), run) == [0] * world
    return runs


LAST = {(1, 0): 19, (2, 0): 17, (2, 1): 6}  # operations of the save of step 6, of a rank


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "point"),
    [
        *((world, f"save.snapshot:kill:rank={world - 1}:step=6") for world in (1, 2)),
        *((w, f"save.io:kill:rank={r}:step=6:nth={n}") for (w, r), last in LAST.items() for n in range(1, last + 1)),
    ],
)
def test_killed_while_it_writes_and_started_again(
    shapes: Path, straight: dict[int, Path], tmp_path: Path, world: int, point: str
) -> None:
    """Steps, ledger lines and the kill after the copy: resumed, all ends bitwise where the unbroken run ends."""
    run, config = tmp_path / "run", config_of(shapes)
    codes = train_ranks(world, config, run, point)
    assert codes[int(point.split("rank=")[1][0])] == -signal.SIGKILL, codes
    found, complaints = checkpoint.newest(run / "checkpoints")
    assert found is not None and found.name in ("step-00000003", "step-00000006") and not complaints
    assert train_ranks(world, config, run) == [0] * world
    assert_same_run(run, straight[world])


@pytest.mark.slow
@pytest.mark.parametrize(("world", "rank"), list(LAST))
def test_these_are_all_operations(shapes: Path, tmp_path: Path, world: int, rank: int) -> None:
    fault = f"save.io:kill:rank={rank}:step=6:nth={LAST[world, rank] + 1}"
    assert train_ranks(world, config_of(shapes), tmp_path / "run", fault) == [0] * world


# --- slow, full, broken -----------------------------------------------------------------------------------------------


def _watched(config: Any, run: Path) -> int:
    """``train`` that writes down what lies there after each step, and what became of each save (the first rank does)."""
    from longskip.engine.trainer import train

    log, end = Job.log, Job._save_ended

    def note(self: Job, line: Any) -> None:
        if self.world.is_main:
            with open(f"{run}.notes", "a") as file:
                file.write(json.dumps(line) + "\n")

    def logged(self: Job) -> None:
        note(self, [self.state.step, names(self.run.checkpoints)])
        log(self)

    def ended(self: Job, saved: Saved) -> None:
        note(self, vars(saved) | {"error": str(saved.error or ""), "noticed": self.state.step})
        end(self, saved)

    Job.log, Job._save_ended = logged, ended  # type: ignore[method-assign]
    return train(config, run)


def _notes(run: Path) -> tuple[dict[int, list[str]], dict[int, dict[str, Any]]]:
    lines = [json.loads(line) for line in Path(f"{run}.notes").read_text().splitlines()]
    return dict(line for line in lines if isinstance(line, list)), {
        line["step"]: line for line in lines if isinstance(line, dict)
    }


@pytest.mark.slow
def test_a_slow_rank_holds_nobody_until_the_next_save(shapes: Path, straight: dict[int, Path], tmp_path: Path) -> None:
    """FAULTS 5: rank 1 takes five seconds for its part of step 3. Steps go on, nothing final is seen before it is done, the
    save of step 6 waits for it, and all that is saved is what the foreground saves."""
    run = tmp_path / "run"
    assert run_ranks(
        2, _watched, config_of(shapes), run, environment={"LONGSKIP_FAULT": "save.shard_half:sleep:rank=1:step=3"}
    ) == [0, 0]
    seen, saved = _notes(run)
    assert seen[4] == seen[5] == seen[6] == ["step-00000003.tmp"]
    assert saved[3]["background"] and saved[3]["seconds"] >= 4.5 and saved[3]["noticed"] == 6
    assert saved[6]["background"] and saved[6]["waited"] > 1.0 and saved[6]["held"] >= saved[6]["waited"]
    assert not saved[9]["background"] and saved[9]["noticed"] == 9
    assert_same_run(run, straight[2])
    for step in ("step-00000006", "step-00000009"):
        ours, theirs = (checkpoint.read_manifest(r / "checkpoints" / step) for r in (run, straight[2]))
        assert ours == theirs  # sizes and SHA-256 of every file


def test_a_run_saves_in_the_background_and_all_is_there_at_its_end(shapes: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_ranks(1, _watched, config_of(shapes), run) == [0]
    _, saved = _notes(run)
    assert {step: entry["background"] for step, entry in saved.items()} == {3: True, 6: True, 9: False}
    assert all(not entry["error"] and entry["held"] <= entry["seconds"] + 0.5 for entry in saved.values())
    assert names(run / "checkpoints") == ["step-00000006", "step-00000009"]


def _full_at_every_operation(checkpoints: Path) -> None:
    """ENOSPC on either rank at each operation in turn: all ranks agree, the folder goes, the step before stays."""
    shards, ended = bare_shards(), list[Saved]()
    fill(shards, 1)
    checkpoint.save(checkpoints, 1, shards, {"step": 1}, keep_last=1)
    step = STEP
    for rank in range(shards.world):
        for nth in range(1, 200):
            os.environ["LONGSKIP_FAULT"] = f"save.io:disk_full:rank={rank}:step={step}:nth={nth}"
            fill(shards, step)
            before = checkpoint.newest(checkpoints)[0]
            saver = saving_of(checkpoints, shards, keep_last=1, ended=ended.append)
            saver.save(step, {"step": step})
            while len(ended) == 0:  # as a run's steps do, without settle
                saver.hear(sum(gather_objects(saver.figure)))  # type: ignore[arg-type]
                time.sleep(0.001)
            error = ended.pop().error
            assert gather_objects(str(error)) == [str(error)] * shards.world
            found = checkpoint.newest(checkpoints)[0]
            assert found is not None and not list(checkpoints.glob("step-*.tmp"))
            if error is not None:
                assert "No space left" in str(error) and type(error).__name__ == "DiskFullError" and error.alike
            if check(found) != step:
                assert error is not None and found == before
            gather_objects("all have looked")
            step += 1
            if error is None:
                break
        else:
            raise AssertionError("it never came to an end")


@pytest.mark.parametrize("world", [1, 2])
def test_a_full_disk_at_every_write_is_heard_of_by_all(tmp_path: Path, world: int) -> None:
    assert bare_ranks(world, tmp_path / "store", _full_at_every_operation, tmp_path / "saved") == [0] * world


def _broken(checkpoints: Path) -> None:
    """Rank 1's thread meets an error that is none of ours: no rank waits for it for ever."""
    shards, ended = bare_shards(), list[Saved]()
    saver = saving_of(checkpoints, shards, ended=ended.append)
    for broken in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if broken and shards.rank == 1:
                patch.setattr(checkpoint.Draft, "_write", lambda self, pieces: {}["nothing"])
            fill(shards, STEP)
            saver.save(STEP, {"step": STEP})
            saver.settle()
        (saved,) = ended
        ended.clear()
        assert ("KeyError: 'nothing'" in str(saved.error)) == broken
    assert check(checkpoints / "step-00000003") == STEP


def test_an_unforeseen_error_in_one_ranks_thread_is_told_to_all(tmp_path: Path) -> None:
    assert bare_ranks(2, tmp_path / "store", _broken, tmp_path / "saved") == [0, 0]


def _without_memory(checkpoints: Path) -> None:
    shards, said, ended = bare_shards(), list[str](), list[Saved]()
    if shards.rank == 1:
        snapshot.host_share = lambda world: 1000  # type: ignore[assignment]
    saver = saving_of(checkpoints, shards, say=said.append, ended=ended.append)
    for step in (1, 2):
        fill(shards, step)
        assert saver.save(step, {"step": step}) is not None
    assert [saved.background for saved in ended] == [False, False]
    assert len(said) == 1 and "host memory of rank 1" in said[0]


def test_without_memory_for_the_copy_it_says_so_once_and_saves_all_the_same(tmp_path: Path) -> None:
    assert bare_ranks(2, tmp_path / "store", _without_memory, tmp_path / "saved") == [0, 0]
    assert [check(path) for path in checkpoint.steps_in(tmp_path / "saved")] == [1, 2]


def test_a_save_waits_for_the_one_before_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, shards, ended = Gate(monkeypatch), bare_shards(), list[Saved]()
    saver = saving_of(tmp_path, shards, ended=ended.append)
    fill(shards, 1)
    saver.save(1, {"step": 1})
    threading.Timer(0.5, gate.opened.set).start()
    fill(shards, 2)
    saver.save(2, {"step": 2})
    assert [saved.step for saved in ended] == [1]
    saver.settle()
    first, second = ended
    assert first.seconds >= 0.5 > first.waited and second.waited >= 0.4 and second.held >= second.waited
    assert [check(path) for path in checkpoint.steps_in(tmp_path)] == [1, 2]


def _too_large(checkpoints: Path) -> None:
    """The system refuses to let a file grow, half-way through it."""
    shards, ended = bare_shards(), list[Saved]()
    fill(shards, 1)
    checkpoint.save(checkpoints, 1, shards, {"step": 1}, keep_last=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_500_000, resource.RLIM_INFINITY))
    saver = saving_of(checkpoints, shards, keep_last=1, ended=ended.append)
    for now in (True, False):
        saver.save(STEP, {"step": STEP}, now=now)
        saver.settle()
        said = str(ended.pop().error)
        assert "File too large after 1,500,000 bytes, " in said and " are free: '" in said
        assert f"{checkpoints}/step-00000003.tmp/weights-00000.safetensors" in said
        assert names(checkpoints) == ["step-00000001"]


def test_an_error_of_the_disk_names_the_file_and_what_is_free(tmp_path: Path) -> None:
    assert bare_ranks(1, tmp_path / "store", _too_large, tmp_path / "saved") == [0]
    assert check(tmp_path / "saved" / "step-00000001") == 1


def test_a_commit_that_all_have_brought_their_parts_to_is_made_by_a_rank_that_ends(tmp_path: Path) -> None:
    shards = bare_shards()
    saver = saving_of(tmp_path, shards)
    fill(shards, STEP)
    saver.save(STEP, {"step": STEP})
    while not (saver._running.committing or saver._running.outcome):  # type: ignore[union-attr]
        time.sleep(0.0001)
    saver.close()
    assert check(tmp_path / "step-00000003") == STEP


def _no_step_comes(checkpoints: Path) -> None:
    """Between ``save`` and the commit no rank says anything to another in a collective: each only waits for the folder."""
    shards = bare_shards()
    fill(shards, STEP)
    saver = saving_of(checkpoints, shards)
    saver.save(STEP, {"step": STEP})
    deadline = time.monotonic() + 60
    while not (checkpoints / "step-00000003").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert check(checkpoints / "step-00000003") == STEP
    saver.settle()


def test_a_commit_waits_for_no_steps_end(tmp_path: Path) -> None:
    assert bare_ranks(2, tmp_path / "store", _no_step_comes, tmp_path / "saved") == [0, 0]


def _gone(checkpoints: Path) -> None:
    shards = bare_shards()
    saver = saving_of(checkpoints, shards)
    if shards.rank == 1:
        durable.Disk._next = lambda disk: os._exit(7)  # type: ignore[method-assign, assignment]
    saver.save(STEP, {"step": STEP})
    with pytest.raises(RuntimeError):
        saver.settle()
    saver.close()
    assert names(checkpoints) == ["step-00000003.tmp"]


def test_a_rank_that_dies_before_its_part_is_brought_is_missed_and_not_waited_for(tmp_path: Path) -> None:
    assert bare_ranks(2, tmp_path / "store", _gone, tmp_path / "saved") == [0, 7]


def test_a_rank_that_fails_alone_gives_up_what_is_half_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, shards = Gate(monkeypatch), bare_shards()
    monkeypatch.setattr(saving, "PATIENCE", 0.2)
    saver = saving_of(tmp_path, shards)
    saver.save(STEP, {"step": STEP})
    saver.close()
    gate.opened.set()
    for thread in threading.enumerate():
        if thread.name == "longskip-save":
            thread.join(10)
    assert names(tmp_path) == ["step-00000003.tmp"]
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) == 0  # it wrote nothing once it was stopped
    assert "longskip-save" not in [thread.name for thread in threading.enumerate()]


# --- the order on the disk --------------------------------------------------------------------------------------------


def test_all_is_on_the_disk_before_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a loss of power would leave: every file, the folder and the ledger are synced before the rename that makes them a
    checkpoint, and the folder above before anything older is removed."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(("sync", Path(f"/proc/self/fd/{descriptor}").resolve().relative_to(tmp_path).as_posix()))
        fsync(descriptor)

    def renamed(old: Path, new: Path) -> None:
        done.append(("rename", f"{Path(old).name} {Path(new).name}"))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    ledger, saved, shards = tmp_path / "ledger.jsonl", tmp_path / "saved", bare_shards()
    ledger.touch()
    saver = saving_of(saved, shards, keep_last=1, records=(ledger,))
    for step in (1, 2):
        done.clear()
        fill(shards, step)
        saver.save(step, {"step": step})
        saver.settle()
    folder = "saved/step-00000002.tmp"
    commit = done.index(("rename", "step-00000002.tmp step-00000002"))
    files = {path.name for path in (saved / "step-00000002").iterdir()}
    before = [place for what, place in done[:commit] if what == "sync"]
    assert set(before) == {"ledger.jsonl", folder, *(f"{folder}/{name}" for name in files)}
    assert before.index(f"{folder}/manifest.json") == len(before) - 2 and before[-1] == folder
    assert done[commit + 1] == ("sync", "saved")
    assert done.index(("rename", "step-00000001 step-00000001.old")) > commit + 1
    assert done[:commit][0] == ("sync", f"{folder}/weights-00000.safetensors")


# --- what is kept -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.sets(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 4), st.integers(0, 7))
def test_the_last_k_and_every_nth_are_kept(
    tmp_path_factory: pytest.TempPathFactory, steps: set[int], last: int, every: int
) -> None:
    """Commit after commit, beside the rule said in another way: a step goes when ``last`` newer ones are committed."""
    folder = tmp_path_factory.mktemp("keep")
    for step in sorted(steps):
        (folder / f"step-{step:08d}").mkdir()
        checkpoint._prune(folder, last, folder / f"step-{step:08d}", every)
    kept = {checkpoint.step_of(path) for path in checkpoint.steps_in(folder)}
    assert kept == {s for s in steps if len([t for t in steps if t > s]) < last or (every and s % every == 0)}
    assert max(steps) in kept and names(folder) == [f"step-{step:08d}" for step in sorted(kept)]


def test_a_run_keeps_two_levels_and_the_list_shows_it(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from longskip.launcher.cli_checkpoint import list_checkpoints

    config = small_config(
        shapes, train={"steps": 8}, checkpoint={"every": 1, "keep_last": 2, "keep_every": 3}, logging={"every": 4}
    )
    assert train_ranks(1, config, tmp_path / "run") == [0]
    assert [checkpoint.step_of(path) for path in checkpoint.steps_in(tmp_path / "run" / "checkpoints")] == [3, 6, 7, 8]
    capsys.readouterr()
    list_checkpoints(str(tmp_path / "run"))
    lines = capsys.readouterr().out.splitlines()
    assert ["for good" in line for line in lines] == [True, True, False, False, False] and "the newest" in lines[3]
    assert lines[4] == "kept: the last 2, and every step that is a multiple of 3"
    list_checkpoints(str(tmp_path / "run"), as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert [entry["kept"] for entry in found["checkpoints"]] == ["every", "every", "last", "last"]
