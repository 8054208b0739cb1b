from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from longskip.engine.config import Config
from longskip.engine.configio import validate
from longskip.engine.data import encode as encode_module
from longskip.engine.data.decode import decode_image
from longskip.engine.data.encode import encode_shards
from longskip.engine.data.encoding import Encoding
from longskip.engine.data.index import load_index, load_table
from longskip.engine.data.pack import write_shards
from longskip.engine.data.sources import ShardSource, open_source
from longskip.engine.encoders import Encoders, check_manifest
from longskip.engine.inputs import Inputs
from longskip.errors import ConfigError, DataError, EncoderError, RunLockedError, ShardError
from longskip.launcher.cli import main
from longskip.launcher.cli_encode import parse_size
from tests.ranks import run_ranks
from tests.tiny_encoders import tiny_clip_text, tiny_t5, tiny_vae

SIZES = [(40, 40), (32, 64), (64, 32), (35, 50)]  # (H, W)


def picture(i: int, size: tuple[int, int] | None = None, format: str = "PNG", **how) -> bytes:
    height, width = size or SIZES[i % len(SIZES)]
    low = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC).save(buffer, format, **how)
    return buffer.getvalue()


def sample(i: int) -> dict:
    """Every third sample has three captions with weights and something else in its JSON."""
    made = {"__key__": f"s{i:03d}", "png": picture(i), "txt": f"a red star {i}"}
    if i % 3 == 0:
        texts = [f"a large blue circle {i}", "a star", "the small green square"]
        made["json"] = {"captions": [{"text": t, "weight": k + 0.5} for k, t in enumerate(texts)], "scene": [i]}
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encode")
    tiny_vae(folder / "vae")
    tiny_vae(folder / "other_vae", seed=1)
    tiny_t5(folder / "t5")
    tiny_clip_text(folder / "clip")
    write_shards((sample(i) for i in range(10)), folder / "shards", per_shard=4)
    return folder


