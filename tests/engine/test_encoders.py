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
from longskip.engine.config import Config
from longskip.engine.configio import merge, validate
from longskip.engine.encoders import Encoders, check_manifest
from longskip.errors import ConfigError, DataError, EncoderError, LongskipError, TextTooLongError
from tests.tiny_encoders import tiny_clip, tiny_clip_text, tiny_t5, tiny_vae

TEXTS = ["a red star", "", "a large blue circle below the small green square", "Straße 7!"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    tiny_vae(folder / "vae")
    tiny_vae(folder / "shifted", latent_channels=6, factor=4, scale=0.5, shift=0.25)
    tiny_clip_text(folder / "clip")
    tiny_clip(folder / "whole_clip")
    tiny_t5(folder / "t5")
    return folder


@pytest.fixture
def copied(folders: Path, tmp_path: Path) -> Path:
    """Encoders that a test may spoil."""
    for name in ("vae", "clip", "t5"):
        shutil.copytree(folders / name, tmp_path / name)
    return tmp_path


def config(folders: Path | None, *, text: str = "t5", vae: bool = True, **groups) -> Config:
    """A run on latents of 4x4 and on texts of the tiny encoders."""
    sizes = {"t5": {"width": 32, "n_tokens": 24}, "clip": {"width": 32, "n_tokens": 77}}
    tree = {
        "model": {"preset": "uvit-tiny", "resolution": 32, "patch": 2},
        "encoders": {
            "vae": {"kind": "vae", "path": str(folders / "vae") if folders else None} if vae else {},
            "text": {"kind": text, "path": str(folders / text) if folders else None, **sizes[text]},
        },
    }
    return validate(merge(tree, groups))


def encoders(*arguments, **settings) -> Encoders:
    return Encoders.of(config(*arguments, **settings), "cpu")


def pixels(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(count)) * 2 - 1


def test_t5_features_are_those_of_a_direct_call(folders):
    from transformers import AutoTokenizer, T5EncoderModel

    features, mask = encoders(folders).encode_text(TEXTS)
    model = T5EncoderModel.from_pretrained(folders / "t5").eval()
    given = AutoTokenizer.from_pretrained(folders / "t5")(
        TEXTS, padding="max_length", max_length=24, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(**given).last_hidden_state
        exact = model.double()(**given).last_hidden_state
    assert features.shape == (4, 24, 32)
    assert features.dtype == torch.float32
    assert torch.equal(features, expected)
    torch.testing.assert_close(features.double(), exact, rtol=1e-4, atol=1e-5)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, given["attention_mask"].bool())
    assert mask.sum(1).tolist()[:2] == [4, 1]  # a red star </s>; </s>


def test_clip_features_are_those_of_a_direct_call_without_a_mask(folders):
    from transformers import AutoTokenizer, CLIPTextModel

    features, mask = encoders(folders, text="clip").encode_text(TEXTS)
    model = CLIPTextModel.from_pretrained(folders / "clip").eval()
    given = AutoTokenizer.from_pretrained(folders / "clip")(
        TEXTS, padding="max_length", max_length=77, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(input_ids=given["input_ids"]).last_hidden_state
        exact = model.double()(input_ids=given["input_ids"]).last_hidden_state
    assert torch.equal(features, expected)
    torch.testing.assert_close(features.double(), exact, rtol=1e-4, atol=1e-5)
    assert mask.shape == (4, 77)
    assert mask.all()


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_the_real_tokens_do_not_depend_on_padding_or_neighbours(folders, kind):
    """The model itself, given one text without any padding, is the oracle."""
    from transformers import AutoTokenizer, CLIPTextModel, T5EncoderModel

    features, _ = encoders(folders, text=kind).encode_text(TEXTS)
    model = {"t5": T5EncoderModel, "clip": CLIPTextModel}[kind].from_pretrained(folders / kind).eval()
    tokenizer = AutoTokenizer.from_pretrained(folders / kind)
    for text, row in zip(TEXTS, features, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            alone = model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(row[: len(alone)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_batch_of_one_gives_what_a_batch_of_many_gives(folders, kind):
    encoder = encoders(folders, text=kind)
    features, mask = encoder.encode_text(TEXTS)
    pictures = pixels(3)
    latents = encoder.encode_images(pictures)
    for i, text in enumerate(TEXTS):
        one, own = encoder.encode_text([text])
        assert one.shape == features[:1].shape
        torch.testing.assert_close(one[0], features[i], rtol=1e-5, atol=1e-5)
        assert torch.equal(own[0], mask[i])
    for i in range(3):
        torch.testing.assert_close(encoder.encode_images(pictures[i : i + 1])[0], latents[i], rtol=1e-5, atol=1e-5)


def test_a_whole_clip_stands_for_its_text_half(folders):
    from transformers import AutoTokenizer, CLIPModel

    whole = CLIPModel.from_pretrained(folders / "whole_clip").eval().requires_grad_(False)
    ids = AutoTokenizer.from_pretrained(folders / "whole_clip")(TEXTS, padding="max_length", return_tensors="pt")
    expected = whole.text_model(input_ids=ids["input_ids"]).last_hidden_state
    encoder = Encoders.at(None, folders / "whole_clip", (32, 32), "cpu")
    assert encoder.text.kind == "clip"
    assert torch.equal(encoder.encode_text(TEXTS)[0], expected)


@pytest.mark.parametrize("name", ["vae", "shifted"])
def test_latents_are_the_scaled_mean_and_decoding_inverts_the_scaling(folders, name):
    from diffusers import AutoencoderKL

    encoder = Encoders.at(folders / name, None, (32, 32), "cpu")
    model = AutoencoderKL.from_pretrained(folders / name, low_cpu_mem_usage=False).eval()
    model.requires_grad_(False)  # torch takes other convolutions, rounded otherwise, for weights that are trained
    scale, shift = {"vae": (0.18215, 0.0), "shifted": (0.5, 0.25)}[name]
    pictures = pixels(2, 32, 48)
    latents = encoder.encode_images(pictures)
    with torch.no_grad():
        mean = model.encode(pictures).latent_dist.mode()
        expected = model.decode(mean).sample.clamp(-1, 1)
        exact = model.double().encode(pictures.double()).latent_dist.mean
    assert torch.equal(latents, encoder.encode_images(pictures.to(memory_format=torch.channels_last)))
    assert latents.shape == ((2, 4, 4, 6) if name == "vae" else (2, 6, 8, 12))
    assert torch.equal(latents, (mean - shift) * scale)
    torch.testing.assert_close(latents.double(), (exact - shift) * scale, rtol=1e-3, atol=1e-5)
    drawn = encoder.decode(latents)
    assert drawn.shape == pictures.shape
    torch.testing.assert_close(drawn, expected, rtol=1e-4, atol=1e-5)
    wild = encoder.decode(latents * 1e4)
    assert wild.abs().max() <= 1


def test_encoding_draws_nothing_at_random_and_goes_into_a_gradient(folders):
    encoder = encoders(folders).load()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    latents, (features, _) = encoder.encode_images(pixels(2)), encoder.encode_text(TEXTS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(encoder.encode_images(pixels(2)), latents)
    assert torch.equal(encoder.encode_text(TEXTS)[0], features)
    weight = torch.ones((), requires_grad=True)
    (latents * weight).sum().backward()
    assert weight.grad == latents.sum()
    for model in (encoder._autoencoder, encoder._text_model):
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_bf16_computes_in_bf16_and_hands_out_float32(folders):
    encoder = Encoders.of(config(folders), "cpu", torch.bfloat16)
    latents, (features, _) = encoder.encode_images(pixels(1)), encoder.encode_text(TEXTS)
    assert latents.dtype == features.dtype == encoder.decode(latents).dtype == torch.float32
    assert next(encoder._autoencoder.parameters()).dtype == torch.bfloat16
    exact = encoders(folders)
    torch.testing.assert_close(latents, exact.encode_images(pixels(1)), rtol=0.1, atol=0.02)
    torch.testing.assert_close(features, exact.encode_text(TEXTS)[0], rtol=0.1, atol=0.1)
    assert not torch.equal(features, exact.encode_text(TEXTS)[0])
    assert encoder.describe()["text"]["dtype"] == "bf16"
    with pytest.raises(ConfigError, match=r"cannot compute in torch\.float16"):
        Encoders.of(config(folders), "cpu", torch.float16)


@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_long_captions_are_refused_or_cut(folders, kind):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders / kind)
    fits, long = "a red star " * 3, "a red star " * 40
    tokens = {"n_tokens": 11}  # of clip: a beginning, 9 words, an end
    exact = encoders(folders, text=kind, encoders={"text": tokens})
    assert exact.token_counts([fits, long]) == [len(tokenizer(text)["input_ids"]) for text in (fits, long)]
    exact.check_text([fits])
    with pytest.raises(TextTooLongError, match=r"takes 12[12] tokens of (t5|clip), .*n_tokens is 11") as caught:
        exact.encode_text([fits, long])
    assert caught.value.reason == "text_too_long"
    assert "too_long: truncate" in str(caught.value)
    cut = encoders(folders, text=kind, encoders={"text": tokens | {"too_long": "truncate"}})
    ids = tokenizer([long], max_length=11, truncation=True, return_tensors="pt")["input_ids"]
    assert ids[0, -1] == tokenizer.eos_token_id
    with torch.no_grad():
        expected = cut._text_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(cut.encode_text([long])[0], expected, rtol=1e-5, atol=1e-6)


def test_wrong_shapes_are_refused(folders):
    encoder = encoders(folders)
    for shape in ((3, 32, 32), (1, 1, 32, 32), (1, 3, 32, 36), (1, 3, 20, 32)):
        with pytest.raises(DataError, match="sides that 8 divides"):
            encoder.encode_images(torch.zeros(shape))
    for shape in ((4, 4, 4), (1, 3, 4, 4)):
        with pytest.raises(DataError, match=r"\(B, 4, h, w\)"):
            encoder.decode(torch.zeros(shape))


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


def test_what_has_no_path_is_missed_only_when_it_is_used(folders):
    encoder = encoders(None)
    assert encoder.load().describe() == {}
    with pytest.raises(EncoderError, match=r"encoders\.vae\.path is not set"):
        encoder.decode(torch.zeros(1, 4, 4, 4))
    with pytest.raises(EncoderError, match=r"encoders\.text\.path is not set"):
        encoder.encode_text(["a"])
    only = encoders(folders, encoders={"text": {"path": None}})
    assert set(only.describe()) == {"vae"}
    assert only.encode_images(pixels(1)).shape == (1, 4, 4, 4)


@pytest.mark.parametrize(
    ("group", "value", "message"),
    [
        ("text.width", 48, r"encoders\.text\.width is 48, the encoder in .*t5 has 32"),
        ("text.kind", "clip", r"encoders\.text\.kind is clip, the encoder in .*t5 has t5"),
        ("vae.channels", 8, r"encoders\.vae\.channels is 8, the encoder in .*vae has 4"),
        ("vae.factor", 4, r"encoders\.vae\.factor is 4, the encoder in .*vae has 8"),
        ("vae.scale", 0.13025, r"encoders\.vae\.scale is 0\.13025, the encoder in .*vae has 0\.18215"),
        ("vae.shift", 0.1, r"encoders\.vae\.shift is 0\.1, the encoder in .*vae has 0\.0"),
    ],
)
def test_a_configuration_that_the_encoder_contradicts_is_refused(folders, group, value, message):
    part, name = group.split(".")
    with pytest.raises(EncoderError, match=message) as caught:
        encoders(folders, encoders={part: {name: value, "n_tokens": 24} if part == "text" else {name: value}})
    assert f"set encoders.{group} to" in caught.value.cure


def test_more_tokens_than_clip_has_positions_are_refused(folders):
    with pytest.raises(EncoderError, match="has 77 positions, 78 tokens"):
        encoders(folders, text="clip", encoders={"text": {"n_tokens": 78}})
    assert encoders(folders, encoders={"text": {"n_tokens": 300}}).encode_text(["a"])[0].shape == (1, 300, 32)


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


def test_a_missing_package_is_named(folders, monkeypatch):
    import builtins

    found = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == "diffusers":
            raise ImportError("No module named 'diffusers'")
        return found(name, *arguments, **keywords)

    encoder = encoders(folders)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"diffusers is not installed") as caught:
        encoder.encode_images(pixels(1))
    assert "longskip[hub]" in caught.value.cure


def test_the_kind_can_be_asked_for(folders):
    assert Encoders.at(None, folders / "clip", (32, 32), "cpu", text_kind="clip").text.n_tokens == 77
    assert Encoders.at(None, folders / "t5", (32, 32), "cpu").text.n_tokens == 120
    with pytest.raises(EncoderError, match="holds clip, t5 is asked for"):
        Encoders.at(None, folders / "clip", (32, 32), "cpu", text_kind="t5")


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
