"""The diffusers layout: a folder that ``DiffusionPipeline.from_pretrained`` loads and draws from, without longskip.

``model_index.json``, ``pipeline.py``, and a folder for each component, with the python file of those that diffusers does
not have (``diffusers_pipeline/`` here). Frozen encoders are copied from where the configuration says they lie.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longskip.engine.config import Config
from longskip.engine.encoderfiles import check_text, check_vae

if TYPE_CHECKING:
    from longskip.engine.export import Model

SOURCES = Path(__file__).with_name("diffusers_pipeline")
WEIGHTS = "diffusion_pytorch_model"
# transformers' classes by encoders.text.kind: (model, tokenizer where the folder names none)
_TEXT = {"clip": ("CLIPTextModel", "CLIPTokenizer"), "t5": ("T5EncoderModel", "T5Tokenizer")}


def check(config: Config) -> None:
    """Refuse what cannot be laid out before a checkpoint is read: encoders that are not what the configuration says."""
    if config.encoders.vae.kind == "vae" and config.encoders.vae.path:
        check_vae(config.encoders.vae)
    if config.encoders.text.frozen and config.encoders.text.path:
        check_text(config.encoders.text)


def write(folder: Path, model: Model, limit: int) -> None:
    """Lay ``model`` out in ``folder``, weight files of at most ``limit`` bytes.

    A frozen encoder without a path is left out: the pipeline is then given it on loading, or draws latents.
    """
    from longskip.engine.tensorfiles import write_files

    config = model.config
    index: dict[str, Any] = {"_class_name": ["pipeline", "UViTPipeline"], **_version()}
    shutil.copyfile(SOURCES / "pipeline.py", folder / "pipeline.py")

    spec = asdict(config.backbone())
    spec |= {"out_channels": config.backbone().c_out, "sample_size": list(spec.pop("latent_size"))}
    del spec["pos_init"]
    transformer = _component(folder, index, "transformer", "longskip_uvit", "UViTModel", spec)
    write_files(transformer, WEIGHTS, model.entries("backbone."), {"format": "pt"} | model.about, limit)

    _scheduler(folder, index, config)
    _vae(folder, index, config)
    _text(folder, index, model, limit)
    index |= {
        "objective": config.diffusion.objective,
        "prediction": config.diffusion.prediction,
        "factor": config.factor if config.encoders.vae.kind == "vae" else None,
        "truncate": config.encoders.text.too_long == "truncate",
    }
    _json(folder / "model_index.json", index)


def _scheduler(folder: Path, index: dict[str, Any], config: Config) -> None:
    group = config.diffusion
    settings: dict[str, Any]
    if group.objective == "flow":
        name, settings = "FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 1000, "shift": group.shift}
    else:
        kinds = {"epsilon": "epsilon", "v": "v_prediction", "x": "sample"}
        name = "DDIMScheduler"
        settings = {
            "num_train_timesteps": group.train_steps,
            "beta_start": group.beta_start,
            "beta_end": group.beta_end,
            "beta_schedule": "scaled_linear",
            "prediction_type": kinds[group.prediction],
            "clip_sample": False,
            "set_alpha_to_one": True,
            "timestep_spacing": "trailing",  # the noisiest step first, as training ends there (2305.08891)
        }
    (folder / "scheduler").mkdir()
    _json(folder / "scheduler" / "scheduler_config.json", {"_class_name": name, **_version(), **settings})
    index["scheduler"] = ["diffusers", name]


def _vae(folder: Path, index: dict[str, Any], config: Config) -> None:
    index["vae"] = [None, None]
    group = config.encoders.vae
    if group.kind == "none" or not group.path:
        return
    files = check_vae(group)
    out = folder / "vae"
    out.mkdir()
    for path in files.weights:
        shutil.copyfile(path, out / path.name)
    # The pipeline takes the scale of the latents from here, as diffusers' pipelines do.
    scaled = {"scaling_factor": group.scale, "shift_factor": group.shift}
    _json(out / "config.json", dict(files.settings) | scaled)
    index["vae"] = ["diffusers", "AutoencoderKL"]


def _text(folder: Path, index: dict[str, Any], model: Model, limit: int) -> None:
    from longskip.engine.tensorfiles import write_files

    index |= {"text_encoder": [None, None], "tokenizer": [None, None]}
    group = model.config.encoders.text
    if model.vocabulary is not None:
        shape = {"vocab_size": len(model.vocabulary)} | {
            name: getattr(group, name) for name in ("width", "n_tokens", "depth")
        }
        encoder = _component(folder, index, "text_encoder", "longskip_words", "WordEncoder", shape)
        write_files(encoder, WEIGHTS, model.entries("text."), {"format": "pt"}, limit)
        settings = {"n_tokens": group.n_tokens, "truncate": group.too_long == "truncate"}
        tokenizer = _component(
            folder, index, "tokenizer", "longskip_tokenizer", "WordTokenizer", settings, "tokenizer_config.json"
        )
        words = json.dumps(model.vocabulary.to_json(), ensure_ascii=False)
        (tokenizer / "vocabulary.json").write_text(words, "utf-8")
    elif group.frozen and group.path:
        files = check_text(group)
        out, tokenizer = folder / "text_encoder", folder / "tokenizer"
        out.mkdir()
        tokenizer.mkdir()
        for name, path in files.files:
            target = tokenizer / Path(name).name if name.startswith("tokenizer/") else out / name
            shutil.copyfile(path, target)
        encoder_class, tokenizer_class = _TEXT[group.kind]
        said = tokenizer / "tokenizer_config.json"
        if said.is_file():
            tokenizer_class = json.loads(said.read_text("utf-8")).get("tokenizer_class") or tokenizer_class
        index["text_encoder"] = ["transformers", encoder_class]
        index["tokenizer"] = ["transformers", tokenizer_class]


def _component(
    folder: Path,
    index: dict[str, Any],
    name: str,
    module: str,
    class_name: str,
    settings: dict[str, Any],
    file: str = "config.json",
) -> Path:
    """A component whose class stands in a python file of its own folder."""
    out = folder / name
    out.mkdir()
    shutil.copyfile(SOURCES / f"{module}.py", out / f"{module}.py")
    _json(out / file, {"_class_name": class_name, **_version(), **settings})
    index[name] = [module, class_name]
    return out


def _version() -> dict[str, str]:
    """The version of diffusers here, which need not be installed to write its layout."""
    try:
        return {"_diffusers_version": metadata.version("diffusers")}
    except metadata.PackageNotFoundError:
        return {}


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