def of(folder: Path, text: str | None = "t5", vae: str | None = "vae", **settings) -> Encoders:
    if text:
        settings = {"n_tokens": 20} | settings
    return Encoders.at(vae and folder / vae, text and folder / text, (32, 32), "cpu", **settings)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The three shards encoded by one process that nobody disturbed."""
    out = folder / "whole"
    report = encode_shards(folder / "shards", out, of(folder), batch=3)
    assert (report.shards, report.encoded, report.finished, report.samples, report.bad) == (3, 3, 0, 10, {})
    assert report.complete
    return out


def tree(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def array(source: ShardSource, i: int, kind: str) -> np.ndarray:
    return np.load(io.BytesIO(source.member(i, kind) or b""), allow_pickle=False)


def test_features_are_those_of_a_direct_call_sample_by_sample(folder, whole):
    from diffusers import AutoencoderKL
    from transformers import AutoTokenizer, T5EncoderModel

    vae = AutoencoderKL.from_pretrained(folder / "vae", low_cpu_mem_usage=False).eval().double()
    model = T5EncoderModel.from_pretrained(folder / "t5").eval().double()
    tokenizer = AutoTokenizer.from_pretrained(folder / "t5")
    source, features = open_source(folder / "shards"), open_source(whole)
    assert isinstance(features, ShardSource)
    assert len(features) == 10
    for i in range(10):
        raw = source.read(i)
        pixels = torch.tensor(decode_image(raw.image, resolution=(32, 32))).double() / 127.5 - 1
        captions = [text for text, _ in raw.captions]
        given = tokenizer(captions, padding="max_length", max_length=20, return_tensors="pt")
        with torch.no_grad():
            latent = vae.encode(pixels.permute(2, 0, 1)[None]).latent_dist.mean[0] * 0.18215
            text = model(**given).last_hidden_state
        assert features.key(i) == raw.key == f"s{i:03d}"
        assert features.captions(i) == raw.captions
        for kind in ("txt", "json"):
            assert features.member(i, kind) == source.member(i, kind)
        assert features.member(i, "image") is None
        found = {kind: array(features, i, f"{kind}.npy") for kind in ("latent", "text", "mask")}
        assert [(a.dtype, a.shape) for a in found.values()] == [
            (np.float16, (4, 4, 4)), (np.float16, (len(captions), 20, 32)), (np.uint8, (len(captions), 20)),
        ]  # fmt: skip
        assert len(captions) == (3 if i % 3 == 0 else 1)
        np.testing.assert_allclose(found["latent"], latent.numpy(), rtol=2e-3, atol=1e-4)
        np.testing.assert_allclose(found["text"], text.numpy(), rtol=2e-3, atol=1e-3)
        np.testing.assert_array_equal(found["mask"], given["attention_mask"].numpy())


def test_what_is_written_is_what_the_encoders_give_to_the_bit(folder, tmp_path):
    """The oracle is numpy's own writer over the encoders' output, batch by batch of the one shard."""
    write_shards((sample(i) for i in range(5)), tmp_path / "shards")
    source, encoders = open_source(tmp_path / "shards"), of(folder, "clip", n_tokens=None)
    encode_shards(tmp_path / "shards", tmp_path / "out", encoders, batch=3, dtype="fp32")
    with tarfile.open(tmp_path / "out" / "00000.tar") as archive:
        found = {member.name: archive.extractfile(member).read() for member in archive}
    for numbers in ((0, 1, 2), (3, 4)):
        raws = [source.read(i) for i in numbers]
        pixels = np.stack([decode_image(raw.image, resolution=(32, 32)) for raw in raws])
        scaled = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).astype(np.float32) * np.float32(1 / 127.5) - 1
        latents = encoders.encode_images(torch.from_numpy(scaled)).numpy()
        captions = [text for raw in raws for text, _ in raw.captions]
        texts = np.concatenate(
            [encoders.encode_text(captions[k : k + 3])[0].numpy() for k in range(0, len(captions), 3)]
        )
        for raw, latent in zip(raws, latents, strict=True):
            rows, texts = texts[: len(raw.captions)], texts[len(raw.captions) :]
            mask = np.ones(rows.shape[:2], np.uint8)
            for kind, value in (("latent", latent), ("text", rows), ("mask", mask)):
                buffer = io.BytesIO()
                np.save(buffer, value)
                assert found.pop(f"{raw.key}.{kind}.npy") == buffer.getvalue()
    assert sorted({name.split(".", 1)[1] for name in found}) == ["json", "txt"]


def test_the_index_says_what_made_the_features(folder, whole):
    import diffusers
    import transformers

    index = load_index(whole)
    described = of(folder).describe()
    made_with = index.encoders["made_with"]
    assert index.encoders["vae"] == {**described["vae"], "dtype": "fp16", "computed_in": "fp32", "crop": "centre"}
    empty = (whole / "empty.safetensors").read_bytes()
    assert index.encoders["text"] == {
        **described["text"], "dtype": "fp16", "computed_in": "fp32", "empty_sha256": hashlib.sha256(empty).hexdigest(),
    }  # fmt: skip
    assert index.encoders["source"] == open_source(folder / "shards").fingerprint()
    assert made_with["device"] == "cpu"
    assert (made_with["diffusers"], made_with["transformers"]) == (diffusers.__version__, transformers.__version__)
    assert index.members == {"latent.npy": 10, "text.npy": 10, "mask.npy": 10, "txt": 10, "json": 4}
    text, mask = of(folder).encode_text([""])
    arrays = safetensors.numpy.load(empty)
    np.testing.assert_array_equal(arrays["text"], text[0].numpy().astype(np.float16))
    np.testing.assert_array_equal(arrays["mask"], mask[0].numpy().astype(np.uint8))
    assert arrays["mask"].dtype == np.uint8
    assert (whole / "bad_samples.jsonl").read_text() == ""
    table = load_table(whole, index.shards[0])
    assert table["latent_height"].tolist() == table["latent_width"].tolist() == [4] * 4
    assert table["height"].tolist() == [0] * 4


def test_the_index_does_not_depend_on_the_place(folder, whole, tmp_path):
    shutil.copytree(folder / "vae", tmp_path / "elsewhere")
    encoders = Encoders.at(tmp_path / "elsewhere", folder / "t5", (32, 32), "cpu", n_tokens=20)
    shutil.copytree(folder / "shards", tmp_path / "shards")
    encode_shards(tmp_path / "shards", tmp_path / "out", encoders, batch=3)
    assert tree(tmp_path / "out") == tree(whole)


def encode_again(folder: Path, out: Path, **settings) -> encode_module.EncodeReport:
    return encode_shards(folder / "shards", out, of(folder), batch=3, **settings)


def kill_after(samples: int):
    def progress(done: int, total: int) -> None:
        if done >= samples:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


@pytest.mark.parametrize("samples", [3, 4, 7, 10])
def test_a_killed_run_started_again_gives_the_same_bytes(folder, whole, tmp_path, samples):
    """Killed in the first shard, at its end, in the second, and at the end of the last, before the index."""
    out = tmp_path / "out"
    assert run_ranks(1, partial(encode_again, progress=kill_after(samples)), folder, out) == [-signal.SIGKILL]
    assert not (out / "index.json").exists()
    assert list(out.glob("*.part"))
    with pytest.raises(DataError):
        open_source(out)
    seen = []
    report = encode_again(folder, out, progress=lambda done, total: seen.append((done, total)))
    assert (report.encoded, report.finished) == {3: (3, 0), 4: (3, 0), 7: (2, 1), 10: (1, 2)}[samples]
    assert report.samples == 10
    assert seen[-1] == (10, 10)
    assert tree(out) == tree(whole)


@pytest.mark.parametrize("step", ["write_table", "replace", "record", "finish"])
def test_a_kill_between_any_two_steps_loses_nothing(folder, whole, tmp_path, step):
    out = tmp_path / "out"

    def dying(*arguments, **keywords):
        os.kill(os.getpid(), signal.SIGKILL)

    def act():
        from longskip.engine.data import encoding

        if step == "write_table":
            encoding.write_table = dying
        elif step == "replace":
            encoding.os.replace = lambda a, b: dying() if str(b).endswith("00001.tar") else os.rename(a, b)
        elif step == "record":
            Encoding._record_path = lambda self, file, path=Encoding._record_path: (
                dying() if (out / "00001.tar").exists() else path(self, file)
            )
        else:
            encoding.save_index = dying
        encode_again(folder, out)

    assert run_ranks(1, act) == [-signal.SIGKILL]
    assert not (out / "index.json").exists()
    report = encode_again(folder, out)
    assert report.finished == {"write_table": 0, "replace": 1, "record": 1, "finish": 3}[step]
    assert tree(out) == tree(whole)


def test_two_ranks_one_after_the_other_give_what_one_gives(folder, whole, tmp_path):
    out = tmp_path / "out"
    second = encode_again(folder, out, rank=1, world=2)
    assert (second.shards, second.encoded, second.samples, second.complete) == (1, 1, 4, False)
    assert not (out / "index.json").exists()
    with pytest.raises(DataError, match=r"2 of 3 shards are not encoded, the first is 00000\.tar"):
        Encoding(out).finish(0.05)
    first = encode_again(folder, out, rank=0, world=2)
    assert (first.shards, first.samples, first.complete) == (2, 6, True)
    assert tree(out) == tree(whole)
    for rank in range(5):  # more ranks than shards
        report = encode_again(folder, out, rank=rank, world=5)
        assert (report.encoded, report.shards, report.complete) == (0, int(rank < 3), True)
    assert tree(out) == tree(whole)


def test_two_ranks_at_once_give_what_one_gives(folder, whole, tmp_path):
    out = tmp_path / "out"

    def act():
        encode_again(folder, out, rank=int(os.environ["RANK"]), world=2)

    assert run_ranks(2, act) == [0, 0]
    assert tree(out) == tree(whole)


def test_a_damaged_or_missing_shard_is_made_again(folder, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    data = bytearray((out / "00000.tar").read_bytes())
    data[5000] ^= 1
    (out / "00000.tar").write_bytes(data)
    (out / "00001.tar").unlink()
    (out / "00002.idx.npy").unlink()
    report = encode_again(folder, out)
    assert (report.encoded, report.finished) == (3, 0)
    assert tree(out) == tree(whole)
    (out / "encoding" / "shards" / "00001.tar.json").write_text("{")
    assert encode_again(folder, out).encoded == 1
    assert tree(out) == tree(whole)


def test_a_finished_folder_is_only_verified(folder, whole, monkeypatch):
    def never(self):
        raise AssertionError("weights were loaded")

    before = tree(whole)
    monkeypatch.setattr(Encoders, "load", never)
    monkeypatch.setattr(encode_module, "_made_with", lambda encoders: {"torch": "another"})
    report = encode_again(folder, whole)
    assert (report.encoded, report.finished, report.samples, report.complete) == (0, 3, 10, True)
    assert tree(whole) == before


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda f: {"encoders": of(f, vae="other_vae")}, r"encoders\.vae\.sha256: '\w{64}' there, '\w{64}' now"),
        (lambda f: {"encoders": of(f, "clip")}, r"encoders\.text\.kind: 't5' there, 'clip' now"),
        (lambda f: {"encoders": of(f, n_tokens=19)}, r"encoders\.text\.n_tokens: 20 there, 19 now"),
        (lambda f: {"encoders": of(f, too_long="truncate")}, r"too_long: 'error' there, 'truncate' now"),
        (lambda f: {"encoders": of(f, None)}, r"encoders\.text\.kind: 't5' there, None now"),
        (lambda f: {"encoders": of(f, dtype=torch.bfloat16)}, r"computed_in: 'fp32' there, 'bf16' now"),
        (
            lambda f: {"encoders": Encoders.at(f / "vae", f / "t5", (64, 32), "cpu", n_tokens=20)},
            r"encoders\.vae\.resolution: \[32, 32\] there, \[64, 32\] now",
        ),
        (lambda f: {"dtype": "fp32"}, r"encoders\.text\.dtype: 'fp16' there, 'fp32' now"),
        (lambda f: {"buckets": [(32, 32)]}, r"encoders\.vae\.buckets: None there, \[\[32, 32\]\] now"),
        (lambda f: {"keep_pictures": True}, "pictures: False there, True now"),
    ],
)
def test_a_folder_encoded_with_other_settings_is_refused(folder, whole, how, message):
    before = tree(whole)
    with pytest.raises(EncoderError, match=message) as caught:
        encode_shards(folder / "shards", whole, **({"encoders": of(folder)} | how(folder)))
    assert "another folder" in caught.value.cure
    assert tree(whole) == before


def test_other_data_and_other_versions_are_refused(folder, whole, tmp_path, monkeypatch):
    write_shards((sample(i) for i in range(9)), tmp_path / "shards", per_shard=4)
    with pytest.raises(EncoderError, match=r"source: '\w{64}' there, '\w{64}' now"):
        encode_shards(tmp_path / "shards", whole, of(folder))
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    (out / "encoding" / "shards" / "00001.tar.json").unlink()
    monkeypatch.setattr(encode_module, "_made_with", lambda encoders: {"torch": "another"})
    with pytest.raises(EncoderError, match=r"made_with\.torch: '2\.\S+' there, 'another' now"):
        encode_again(folder, out)


def test_a_shard_that_another_process_writes_is_left_alone(folder, whole, tmp_path):
    out = tmp_path / "out"
    encode_again(folder, out, rank=1, world=3)
    with (out / "00000.tar.part").open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        stream.write(b"half")
        stream.flush()
        with pytest.raises(RunLockedError, match=r"00000\.tar\.part is being written by another process"):
            encode_again(folder, out, rank=0, world=3)
        assert (out / "00000.tar.part").read_bytes() == b"half"
    with (out / "00000.tar.part").open("ab") as stream:
        stream.write(bytes(1 << 20))  # longer than the shard: what a killed process left
    assert encode_again(folder, out).complete
    assert tree(out) == tree(whole)


def spoilt(i: int) -> dict:
    """Of 20 samples: a broken picture, an empty caption, and captions of too many tokens."""
    made = sample(i)
    if i == 2:
        made["png"] = made["png"][:60]
    elif i == 5:
        made["txt"] = "  "
    elif i == 9:
        made["json"]["captions"][2]["text"] = "a red star " * 9
    elif i == 10:
        made["txt"] = "a red star " * 9
    return made


def test_bad_samples_are_left_out_and_listed(folder, tmp_path):
    write_shards((spoilt(i) for i in range(20)), tmp_path / "shards", per_shard=8)
    report = encode_shards(tmp_path / "shards", tmp_path / "out", of(folder), batch=3, max_bad_share=0.2)
    assert report.bad == {"caption_missing": 1, "image_decode": 1, "text_too_long": 2}
    assert report.samples == 16
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert [(item["shard"], item["sample"], item["key"], item["reason"]) for item in listed] == [
        ("00000.tar", 2, "s002", "image_decode"),
        ("00000.tar", 5, "s005", "caption_missing"),
        ("00001.tar", 9, "s009", "text_too_long"),
        ("00001.tar", 10, "s010", "text_too_long"),
    ]
    assert all("detail" in item and str(tmp_path) not in item["detail"] for item in listed)
    features = open_source(tmp_path / "out")
    assert [features.key(i) for i in range(len(features))] == [f"s{i:03d}" for i in range(20) if i not in (2, 5, 9, 10)]
    exact = encode_shards(tmp_path / "shards", tmp_path / "cut", of(folder, too_long="truncate"), max_bad_share=0.1)
    assert exact.bad == {"caption_missing": 1, "image_decode": 1}


@pytest.mark.parametrize("world", [1, 2])
def test_too_many_bad_samples_stop_the_encoding(folder, tmp_path, world):
    write_shards((spoilt(i) for i in range(20)), tmp_path / "shards", per_shard=8)
    with pytest.raises(DataError, match=r"of 20 samples cannot be encoded, more than the share 0\.1[59]") as caught:
        for rank in range(world):
            encode_shards(
                tmp_path / "shards",
                tmp_path / "out",
                of(folder),
                rank=rank,
                world=world,
                max_bad_share=0.19 - 0.04 * (world == 1),
            )
    assert "s002 of 00000.tar" in caught.value.message
    assert not (tmp_path / "out" / "index.json").exists()
    assert not list((tmp_path / "out").glob("*.part"))
    with pytest.raises(DataError, match=r"not encoded|more than the share"):
        Encoding(tmp_path / "out").finish(0.15)


def test_a_shard_without_a_good_sample_is_not_there(folder, tmp_path):
    made = [sample(i) for i in range(6)]
    for i in (2, 3):
        made[i]["png"] = b"\x89PNG\r\n\x1a\n"
    write_shards(made, tmp_path / "shards", per_shard=2)
    report = encode_shards(tmp_path / "shards", tmp_path / "out", of(folder), max_bad_share=0.5)
    assert report.complete
    assert [shard.file for shard in load_index(tmp_path / "out").shards] == ["00000.tar", "00002.tar"]
    assert len(open_source(tmp_path / "out")) == 4
    again = encode_shards(tmp_path / "shards", tmp_path / "out", of(folder), max_bad_share=0.5)
    assert (again.encoded, again.finished) == (0, 3)
    write_shards([{**sample(1), "txt": ""}], tmp_path / "none")
    with pytest.raises(DataError, match=r"not one sample could be encoded: \{'caption_missing': 1\}"):
        encode_shards(tmp_path / "none", tmp_path / "out2", of(folder), max_bad_share=1.0)


def test_values_past_fp16_are_no_features(folder, tmp_path):
    tiny_vae(tmp_path / "loud", scale=1e7)
    encoders = Encoders.at(tmp_path / "loud", None, (32, 32), "cpu")
    report = encode_shards(folder / "shards", tmp_path / "fp32", encoders, dtype="fp32")
    assert report.bad == {}
    with pytest.raises(DataError, match=r"4 of 10 .*\{'latent_not_finite': 4\}.*latents past float16"):
        encode_shards(folder / "shards", tmp_path / "fp16", encoders)


def test_text_features_past_fp16_are_no_features(folder, tmp_path):
    encoders = of(folder)
    exact = encoders.encode_text

    def loud(texts: list[str]):
        features, mask = exact(texts)
        for row, text in enumerate(texts):
            if text in ("a red star 4", "a star"):  # the only caption of one sample, the second of four others
                features[row, 3, 1] = 1e6
        return features, mask

    encoders.encode_text = loud
    report = encode_shards(folder / "shards", tmp_path / "out", encoders, max_bad_share=0.5)
    assert report.bad == {"text_not_finite": 5}
    features = open_source(tmp_path / "out")
    assert [features.key(i) for i in range(5)] == ["s001", "s002", "s005", "s007", "s008"]
    shutil.copytree(folder / "t5", tmp_path / "t5")
    weights = tmp_path / "t5" / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in safetensors.numpy.load_file(weights).items()}
    tensors["encoder.final_layer_norm.weight"] *= 1e6
    safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(DataError, match="the empty caption's features are past float16"):
        encode_shards(folder / "shards", tmp_path / "out2", of(tmp_path, vae=None), keep_pictures=True)


def test_bad_samples_are_listed_in_order_whatever_made_them_bad(folder, tmp_path):
    made = [sample(i) for i in range(8)]
    made[5]["png"] = b"\x89PNG\r\n\x1a\n"
    made[2]["txt"] = "a red star " * 9
    write_shards(made, tmp_path / "shards")
    encode_shards(tmp_path / "shards", tmp_path / "out", of(folder), batch=8, max_bad_share=0.3)
    listed = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert [(item["sample"], item["reason"]) for item in listed] == [(2, "text_too_long"), (5, "image_decode")]


def test_damaged_input_stops_or_is_left_out(folder, tmp_path):
    shutil.copytree(folder / "shards", tmp_path / "shards")
    row = load_table(tmp_path / "shards", load_index(tmp_path / "shards").shards[1])[2]
    data = bytearray((tmp_path / "shards" / "00001.tar").read_bytes())
    data[int(row["image_offset"]) + 30] ^= 1
    (tmp_path / "shards" / "00001.tar").write_bytes(data)
    with pytest.raises(ShardError, match="crc32"):
        encode_shards(tmp_path / "shards", tmp_path / "out", of(folder))
    report = encode_shards(tmp_path / "shards", tmp_path / "out", of(folder), on_damage="skip", max_bad_share=0.1)
    assert report.bad == {"shard_crc": 1}


def rotated(i: int) -> bytes:
    """Stored 64 x 32 (H, W), to be seen 32 x 64."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return picture(i, (64, 32), "JPEG", exif=exif)


