from __future__ import annotations

import io
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from longskip.engine.data.draws import generator
from longskip.engine.data.index import load_index, load_table
from longskip.engine.data.pack import write_shards
from longskip.engine.data.plan import Cursor, Plan
from longskip.engine.data.reader import THREADS, MicroBatch, Reader
from longskip.engine.data.sources import RawSample, open_source
from longskip.engine.data.tokens import Vocabulary
from longskip.errors import BadSampleError, ConfigError, DataError, ShardError
from tests.figures import figure

SAMPLES, BATCH, STEPS = 20, 12, 4
VOCABULARY = Vocabulary.build(["a number of words"], 300)
SETTINGS = {"resolution": (6, 6), "n_txt": 12, "seed": 5, "caption_dropout": 0.3, "flip": True, "crop": "random"}


def pixels_of(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_of(i)).save(buffer, "PNG")
    return buffer.getvalue()


def samples():
    for i in range(SAMPLES):
        captions = [{"text": f"number {i}", "weight": 1}, {"text": "words", "weight": 3}]
        yield {"png": png(i), "txt": f"number {i}", "json": {"captions": captions}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("reader") / "shards"
    write_shards(samples(), out, per_shard=7)
    return out


def reader(folder, world=1, rank=0, micro=4, workers=0, **options) -> Reader:
    source = options.pop("source", None) or open_source(folder)
    accumulation = BATCH // (micro * world)
    options = {**SETTINGS, "start_method": "forkserver", **options}
    return Reader(source, Plan(len(source), BATCH, 3), VOCABULARY, micro=micro, rank=rank, world=world,
                  accumulation=accumulation, workers=workers, **options)  # fmt: skip


def rows(batch: MicroBatch) -> list[tuple]:
    """All that training sees of each sample, bit by bit."""
    return [
        (int(batch.epochs[i]), int(batch.samples[i]), batch.keys[i], batch.clean[i].numpy().tobytes(),
         tuple(batch.conditions["tokens"][i].tolist()), bool(batch.dropped[i]), batch.time_normal[i].item(),
         batch.noise[i].numpy().tobytes(), batch.weight[i].item())
        for i in range(len(batch))
    ]  # fmt: skip


def steps(read: Reader, count: int) -> list[list[list[tuple]]]:
    with read:
        return [[rows(batch) for batch in next(read)] for _ in range(count)]


@pytest.fixture(scope="module")
def straight(folder):
    """Each step's global batch in slot order, read by one rank in one go."""
    return [step[0] for step in steps(reader(folder, micro=BATCH), STEPS)]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 3), (3, 2)])
def test_the_same_global_batches_for_any_ranks_and_workers(folder, straight, world, micro, workers):
    accumulation = BATCH // (world * micro)
    ranks = [steps(reader(folder, world, rank, micro, workers), STEPS) for rank in range(world)]
    for k in range(STEPS):
        slots = [row for j in range(accumulation) for rank in range(world) for row in ranks[rank][k][j]]
        assert slots == straight[k]
    figure(f"plan: {world} ranks, {workers} workers: the same ids in the same {STEPS} global batches of {BATCH}")


