"""Encoders' folders: what is read of them, their hash, and what is refused."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from longskip.engine import encoderfiles
from longskip.engine.encoders import Encoders
from longskip.errors import EncoderError
from tests.engine.encoder_folders import TEXTS, encoders, make_folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture
def copied(folders: Path, tmp_path: Path) -> Path:
    """Encoders that a test may spoil."""
    for name in ("vae", "clip", "t5"):
        shutil.copytree(folders / name, tmp_path / name)
    return tmp_path


def digest(*files: tuple[str, Path]) -> str:
    lines = [f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for name, path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_the_description_is_what_the_index_holds(folders):
    parts = encoders(folders).describe()
    vae, t5 = folders / "vae", folders / "t5"
    weights = "diffusion_pytorch_model.safetensors"
    assert parts == {
        "vae": {
            "kind": "vae",
            "sha256": digest(("config.json", vae / "config.json"), (weights, vae / weights)),
            "dtype": "fp32",
            "resolution": [32, 32],
            "channels": 4,
            "factor": 8,
            "scale": 0.18215,
            "shift": 0.0,
            "posterior": "mean",
        },
        "text": {
            "kind": "t5",
            "sha256": digest(
                ("config.json", t5 / "config.json"),
                ("model.safetensors", t5 / "model.safetensors"),
                ("tokenizer/tokenizer.json", t5 / "tokenizer.json"),
                ("tokenizer/tokenizer_config.json", t5 / "tokenizer_config.json"),
            ),
            "dtype": "fp32",
            "n_tokens": 24,
            "width": 32,
            "too_long": "error",
        },
    }


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_the_hash_is_of_weights_configuration_and_tokenizer_and_of_nothing_else(copied, name):
    before = encoderfiles.text_files(copied / "t5").sha256()
    reads = encoderfiles._file_sha256.cache_info().misses
    assert encoderfiles.text_files(copied / "t5").sha256() == before
    assert encoderfiles._file_sha256.cache_info().misses == reads  # remembered
    (copied / "t5" / "README.md").write_text("about")
    (copied / "t5").rename(copied / "elsewhere")
    assert encoderfiles.text_files(copied / "elsewhere").sha256() == before
    data = bytearray((copied / "elsewhere" / name).read_bytes())
    data[-2] ^= 1
    (copied / "elsewhere" / name).write_bytes(data)
    if name.endswith("tensors"):
        assert encoderfiles.text_files(copied / "elsewhere").sha256() != before
    else:
        (copied / "elsewhere" / name).write_bytes(bytes(data[:-2]) + b"  }")  # still JSON for config.json
        assert encoderfiles.text_files(copied / "elsewhere").sha256() != before


def test_a_pipeline_folder_is_taken_apart(folders, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(folders / "vae", pipeline / "vae")
    for path in (folders / "clip").iterdir():
        part = pipeline / ("tokenizer" if path.name.startswith("tokenizer") else "text_encoder")
        part.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, part)
    whole = Encoders.at(pipeline, pipeline, (32, 32), "cpu")
    apart = Encoders.at(folders / "vae", folders / "clip", (32, 32), "cpu")
    assert whole.describe() == apart.describe()
    assert torch.equal(whole.encode_text(TEXTS)[0], apart.encode_text(TEXTS)[0])
    direct = Encoders.at(pipeline / "vae", pipeline / "text_encoder", (32, 32), "cpu")
    assert torch.equal(direct.encode_text(TEXTS)[0], apart.encode_text(TEXTS)[0])


def test_weights_in_several_files_are_the_same_weights(folders, tmp_path):
    from transformers import T5EncoderModel

    shutil.copytree(folders / "t5", tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").unlink()
    T5EncoderModel.from_pretrained(folders / "t5").save_pretrained(tmp_path / "t5", max_shard_size="30KB")
    parts = sorted((tmp_path / "t5").glob("model-*.safetensors"))
    assert len(parts) > 2
    one, _ = encoders(folders, vae=False).encode_text(TEXTS)
    many, _ = encoders(tmp_path, vae=False).encode_text(TEXTS)
    assert torch.equal(one, many)
    parts[1].unlink()
    with pytest.raises(EncoderError, match=f"lists {parts[1].name}, which is not there"):
        encoders(tmp_path, vae=False)
    index = tmp_path / "t5" / "model.safetensors.index.json"
    for name in ("../model.safetensors", "model.bin", "/etc/model.safetensors", 7):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(EncoderError, match="only safetensors beside it are read"):
            encoders(tmp_path, vae=False)


def test_a_clip_tokenizer_of_two_files_is_read(folders, tmp_path):
    shutil.copytree(folders / "clip", tmp_path / "clip")
    model = json.loads((tmp_path / "clip" / "tokenizer.json").read_text())["model"]
    (tmp_path / "clip" / "tokenizer.json").unlink()
    (tmp_path / "clip" / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (tmp_path / "clip" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    one, _ = encoders(folders, text="clip", vae=False).encode_text(TEXTS)
    other, _ = encoders(tmp_path, text="clip", vae=False).encode_text(TEXTS)
    assert torch.equal(one, other)


def test_a_sentencepiece_tokenizer_gives_sentencepieces_own_ids(tmp_path, monkeypatch):
    """As Google's T5 folders hold it; sentencepiece itself is the oracle for the ids."""
    sentencepiece = pytest.importorskip("sentencepiece")
    from transformers import T5Config, T5EncoderModel

    lines = [f"a {size} {colour} star" for size in ("small", "large") for colour in ("red", "green", "blue")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 20), model_prefix=str(tmp_path / "spiece"), vocab_size=40, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    folder = tmp_path / "t5"
    T5EncoderModel(T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)).save_pretrained(
        folder
    )
    (tmp_path / "spiece.model").rename(folder / "spiece.model")
    encoder = encoders(tmp_path, vae=False)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    for line in lines:
        assert encoder._tokenizer(line)["input_ids"] == [*oracle.encode(line), 1]
    assert encoder.encode_text(lines)[0].isfinite().all()
    monkeypatch.setattr(encoderfiles.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EncoderError, match="needs the package sentencepiece"):
        encoders(tmp_path, vae=False)


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("part", ["vae", "t5", "clip"])
def test_pickled_weights_are_never_opened(copied, part):
    trap = copied / "sprung"
    stem = "diffusion_pytorch_model" if part == "vae" else "pytorch_model"
    weights = next((copied / part).glob("*.safetensors"))
    (copied / part / f"{stem}.bin").write_bytes(pickle.dumps(Trap(trap)))
    arguments = {"text": "t5" if part == "vae" else part, "vae": part == "vae"}
    encoders(copied, **arguments).load()  # beside safetensors it does no harm
    weights.unlink()
    with pytest.raises(EncoderError, match=rf"only pickled weights \({stem}\.bin\), which can run code") as caught:
        encoders(copied, **arguments)
    assert "safetensors" in caught.value.cure
    assert not trap.exists()


