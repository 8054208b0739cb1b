"""Samples that cannot be encoded are left out and listed; too many of them stop the encoding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import safetensors.numpy

from longskip.engine.data.encode import encode_shards
from longskip.engine.data.encoding import Encoding
from longskip.engine.data.index import load_index, load_table
from longskip.engine.data.pack import write_shards
from longskip.engine.data.sources import open_source
from longskip.engine.encoders import Encoders
from longskip.errors import DataError, ShardError
from tests.engine.encode_folders import (
    make_folder,
    of,
    sample,
)
from tests.tiny_encoders import tiny_vae


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("encode"))


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