def test_every_sample_comes_once_per_epoch(straight):
    seen = Counter((row[0], row[1]) for step in straight for row in step)
    assert sum(seen.values()) == STEPS * BATCH
    assert set(seen.values()) == {1}
    for epoch in range(STEPS * BATCH // SAMPLES):
        assert sorted(sample for at, sample in seen if at == epoch) == list(range(SAMPLES))


def test_draws_are_what_their_counters_say(straight):
    flips = crops = drops = 0
    purposes = ("time", "noise", "flip", "crop", "dropout", "caption")
    for row in (row for step in straight for row in step):
        epoch, sample, key, pixels, tokens, dropped, time_normal, noise, weight = row
        draw = {purpose: generator(5, epoch, sample, purpose) for purpose in purposes}
        assert key == f"{sample:09d}"
        assert weight == 1.0
        assert time_normal == np.float32(draw["time"].standard_normal())
        assert noise == draw["noise"].standard_normal((3, 6, 6), dtype=np.float32).tobytes()
        left = draw["crop"].random(2)[1] * 2  # 8 columns stored, 6 wanted
        lo = int(left)
        blend = pixels_of(sample).astype(float)
        expected = blend[:, lo : lo + 6] * (1 - (left - lo)) + blend[:, lo + 1 : lo + 7] * (left - lo)
        flip = draw["flip"].random() < 0.5
        expected = expected[:, ::-1] if flip else expected
        got = (np.frombuffer(pixels, np.float32).reshape(3, 6, 6).transpose(1, 2, 0) + 1) * 127.5
        # The window is cut at a fraction of a pixel; a linear blend is near enough to tell it from any other window.
        assert np.abs(got - expected).mean() < 30
        assert dropped == (draw["dropout"].random() < 0.3)
        text = f"number {sample}" if draw["caption"].random() * 4 < 1 else "words"
        assert list(tokens) == VOCABULARY.encode("" if dropped else text, 12).tolist()
        flips, crops, drops = flips + flip, crops + (left > 1), drops + dropped
    assert 0 < flips < STEPS * BATCH
    assert 0 < crops < STEPS * BATCH
    assert 0 < drops < STEPS * BATCH


def test_pixels_are_scaled_to_minus_one_and_one(folder):
    with reader(folder, flip=False, crop="centre") as read:
        batch = next(read)[0]
    assert batch.clean.dtype == torch.float32
    expected = np.stack([pixels_of(int(i))[:, 1:7] for i in batch.samples]).transpose(0, 3, 1, 2)
    assert np.abs(batch.clean.numpy() - (expected / 127.5 - 1)).max() < 1e-6
    moved = batch.to("cpu")
    assert rows(moved) == rows(batch)


@pytest.mark.parametrize("workers", [0, 1])
def test_resume_at_any_step_continues_the_same_stream(folder, straight, workers):
    for stop in range(STEPS) if workers == 0 else [2]:
        with reader(folder, micro=BATCH, workers=workers) as read:
            before = [rows(next(read)[0]) for _ in range(stop)]
            saved = json.loads(json.dumps(read.cursor.to_json()))
        assert saved["position"] == stop * BATCH
        after = reader(folder, micro=BATCH, workers=workers, cursor=Cursor.from_json(saved))
        assert before + [step[0] for step in steps(after, STEPS - stop)] == straight


def test_seek_and_close_go_on_at_the_cursor(folder, straight):
    with reader(folder, micro=BATCH) as read:
        first = [rows(next(read)[0]) for _ in range(3)]
        read.close()
        assert rows(next(read)[0]) == straight[3]
        read.seek(Plan(SAMPLES, BATCH, 3).batch_cursor(1))
        assert rows(next(read)[0]) == straight[1]
    assert first == straight[:3]


def test_skipped_positions_are_not_read(folder):
    plan = Plan(SAMPLES, BATCH, 3)
    with reader(folder, micro=BATCH, cursor=plan.cursor().skip((3, 15))) as read:
        batch = next(read)[0]
        assert read.cursor.position == 24
    epochs, numbers = plan.lookup(np.array([0, 1, 2, *range(15, 24)]))
    assert batch.samples.tolist() == numbers.tolist()
    assert batch.epochs.tolist() == epochs.tolist()


class Troubled:
    """A source whose samples 4 and 9 are bad and whose sample 11 has a long caption."""

    features = None

    def __init__(self, inner) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def key(self, i: int) -> str:
        return self.inner.key(i)

    def fingerprint(self) -> str:
        return self.inner.fingerprint()

    def read(self, i: int) -> RawSample:
        if i == 4:
            raise BadSampleError("caption_missing", "no caption")
        sample = self.inner.read(i)
        if i == 9:
            return sample._replace(image=sample.image[:50])
        return sample._replace(captions=(("word " * 50, 1.0),)) if i == 11 else sample


@pytest.mark.parametrize("workers", [0, 1])
def test_bad_samples_keep_their_slots_with_weight_zero(folder, straight, workers):
    with reader(folder, micro=BATCH, workers=workers, source=Troubled(open_source(folder))) as read:
        batches = [next(read)[0] for _ in range(2)]
    reasons = {}
    for batch, expected in zip(batches, straight, strict=False):
        for found, row in zip(rows(batch), expected, strict=True):
            assert found[:3] == row[:3]
            assert (found[6], found[7]) == (row[6], row[7])  # time and noise are drawn all the same
            if found[1] in (4, 9, 11):
                assert found[8] == 0.0
                assert not any(np.frombuffer(found[3], np.float32))
                assert not any(found[4])
            else:
                assert found == row
        reasons.update({bad["sample"]: (bad["key"], bad["reason"]) for bad in batch.bad})
        assert sum(batch.weight.tolist()) == BATCH - len(batch.bad)
    assert reasons == {
        4: ("000000004", "caption_missing"),
        9: ("000000009", "image_decode"),
        11: ("000000011", "text_too_long"),
    }
    with reader(folder, micro=BATCH, source=Troubled(open_source(folder)), too_long="truncate") as read:
        assert {bad["sample"] for _ in range(2) for bad in next(read)[0].bad} == {4, 9}


@pytest.mark.parametrize("workers", [0, 1])
def test_damage_stops_the_reader_or_is_skipped_as_configured(tmp_path, workers):
    write_shards(samples(), tmp_path / "a", per_shard=7)
    shard = load_index(tmp_path / "a").shards[1]
    at = int(load_table(tmp_path / "a", shard)[2]["image_offset"]) + 30
    with (tmp_path / "a" / shard.file).open("r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)[0]
        stream.seek(at)
        stream.write(bytes([byte ^ 8]))
    stopped = pytest.raises(ShardError, match="the image of 000000009")
    with reader(tmp_path / "a", workers=workers) as read, stopped as caught:
        for _ in range(2):
            next(read)
    assert "longskip data lint" in (caught.value.cure or "")
    with reader(tmp_path / "a", workers=workers, source=open_source(tmp_path / "a", on_damage="skip")) as read:
        bad = [bad for _ in range(2) for batch in next(read) for bad in batch.bad]
    assert {(item["sample"], item["reason"]) for item in bad} == {(9, "shard_crc")}


def test_closing_leaves_no_thread_and_no_process(folder):
    def running() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name.startswith("longskip-reader")]

    read = reader(folder)
    next(read)
    assert len(running()) == THREADS
    read.close()
    assert running() == []
    read = reader(folder, workers=2)
    next(read)
    assert len(multiprocessing.active_children()) == 2
    read.close()
    assert multiprocessing.active_children() == []
    read.close()


def test_too_little_shared_memory_is_refused_before_it_is_written(folder, monkeypatch):
    """Memory that is not there would end the process with a signal at the first write, as in a container's 64 MB."""
    there = os.statvfs("/dev/shm")
    little = SimpleNamespace(f_bavail=3, f_frsize=there.f_frsize)
    monkeypatch.setattr(os, "statvfs", lambda path: little)
    read = reader(folder, workers=2)
    with pytest.raises(DataError, match=r"hand batches over in \d+ MiB of shared memory; /dev/shm has 0 MiB") as caught:
        next(read)
    assert "--shm-size" in (caught.value.cure or "") and multiprocessing.active_children() == []
    with reader(folder, workers=0) as read:
        next(read)


def test_spawned_workers_read_the_same(folder, straight):
    assert steps(reader(folder, micro=BATCH, workers=1, start_method="spawn"), 1) == [[straight[0]]]


def test_a_killed_worker_is_an_error_and_not_a_hang(folder):
    with reader(folder, workers=2) as read:
        next(read)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(DataError, match="a data worker died"):
            for _ in range(100):
                next(read)
        assert time.monotonic() - started < 30
    assert multiprocessing.active_children() == []


def test_workers_outlive_a_signal_to_the_group(folder):
    with reader(folder, workers=1) as read:
        next(read)
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGTERM)
            os.kill(child.pid, signal.SIGINT)
        for _ in range(20):
            next(read)


