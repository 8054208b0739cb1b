"""Feature networks from files: what they are shown, what they give, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from longskip.engine.clip import Clip, ClipScore
from longskip.engine.feature_network import FeatureNetwork, resized
from longskip.errors import DataError, EncoderError
from tests.feature_networks import scripted, tiny_inception
from tests.tiny_encoders import tiny_clip


def noise(count: int, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def planes(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float()


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip") / "clip", seed=3)


# --- resizing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width", "size"), [(64, 64, 24), (17, 40, 24), (8, 8, 24), (299, 150, 75)])
def test_resizing_is_the_antialiased_bicubic_of_another_implementation(height: int, width: int, size: int) -> None:
    """torch's own antialiased filter; both cut the overshoot off at the ends of the range."""
    pictures = noise(3, height, width)
    theirs = nn.functional.interpolate(planes(pictures), (size, size), mode="bicubic", antialias=True)
    ours = torch.from_numpy(resized(pictures, size))
    assert ours.shape == (3, 3, size, size) and ours.dtype == torch.float32
    assert float((ours - theirs.clamp(0, 255)).abs().max()) < 2e-3
    assert float(ours.min()) >= 0 and float(ours.max()) <= 255
    assert float((ours - ours.round()).abs().mean()) > 0.1  # not rounded back to 8 bits


def test_fine_stripes_shrink_to_grey_and_not_to_an_alias() -> None:
    """Stripes above the small picture's Nyquist frequency: a filter that does not widen would leave false ones."""
    stripes = np.zeros((1, 96, 96, 3), dtype=np.uint8)
    stripes[:, :, ::2] = 255
    inner = resized(stripes, 20)[..., 2:-2]
    aliased = nn.functional.interpolate(planes(stripes), (20, 20), mode="bicubic")[..., 2:-2]
    assert float(np.ptp(inner)) < 3 and abs(float(inner.mean()) - 127.5) < 1
    assert float(aliased.max() - aliased.min()) > 100


def test_pictures_of_the_right_size_are_shown_as_they_are() -> None:
    pictures = noise(2, 24, 24)
    assert np.array_equal(resized(pictures, 24), planes(pictures).numpy())


# --- TorchScript ---------------------------------------------------------------------------------------------------


def test_a_torchscript_file_gives_what_the_module_gives(tmp_path: Path) -> None:
    module = tiny_inception(n_features=8, size=24)
    path = scripted(module, tmp_path / "net.pt")
    network = FeatureNetwork.load(path)
    pictures = noise(5, 32, 48)
    with torch.no_grad():
        shown = nn.functional.interpolate(planes(pictures), (24, 24), mode="bicubic", antialias=True).clamp(0, 255)
        expected = module(shown, True)
    found = network(pictures)
    assert found.dtype == torch.float32 and found.shape == (5, 8) and network.n_features == 8
    assert float((found - expected).abs().max()) < 1e-5
    assert float((found[1] - network(pictures[1:2])[0]).abs().max()) < 1e-6  # a picture's features are its own
    assert network.describe() == {
        "kind": "torchscript",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "features": 8,
        "input": [24, 24],
        "resize": "bicubic, antialiased, float32",
    }


class Plain(nn.Module):
    """No ``return_features``; ``input_size`` only where it is given; gives a function of the mean colours."""

    def __init__(self, size: int | None, how: str = "features") -> None:
        super().__init__()
        if size is not None:
            self.input_size = size
        self.how = how

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        means = pictures.mean((2, 3))
        if self.how == "infinite":
            return means / 0
        if self.how == "cube":
            return pictures
        if self.how == "fails":
            raise ValueError("no such thing")
        return means


class Renamed(nn.Module):
    """``return_features`` without ``input_size``, as the Inception that is passed around; gives the size it saw."""

    def forward(self, img: torch.Tensor, return_features: bool = False, use_fp16: bool = False) -> torch.Tensor:
        return img.mean((2, 3)) * 0 + img.shape[3] + (0 if return_features else 1000)


def test_what_a_network_is_given(tmp_path: Path) -> None:
    plain = FeatureNetwork.load(scripted(Plain(7), tmp_path / "plain.pt"))
    pictures = np.full((2, 9, 9, 3), (10, 20, 255), dtype=np.uint8)
    assert torch.allclose(plain(pictures), torch.tensor([[10.0, 20.0, 255.0]]).expand(2, 3))
    inception = FeatureNetwork.load(scripted(Renamed(), tmp_path / "renamed.pt"))
    assert torch.equal(inception(noise(1)), torch.full((1, 3), 299.0)) and inception.describe()["input"] == [299, 299]


