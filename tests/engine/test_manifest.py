"""What the index says of the encoders, against what a run asks for."""

from __future__ import annotations

from pathlib import Path

import pytest

from longskip.engine.encoders import check_manifest
from longskip.errors import EncoderError, LongskipError
from tests.engine.encoder_folders import config, encoders, make_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("encoders"))


FEATURES = {"latent.npy": 9, "text.npy": 9, "mask.npy": 9, "txt": 9}


@pytest.fixture
def manifest(folders) -> dict:
    parts = encoders(folders).describe()
    return {part: {**entry, "dtype": "fp16"} for part, entry in parts.items()}


def test_a_manifest_of_the_same_encoders_fits_with_and_without_their_folders(folders, manifest):
    check_manifest(config(folders), manifest, FEATURES)
    check_manifest(config(None), manifest, FEATURES)
    manifest["vae"]["scale"] = 0.18215000000001
    check_manifest(config(None), manifest, FEATURES)


@pytest.mark.parametrize(
    ("part", "name", "value", "message", "cure"),
    [
        ("vae", "channels", 16, "vae channels 16, encoders.vae.channels is 4", "set encoders.vae.channels to 16"),
        ("vae", "factor", 16, "vae factor 16, encoders.vae.factor is 8", "set encoders.vae.factor to 16"),
        ("vae", "scale", 0.13025, "vae scale 0.13025, encoders.vae.scale is 0.18215", "encoders.vae.scale to 0.13025"),
        ("vae", "shift", 0.1, "vae shift 0.1, encoders.vae.shift is 0.0", "set encoders.vae.shift to 0.1"),
        ("vae", "kind", "vq", "vae kind vq, encoders.vae.kind is vae", "set encoders.vae.kind to vq"),
        ("vae", "scale", None, "vae scale None", "data encode"),
        ("vae", "resolution", [64, 32], r"resolution \[64, 32\], model.resolution is \[32, 32\]", "to [64, 32]"),
        ("vae", "dtype", "fp8", "vae features in fp8; fp16 and fp32 are read", "data encode"),
        ("vae", "sha256", "ab", r"another vae encoder \(SHA-256 ab\) than the one in .*vae \([0-9a-f]{64}\)", "path"),
        ("vae", "buckets", [[32, 32]], r"in the buckets \[\[32, 32\]\], data.buckets is off", "data.buckets to"),
        ("text", "kind", "clip", "text kind clip, encoders.text.kind is t5", "set encoders.text.kind to clip"),
        ("text", "width", 64, "text width 64, encoders.text.width is 32", "set encoders.text.width to 64"),
        ("text", "n_tokens", 77, "text n_tokens 77, encoders.text.n_tokens is 24", "encoders.text.n_tokens to 77"),
        ("text", "dtype", "bf16", "text features in bf16", "data encode"),
        ("text", "sha256", "ab", "another text encoder", "encoders.text.path"),
        ("vae", None, None, "does not say which encoders.vae made them", "data encode"),
        ("text", None, None, "does not say which encoders.text made them", "data encode"),
    ],
)
def test_features_of_other_encoders_are_refused(folders, manifest, part, name, value, message, cure):
    if name is None:
        manifest[part] = None
    else:
        manifest[part][name] = value
    with pytest.raises(EncoderError, match=message) as caught:
        check_manifest(config(folders), manifest, FEATURES, "shards/here")
    assert caught.value.message.startswith("shards/here")
    assert cure in caught.value.cure
    assert isinstance(caught.value, LongskipError)
    assert caught.value.exit_code == 2


def test_buckets_must_be_the_same_set(folders, manifest):
    manifest["vae"]["buckets"] = [[32, 32], [16, 64]]
    check_manifest(config(folders, data={"buckets": [[16, 64], [32, 32]]}), manifest, FEATURES)
    for given in ([[32, 32]], [[64, 16], [32, 32]], "off"):
        with pytest.raises(EncoderError, match=r"in the buckets \[\[16, 64\], \[32, 32\]\], data.buckets is"):
            check_manifest(config(folders, data={"buckets": given}), manifest, FEATURES)
    automatic = config(folders, data={"buckets": "auto"})
    manifest["vae"]["buckets"] = [list(size) for size in automatic.buckets[::-1]]
    check_manifest(automatic, manifest, FEATURES)
    manifest["vae"]["buckets"].pop()
    with pytest.raises(EncoderError, match="in the buckets"):
        check_manifest(automatic, manifest, FEATURES)
    del manifest["vae"]["buckets"]
    with pytest.raises(EncoderError, match="was encoded without buckets"):
        check_manifest(config(folders, data={"buckets": [[32, 32]]}), manifest, FEATURES)


def test_data_without_features_need_the_encoders(folders, manifest):
    pictures = {"image": 9, "txt": 9}
    check_manifest(config(folders), {}, pictures)
    with pytest.raises(EncoderError, match=r"encoders\.vae\.path is not set"):
        check_manifest(config(None), {}, pictures)
    with pytest.raises(EncoderError, match=r"encoders\.text\.path is not set"):
        check_manifest(config(folders, encoders={"text": {"path": None}}), {}, pictures)
    check_manifest(config(folders, vae=False), manifest, FEATURES | {"image": 9})
    with pytest.raises(EncoderError, match=r"latents and no pictures, encoders\.vae\.kind is none"):
        check_manifest(config(folders, vae=False), manifest, FEATURES)
