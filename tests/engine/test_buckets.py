from __future__ import annotations

import io
import json
import math
import tarfile
import time
import tracemalloc
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from longskip.engine.configio import validate
from longskip.engine.data.buckets import (
    LEFT_OUT,
    RATIOS,
    Assignment,
    Histogram,
    assign,
    auto_buckets,
    nearest,
    resolve_buckets,
    stored_sizes,
)
from longskip.engine.data.index import build_index
from longskip.engine.data.pack import write_shards
from longskip.engine.data.plan import Cursor, Plan
from longskip.engine.data.reader import Reader
from longskip.engine.data.sources import FolderSource, ShardSource, open_source
from longskip.engine.data.streams import plan_of
from longskip.engine.data.tokens import Vocabulary
from longskip.errors import ConfigError, DataError
from tests.figures import figure

BUCKETS = ((16, 16), (8, 24), (24, 8), (16, 24))
VOCABULARY = Vocabulary.build(["a picture"], 300)


def png(height: int, width: int, orientation: int = 1) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height), (height % 256, width % 256, 7)).save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def some_sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    return [(int(h), int(w)) for h, w in np.random.default_rng(seed).integers(5, 60, (count, 2))]


def packed(sizes, out, per_shard=13) -> ShardSource:
    write_shards(({"png": png(*size), "txt": "a picture"} for size in sizes), out, per_shard=per_shard)
    return ShardSource(out)


def ratio_of(size: tuple[int, int]) -> Fraction:
    return Fraction(*size)


def nearest_by_hand(buckets, height: int, width: int) -> tuple[int, int]:
    """By exact fractions: the smallest factor between the two ratios; the wider of equals."""
    ratio = Fraction(height, width)
    return min(buckets, key=lambda b: (max(Fraction(*b) / ratio, ratio / Fraction(*b)), Fraction(*b)))


def cropped_by_hand(bucket: tuple[int, int], height: int, width: int) -> float:
    """One minus the area of the largest window of the bucket's shape over the picture's."""
    scale = min(height / bucket[0], width / bucket[1])
    return 1 - bucket[0] * scale * bucket[1] * scale / (height * width)


# --- the buckets themselves -------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    buckets=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=9, unique_by=ratio_of),
    sizes=st.lists(st.tuples(st.integers(1, 500), st.integers(1, 500)), min_size=1, max_size=20),
)  # fmt: skip
def test_nearest_is_the_one_of_the_least_factor(buckets, sizes):
    ties = [
        (a[0] * b[0], a[1] * b[1]) for a in buckets for b in buckets
    ]  # half way between two, where these are squares
    sizes += [(math.isqrt(h), math.isqrt(w)) for h, w in ties]
    heights, widths = zip(*sizes, strict=True)
    found = [buckets[i] for i in nearest(buckets, heights, widths)]
    assert found == [nearest_by_hand(buckets, height, width) for height, width in sizes]


