"""What frozen encoders give: features and latents, against direct calls of the models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longskip.engine.encoders import Encoders
from longskip.errors import ConfigError, DataError, EncoderError, TextTooLongError
from tests.engine.encoder_folders import TEXTS, config, encoders, make_folders, pixels


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folders(tmp_path_factory.mktemp("encoders"))


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