def test_nothing_is_fetched(folders, monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    encoders(folders).load().encode_text(TEXTS)
    encoders(folders, text="clip").load()
    with pytest.raises(EncoderError, match=r"google/t5-v1_1-xxl is not a folder.*\n.*nothing is downloaded"):
        encoders(None, encoders={"text": {"path": "google/t5-v1_1-xxl"}})


def edit(path: Path, **changes) -> None:
    settings = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in settings.items() if value is not None}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_weight(path: Path) -> None:
    tensors = load_file(path)
    del tensors[sorted(tensors)[0]]
    save_file(tensors, path, metadata={"format": "pt"})


def shrink_a_weight(path: Path) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].flatten()[:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})


VAE = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("part", "spoil", "message"),
    [
        ("vae", shutil.rmtree, "vae is not a folder; an AutoencoderKL of diffusers is meant"),
        ("t5", shutil.rmtree, "t5 is not a folder; a T5 or CLIP"),
        ("vae", lambda f: (shutil.rmtree(f), f.write_text("")), "vae is not a folder"),
        ("vae", lambda f: (f / "config.json").unlink(), "no config.json"),
        ("t5", lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
        ("t5", lambda f: (f / "config.json").write_text("[]"), "holds a list, not an object"),
        ("vae", lambda f: edit(f / "config.json", _class_name="VQModel"), "holds a VQModel, not AutoencoderKL"),
        ("vae", lambda f: edit(f / "config.json", _class_name=None), "without _class_name, not AutoencoderKL"),
        ("vae", lambda f: edit(f / "config.json", latent_channels="four"), "config.json is malformed"),
        ("vae", lambda f: edit(f / "config.json", block_out_channels=None), "config.json is malformed"),
        ("vae", lambda f: edit(f / "config.json", latents_mean=[0.0] * 4), "each latent channel by itself"),
        ("vae", lambda f: edit(f / "config.json", in_channels=1), "takes 1 channels and gives 3"),
        ("t5", lambda f: edit(f / "config.json", model_type="bert"), "holds a bert, neither T5 nor CLIP"),
        ("t5", lambda f: edit(f / "config.json", d_model="wide"), "config.json is malformed"),
        ("clip", lambda f: edit(f / "config.json", model_type="clip_vision_model"), "neither T5 nor CLIP"),
        ("t5", lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter"),
        ("t5", lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer \(tokenizer.json or spiece.model\)"),
        ("clip", lambda f: (f / "tokenizer.json").unlink(), r"no tokenizer \(tokenizer.json, or vocab.json and"),
        ("clip", lambda f: (f / "tokenizer.json").write_text("{}"), "cannot be loaded"),
        ("clip", lambda f: edit(f / "config.json", vocab_size=100), "cannot be loaded|knows 100"),
        ("vae", lambda f: (f / VAE).unlink(), f"no {VAE}"),
        ("clip", lambda f: (f / "model.safetensors").unlink(), r"no model\.safetensors"),
        ("vae", lambda f: cut(f / VAE), "cannot be loaded"),
        ("t5", lambda f: cut(f / "model.safetensors"), "cannot be loaded"),
        ("vae", lambda f: drop_a_weight(f / VAE), "lacks 1 weights of AutoencoderKL|cannot be loaded"),
        ("clip", lambda f: drop_a_weight(f / "model.safetensors"), "lacks 1 weights of CLIPTextModel"),
        ("t5", lambda f: drop_a_weight(f / "model.safetensors"), "lacks 1 weights of T5EncoderModel"),
        ("vae", lambda f: shrink_a_weight(f / VAE), "cannot be loaded"),
        ("t5", lambda f: shrink_a_weight(f / "model.safetensors"), "cannot be loaded|lacks"),
    ],
)
def test_folders_that_are_not_what_they_should_be_are_refused(copied, part, spoil, message):
    spoil(copied / part)
    with pytest.raises(EncoderError, match=message):
        encoders(copied, text="t5" if part == "vae" else part, vae=part == "vae").load().encode_text(["a"])


def test_a_tokenizer_of_another_encoder_is_refused(copied):
    edit(copied / "t5" / "config.json", vocab_size=64)
    tensors = load_file(copied / "t5" / "model.safetensors")
    tensors["shared.weight"] = tensors["shared.weight"][:64].clone()
    save_file(tensors, copied / "t5" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EncoderError, match=r"the tokenizer in .* has \d+ tokens, the encoder in .* knows 64"):
        encoders(copied, vae=False).encode_text(["a"])