def test_files_that_are_no_network_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("a network?")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("nowhere.pt", "does not exist"), ("text.pt", "no TorchScript"), ("state.pt", "no TorchScript"),
        ("empty", "config.json"),
    ):  # fmt: skip
        with pytest.raises(EncoderError, match=words):
            FeatureNetwork.load(tmp_path / name)
    for how, words in (("infinite", "not finite"), ("cube", r"\(B, D\)"), ("fails", "no such thing")):
        with pytest.raises(EncoderError, match=words):
            FeatureNetwork.load(scripted(Plain(8, how), tmp_path / f"{how}.pt"))
    with pytest.raises(EncoderError, match="input_size"):
        FeatureNetwork.load(scripted(Plain(None), tmp_path / "sizeless.pt"))
    network = FeatureNetwork.load(scripted(Plain(8), tmp_path / "good.pt"))
    for pictures in (noise(2).astype(np.float32), noise(2)[0], noise(2)[..., :1]):
        with pytest.raises(DataError, match="uint8"):
            network(pictures)


# --- CLIP ----------------------------------------------------------------------------------------------------------


def clip_input(pictures: np.ndarray, size: int) -> torch.Tensor:
    """CLIP's preparation written out: the shorter side to ``size``, the middle square, CLIP's mean and deviation."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    std = np.array([0.26862954, 0.26130258, 0.27577711])
    made = []
    for picture in pictures:
        height, width = picture.shape[:2]
        long = int(size * max(height, width) / min(height, width))
        sides = (size, long) if width < height else (long, size)
        small = np.asarray(Image.fromarray(picture).resize(sides, Image.Resampling.BICUBIC))
        top, left = (small.shape[0] - size) // 2, (small.shape[1] - size) // 2
        made.append((small[top : top + size, left : left + size] / 255 - mean) / std)
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float()


def test_a_clip_folder_gives_projected_image_embeddings(clip_folder: Path) -> None:
    from transformers import CLIPModel

    whole = CLIPModel.from_pretrained(clip_folder).eval()
    network = FeatureNetwork.load(clip_folder)
    for pictures in (noise(3, 32, 32), noise(2, 48, 80), noise(2, 90, 40)):
        with torch.no_grad():
            expected = whole.visual_projection(whole.vision_model(clip_input(pictures, 32)).pooler_output)
        assert float((network(pictures) - expected).abs().max()) < 1e-5
    assert network.n_features == 16 and network.describe()["input"] == [32, 32]


def test_the_pictures_half_alone_is_enough_and_its_projection_is_not_made_up(clip_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

    for name, kind in (("half", CLIPVisionModelWithProjection), ("unprojected", CLIPVisionModel)):
        kind.from_pretrained(clip_folder).save_pretrained(tmp_path / name)
        shutil.copy(clip_folder / "preprocessor_config.json", tmp_path / name)
    pictures = noise(2)
    half = FeatureNetwork.load(tmp_path / "half")
    assert torch.equal(half(pictures), FeatureNetwork.load(clip_folder)(pictures))
    with pytest.raises(EncoderError, match="lacks 1 weights"):
        FeatureNetwork.load(tmp_path / "unprojected")
    with pytest.raises(EncoderError, match="weights of CLIPText"):
        Clip(tmp_path / "half", "cpu").texts(["a red circle"])


def test_the_hash_is_of_weights_and_preparation(clip_folder: Path, tmp_path: Path) -> None:
    hashes = {FeatureNetwork.load(clip_folder).describe()["sha256"]}
    assert FeatureNetwork.load(clip_folder).describe()["sha256"] in hashes
    other = tiny_clip(tmp_path / "other", seed=4)
    hashes.add(FeatureNetwork.load(other).describe()["sha256"])
    settings = json.loads((other / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.5, 0.5, 0.5]
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    hashes.add(FeatureNetwork.load(other).describe()["sha256"])
    assert len(hashes) == 3


def test_clip_folders_that_cannot_be_used_are_refused(clip_folder: Path, tmp_path: Path) -> None:
    def spoilt(name: str) -> Path:
        return Path(shutil.copytree(clip_folder, tmp_path / name))

    (spoilt("unprepared") / "preprocessor_config.json").unlink()
    (spoilt("weightless") / "model.safetensors").rename(tmp_path / "weightless" / "pytorch_model.bin")
    settings = json.loads((spoilt("bert") / "config.json").read_text()) | {"model_type": "bert"}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(settings))
    data = (spoilt("cut") / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(data[: len(data) // 2])
    size = json.loads((spoilt("larger") / "preprocessor_config.json").read_text())
    size |= {"crop_size": {"height": 64, "width": 64}, "size": {"shortest_edge": 64}}
    (tmp_path / "larger" / "preprocessor_config.json").write_text(json.dumps(size))
    for name, words in (
        ("unprepared", "preprocessor_config.json"), ("weightless", "model.safetensors"), ("bert", "bert"),
        ("cut", "cannot be loaded"), ("larger", "fails on pictures"),
    ):  # fmt: skip
        with pytest.raises(EncoderError, match=words):
            FeatureNetwork.load(tmp_path / name)
        with pytest.raises(EncoderError, match=words):
            Clip(tmp_path / name, "cpu").load()


class Adapter(nn.Module):
    """The interface of a CLIPModel that torchmetrics calls: embeddings as tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.visual_projection(self.model.vision_model(pixels).pooler_output)

    def get_text_features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        found = self.model.text_model(input_ids=ids, attention_mask=mask)
        return self.model.text_projection(found.pooler_output)


