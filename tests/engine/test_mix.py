from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from longskip.engine.config import DataGroup
from longskip.engine.data.assembler import Assembler
from longskip.engine.data.buckets import LEFT_OUT, Assignment, Histogram, assign
from longskip.engine.data.captions import captions_of, check_fields
from longskip.engine.data.draws import generator
from longskip.engine.data.features import FeatureBatch
from longskip.engine.data.index import build_index
from longskip.engine.data.mix import MixedSource
from longskip.engine.data.pack import write_shards
from longskip.engine.data.plan import Plan
from longskip.engine.data.reader import Reader
from longskip.engine.data.sources import FolderSource, ShardSource, open_source
from longskip.engine.data.streams import plan_of
from longskip.engine.data.tokens import Vocabulary
from longskip.errors import BadSampleError, ConfigError, DataError

WORST = 3.359885666243178 / 2  # how far an Interleave's count may stray
VOCABULARY = Vocabulary.build(["number long short"], 300)


def png(height: int, width: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (9, 8, 7)).save(buffer, "PNG")
    return buffer.getvalue()


def packed(out, count: int, name: str, per_shard: int = 7, sizes=((16, 16),)) -> ShardSource:
    write_shards(
        ({"png": png(*sizes[i % len(sizes)]), "txt": f"{name} number {i}"} for i in range(count)),
        out,
        per_shard=per_shard,
    )
    return ShardSource(out)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mix")
    return [
        packed(folder / "a", 20, "long"),
        packed(folder / "b", 50, "short", sizes=((16, 16), (8, 24), (8, 25), (9, 26))),
    ]


def mixed(sets, weights=(3, 1)) -> MixedSource:
    return MixedSource(sets, weights, [f"set {i}" for i in range(len(sets))])


# --- the source -------------------------------------------------------------------------------------------------------


def test_samples_are_numbered_through(sets):
    source = mixed(sets)
    assert len(source) == 70
    for i in range(70):
        member, at = (sets[0], i) if i < 20 else (sets[1], i - 20)
        assert source.read(i) == member.read(at)
        assert (source.key(i), source.captions(i), source.size(i)) == (
            member.key(at),
            member.captions(at),
            member.size(at),
        )
    assert np.concatenate(list(source.sizes())).tolist() == [list(source.size(i)) for i in range(70)]
    for bad in (-1, 70):
        with pytest.raises(DataError, match="the mix holds 70"):
            source.read(bad)
    assert source.features is None
    assert source.caption_fields() == {"txt"}
    source.close()


def test_the_fingerprint_covers_the_data_sets_their_order_and_weights(sets, tmp_path):
    prints = {
        mixed(sets).fingerprint(), mixed(sets[::-1]).fingerprint(), mixed(sets, (3, 2)).fingerprint(),
        mixed(sets[:1], (3,)).fingerprint(), mixed([sets[0], packed(tmp_path / "c", 50, "other")]).fingerprint(),
    }  # fmt: skip
    assert len(prints) == 5
    assert mixed(sets, (0.75, 0.25)).fingerprint() == mixed(sets).fingerprint()


@pytest.mark.parametrize(
    ("weights", "names", "message"),
    [((1,), ("a", "b"), "1 weights"), ((1, 0), ("a", "b"), "above 0"), ((1, 1), ("a", "a"), "names a twice")],
)
def test_mixes_that_cannot_be_are_refused(sets, weights, names, message):
    with pytest.raises(DataError, match=message):
        MixedSource(sets, weights, names)
    with pytest.raises(DataError, match="no weights"):
        MixedSource([], [], [])


class Follower:
    """Remembers what it was told to fetch."""

    def __init__(self, inner) -> None:
        self.inner, self.told, self.closed = inner, [], 0

    def __len__(self) -> int:
        return len(self.inner)

    def follow(self, epochs, samples) -> None:
        self.told.append((epochs.tolist(), samples.tolist()))

    def close(self) -> None:
        self.closed += 1


def test_what_is_read_next_is_told_to_its_own_data_set(sets):
    member = Follower(sets[1])
    source = mixed([sets[0], member])
    source.follow([4, 5, 6, 7], [3, 20, 69, 19])
    source.close()
    assert member.told == [([5, 6], [0, 49])]
    assert member.closed == 1
    with pytest.raises(DataError, match="the mix holds 70"):
        source.follow([0], [70])


# --- its plan ---------------------------------------------------------------------------------------------------------


class Numbers:
    """A source of so many samples, for plans alone."""

    features = None

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


