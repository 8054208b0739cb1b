"""Stored features as batches have them, against tarfile and numpy's own reader; and what is refused."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import threading
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from longskip.engine.data import features, sources, spans
from longskip.engine.data import reader as reader_module
from longskip.engine.data.assembler import Assembler, MicroBatch
from longskip.engine.data.draws import generator
from longskip.engine.data.index import build_index, load_index, load_table
from longskip.engine.data.pack import write_shards
from longskip.engine.data.plan import Plan
from longskip.engine.data.reader import Reader
from longskip.engine.data.sources import ShardSource, open_source
from longskip.engine.data.tokens import Vocabulary
from longskip.errors import BadSampleError, ConfigError, EncoderError, ShardError
from tests.figures import figure

LATENT, N_TXT, WIDTH = (4, 4, 6), 5, 8
SAMPLES = 24
WEIGHTS = (1.0, 0.5, 2.5)
EMPTY = {"text": np.full((N_TXT, WIDTH), 0.25, np.float16), "mask": np.array([1, 0, 0, 0, 0], np.uint8)}


def npy(array: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


def arrays(i: int, dtype: type = np.float16) -> dict[str, np.ndarray]:
    """Every third sample has three captions; the others one, with or without an axis for it."""
    rng = np.random.default_rng(i)
    rows = (3,) if i % 3 == 0 else (1,) if i % 3 == 1 else ()
    return {
        "latent.npy": rng.standard_normal(LATENT).astype(dtype),
        "text.npy": rng.standard_normal((*rows, N_TXT, WIDTH)).astype(dtype),
        "mask.npy": rng.integers(0, 2, (*rows, N_TXT)).astype(np.uint8),
    }


def sample(i: int, dtype: type = np.float16) -> dict[str, Any]:
    members: dict[str, Any] = {name: npy(array) for name, array in arrays(i, dtype).items()}
    members["txt"] = f"caption 0 of {i}"
    if i % 3 == 0:
        items = [{"text": f"caption {k} of {i}", "weight": weight} for k, weight in enumerate(WEIGHTS)]
        members["json"] = {"captions": items}
    return members


def write(folder: Path, samples: Any, encoders: Any = None) -> Path:
    write_shards(samples, folder, per_shard=7, encoders=encoders)
    save_file(EMPTY, folder / "empty.safetensors")
    return folder


@pytest.fixture(params=[1, 1 << 12], ids=["straight", "aside"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """These rows are small; they are also read as large ones are."""
    monkeypatch.setattr(spans, "STRAIGHT", request.param)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("features") / "shards", (sample(i) for i in range(SAMPLES)))


def assembler(folder: Path, **options: Any) -> Assembler:
    source = options.pop("source", None) or open_source(folder)
    settings: dict[str, Any] = {"vocabulary": None, "resolution": (32, 48), "n_txt": N_TXT, "seed": 3}
    return Assembler(source, **settings | options)


def stored(folder: Path) -> dict[str, dict[str, bytes]]:
    """All members by key and extension, by tarfile alone."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                data = tar.extractfile(member)
                assert data is not None
                found.setdefault(key, {})[extension] = data.read()
    return found


def expected(members: dict[str, bytes], epoch: int, number: int) -> tuple[bytes, bytes, list[bool], str]:
    """Latent, text, mask and caption of one sample, with numpy's reader and the caption drawn as its counter says."""
    latent, text, mask = (np.load(io.BytesIO(members[f"{name}.npy"])) for name in ("latent", "text", "mask"))
    captions, pick = [members["txt"].decode()], 0
    if "json" in members:
        items = json.loads(members["json"])["captions"]
        captions, shares = [item["text"] for item in items], np.cumsum([item["weight"] for item in items])
        pick = int(np.searchsorted(shares, generator(3, epoch, number, "caption").random() * shares[-1], side="right"))
    text, mask = text.reshape(-1, N_TXT, WIDTH)[pick], mask.reshape(-1, N_TXT)[pick]
    return latent.tobytes(), text.tobytes(), mask.astype(bool).tolist(), captions[pick]