def test_the_clip_score_is_that_of_torchmetrics(clip_folder: Path) -> None:
    from torchmetrics.functional.multimodal import clip_score
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

    model = Adapter(CLIPModel.from_pretrained(clip_folder).eval())
    processor = CLIPProcessor(
        CLIPImageProcessorPil.from_pretrained(clip_folder), CLIPTokenizer.from_pretrained(clip_folder)
    )
    prompts = ["a small red circle", "a big blue star at the top left", "", "two green squares", "zebra"]
    pictures = noise(5, 32, 32, seed=1)
    clip = Clip(clip_folder, "cpu").load()
    ours = ClipScore(clip)
    ours.add(pictures[:2], prompts[:2])
    ours.add(pictures[2:], prompts[2:])
    with torch.no_grad():
        images = list(torch.from_numpy(pictures).permute(0, 3, 1, 2))
        pairs = zip(images, prompts, strict=True)
        each = [float(clip_score(image, text, lambda: (model, processor))) for image, text in pairs]
        theirs = float(clip_score(images, prompts, lambda: (model, processor)))
    found = ours.result()
    raw = 100 * torch.cosine_similarity(clip.pictures(pictures), clip.texts(prompts)[0])
    assert max(abs(a - max(b, 0.0)) for a, b in zip(each, raw.tolist(), strict=True)) < 1e-4
    assert found["value"] == pytest.approx(theirs, abs=1e-4) and found["count"] == 5
    assert found["standard_error"] == pytest.approx(float(np.std(raw.numpy(), ddof=1)) / 5**0.5)
    assert found["truncated_prompts"] == 0 and len(found["clip"]["sha256"]) == len(found["clip"]["text_sha256"]) == 64


def test_a_score_below_nought_is_nought(clip_folder: Path) -> None:
    """The prompt whose cosine with a picture is lowest, so that the mean is negative."""
    clip = Clip(clip_folder, "cpu").load()
    pictures, prompts = noise(1), ["a red circle", "a blue star", "zebra", "heart", "grey", "top left", "of", "pink"]
    cosines = torch.cosine_similarity(clip.pictures(pictures), clip.texts(prompts)[0])
    worst = int(cosines.argmin())
    assert float(cosines[worst]) < 0
    score = ClipScore(clip)
    score.add(pictures, [prompts[worst]])
    assert score.result()["value"] == 0.0 and score.result()["standard_error"] is None


def test_a_prompt_past_the_positions_keeps_its_end_mark(tmp_path: Path) -> None:
    """12 positions: the start mark, ten pieces and the end mark, cut by hand."""
    from transformers import CLIPModel, CLIPTokenizer

    folder = tiny_clip(tmp_path / "short", n_tokens=12)
    clip = Clip(folder, "cpu")
    long = "a small red circle on the top of a big blue star at the left corner"
    found, truncated = clip.texts([long, "a star"])
    assert truncated == 1
    tokenizer, model = CLIPTokenizer.from_pretrained(folder), CLIPModel.from_pretrained(folder).eval()
    ids = tokenizer(long)["input_ids"]
    assert len(ids) > 12
    kept = torch.tensor([[*ids[:11], tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = model.text_projection(model.text_model(input_ids=kept).pooler_output)
    assert float((found[0] - expected[0]).abs().max()) < 1e-5
    alone, none = clip.texts(["a star"])
    assert none == 0 and float((found[1] - alone[0]).abs().max()) < 1e-5