@settings(max_examples=30, deadline=None)
@given(
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    weights=st.lists(st.one_of(st.integers(1, 9), st.floats(0.01, 5)), min_size=5, max_size=5),
    batch=st.integers(1, 12), seed=st.integers(0, 99),
)  # fmt: skip
def test_shares_are_the_weights_and_every_data_set_has_epochs_of_its_own(counts, weights, batch, seed):
    batch = min(batch, sum(counts))
    weights = weights[: len(counts)]
    source = mixed([Numbers(count) for count in counts], weights)
    plan = plan_of(source, batch, seed)
    steps = 200 // batch
    epochs, samples = plan.lookup(np.arange(steps * batch).reshape(steps, batch))
    assert [part.tolist() for part in plan.batch_at(3)] == [epochs[3].tolist(), samples[3].tolist()]
    epochs, samples = epochs.ravel(), samples.ravel()
    ends = np.cumsum([0, *counts])
    exact = [Fraction(str(weight)) for weight in weights]
    passes = plan.passes(steps)
    for number, (first, stop) in enumerate(pairwise(ends)):
        mine = (samples >= first) & (samples < stop)
        n, taken = int(stop - first), int(mine.sum())
        share = exact[number] / sum(exact)
        assert abs(taken - len(samples) * share) <= WORST
        assert epochs[mine].tolist() == [place // n for place in range(taken)]
        for epoch in range(taken // n):
            assert sorted(samples[mine & (epochs == epoch)].tolist()) == list(range(first, stop))
        assert passes[f"set {number}"] == taken / n
    if len(counts) == 1:
        plain = Plan(len(source), batch, seed)
        assert plan.batch_at(5)[1].tolist() == plain.batch_at(5)[1].tolist()


def test_data_sets_of_one_size_come_in_orders_of_their_own():
    plan = plan_of(mixed([Numbers(50), Numbers(50)], (1, 1)), 100, 7)
    samples = plan.batch_at(0)[1]
    assert sorted(samples.tolist()) == list(range(100))
    assert samples[samples < 50].tolist() != (samples[samples >= 50] - 50).tolist()


@settings(max_examples=20, deadline=None)
@given(
    table=st.lists(st.lists(st.integers(0, 30), min_size=3, max_size=3), min_size=2, max_size=3),
    weights=st.lists(st.integers(1, 5), min_size=3, max_size=3), seed=st.integers(0, 9),
)  # fmt: skip
def test_in_buckets_the_shares_are_kept_over_all_and_no_sample_is_favoured(table, weights, seed):
    """``table``: samples of each data set in each bucket."""
    table = [[max(count, 4 * (at == 0)) for at, count in enumerate(counts)] for counts in table]
    weights = weights[: len(table)]
    rng = np.random.default_rng(seed)
    codes = np.concatenate([rng.permutation(np.repeat([0, 1, 2, LEFT_OUT], [*counts, 2])) for counts in table]).astype(
        np.uint8
    )
    of = np.repeat(np.arange(len(table)), [sum(counts) + 2 for counts in table])
    kept = [bucket for bucket in range(3) if sum(counts[bucket] for counts in table) >= 4]
    renumbered = np.full(256, LEFT_OUT, dtype=np.uint8)
    renumbered[kept] = range(len(kept))
    codes = renumbered[codes]
    buckets = [(8, 8 * (1 + bucket)) for bucket in kept]
    source = mixed([Numbers(int((of == number).sum())) for number in range(len(table))], weights)
    plan = plan_of(source, 4, seed, assignment=Assignment(buckets, codes, Histogram((), 4)))
    shares = np.array([[w * sum((of == m) & (codes == b)) / sum((of == m) & (codes != LEFT_OUT)) for b in range(len(kept))]
                       for m, w in enumerate(weights)])  # fmt: skip
    steps = 400
    epochs, samples = (part.reshape(steps, 4) for part in plan.lookup(np.arange(steps * 4)))
    lanes = codes[samples]
    assert (lanes == lanes[:, :1]).all()  # every batch of one bucket
    counts = np.zeros_like(shares)
    np.add.at(counts, (of[samples].ravel(), lanes.ravel()), 1)
    expected = shares / shares.sum() * steps * 4
    # A bucket's batches stray by less than 1.68, its samples by four times that, and a stream of it by 1.68 more.
    assert np.abs(counts - expected).max() <= 4 * WORST + WORST
    assert np.abs(counts.sum(axis=1) / counts.sum() - np.array(weights) / sum(weights)).max() < 0.02
    for number in range(len(table)):
        for bucket in range(len(kept)):
            mine = (of[samples] == number) & (lanes == bucket)
            n = int(((of == number) & (codes == bucket)).sum())
            if n:
                assert epochs[mine].tolist() == [place // n for place in range(int(mine.sum()))]
    served = Counter(zip(epochs.ravel().tolist(), samples.ravel().tolist(), strict=True))
    assert set(served.values()) == {1}


def test_the_order_of_mixes_and_buckets_is_frozen():
    # A run is resumed by its position alone, so these may never change.
    source, codes = mixed([Numbers(80), Numbers(40)]), np.resize(np.array([0, 1, 0, 0, 1, 2], dtype=np.uint8), 120)
    plan = plan_of(source, 6, 42)
    assert [part.tolist() for part in plan.batch_at(77)] == [[2, 4, 4, 4, 2, 4], [118, 65, 8, 7, 111, 18]]
    found = Assignment([(16, 16), (8, 24), (24, 8)], codes, Histogram((), 6))
    plan = plan_of(source, 6, 42, assignment=found)
    assert [part.tolist() for part in plan.batch_at(0)] == [[0] * 6, [37, 25, 100, 10, 7, 49]]
    assert [part.tolist() for part in plan.batch_at(77)] == [[4, 4, 2, 4, 4, 4], [9, 24, 104, 18, 32, 54]]
    assert [plan.bucket_at(k) for k in (0, 1, 2, 77)] == [(8, 24), (16, 16), (24, 8), (16, 16)]


def test_a_data_set_without_a_sample_in_any_bucket_is_refused():
    codes = np.array([0] * 6 + [LEFT_OUT] * 3, dtype=np.uint8)
    with pytest.raises(DataError, match="set 1 has no sample in any bucket"):
        plan_of(mixed([Numbers(6), Numbers(3)]), 2, assignment=Assignment([(8, 8)], codes, Histogram((), 2)))


def test_in_windows_every_data_set_keeps_to_its_own(sets, tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(16, 16))
        (tmp_path / f"{number}.txt").write_text("x")
    source = MixedSource([*sets, FolderSource(tmp_path)], [2, 2, 1], ["a", "b", "c"])
    plan = plan_of(source, 5, 4, window_shards=2)
    shards = [sets[0].locate(np.arange(20))[0], sets[1].locate(np.arange(50))[0]]
    epochs, samples = plan.lookup(np.arange(200))
    for number, (first, stop) in enumerate(((0, 20), (20, 70))):
        order = plan.lanes[0].streams[number].order
        mine = (samples >= first) & (samples < stop)
        windows = [
            order.windows_with(int(e), shards[number][s - first])
            for e, s in zip(epochs[mine], samples[mine], strict=True)
        ]
        turns = [(int(epoch), int(window)) for epoch, window in zip(epochs[mine], windows, strict=True)]
        assert turns == sorted(turns)
        assert order.n_windows > 1
    last = samples[samples >= 70]
    assert sorted(last[:3].tolist()) == [70, 71, 72]


def reader(source, plan, world=1, rank=0, micro=6, workers=0, **options) -> Reader:
    return Reader(source, plan, VOCABULARY, resolution=(16, 16), n_txt=6, micro=micro, rank=rank, world=world, workers=workers,
                  accumulation=plan.batch // (micro * world), start_method="forkserver", **options)  # fmt: skip


def test_ranks_and_workers_read_the_same_mixed_batches_in_buckets(sets):
    source = mixed(sets)
    plan = plan_of(source, 6, 1, assignment=assign(source, [(16, 16), (8, 24)], 6))

    def rows(read: Reader) -> list[list[list[tuple]]]:
        with read:
            return [
                [[(int(b.epochs[i]), int(b.samples[i]), b.captions[i], b.clean[i].numpy().tobytes(), b.noise[i].numpy().tobytes())
                  for i in range(len(b))] for b in next(read)]
                for _ in range(10)
            ]  # fmt: skip

    straight = [step[0] for step in rows(reader(source, plan))]
    for k, step in enumerate(straight):
        for at, (epoch, sample, caption, clean, _) in enumerate(step):
            assert (epoch, sample) == tuple(int(part[at]) for part in plan.batch_at(k))
            assert caption == source.captions(sample)[0][0]
            assert len(clean) == 4 * 3 * np.prod(plan.bucket_at(k))
    assert {plan.bucket_at(k) for k in range(10)} == {(16, 16), (8, 24)}
    for workers in (0, 1):
        ranks = [rows(reader(source, plan, 2, rank, 3, workers)) for rank in range(2)]
        assert [ranks[0][k][0] + ranks[1][k][0] for k in range(10)] == straight


# --- stored features --------------------------------------------------------------------------------------------------


def feature_shards(folder, first: int, count: int, *, kind="<f2", channels=4, empty=0.0, text=True) -> ShardSource:
    """Latents and text features filled with their numbers from ``first`` on."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(count):
            arrays = {"latent": np.full((channels, 2, 2), first + i, kind)}
            if text:
                arrays |= {"text": np.full((1, 3, 5), first + i, kind), "mask": np.ones((1, 3), np.uint8)}
            members = {"txt": b"a caption"}
            for name, array in arrays.items():
                buffer = io.BytesIO()
                np.save(buffer, array)
                members[f"{name}.npy"] = buffer.getvalue()
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{i:09d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    build_index(folder)
    arrays = {"text": np.full((3, 5), empty, kind), "mask": np.ones(3, np.uint8)}
    (folder / "empty.safetensors").write_bytes(safetensors.numpy.save(arrays))
    return ShardSource(folder)


def test_features_of_several_data_sets_come_to_their_slots(tmp_path):
    source = mixed([feature_shards(tmp_path / "a", 0, 8), feature_shards(tmp_path / "b", 8, 8)], (1, 1))
    assert source.features is not None
    assembler = Assembler(source, None, (16, 16), 3, latent_shape=(4, 2, 2), caption_dropout=0.5, seed=1)
    samples = np.random.default_rng(0).permutation(16)
    batch = assembler.assemble(np.zeros(16, dtype=int), samples)
    assert not batch.bad
    assert batch.clean[:, 0, 0, 0].tolist() == batch.samples.tolist() == samples.tolist()
    expected = [
        0 if dropped else sample for sample, dropped in zip(samples.tolist(), batch.dropped.tolist(), strict=True)
    ]
    assert batch.conditions["text"][:, 0, 0].tolist() == expected
    with pytest.raises(DataError, match="the mix holds 16"):
        source.read_features([0], np.array([16]), FeatureBatch(None, None, None, [""], [""]), lambda slot, captions: 0)


@pytest.mark.parametrize(
    ("other", "message"),
    [({"kind": "<f4"}, "float32 latents"), ({"channels": 3}, "3 channels"), ({"text": False}, "text features")],
)  # fmt: skip
def test_features_that_do_not_go_together_are_refused(tmp_path, other, message):
    source = mixed([feature_shards(tmp_path / "a", 0, 2), feature_shards(tmp_path / "b", 2, 2, **other)], (1, 1))
    with pytest.raises(DataError, match=message) as caught:
        _ = source.features
    assert "set 0" in str(caught.value) and "set 1" in str(caught.value)


def test_pictures_and_features_in_one_mix_are_refused(sets, tmp_path):
    with pytest.raises(DataError, match="set 1 pictures alone; they cannot be in one batch"):
        _ = mixed([feature_shards(tmp_path / "a", 0, 2), sets[0]]).features


def test_other_features_of_the_empty_caption_are_refused(tmp_path):
    same = mixed([feature_shards(tmp_path / "a", 0, 2), feature_shards(tmp_path / "b", 2, 2)], (1, 1))
    assert same.empty_text[0].tolist() == np.zeros((3, 5)).tolist()
    other = mixed([same.members[0], feature_shards(tmp_path / "c", 2, 2, empty=1.0)], (1, 1))
    with pytest.raises(DataError, match="other features for the empty caption"):
        _ = other.empty_text


# --- captions by shares of fields -------------------------------------------------------------------------------------


def records():
    for i in range(40):
        record = {"caption": f"short {i}", "long_caption": f"long {i} of many words", "width": 7}
        if i == 3:
            record.pop("long_caption")
        yield {"png": png(4, 4), "txt": f"txt {i}", "json": record}


SHARES = {"long_caption": 0.5, "caption": 0.2, "txt": 0.3}


@pytest.fixture(scope="module")
def fielded(tmp_path_factory):
    out = tmp_path_factory.mktemp("fields") / "shards"
    write_shards(records(), out)
    return out


def test_fields_and_their_shares_are_the_captions(fielded):
    source = open_source(fielded, fields=SHARES)
    assert source.captions(5) == (("short 5", 0.2), ("long 5 of many words", 0.5), ("txt 5", 0.3))
    assert source.read(5).captions == source.captions(5)
    assert source.captions(3) == (("short 3", 0.2), ("txt 3", 0.3))  # in proportion, where one is missing
    assert open_source(fielded, fields={"txt": 1.0}).captions(5) == (("txt 5", 1.0),)
    assert open_source(fielded).captions(5) == (("txt 5", 1.0),)
    with pytest.raises(BadSampleError, match="none of the captions long_caption") as caught:
        open_source(fielded, fields={"long_caption": 1.0}).captions(3)
    assert caught.value.reason == "caption_missing"
    with pytest.raises(BadSampleError, match="the field 'width' is a int"):
        open_source(fielded, fields={"width": 1.0}).captions(3)


def test_long_and_short_captions_are_drawn_by_their_shares_and_always_alike(fielded):
    source, epochs = open_source(fielded, fields=SHARES), 60
    assembler = Assembler(source, None, (4, 4), 0, seed=9)
    drawn: Counter[str] = Counter()
    for epoch in range(epochs):
        numbers = np.array([i for i in range(40) if i != 3])
        batch = assembler.assemble(np.full(39, epoch), numbers)
        again = Assembler(open_source(fielded, fields=dict(reversed(SHARES.items()))), None, (4, 4), 0, seed=9)
        assert again.assemble(np.full(5, epoch), numbers[:5]).captions == batch.captions[:5]
        for i, caption in zip(numbers.tolist(), batch.captions, strict=True):
            at = generator(9, epoch, i, "caption").random()
            expected = f"short {i}" if at < 0.2 else f"long {i} of many words" if at < 0.7 else f"txt {i}"
            assert caption == expected
            drawn[caption.split()[0]] += 1
    total = 39 * epochs
    for name, share in (("short", 0.2), ("long", 0.5), ("txt", 0.3)):
        assert abs(drawn[name] - share * total) < 4.5 * (total * share * (1 - share)) ** 0.5


def test_a_folder_has_fields_too(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(4, 4))
        (tmp_path / f"{i}.txt").write_text(f"txt {i}")
        (tmp_path / f"{i}.json").write_text(json.dumps({"long": f"long {i}"}))
    source = open_source(tmp_path, fields={"txt": 1, "long": 3})
    assert source.read(2).captions == source.captions(2) == (("long 2", 3.0), ("txt 2", 1.0))
    assert source.caption_fields() == {"txt", "long"}
    lines = [{"file_name": f"{i}.png", "text": f"text {i}", "long": f"long {i}"} for i in range(3)]
    (tmp_path / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    source = open_source(tmp_path, fields={"txt": 1, "long": 3})
    assert source.captions(2) == (("long 2", 3.0), ("text 2", 1.0))
    assert source.caption_fields() == {"txt", "long"}
    with pytest.raises(DataError, match="none of the captions wide"):
        open_source(tmp_path, fields={"wide": 1})


def test_a_field_that_no_sample_has_is_refused(fielded, sets):
    found = open_source(fielded).caption_fields()
    assert found == {"txt", "caption", "long_caption"}
    check_fields(SHARES, found)
    with pytest.raises(ConfigError, match="names 'long_captoin', which no sample has among the first") as caught:
        check_fields({"caption": 1, "long_captoin": 1}, found)
    assert "caption, long_caption, txt" in (caught.value.cure or "")
    check_fields(SHARES, mixed([open_source(fielded), sets[0]]).caption_fields())


def test_the_configuration_has_shares_above_zero():
    assert DataGroup(captions={"caption": "1e-1", "long": 2}).captions == {"caption": 0.1, "long": 2.0}
    for bad in ({"caption": 0}, {"caption": -1}, ["caption"]):
        with pytest.raises(ValueError, match="captions"):
            DataGroup(captions=bad)


def test_captions_in_odd_records_are_bad_samples():
    assert captions_of(b"x", None, {"txt": 2.0}) == (("x", 2.0),)
    assert captions_of(b" ", b'{"long": " y "}', {"txt": 2.0, "long": 1.0}) == (("y", 1.0),)
    for text, extra, reason in (
        (b"\xff", None, "caption_encoding"), (b" ", b'{"long": null}', "caption_missing"), (None, b"[]", "caption_json"),
        (None, b'{"long": ["a"]}', "caption_json"), (None, b'{"long": "\\ud800"}', "caption_encoding"),
        (None, None, "caption_missing"),
    ):  # fmt: skip
        with pytest.raises(BadSampleError) as caught:
            captions_of(text, extra, {"txt": 1.0, "long": 1.0})
        assert caught.value.reason == reason
