"""Features as they are stored: those of a direct call, in the buckets asked for, and read again by a run."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from longskip.engine.configio import validate
from longskip.engine.data.decode import decode_image
from longskip.engine.data.encode import encode_shards
from longskip.engine.data.index import load_index, load_table
from longskip.engine.data.pack import write_shards
from longskip.engine.data.sources import ShardSource, open_source
from longskip.engine.encoders import Encoders
from longskip.engine.inputs import Inputs
from longskip.errors import EncoderError
from longskip.launcher.cli import main
from tests.engine.encode_folders import (
    SIZES,
    array,
    encode_whole,
    make_folder,
    of,
    opened,
    picture,
    sample,
    tree,
)
from tests.engine.remote_server import GIB, Server, forget_connections


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("encode"))


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return encode_whole(folder)


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


def test_shards_at_a_url_give_the_same_bytes(folder, whole, tmp_path, monkeypatch, capsys):
    """One after the other, each fetched once, within a cache that holds two of them; also by the command."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = Server(folder / "shards")
    shards = load_index(folder / "shards").shards
    try:
        # With room for two, the third is not fetched before the first is done with.
        cache_gib = (sum(sorted(shard.bytes for shard in shards)[-2:]) + 2 * 4096) / GIB
        settings = {"remote": "fsspec", "cache": tmp_path / "cache", "cache_gib": cache_gib}
        encode_shards(server.url, tmp_path / "out", of(folder), batch=3, **settings)
        assert tree(tmp_path / "out") == tree(whole)
        assert [file for file, _ in server.log if file.endswith(".tar")] == [shard.file for shard in shards]
        typed = ["--vae", str(folder / "vae"), "--text", str(folder / "t5"), "--resolution", "32", "--n-tokens", "20"]
        typed += [
            "--batch",
            "3",
            "--device",
            "cpu",
            "--out",
            str(tmp_path / "typed"),
            "--cache",
            str(tmp_path / "cache"),
        ]
        with pytest.raises(SystemExit) as ended:
            main(["data", "encode", server.url, *typed])
        assert ended.value.code != 0 and "--remote" in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "typed").exists()
        with pytest.raises(SystemExit) as ended:
            main(["data", "encode", server.url, *typed, "--remote", "fsspec"])
        assert not ended.value.code and tree(tmp_path / "typed") == tree(whole)
    finally:
        server.close()
        forget_connections()