def test_data_wait_is_the_time_the_consumer_waited(folder):
    class Slow(Troubled):
        def read(self, i: int) -> RawSample:
            time.sleep(0.01)
            return self.inner.read(i)

    with reader(folder, source=Slow(open_source(folder))) as read:
        started = time.perf_counter()
        for _ in range(3):
            next(read)
        spent = time.perf_counter() - started
        assert 3 * BATCH * 0.01 * 0.9 / THREADS < read.data_wait_seconds <= spent
        waited = read.data_wait_seconds
        time.sleep(0.6)  # two steps are prepared meanwhile
        next(read)
        assert read.data_wait_seconds - waited < 0.06


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [({"micro": 5}, ConfigError, "global batch is 12"), ({"rank": 1}, ConfigError, "rank 1 of 1"),
     ({"resolution": (0, 6)}, ConfigError, "resolution"), ({"n_txt": 0}, ConfigError, "n_txt"),
     ({"caption_dropout": 1.5}, ConfigError, "caption_dropout"), ({"crop": "left"}, ConfigError, "crop"),
     ({"too_long": "x"}, ConfigError, "too_long"), ({"workers": -1}, ConfigError, "workers"),
     ({"cursor": Cursor(0, (), 21)}, DataError, "cursor is of data with 21 samples")],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(folder, change, error, message):
    with pytest.raises(error, match=message):
        reader(folder, **change)


def test_a_plan_of_other_data_is_refused(folder):
    source = open_source(folder)
    with pytest.raises(DataError, match="the plan is for 21 samples, the source holds 20"):
        Reader(source, Plan(21, 4), VOCABULARY, resolution=(6, 6), n_txt=4, micro=4)


def test_noise_takes_the_latents_shape(folder):
    with reader(folder, latent_shape=(4, 2, 3)) as read:
        assert next(read)[0].noise.shape == (4, 4, 2, 3)