@pytest.mark.parametrize("multiple", [4, 8, 16])
@pytest.mark.parametrize("cells", [(1, 1), (4, 4), (16, 16), (5, 3), (8, 32), (33, 7)])
def test_auto_buckets_are_the_nearest_to_the_usual_ratios_that_fit_the_area(cells, multiple):
    resolution = (cells[0] * multiple, cells[1] * multiple)
    area, found = math.prod(resolution), auto_buckets(resolution, multiple)
    assert resolution in found
    assert all(h % multiple == w % multiple == 0 and h > 0 < w and h * w <= area for h, w in found)
    assert len({Fraction(*size) for size in found}) == len(found)
    every = [
        (h, w) for h in range(multiple, area // multiple + 1, multiple)
        for w in range(multiple, area // h + 1, multiple)
        if (h + multiple) * w > area or h * (w + multiple) > area  # as large as it can be in one direction
    ]  # fmt: skip
    best = {}
    for ratio in {ratio**power for ratio in RATIOS for power in (1, -1)}:
        factors = {size: max(Fraction(*size) / ratio, ratio / Fraction(*size)) for size in every}
        least = min(factors.values())
        best[ratio] = {Fraction(*size) for size, factor in factors.items() if factor == least}
    ratios = {Fraction(*size) for size in found}
    assert all(ratios & choices for choices in best.values())
    assert ratios <= {Fraction(*resolution)}.union(*best.values())
    if resolution[0] == resolution[1]:
        assert {(w, h) for h, w in found} == set(found)


def test_auto_buckets_of_the_usual_resolution():
    assert auto_buckets((256, 256), 16) == (
        (176, 352), (192, 336), (208, 304), (224, 288), (256, 256), (288, 224), (304, 208), (336, 192), (352, 176)
    )  # fmt: skip


@pytest.mark.parametrize(
    ("setting", "message"),
    [([(16, 16), (12, 16)], "12x16 does not divide into patches of 8"), ([(16, 16), (32, 32)], "the same aspect ratio"),
     ([(16, 16), (16, 16)], "the same aspect ratio"), ([], "0 aspect buckets"), ([(0, 8)], "0x8"),
     ([(8, 8 * k) for k in range(1, 257)], "256 aspect buckets")],
)  # fmt: skip
def test_buckets_that_cannot_be_are_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        resolve_buckets(setting, (16, 16), 8)


def test_the_configuration_knows_its_buckets():
    tree = {"model": {"preset": "uvit-tiny", "resolution": 32}}
    assert validate(tree).buckets == ()
    assert validate(tree | {"data": {"buckets": "auto"}}).buckets == ((24, 40), (32, 32), (40, 24))
    assert validate(tree | {"data": {"buckets": [[32, 32], [16, 64]]}}).buckets == ((32, 32), (16, 64))
    with pytest.raises(ConfigError, match="30x32 does not divide into patches of 8"):
        validate(tree | {"data": {"buckets": [[30, 32]]}})


# --- sorting pictures into them ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    sizes = some_sizes(150)
    return sizes, packed(sizes, tmp_path_factory.mktemp("buckets") / "shards")


def test_every_picture_is_in_the_nearest_bucket_and_the_histogram_says_what_it_costs(pictures):
    sizes, source = pictures
    found = assign(source, BUCKETS)
    of = [found.buckets[code] for code in found.codes]
    assert of == [nearest_by_hand(BUCKETS, *size) for size in sizes]
    assert found.counts == tuple(of.count(bucket) for bucket in found.buckets)
    for row in found.histogram.rows:
        bucket = (row.height, row.width)
        mine = [size for size, at in zip(sizes, of, strict=True) if at == bucket]
        assert row.samples == len(mine) > 0
        assert row.cropped == pytest.approx(sum(cropped_by_hand(bucket, *size) for size in mine) / len(mine), abs=1e-12)
        assert row.enlarged == sum(height < bucket[0] or width < bucket[1] for height, width in mine)
        assert row.fate == "kept"
    small = sum(row.enlarged for row in found.histogram.rows)
    assert small
    assert found.histogram.warnings() == [f"{small} pictures are smaller than their bucket and are enlarged"]
    assert found.histogram.served == 150
    assert json.loads(json.dumps(found.histogram.to_json()))["served"] == 150
    assert Histogram.from_json(json.loads(json.dumps(found.histogram.to_json()))) == found.histogram
    assert any("16 x 24" in line and "cropped" in line for line in found.histogram.lines())


def test_pictures_of_unreadable_size_keep_a_slot_in_the_fullest_bucket(tmp_path):
    broken = png(20, 8)[:20]
    samples = [{"png": broken if i in (2, 5) else png(16, 17), "txt": "x"} for i in range(8)] + [
        {"png": png(8, 30), "txt": "x"}
    ]
    write_shards(samples, tmp_path / "a")
    found = assign(ShardSource(tmp_path / "a"), BUCKETS)
    assert found.buckets == ((16, 16), (8, 24))
    assert found.codes.tolist() == [0] * 8 + [1]
    assert found.histogram.unknown == 2
    assert found.histogram.served == 9
    assert "size of 2 samples is not known" in found.histogram.warnings()[-1]
    assert [(row.samples, row.fate) for row in found.histogram.rows] == [
        (6, "kept"),
        (1, "kept"),
        (0, "empty"),
        (0, "empty"),
    ]


def test_a_folder_knows_which_pictures_are_turned_and_a_table_does_not(tmp_path):
    for number, (size, orientation) in enumerate([((8, 30), 1), ((8, 30), 6), ((8, 30), 3), ((30, 8), 8)]):
        (tmp_path / f"{number}.png").write_bytes(png(*size, orientation))
        (tmp_path / f"{number}.txt").write_text("x")
    folder = FolderSource(tmp_path)
    assert [folder.size(i) for i in range(4)] == [(8, 30), (30, 8), (8, 30), (8, 30)]
    assert np.concatenate(list(folder.sizes())).tolist() == [[8, 30], [30, 8], [8, 30], [8, 30]]
    write_shards((folder.read(i) for i in range(4)), tmp_path / "out")
    assert [ShardSource(tmp_path / "out").size(i) for i in range(4)] == [(8, 30), (8, 30), (8, 30), (30, 8)]
    assert assign(folder, BUCKETS).codes.tolist() == [0, 1, 0, 0]


def test_a_folder_finds_sizes_behind_large_headers(tmp_path):
    buffer = io.BytesIO()
    Image.new("RGB", (9, 6)).save(buffer, "JPEG", icc_profile=bytes(200_000))
    assert b"\xff\xc0" not in buffer.getvalue()[: 1 << 16]  # the frame's header comes later
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    (tmp_path / "b.png").write_bytes(b"nothing")
    source = FolderSource(tmp_path)
    assert np.concatenate(list(source.sizes())).tolist() == [[6, 9], [0, 0]]
    assert np.concatenate(list(source.sizes(latents=True))).tolist() == [[0, 0], [0, 0]]
    (tmp_path / "a.jpg").unlink()
    assert source.size(0) == (0, 0)


@pytest.mark.parametrize("batch", [1, 4, 20, 60, 149, 200])
def test_small_buckets_are_dissolved_one_after_the_other(pictures, batch):
    sizes, source = pictures
    live = list(BUCKETS)
    while True:  # by hand: sort everything anew into the buckets that are left
        of = [nearest_by_hand(live, *size) for size in sizes]
        counts = Counter(of)
        small = min(live, key=lambda bucket: (counts[bucket], BUCKETS.index(bucket)))
        if counts[small] >= batch or len(live) == 1:
            break
        live.remove(small)
    found = assign(source, BUCKETS, batch)
    assert set(found.buckets) == set(live)
    assert [found.buckets[code] for code in found.codes] == of
    rows = {(row.height, row.width): row for row in found.histogram.rows}
    for bucket in BUCKETS:
        if bucket in live:
            mine = [size for size, at in zip(sizes, of, strict=True) if at == bucket]
            share = sum(cropped_by_hand(bucket, *size) for size in mine) / len(mine)
            assert (rows[bucket].samples, rows[bucket].fate) == (len(mine), "kept")
            assert rows[bucket].cropped == pytest.approx(share, abs=1e-12)
            assert rows[bucket].enlarged == sum(h < bucket[0] or w < bucket[1] for h, w in mine)
        else:
            assert rows[bucket].fate == "merged"
            assert any(f"bucket {bucket[0]}x{bucket[1]} has" in text for text in found.histogram.warnings())
    if batch <= 150:
        plan_of(source, batch, assignment=found)
    else:
        with pytest.raises(DataError, match="holds 150 samples, fewer than the global batch of 200"):
            plan_of(source, batch, assignment=found)


# --- rank and select --------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n=st.one_of(st.integers(1, 50), st.sampled_from([1023, 1024, 1025, 2048, 3000, 4096])),
    buckets=st.one_of(st.integers(1, 9), st.just(255)), seed=st.integers(0, 99),
)  # fmt: skip
def test_rank_and_select_equal_a_search(n, buckets, seed):
    rng = np.random.default_rng(seed)
    codes = rng.choice(np.append(rng.permutation(buckets)[:4], LEFT_OUT), n).astype(np.uint8)
    found = Assignment([(1, b + 1) for b in range(buckets)], codes, Histogram((), 1))
    for bucket in {*codes.tolist(), 0} - {LEFT_OUT}:
        where = np.flatnonzero(codes == bucket)
        assert found.counts[bucket] == len(where)
        ranks = rng.permutation(len(where))
        assert found.select(bucket, ranks).tolist() == where[ranks].tolist()
        places = rng.integers(0, n + 1, 20)
        assert found.rank(bucket, places).tolist() == [(codes[:place] == bucket).sum() for place in places]
        assert found.rank(bucket, [0, n]).tolist() == [0, len(where)]


def test_many_places_at_once(monkeypatch):
    monkeypatch.setattr("longskip.engine.data.buckets._CHUNK", 7)
    codes = np.random.default_rng(0).integers(0, 3, 20_000).astype(np.uint8)
    found = Assignment([(1, 1), (1, 2), (1, 3)], codes, Histogram((), 1))
    where = np.flatnonzero(codes == 2)
    assert found.select(2, np.arange(len(where)).reshape(1, -1)).tolist() == [where.tolist()]
    assert found.rank(2, where).tolist() == list(range(len(where)))


def test_an_assignment_is_kept_on_disk(pictures, tmp_path):
    _, source = pictures
    found = assign(source, BUCKETS, 10)
    found.save(tmp_path, "abc")
    again = Assignment.load(tmp_path, "abc")
    assert again.buckets == found.buckets
    assert again.histogram == found.histogram
    assert again.codes.tobytes() == found.codes.tobytes()
    assert isinstance(again.codes.base, np.memmap)  # ranks of a machine share its pages
    assert again.select(1, [3, 0]).tolist() == found.select(1, [3, 0]).tolist()
    with pytest.raises(DataError, match="of other data"):
        Assignment.load(tmp_path, "xyz")
    (tmp_path / "buckets.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match="cannot be read"):
        Assignment.load(tmp_path, "abc")
    with pytest.raises(DataError, match="cannot be read"):
        Assignment.load(tmp_path / "nowhere", "abc")


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_batches_are_of_one_bucket_and_every_sample_comes_once_per_epoch_of_its_own(pictures):
    _, source = pictures
    batch = 8
    found = assign(source, BUCKETS, batch)
    plan = plan_of(source, batch, 5, assignment=found)
    assert plan.n_samples == len(source)
    assert plan.buckets == found.buckets
    steps = 5 * len(source) // batch
    served: dict[int, list[tuple[int, int]]] = {code: [] for code in range(len(found.buckets))}
    for k in range(steps):
        epochs, samples = plan.batch_at(k)
        (code,) = set(found.codes[samples].tolist())
        assert plan.bucket_at(k) == found.buckets[code]
        served[code] += zip(epochs.tolist(), samples.tolist(), strict=True)
        for world, micro in ((2, 4), (2, 2), (4, 2)):  # a micro-step is of that bucket on all ranks
            slots = [plan.slots(k, rank, world, micro, batch // micro // world) for rank in range(world)]
            together = [slots[rank][j][1] for j in range(batch // micro // world) for rank in range(world)]
            assert np.concatenate(together).tolist() == samples.tolist()
    for code, rows in served.items():
        n = found.counts[code]
        where = np.flatnonzero(found.codes == code).tolist()
        assert [epoch for epoch, _ in rows] == [place // n for place in range(len(rows))]  # remainders are carried
        for epoch in range(len(rows) // n):
            assert sorted(sample for at, sample in rows if at == epoch) == where
        assert abs(len(rows) / batch - steps * n / len(source)) < 1.68
    assert plan.passes(steps)["data"] == steps * batch / len(source)


@settings(max_examples=20, deadline=None)
@given(counts=st.lists(st.integers(4, 40), min_size=2, max_size=5), left_out=st.integers(0, 9), seed=st.integers(0, 9))
def test_a_resume_at_any_batch_goes_on(counts, left_out, seed):
    codes = np.repeat(np.array([*range(len(counts)), LEFT_OUT]), [*counts, left_out]).astype(np.uint8)
    codes = np.random.default_rng(seed).permutation(codes)
    found = Assignment([(8, 8 * (b + 1)) for b in range(len(counts))], codes, Histogram((), 1))
    plan = plan_of(_Numbers(len(codes)), 4, seed, assignment=found)
    cursor = plan.cursor().skip((8, 20))
    whole = []
    for _ in range(60):
        whole.append((plan.bucket_at(cursor), *(part.tolist() for part in plan.batch_at(cursor))))
        cursor = cursor.advance(4)
    for stop in (0, 1, 2, 3, 17, 59):
        cursor = Cursor.from_json(json.loads(json.dumps(plan.cursor().skip((8, 20)).advance(4 * stop).to_json())))
        assert (plan.bucket_at(cursor), *(part.tolist() for part in plan.batch_at(cursor))) == whole[stop]
    seen = {sample for _, _, samples in whole for sample in samples}
    assert not seen & set(np.flatnonzero(codes == LEFT_OUT).tolist())


class _Numbers:
    """A source of so many samples, for plans alone."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def test_an_assignment_of_other_data_is_refused(pictures):
    _, source = pictures
    with pytest.raises(DataError, match="the buckets are of 150 samples, the source holds 7"):
        plan_of(_Numbers(7), 2, assignment=assign(source, BUCKETS))


def test_windows_of_shards_are_the_same_for_all_buckets(pictures):
    _, source = pictures
    found = assign(source, BUCKETS, 8)
    plan = plan_of(source, 8, 3, assignment=found, window_shards=2)
    shards = source.locate(np.arange(len(source)))[0]
    ends = np.cumsum([0, *(shard.count for shard in source.index.shards)])
    for lane in plan.lanes:
        order = lane.streams[0].order
        rows = [lane.streams[0].lookup(np.arange(len(order)))[1]]
        assert sorted(rows[0].tolist()) == np.flatnonzero(found.codes == found.buckets.index(lane.bucket)).tolist()
        for window in range(order.n_windows):
            inside = rows[0][order.window_of(0, np.arange(len(order))) == window]
            assert set(shards[inside].tolist()) <= set(order.shards_of(0, window).tolist())
            assert order.shards_of(0, window).tolist() == plan.lanes[0].streams[0].order.shards_of(0, window).tolist()
    assert len(ends) == 13


def figures_of(n: int, batch: int) -> None:
    """A plan of ``n`` samples in ten buckets: memory beyond the byte per sample, and the time of a batch."""
    shares = np.array([40, 20, 10, 8, 7, 6, 4, 3, 1.5, 0.5]) / 100
    codes = np.resize(np.random.default_rng(0).choice(10, 10_007, p=shares).astype(np.uint8), n)
    found = Assignment([(256, 256 + 16 * b) for b in range(10)], codes, Histogram((), 1))
    tracemalloc.start()
    plan = plan_of(_Numbers(n), batch, 3, assignment=found)
    begin = time.perf_counter()
    for k in range(20):
        _, samples = plan.batch_at(n // batch * 5 + k * 12345)
    milliseconds = (time.perf_counter() - begin) / 20 * 1e3
    memory, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(found.codes[samples].tolist())) == 1
    assert memory < n // 25 + (1 << 20)
    assert peak < n // 10 + (1 << 26)
    figure(
        f"buckets, {n:.0e} samples in 10 buckets: {milliseconds:.1f} ms per batch of {batch}, {memory / 2**20:.0f} MiB "
        f"beside the {n / 2**20:.0f} MiB of the assignment"
    )


def test_a_plan_of_many_samples_takes_little_more_than_a_byte_each():
    figures_of(20_000_000, 1024)


@pytest.mark.slow
def test_a_plan_of_a_thousand_million_samples():
    figures_of(1_000_000_000, 1024)


# --- the reader -------------------------------------------------------------------------------------------------------


def reader(source, plan, world=1, rank=0, micro=8, workers=0, **options) -> Reader:
    options = {"resolution": (16, 16), "n_txt": 4, "seed": 5, "start_method": "forkserver", **options}
    vocabulary = options.pop("vocabulary", VOCABULARY)
    return Reader(source, plan, vocabulary, micro=micro, rank=rank, world=world, workers=workers,
                  accumulation=plan.batch // (micro * world), **options)  # fmt: skip


def step_rows(read: Reader, count: int) -> list[list[list[tuple]]]:
    with read:
        return [
            [[(batch.samples[i].item(), batch.clean[i].shape, batch.clean[i].numpy().tobytes(), batch.noise[i].numpy().tobytes(),
               batch.weight[i].item()) for i in range(len(batch))] for batch in next(read)]
            for _ in range(count)
        ]  # fmt: skip


def test_pictures_come_in_their_buckets_shape_whatever_the_ranks_and_workers(pictures):
    sizes, source = pictures
    found = assign(source, BUCKETS, 8)
    plan = plan_of(source, 8, 3, assignment=found)
    straight = [step[0] for step in step_rows(reader(source, plan), 12)]
    shapes = set()
    for k, rows in enumerate(straight):
        bucket = plan.bucket_at(k)
        shapes.add(bucket)
        assert {row[1] for row in rows} == {(3, *bucket)}
        for sample, _, clean, noise, weight in rows:
            assert weight == 1
            expected = np.array([sizes[sample][0] % 256, sizes[sample][1] % 256, 7]) / 127.5 - 1
            pixels = np.frombuffer(clean, np.float32).reshape(3, -1)
            assert np.abs(pixels - expected[:, None]).max() < 1e-6
            assert len(noise) == len(clean)
    assert len(shapes) > 2
    for world, micro, workers in ((2, 4, 0), (2, 2, 2)):
        ranks = [step_rows(reader(source, plan, world, rank, micro, workers), 12) for rank in range(world)]
        for k in range(12):
            slots = [row for j in range(8 // micro // world) for rank in range(world) for row in ranks[rank][k][j]]
            assert slots == straight[k]
    resumed = reader(source, plan, cursor=plan.batch_cursor(5))
    assert [step[0] for step in step_rows(resumed, 7)] == straight[5:]


def latent_shards(folder, shapes, per_shard=10, kind="<f2") -> ShardSource:
    """Shards of latents of these shapes alone, each filled with its number."""
    folder.mkdir(parents=True)
    for number in range(0, len(shapes), per_shard):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as tar:
            for i, shape in enumerate(shapes[number : number + per_shard], number):
                buffer = io.BytesIO()
                np.save(buffer, np.full(shape, i, dtype=kind))
                members = {"latent.npy": buffer.getvalue(), "txt": b"a picture"}
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{i:09d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    encoders = {"vae": {"buckets": [[64, 64]], "factor": 8, "resolution": [64, 64]}}
    build_index(folder, encoders=encoders)
    return ShardSource(folder)


def test_stored_latents_come_in_their_own_shape(tmp_path):
    rng = np.random.default_rng(3)
    shapes = [[(4, 4, 4), (4, 2, 8), (4, 8, 2)][i] for i in rng.choice(3, 60, p=[0.2, 0.5, 0.3])]
    shapes[7] = shapes[31] = (4, 3, 3)
    source = latent_shards(tmp_path / "a", shapes)
    assert stored_sizes(source, 8) == ((16, 64), (24, 24), (32, 32), (64, 16))
    found = assign(source, stored_sizes(source, 8), 6, factor=8)
    assert found.buckets == ((16, 64), (32, 32), (64, 16))
    assert found.codes.tolist() == [
        LEFT_OUT if shape == (4, 3, 3) else found.buckets.index((8 * shape[1], 8 * shape[2])) for shape in shapes
    ]
    assert [(row.samples, row.fate) for row in found.histogram.rows if row.height == 24] == [(2, "left out")]
    assert found.histogram.left_out == 2
    assert "left out, as stored latents cannot be cut again" in found.histogram.warnings()[0]
    plan = plan_of(source, 6, 1, assignment=found)
    assert plan.passes(20)["data"] == pytest.approx(20 * 6 / 58)
    for workers in (0, 1):
        with reader(source, plan, micro=6, workers=workers, resolution=(32, 32), latent_shape=(4, 4, 4)) as read:
            for k in range(12):
                (batch,) = next(read)
                height, width = plan.bucket_at(k)
                assert batch.clean.shape == batch.noise.shape == (6, 4, height // 8, width // 8)
                assert batch.clean.dtype == torch.float16
                assert batch.clean[:, 0, 0, 0].tolist() == batch.samples.tolist()
                assert not batch.bad


def test_stored_latents_of_no_bucket_are_left_out_and_said(tmp_path):
    source = latent_shards(tmp_path / "a", [(4, 4, 4)] * 6 + [(4, 2, 8)] * 3)
    found = assign(source, [(32, 32), (64, 16)], 4, factor=8)
    assert found.codes.tolist() == [0] * 6 + [LEFT_OUT] * 3
    assert (found.histogram.strange, found.histogram.left_out, found.histogram.served) == (3, 3, 6)
    assert found.histogram.warnings() == ["3 stored latents have the size of no bucket and are left out"]
    with pytest.raises(DataError, match="no aspect bucket holds a batch of 7"):
        assign(source, [(32, 32), (64, 16)], 7, factor=8)
    with pytest.raises(DataError, match="no latents"):
        write_shards([{"png": png(8, 8), "txt": "x"}], tmp_path / "b")
        stored_sizes(open_source(tmp_path / "b"), 8)


def test_without_buckets_nothing_changes(pictures):
    _, source = pictures
    for k in (0, 7, 100):
        ours, plain = plan_of(source, 8, 3).batch_at(k), Plan(len(source), 8, 3).batch_at(k)
        assert [part.tolist() for part in ours] == [part.tolist() for part in plain]
    one = plan_of(source, 8, 3, assignment=assign(source, [(16, 16)]))
    assert [part.tolist() for part in one.batch_at(20)] == [
        part.tolist() for part in Plan(len(source), 8, 3).batch_at(20)
    ]
    assert one.bucket_at(20) == (16, 16)