def rows(batch: MicroBatch) -> list[tuple[bytes, bytes, list[bool], str]]:
    texts, masks = batch.conditions["text"], batch.conditions["text_mask"]
    return [
        (batch.clean[i].numpy().tobytes(), texts[i].numpy().tobytes(), masks[i].tolist(), batch.captions[i])
        for i in range(len(batch))
    ]


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_batches_hold_the_stored_bytes(tmp_path: Path, dtype: type) -> None:
    place = write(tmp_path / "shards", (sample(i, dtype) for i in range(SAMPLES)))
    members, read = stored(place), assembler(place)
    numbers = np.random.default_rng(0).permutation(SAMPLES)[:17]
    for epoch in (0, 5):
        batch = read.assemble(np.full(17, epoch), numbers)
        assert batch.keys == tuple(f"{i:09d}" for i in numbers)
        assert not batch.bad and batch.weight.tolist() == [1.0] * 17
        assert batch.clean.dtype == batch.conditions["text"].dtype == torch.from_numpy(np.empty(0, dtype)).dtype
        assert batch.conditions["text_mask"].dtype == torch.bool
        assert rows(batch) == [
            expected(members[key], epoch, int(i)) for key, i in zip(batch.keys, numbers, strict=True)
        ]
        for i, number in enumerate(numbers.tolist()):
            drawn = generator(3, epoch, number, "noise").standard_normal(LATENT, dtype=np.float32)
            assert batch.noise[i].numpy().tobytes() == drawn.tobytes()
            assert batch.time_normal[i] == np.float32(generator(3, epoch, number, "time").standard_normal())
    assert len(read.assemble([], [])) == 0