def test_buckets_take_each_picture_at_its_nearest_shape(folder, tmp_path):
    buckets = [(32, 32), (16, 40), (48, 16), (24, 32)]
    made = [{**sample(i), "png": rotated(i)} if i == 7 else sample(i) for i in range(9)]
    made[7]["jpg"] = made[7].pop("png")
    write_shards(made, tmp_path / "shards")
    encode_shards(tmp_path / "shards", tmp_path / "out", of(folder), batch=5, buckets=buckets)
    index = load_index(tmp_path / "out")
    assert index.encoders["vae"]["buckets"] == [list(size) for size in buckets]
    table = load_table(tmp_path / "out", index.shards[0])
    source, features = open_source(tmp_path / "shards"), open_source(tmp_path / "out")
    encoders = of(folder, None)
    for i in range(9):
        height, width = (32, 64) if i == 7 else SIZES[i % 4]
        ratios = {
            size: max(height * size[1] / (width * size[0]), width * size[0] / (height * size[1])) for size in buckets
        }
        wanted = min(ratios, key=lambda size: ratios[size])
        latent = array(features, i, "latent.npy")
        assert latent.shape == (4, wanted[0] // 8, wanted[1] // 8)
        assert (table["latent_height"][i], table["latent_width"][i]) == latent.shape[1:]
        pixels = torch.tensor(decode_image(source.read(i).image, resolution=wanted)).float() / 127.5 - 1
        expected = encoders.encode_images(pixels.permute(2, 0, 1)[None])[0].numpy()
        np.testing.assert_allclose(latent, expected, rtol=2e-3, atol=1e-4)
        assert features.key(i) == f"s{i:03d}"
    assert len({tuple(array(features, i, "latent.npy").shape) for i in range(9)}) == 4


def test_a_folder_of_pictures_is_encoded_into_shards(folder, tmp_path):
    photos = tmp_path / "photos"
    (photos / "b").mkdir(parents=True)
    for i, name in enumerate(["b/z", "a.v2", "c", "d", "e"]):
        (photos / f"{name}.png").write_bytes(picture(i))
        (photos / f"{name}.txt").write_text(f"a star {i}")
    (photos / "d.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    out = tmp_path / "out"
    report = encode_shards(photos, out, of(folder), per_shard=2, max_bad_share=0.2)
    assert report.bad == {"image_decode": 1}
    features = open_source(out)
    source = open_source(photos)
    assert [shard.count for shard in load_index(out).shards] == [2, 1, 1]
    assert [features.key(i) for i in range(4)] == ["000000000", "000000001", "000000002", "000000004"]
    assert [features.captions(i) for i in range(4)] == [source.captions(i) for i in (0, 1, 2, 4)]
    assert json.loads((out / "bad_samples.jsonl").read_text())["key"] == "d"
    assert encode_shards(photos, out, of(folder), per_shard=2, max_bad_share=0.2).finished == 3


def test_pictures_are_kept_when_asked_for_and_parts_can_be_left_out(folder, tmp_path):
    shards = folder / "shards"
    encode_shards(shards, tmp_path / "both", of(folder), keep_pictures=True)
    encode_shards(shards, tmp_path / "text", of(folder, vae=None), keep_pictures=True)
    encode_shards(shards, tmp_path / "latents", of(folder, None))
    source = open_source(shards)
    for name, kinds in (
        ("both", {"image", "latent.npy", "text.npy", "mask.npy", "txt", "json"}),
        ("text", {"image", "text.npy", "mask.npy", "txt", "json"}),
        ("latents", {"latent.npy", "txt", "json"}),
    ):
        features = open_source(tmp_path / name)
        assert set(load_index(tmp_path / name).members) == kinds
        assert set(load_index(tmp_path / name).encoders) - {"made_with", "source"} == (
            {"vae", "text"} if name == "both" else {"text" if name == "text" else "vae"}
        )
        assert (tmp_path / name / "empty.safetensors").exists() == (name != "latents")
        for i in range(10):
            assert features.captions(i) == source.captions(i)
            if "image" in kinds:
                assert features.read(i) == source.read(i)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dtype": "bf16"}, "stored in 'bf16'"),
        ({"batch": 0}, "batch 0"),
        ({"per_shard": 0}, "per_shard 0"),
        ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ({"rank": 0, "world": 0}, "rank 0 of 0"),
        ({"max_bad_share": 1.5}, r"max_bad_share 1\.5"),
        ({"buckets": [(32, 30)]}, "the bucket 32x30 does not divide"),
        ({"buckets": [(0, 32)]}, "the bucket 0x32 does not divide"),
        ({"buckets": [(32, 32), (16, 16)]}, "same aspect ratio"),
        ({"encoders": lambda f: of(f, None, None)}, "no encoder is named"),
        ({"encoders": lambda f: of(f, vae=None)}, "pictures must be kept"),
        ({"encoders": lambda f: of(f, vae=None), "keep_pictures": True, "buckets": [(8, 8)]}, "pictures must be kept"),
        ({"encoders": lambda f: Encoders.at(f / "vae", None, (32, 36), "cpu")}, "32x36 is not divisible"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything(folder, tmp_path, settings, message):
    make = settings.get("encoders", of)
    with pytest.raises(ConfigError, match=message):
        encode_shards(folder / "shards", tmp_path / "out", **{**settings, "encoders": make(folder)})
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_are_refused(folder, whole, tmp_path):
    with pytest.raises(ConfigError, match="is the folder that is encoded"):
        encode_shards(folder / "shards", folder / "shards", of(folder))
    with pytest.raises(DataError, match="holds no pictures but features already"):
        encode_shards(whole, tmp_path / "out", of(folder))
    shutil.copytree(folder / "shards", tmp_path / "other")
    with pytest.raises(DataError, match="already holds data that were not encoded here"):
        encode_shards(folder / "shards", tmp_path / "other", of(folder))
    with pytest.raises(ShardError, match="URL or a pipe"):
        encode_shards(folder / "shards", "s3://bucket/out", of(folder))
    with pytest.raises(DataError, match="holds no encoding"):
        Encoding(tmp_path / "nowhere").finish(0.05)
    out = tmp_path / "broken"
    shutil.copytree(whole, out)
    (out / "encoding" / "settings.json").write_text("{}")
    with pytest.raises(DataError, match=r"settings\.json cannot be read"):
        encode_again(folder, out)


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["data", "encode", *arguments])
    return int(ended.value.code or 0)


def test_the_command_encodes_by_rank_and_finishes(folder, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    typed = [
        str(folder / "shards"), "--out", str(out), "--vae", str(folder / "vae"), "--text", str(folder / "t5"),
        "--resolution", "32", "--n-tokens", "20", "--batch", "3", "--device", "cpu",
    ]  # fmt: skip
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert command(*typed, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["rank"], told["world"], told["samples"], told["complete"]) == (0, 2, 6, False)
    assert command("--out", str(out), "--finish") == 1
    assert "1 of 3 shards are not encoded" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    assert command(*typed) == 0
    printed = capsys.readouterr().out
    for line in (
        f"data.path={out}",
        "model.resolution=32",
        "encoders.vae.scale=0.18215",
        "encoders.text.width=32",
    ):
        assert line in printed
    assert command("--out", str(out), "--finish", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "samples": 10, "shards": 3, "complete": True}
    assert tree(out) == tree(whole)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert command(*typed, "--dtype", "fp32") == 2
    assert "encoded with other settings" in capsys.readouterr().err


def opened(config: Config, path: Path) -> ShardSource:
    """The data of a run, checked as a run checks them."""
    source = open_source(path)
    assert isinstance(source, ShardSource)
    check_manifest(config, source.index.encoders, source.index.members, str(path))
    return source


def test_the_command_makes_the_buckets_that_a_run_of_auto_expects(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    typed = ["--vae", str(folder / "vae"), "--resolution", "64", "--buckets", "auto", "--patch", "1"]
    assert command(str(folder / "shards"), "--out", str(out), "--device", "cpu", *typed, "--json") == 0
    assert json.loads(capsys.readouterr().out)["complete"]
    tree = {
        "model": {"preset": "uvit-tiny", "resolution": 64, "patch": 1},
        "data": {"path": str(out), "buckets": "auto"},
        "encoders": {"vae": {"kind": "vae"}},
    }
    assert len(opened(validate(tree), out)) == 10
    tree["model"]["patch"] = 2
    with pytest.raises(EncoderError, match=r"in the buckets .* data\.buckets is"):
        opened(validate(tree), out)


def test_a_run_reads_what_was_encoded(folder, whole):
    """Through the run's own reader: latents, the chosen caption's text and mask, and the empty caption's."""
    tree = {
        "model": {"preset": "uvit-tiny", "resolution": 32, "patch": 2},
        "data": {"path": str(whole)},
        "encoders": {
            "vae": {"kind": "vae", "path": str(folder / "vae")},
            "text": {"kind": "t5", "path": str(folder / "t5"), "width": 32, "n_tokens": 20},
        },
    }
    config = validate(tree)
    source = opened(config, whole)
    inputs = Inputs(config, None, torch.device("cpu"), source)
    numbers = np.arange(10)
    batch = inputs.assembler(source).assemble(np.zeros_like(numbers), numbers)
    assert batch.bad == []
    for i in range(10):
        row = [text for text, _ in source.captions(i)].index(batch.captions[i])
        np.testing.assert_array_equal(batch.clean[i].numpy(), array(source, i, "latent.npy"))
        np.testing.assert_array_equal(batch.conditions["text"][i].numpy(), array(source, i, "text.npy")[row])
        np.testing.assert_array_equal(batch.conditions["text_mask"][i].numpy(), array(source, i, "mask.npy")[row])
    dropped = inputs.assembler(source, caption_dropout=1.0).assemble(np.zeros_like(numbers), numbers)
    empty = safetensors.numpy.load((whole / "empty.safetensors").read_bytes())
    for i in range(10):
        np.testing.assert_array_equal(dropped.conditions["text"][i].numpy(), empty["text"])
        np.testing.assert_array_equal(dropped.conditions["text_mask"][i].numpy(), empty["mask"])
    tree["encoders"]["text"]["n_tokens"] = 21
    with pytest.raises(EncoderError, match=r"text n_tokens 20, encoders\.text\.n_tokens is 21"):
        opened(validate(tree), whole)


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--resolution", "big"], {}, "is no size in pixels"),
        (["--buckets", "32x32,"], {}, "is no size in pixels"),
        (["--text-kind", "bert"], {}, "one of auto, t5, clip"),
        (["--dtype", "fp8"], {}, "one of fp16, fp32"),
        (["--compute", "fp16"], {}, "one of fp32, bf16"),
        (["--too-long", "cut"], {}, "one of error, truncate"),
        (["--on-damage", "ignore"], {}, "one of stop, skip"),
        (["--device", "tpu9"], {}, "CUDA devices are here"),
        (["--device", "cuda:99"], {}, "CUDA devices are here"),
        (["--vae", "nowhere"], {}, "nowhere is not a folder"),
        ([], {"RANK": "x"}, "RANK='x' is no whole number"),
        ([], {"RANK": "1"}, "rank 1 of 1"),
        ([], {}, "no encoder is named"),
    ],
)
def test_what_is_typed_wrongly_is_said(folder, tmp_path, capsys, monkeypatch, arguments, variables, message):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    if variables.get("RANK") == "1":
        arguments = ["--vae", str(folder / "vae")]
    assert command(str(folder / "shards"), "--out", str(tmp_path / "out"), *arguments) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_sizes_are_read():
    assert parse_size("256") == (256, 256)
    assert parse_size(" 192X320") == (192, 320)
    for text in ("", "x", "0", "12x", "1x2x3", "-4", "4.5", "999999"):
        with pytest.raises(ConfigError):
            parse_size(text)
