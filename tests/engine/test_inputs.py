"""Training on features and on pictures that are encoded on the way is the same training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from longskip.engine.config import Config
from longskip.engine.data.encode import encode_shards
from longskip.engine.encoders import Encoders
from longskip.engine.sample import draw_prompts, load_run
from longskip.errors import ConfigError, EncoderError
from tests.engine.test_training import losses, relative
from tests.ranks import small_config, train_ranks
from tests.tiny_encoders import tiny_clip_text, tiny_t5, tiny_vae

STEPS = 6
WIDTH = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {
        "vae": tiny_vae(root / "vae", 4, 4),
        "clip": tiny_clip_text(root / "clip", WIDTH, 24),
        "t5": tiny_t5(root / "t5", WIDTH, 24),
    }


def config_of(data: Path, folders: dict[str, Path], text: str, *, paths: bool = True, **groups: Any) -> Config:
    """uvit-tiny on 8×8 latents of 32×32 pictures with frozen text features."""
    encoders = {
        "vae": {"kind": "vae", "factor": 4, "path": str(folders["vae"]) if paths else None},
        "text": {"kind": text, "width": WIDTH, "n_tokens": 24, "path": str(folders[text]) if paths else None},
    }
    return small_config(
        data,
        model={"patch": 2},
        encoders=encoders,
        diffusion={"prediction": "v", "caption_dropout": 0.3},
        train={"steps": STEPS},
        checkpoint={"every": STEPS},
        logging={"samples_every": STEPS, "sample_steps": 2},
        eval={"every": STEPS},
        **groups,
    )


def encode(shapes: Path, out: Path, config: Config) -> Path:
    for part in ("train", "validation"):
        encode_shards(shapes / part, out / part, Encoders.of(config, "cpu"), dtype="fp32", batch=8)
    return out


@pytest.mark.parametrize("text", ["clip", "t5"])
def test_features_and_encoding_on_the_way_agree(
    shapes: Path, folders: dict[str, Path], tmp_path: Path, text: str
) -> None:
    online = config_of(shapes, folders, text)
    features = encode(shapes, tmp_path / "features", online)
    stored = config_of(features, folders, text, paths=False)
    assert train_ranks(2, online, tmp_path / "online") == [0, 0]
    assert train_ranks(2, stored, tmp_path / "stored") == [0, 0]
    assert relative(losses(tmp_path / "stored"), losses(tmp_path / "online"), STEPS) <= 1e-5
    evaluated = [_validation(tmp_path / name) for name in ("online", "stored")]
    assert abs(evaluated[0] - evaluated[1]) <= 1e-5 * evaluated[0]
    # With encoders samples are drawn; features alone cannot be turned into pictures.
    assert (tmp_path / "online" / "samples" / f"step-{STEPS:08d}" / "grid.png").is_file()
    assert not (tmp_path / "stored" / "samples").exists()


def _validation(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return next(line["validation/loss"] for line in lines if "validation/loss" in line)


def test_a_latent_run_draws_and_is_the_same_alone_and_in_a_batch(
    shapes: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    config = config_of(shapes, folders, "clip")
    assert train_ranks(1, config, tmp_path / "run") == [0]
    loaded = load_run(tmp_path / "run")
    from longskip.engine.drawing import Drawing

    how = Drawing("euler", 3, 2.0, 7)
    prompts = ["a red circle", "a big blue star", "a red circle"]
    pictures = draw_prompts(loaded, prompts, how)
    assert pictures.shape == (3, 32, 32, 3)
    alone = draw_prompts(loaded, prompts[1:2], how)
    assert abs(pictures[1].astype(int) - alone[0]).max() <= 1  # of 255: products of other batch sizes round otherwise
    assert (pictures[0] != pictures[2]).any()  # the same prompt again is another picture


def test_what_does_not_fit_is_refused_before_the_first_step(
    shapes: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    from longskip.engine.distributed import World
    from longskip.engine.prepare import prepare

    config = config_of(shapes, folders, "clip")
    features = encode(shapes, tmp_path / "features", config)
    world = World(0, 1, 0, torch.device("cpu"))
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"encoders": {"vae": {"scale": 0.5}}}, EncoderError, "scale"),
        ({"encoders": {"text": {"kind": "t5"}}}, EncoderError, "kind"),
        ({"model": {"resolution": 64}}, EncoderError, "resolution"),
        ({"encoders": {"vae": {"kind": "none", "factor": 8}}, "model": {"patch": 8}}, EncoderError, "latents"),
    ]
    from longskip.engine.configio import merge, validate

    base = config_of(features, folders, "clip", paths=False).model_dump(mode="json")
    for number, (change, error, words) in enumerate(cases):
        run = tmp_path / f"refused-{number}"
        with pytest.raises(error, match=words):
            prepare(validate(merge(base, change)), run, world)
        assert not (run / "config.yaml").exists()
    with pytest.raises((EncoderError, ConfigError), match="path"):
        prepare(config_of(shapes, folders, "clip", paths=False), tmp_path / "without", world)


def test_a_caption_too_long_for_the_encoder_is_a_bad_sample(
    shapes: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Encoded on the way: the run goes on, the sample has weight 0 and is listed."""
    import shutil

    from PIL import Image

    data = tmp_path / "pictures"
    data.mkdir()
    for i in range(60):
        Image.new("RGB", (32, 32), (4 * i, 90, 120)).save(data / f"{i:03d}.png")
        words = "a red circle " * (40 if i == 7 else 1)
        (data / f"{i:03d}.txt").write_text(words)
    shutil.copytree(data, tmp_path / "train")
    shutil.copytree(data, tmp_path / "validation")
    config = config_of(tmp_path, folders, "clip")
    config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 8})})
    assert train_ranks(2, config, tmp_path / "run") == [0, 0]  # 64 samples: every one is met
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert {entry["key"] for entry in listed} <= {"007"} and all(e["reason"] == "text_too_long" for e in listed)
    assert len(listed) >= 1