@pytest.mark.usefixtures("ways")
def test_samples_with_one_caption_are_read_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast way is really taken, or else its speed would be gone without a test that fails."""
    read = assembler(folder)
    careful = Counter[int]()
    with_care = features._Batch._with_care

    def counting(self: Any, shard: int, descriptor: int, row: Any, slot: int) -> None:
        careful[int(row["key"])] += 1
        with_care(self, shard, descriptor, row, slot)

    monkeypatch.setattr(features._Batch, "_with_care", counting)
    read.assemble(np.zeros(SAMPLES, int), np.arange(SAMPLES))
    assert sorted(careful) == [i for i in range(SAMPLES) if i % 3 == 0]


def test_a_long_text_is_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = {2: 20_000, 5: 70_000, 8: spans.LONG - 1}
    place = write(tmp_path / "shards", (sample(i) | {"txt": "x" * long.get(i, 9)} for i in range(1, 12) if i % 3))
    alone: list[int] = []
    with_care = features._Batch._with_care

    def noting(self: Any, shard: int, descriptor: int, row: Any, slot: int) -> None:
        alone.append(slot)
        with_care(self, shard, descriptor, row, slot)

    monkeypatch.setattr(features._Batch, "_with_care", noting)
    batch = assembler(place).assemble(np.zeros(8, int), np.arange(8))
    assert sorted(alone) == [1, 3] and not batch.bad
    assert [len(caption) for caption in batch.captions] == [9, 20_000, 9, 70_000, 9, spans.LONG - 1, 9, 9]


def test_captions_are_chosen_by_their_weights(folder: Path) -> None:
    read, epochs = assembler(folder), 2000
    batch = read.assemble(np.arange(epochs), np.full(epochs, 3))
    chosen = Counter(batch.captions)
    for k, weight in enumerate(WEIGHTS):
        share = weight / sum(WEIGHTS)
        assert abs(chosen[f"caption {k} of 3"] / epochs - share) < 4 * np.sqrt(share * (1 - share) / epochs)
    texts = arrays(3)["text.npy"]
    for i, caption in enumerate(batch.captions):
        assert batch.conditions["text"][i].numpy().tobytes() == texts[int(caption.split()[1])].tobytes()


def test_dropout_puts_the_empty_captions_feature(folder: Path) -> None:
    epochs = np.repeat(np.arange(20), SAMPLES)
    numbers = np.tile(np.arange(SAMPLES), 20)
    kept, dropped = (assembler(folder, caption_dropout=share).assemble(epochs, numbers) for share in (0.0, 0.3))
    wanted = [generator(3, int(e), int(i), "dropout").random() < 0.3 for e, i in zip(epochs, numbers, strict=True)]
    assert dropped.dropped.tolist() == wanted and not any(kept.dropped.tolist())
    assert 0.2 < np.mean(wanted) < 0.4
    empty = (EMPTY["text"].tobytes(), EMPTY["mask"].astype(bool).tolist(), "")
    for i, (with_text, found) in enumerate(zip(rows(kept), rows(dropped), strict=True)):
        assert found == ((with_text[0], *empty) if wanted[i] else with_text)


def test_the_empty_captions_feature_must_be_there_and_fit(tmp_path: Path) -> None:
    place = write(tmp_path / "a", (sample(i) for i in range(SAMPLES)), {"text": {"empty_sha256": "0" * 64}})
    assert assembler(place).features is not None
    with pytest.raises(ShardError, match=r"index\.json says 0000"):
        assembler(place, caption_dropout=0.1)
    place = write(tmp_path / "b", (sample(i) for i in range(SAMPLES)))
    for arrays_, error, words in (
        ({"text": EMPTY["text"]}, ShardError, "does not hold"),
        ({"text": EMPTY["text"], "mask": EMPTY["mask"] + 1}, ShardError, "0 or 1"),
        ({"text": EMPTY["text"][:, :4].copy(), "mask": EMPTY["mask"]}, EncoderError, r"\(5, 4\)"),
        ({"text": EMPTY["text"].astype(np.float32), "mask": EMPTY["mask"]}, EncoderError, "float32"),
    ):
        save_file(arrays_, place / "empty.safetensors")
        with pytest.raises(error, match=words):
            assembler(place, caption_dropout=0.1)
    (place / "empty.safetensors").unlink()
    with pytest.raises(ShardError, match=r"empty\.safetensors cannot be read"):
        assembler(place, caption_dropout=0.1)


class Executed:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (str(self.path), "w")


@pytest.mark.usefixtures("ways")
def test_bad_features_are_bad_samples(tmp_path: Path) -> None:
    good = {name: npy(array) for name, array in arrays(2).items()}
    objects = np.array([Executed(tmp_path / "executed")], dtype=object)
    pickled = npy(objects, allow_pickle=True)
    (tmp_path / "executed").unlink(missing_ok=True)  # numpy opened it when it looked at the array's size
    text = arrays(2)["text.npy"]
    changes: dict[str, dict[str, bytes | None]] = {
        "latent_shape": {"latent.npy": npy(np.zeros((4, 6, 4), np.float16))},
        "latent_missing": {"latent.npy": None},
        "feature_dtype": {"latent.npy": npy(np.zeros(LATENT, np.float32))},
        "feature_dtype 64 bits": {"latent.npy": npy(np.zeros(LATENT))},
        "feature_dtype other end first": {"latent.npy": npy(np.zeros(LATENT, ">f2"))},
        "feature_dtype objects": {"latent.npy": pickled},
        "feature_format": {"latent.npy": b"not numpy's"},
        "feature_format cut": {"latent.npy": good["latent.npy"][:-2]},
        "feature_format more": {"latent.npy": good["latent.npy"] + b"\0\0"},
        "feature_format header cut": {"latent.npy": good["latent.npy"][:50]},
        "feature_format Fortran": {"text.npy": npy(np.asfortranarray(text))},
        "feature_format version": {"latent.npy": good["latent.npy"].replace(b"NUMPY\1", b"NUMPY\3")},
        "feature_format nothing": {"mask.npy": b""},
        "text_shape": {"text.npy": npy(np.zeros((N_TXT + 1, WIDTH), np.float16))},
        "text_shape wide": {"text.npy": npy(np.zeros((N_TXT, WIDTH + 1), np.float16))},
        "text_shape two rows, one caption": {"text.npy": npy(np.zeros((2, N_TXT, WIDTH), np.float16))},
        "text_shape one row, two captions": {"json": b'{"captions": [{"text": "a"}, {"text": "b"}]}'},
        "text_missing": {"text.npy": None},
        "mask_missing": {"mask.npy": None},
        "mask_shape": {"mask.npy": npy(np.ones(N_TXT + 1, np.uint8))},
        "mask_values": {"mask.npy": npy(np.full(N_TXT, 2, np.uint8))},
        "feature_dtype mask": {"mask.npy": npy(np.ones(N_TXT, bool))},
        "caption_encoding": {"txt": b"\xff"},
        "caption_missing": {"txt": b"  "},
    }
    members = [good | {"txt": b"a caption", "json": None}]
    members += [members[0] | change for change in changes.values()] + [members[0]]
    place = tmp_path / "shards"
    place.mkdir()
    write_tar(place / "0.tar", members)
    build_index(place)
    batch = assembler(place).assemble(np.zeros(len(members), int), np.arange(len(members))[::-1])
    assert not (tmp_path / "executed").exists()
    assert {bad["sample"]: bad["reason"] for bad in batch.bad} == {
        i: name.split()[0] for i, name in enumerate(changes, 1)
    }
    for bad in batch.bad:
        slot = len(members) - 1 - bad["sample"]
        assert batch.weight[slot] == 0 and bad["key"] == batch.keys[slot] == f"{bad['sample']:05d}"
        assert batch.captions[slot] == "" and not batch.clean[slot].any()
        assert not batch.conditions["text"][slot].any() and not batch.conditions["text_mask"][slot].any()
    details = {bad["sample"]: bad["detail"] for bad in batch.bad}
    assert "(4, 6, 4)" in details[1] and "(4, 4, 6)" in details[1] and "latent.npy of 00001" in details[1]
    assert "float32" in details[3] and "float16" in details[3]
    assert "run code" in details[6]
    whole = [0, len(members) - 1]
    found = rows(batch)
    for slot in whole:
        assert found[slot] == (
            arrays(2)["latent.npy"].tobytes(), text.tobytes(), arrays(2)["mask.npy"].astype(bool).tolist(), "a caption"
        )  # fmt: skip
    figure(f"features: {len(changes)} ways to be bad, each a bad sample with its reason")


def write_tar(path: Path, samples: list[dict[str, bytes | None]], between: int = 0) -> None:
    """A tar with the members in the order given, and ``between`` bytes of something else after each."""
    with tarfile.open(path, "w") as tar:
        for i, members in enumerate(samples):
            for extension, data in members.items():
                for name, content in ((extension, data), (f"{extension}.other", b"x" * between if between else None)):
                    if content is not None:
                        info = tarfile.TarInfo(f"{i:05d}.{name}")
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("between", [0, 3000, 20000])
@pytest.mark.parametrize("mixed", [False, True])
def test_any_order_and_distance_of_members_gives_the_same(tmp_path: Path, between: int, mixed: bool) -> None:
    """txt last or first, json in some samples, other members in between; and shards that are not alike."""
    samples = [{k: v.encode() if isinstance(v, str) else json.dumps(v).encode() if isinstance(v, dict) else v
                for k, v in sample(i).items()} for i in range(12)]  # fmt: skip
    orders = [
        ["txt", "text.npy", "json", "latent.npy", "mask.npy"],
        ["json", "latent.npy", "mask.npy", "text.npy", "txt"],
    ]
    for i, members in enumerate(samples):
        order = orders[i % 2 if mixed else 0]
        samples[i] = {name: members[name] for name in order if name in members}
    write_tar(tmp_path / "0.tar", samples[:7], between)
    with tarfile.open(tmp_path / "1.tar", "w") as tar:  # keys of its own
        for i, members in enumerate(samples[7:], 7):
            for extension, data in members.items():
                info = tarfile.TarInfo(f"{'long-' * 8}{i:05d}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    build_index(tmp_path)
    batch = assembler(tmp_path).assemble(np.zeros(12, int), np.arange(12))
    assert not batch.bad
    wanted = [expected(members, 0, i) for i, members in enumerate(samples)]
    assert rows(batch) == wanted


def test_what_the_first_sample_shows_is_checked_before_anything_else(tmp_path: Path) -> None:
    said = {
        "vae": {"dtype": "fp16", "channels": 4, "factor": 8, "resolution": [32, 48]},
        "text": {"dtype": "fp16", "n_tokens": N_TXT, "width": WIDTH},
    }
    assert assembler(write(tmp_path / "good", [sample(2)], said)).features is not None
    for number, (part, name, value, words) in enumerate((
        ("vae", "dtype", "fp32", "dtype fp16, index.json says encoders.vae.dtype fp32"),
        ("vae", "channels", 16, "channels 4"),
        ("vae", "resolution", [48, 32], r"resolution \[32, 48\]"),
        ("text", "dtype", "bf16", "encoders.text.dtype bf16"),
        ("text", "n_tokens", 77, "n_tokens 5"),
        ("text", "width", 768, "width 8, index.json says encoders.text.width 768"),
    )):  # fmt: skip
        changed = said | {part: said[part] | {name: value}}
        with pytest.raises(ShardError, match=words):
            assembler(write(tmp_path / str(number), [sample(2)], changed))
    for name, data in (
        ("latent.npy", b"?" * 400),
        ("latent.npy", npy(np.zeros((4, 4)))),
        ("latent.npy", npy(np.zeros((4, 4), np.float16))),
        ("text.npy", npy(np.zeros((1, 1, 2, 3), np.float16))),
    ):
        place = tmp_path / f"bad-{len(list(tmp_path.iterdir()))}"
        with pytest.raises(ShardError, match=f"the first {name}"):
            assembler(write(place, [sample(2) | {name: data}, sample(5)]))


def test_shards_that_are_not_alike_are_refused(tmp_path: Path) -> None:
    picture = {"png": png(0), "txt": "a"}
    half = write(tmp_path / "a", [sample(2)] * 7 + [picture] * 7)
    with pytest.raises(ShardError, match=r"00001\.tar holds no latent"):
        assembler(half)
    no_mask = [{k: v for k, v in sample(2).items() if k != "mask.npy"}] * 3
    with pytest.raises(ShardError, match="without the other"):
        assembler(write(tmp_path / "b", no_mask))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [({"latent_shape": (4, 6, 4)}, EncoderError, r"\(4, 4, 6\), the model takes \(4, 6, 4\)"),
     ({"latent_shape": (3, 32, 48)}, EncoderError, "data encode"), ({"n_txt": 6}, EncoderError, "5 tokens"),
     ({"flip": True}, ConfigError, "mirrored"), ({"crop": "random"}, ConfigError, "crop: centre")],
)  # fmt: skip
def test_features_that_do_not_fit_the_model_are_refused(folder: Path, change: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        assembler(folder, **change)
    with pytest.raises(error, match=words):
        source = open_source(folder)
        settings = {"resolution": (32, 48), "n_txt": N_TXT} | change
        Reader(source, Plan(len(source), 4), None, micro=4, **settings)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("member", ["latent.npy", "text.npy", "mask.npy", "txt"])
@pytest.mark.parametrize("at", [20, -1])  # in a header, in the numbers
@pytest.mark.parametrize("mixed", [False, True])  # samples that are all alike are checked together
def test_damage_is_found_whatever_it_hits(tmp_path: Path, member: str, at: int, mixed: bool) -> None:
    place = write(tmp_path / "shards", (sample(i if mixed else 3 * i + 2) for i in range(8)))
    shard = load_index(place).shards[0]
    row = load_table(place, shard)[4]
    offset = int(row[f"{member}_offset"]) + (at % int(row[f"{member}_size"]))
    with (place / shard.file).open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ 4]))
    with pytest.raises(ShardError, match=f"the {member} of 000000004"):
        assembler(place).assemble([0] * 8, range(8))
    skipping = assembler(place, source=open_source(place, on_damage="skip"))
    bad = skipping.assemble([0] * 8, range(8)).bad
    assert [(item["sample"], item["reason"]) for item in bad] == [(4, "shard_crc")]


def png(i: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (32, 48, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_pictures_beside_features_are_for_models_of_pixels(tmp_path: Path) -> None:
    both = write(tmp_path / "both", (sample(i) | {"png": png(i)} for i in range(9)))
    without = write(tmp_path / "texts", ({k: v for k, v in sample(i).items() if k != "latent.npy"} | {"png": png(i)}
                                         for i in range(9)))  # fmt: skip
    stored_, numbers, zeros = stored(both), np.arange(9), np.zeros(9, int)
    latents = assembler(both, latent_shape=LATENT).assemble(zeros, numbers)
    assert rows(latents) == [expected(stored_[key], 0, i) for i, key in enumerate(latents.keys)]
    for place in (both, without):
        batch = assembler(place, latent_shape=(3, 32, 48)).assemble(zeros, numbers)
        assert batch.clean.shape == (9, 3, 32, 48) and batch.clean.dtype == torch.float32
        for i in range(9):
            pixels = np.asarray(Image.open(io.BytesIO(png(i)))).transpose(2, 0, 1)
            assert np.abs(batch.clean[i].numpy() - (pixels / 127.5 - 1)).max() < 1e-6
        assert [row[1:] for row in rows(batch)] == [row[1:] for row in rows(latents)]
    on_the_way = assembler(without, latent_shape=LATENT).assemble(zeros, numbers)  # to be encoded by the trainer
    assert on_the_way.clean.shape == (9, 3, 32, 48) and on_the_way.noise.shape == (9, *LATENT)


def test_words_and_models_without_text_leave_text_features_alone(folder: Path) -> None:
    vocabulary = Vocabulary.build(["caption 0 1 2 of 3 4 5"], 300)
    zeros, numbers = np.zeros(6, int), np.arange(6)
    words = assembler(folder, vocabulary=vocabulary, n_txt=12, caption_dropout=0.5).assemble(zeros, numbers)
    assert set(words.conditions) == {"tokens"}
    for i, caption in enumerate(words.captions):
        assert words.conditions["tokens"][i].tolist() == vocabulary.encode(caption, 12).tolist()
        assert words.dropped[i].item() == (caption == "")
    bare = assembler(folder, n_txt=0).assemble(zeros, numbers)
    assert bare.conditions == {} and bare.clean.shape == (6, *LATENT)
    with_text = assembler(folder).assemble(zeros, numbers)
    assert torch.equal(bare.clean, with_text.clean) and bare.captions == with_text.captions


def reader(folder: Path, workers: int, micro: int = 4, **options: Any) -> Reader:
    source = options.pop("source", None) or open_source(folder)
    settings: dict[str, Any] = {"resolution": (32, 48), "n_txt": N_TXT, "seed": 3, "caption_dropout": 0.2}
    return Reader(source, Plan(len(source), 2 * micro, 3), None, micro=micro, accumulation=2, workers=workers,
                  start_method="forkserver", **settings | options)  # fmt: skip


def everything(batch: MicroBatch) -> list[Any]:
    tensors = [batch.noise, batch.time_normal, batch.weight, batch.samples, batch.epochs, batch.dropped]
    return [*rows(batch), *(tensor.numpy().tobytes() for tensor in tensors), batch.keys, batch.bad]


def test_workers_read_the_same_and_held_batches_stay_as_they_are(folder: Path) -> None:
    """More batches are held than there are slots, some for long: none of them is written over."""
    steps = 12
    with reader(folder, 0) as read:
        wanted = [[everything(batch) for batch in next(read)] for _ in range(steps)]
    for workers in (1, 2):
        with reader(folder, workers) as read:
            held = [next(read) for _ in range(steps)]
            assert [[everything(batch) for batch in step] for step in held] == wanted
            held = held[::3]
            for _ in range(steps):
                next(read)
            assert [[everything(batch) for batch in step] for step in held] == wanted[::3]
        assert [[everything(batch) for batch in step] for step in held] == wanted[::3]


@pytest.mark.parametrize(("grouped", "slots"), [(1, 1 * 4 + 2 + 1), (12, 1 * 2 + 2 + 1)])
def test_worker_memory_is_used_again(folder: Path, monkeypatch: pytest.MonkeyPatch, grouped: int, slots: int) -> None:
    monkeypatch.setattr(reader_module, "GROUPED", grouped)
    with reader(folder, 1) as read:
        places = [next(read)[0].clean.untyped_storage().data_ptr() for _ in range(20)]
    assert 1 < len(set(places)) <= slots


@pytest.mark.parametrize("workers", [0, 2])
def test_groups_of_micro_batches_are_those_read_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Bad samples stay with their micro-batch, and a step may lie in two groups."""
    bad: dict[str, Any] = {"latent.npy": npy(np.zeros((4, 6, 4), np.float16))}
    place = write(tmp_path / "shards", (sample(i) | (bad if i % 4 == 2 else {}) for i in range(SAMPLES)))
    monkeypatch.setattr(reader_module, "GROUPED", 1)
    with reader(place, 0) as read:
        wanted = [[(everything(batch), batch.bad) for batch in next(read)] for _ in range(9)]
    assert sum(len(bad) for step in wanted for _, bad in step) == 9 * 8 // 4
    for grouped in (12, 256):
        monkeypatch.setattr(reader_module, "GROUPED", grouped)
        with reader(place, workers) as read:
            assert [[(everything(batch), batch.bad) for batch in next(read)] for _ in range(9)] == wanted


def test_workers_hand_over_errors_of_shards(tmp_path: Path) -> None:
    place = write(tmp_path / "shards", (sample(i) for i in range(16)))
    shard = load_index(place).shards[1]
    os.truncate(place / shard.file, shard.bytes // 2)
    for workers in (0, 1):
        unchecked = ShardSource(place, check=False)
        stopped = pytest.raises(ShardError, match=r"00001\.tar: the \S+ of 0000000")
        with reader(place, workers, source=unchecked) as read, stopped as caught:
            for _ in range(4):
                next(read)
        assert "longskip data lint" in (caught.value.cure or "")


def test_a_reader_that_nobody_closed_does_not_keep_the_program(folder: Path, tmp_path: Path) -> None:
    code = f"""
from longskip.engine.data.plan import Plan
from longskip.engine.data.reader import Reader
from longskip.engine.data.sources import open_source
if __name__ == "__main__":
    read = Reader(open_source({str(folder)!r}), Plan({SAMPLES}, 4), None, resolution=(32, 48), n_txt={N_TXT}, micro=4,
                  workers=1, start_method="forkserver")
    kept = [next(read)]
    print(kept[0][0].keys[0], flush=True)
"""
    (tmp_path / "program.py").write_text(code)
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("0000"), done.stderr
    assert done.stderr == ""


def test_shards_are_let_go_and_opened_again_under_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards((sample(i) for i in range(40)), tmp_path / "shards", per_shard=2)
    monkeypatch.setattr(sources, "OPEN_SHARDS", 3)
    source = open_source(tmp_path / "shards")
    wanted = [arrays(i)["latent.npy"].tobytes() for i in range(40)]
    read = assembler(tmp_path / "shards", source=source)
    failures: list[Any] = []

    def run(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(25):
            numbers = rng.integers(0, 40, 8)
            batch = read.assemble(np.zeros(8, int), numbers)
            if [row[0] for row in rows(batch)] != [wanted[i] for i in numbers]:
                failures.append(numbers)

    descriptors = Path("/proc/self/fd")
    before = len(list(descriptors.iterdir())) if descriptors.is_dir() else None
    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    source.close()  # type: ignore[attr-defined]
    if before is not None:
        assert len(list(descriptors.iterdir())) <= before


def test_a_bad_sample_of_the_source_is_reported_by_it(folder: Path) -> None:
    source = ShardSource(folder)
    into = features.FeatureBatch(np.zeros((1, *LATENT), np.float16), None, None, [""], [""])

    def refuse(slot: int, captions: Any) -> int:
        raise BadSampleError("caption_json", "refused here")

    features.read_features(source, [0], np.array([3]), into, refuse)
    assert into.bad[0].reason == "caption_json" and into.keys == ["000000003"]


def test_crc32_is_the_tables(folder: Path) -> None:
    from longskip.engine.data.crc import crc32

    rng = np.random.default_rng(0)
    for size in (0, 1, 63, 5000, 5121, 120_000):
        data = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        assert crc32(data) == zlib.crc32(data)
        assert crc32(memoryview(data)[1:], crc32(data[:1])) == zlib.crc32(data)
