"""CLIP from a local folder: pictures and texts as points of one space, and the CLIP score of pictures and prompts.

The folder is what transformers' ``save_pretrained`` writes of a ``CLIPModel`` with its processor; for pictures alone a
``CLIPVisionModelWithProjection`` with its ``preprocessor_config.json`` is enough. Nothing is downloaded, and pickled
weights are not opened.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longskip.engine.encoderfiles import EncoderFiles, text_files
from longskip.engine.encoders import library, loading
from longskip.errors import DataError, EncoderError

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_KINDS = ("clip", "clip_vision_model")


class Clip:
    """Both halves of a CLIP on ``device``, in float32; each is loaded at its first use.

    Raises ``EncoderError`` for a folder that is missing, of another kind, without safetensors or without the settings of
    its picture processor.
    """

    def __init__(self, path: str | Path, device: torch.device | str) -> None:
        self.folder, self.device = Path(path), torch.device(device)
        if not self.folder.is_dir():
            raise EncoderError(f"{self.folder} is not a folder; a CLIP of transformers is meant", cure=_COPY)
        settings = _json(self.folder / "config.json")
        if settings.get("model_type") not in _KINDS:
            raise EncoderError(
                f"{self.folder} holds a {settings.get('model_type') or 'model without model_type'}, not a CLIP",
                cure=f"name a folder whose config.json has the model_type {' or '.join(_KINDS)}",
            )
        weights = sorted(self.folder.glob("model*.safetensors*"))
        if not weights:
            raise EncoderError(f"{self.folder} has no model.safetensors", cure=_COPY)
        processors = [self.folder / name for name in _PROCESSORS if (self.folder / name).is_file()]
        if not processors:
            raise EncoderError(f"{self.folder} has no {_PROCESSORS[0]}, which says how pictures are scaled", cure=_COPY)
        self.files = EncoderFiles(self.folder, settings, (*weights, *processors))

    @torch.no_grad()
    def pictures(self, pictures: np.ndarray) -> torch.Tensor:
        """uint8 (B, H, W, 3) → image embeddings (B, P) float32 on the CPU: projected, not normalised.

        CLIP's own preparation: shorter side resized (bicubic, antialiased, 8 bits), the square in the centre cut out,
        scaled by its mean and deviation; what a wide picture has beside that square is not seen. Raises ``EncoderError``
        where the processor's pictures are not the model's.
        """
        images = list(check_pictures(pictures))
        try:
            prepared = self._processor(images=images, input_data_format="channels_last", return_tensors="pt")
            found = self._vision(prepared["pixel_values"].float().to(self.device)).image_embeds
        except (RuntimeError, ValueError) as error:
            raise EncoderError(
                f"{self.folder} fails on pictures {pictures.shape}: {str(error)[:300]}",
                cure="take the processor's settings that belong to the model",
            ) from error
        return found.float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> tuple[torch.Tensor, int]:
        """B texts → text embeddings (B, P) float32 on the CPU, and how many texts were cut to the positions there are.

        A cut text keeps its end mark, where CLIP reads the embedding.
        """
        positions = self._text.config.max_position_embeddings
        lengths = [len(row) for row in self._tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]]
        given = self._tokenizer(list(texts), padding=True, truncation=True, max_length=positions, return_tensors="pt")
        ids, mask = given["input_ids"].to(self.device), given["attention_mask"].to(self.device)
        found = self._text(input_ids=ids, attention_mask=mask).text_embeds
        return found.float().cpu(), sum(length > positions for length in lengths)

    def load(self) -> Clip:
        """Loads and tries both halves now, so that what is wrong with them is met before anything else is done."""
        widths = self.pictures(np.zeros((1, 32, 32, 3), dtype=np.uint8)).shape[1], self.texts([""])[0].shape[1]
        if widths[0] != widths[1]:
            raise EncoderError(f"{self.folder} puts pictures and texts into spaces of {widths[0]} and {widths[1]}")
        return self

    def describe(self) -> dict[str, Any]:
        """What embeddings of pictures depend on; ``sha256`` is over weights, settings and picture processor."""
        return {"kind": "clip", "sha256": self.files.sha256(), "input": self.input_size}

    @property
    def input_size(self) -> list[int]:
        """Pixels [H, W] of the square that the vision half sees."""
        size = self._processor.crop_size
        return [int(size["height"]), int(size["width"])]

    @cached_property
    def _processor(self) -> Any:
        transformers = library("transformers")
        # The one that computes with PIL; the other needs torchvision.
        kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
        with loading(self.files):
            return kind.from_pretrained(str(self.folder), local_files_only=True)

    @cached_property
    def _vision(self) -> Any:
        return self._model("CLIPVisionModelWithProjection")

    @cached_property
    def _text(self) -> Any:
        return self._model("CLIPTextModelWithProjection")

    @cached_property
    def _tokenizer(self) -> Any:
        files = text_files(self.folder)
        with loading(files):
            return library("transformers").CLIPTokenizer.from_pretrained(str(files.tokenizer), local_files_only=True)

    def _model(self, name: str) -> Any:
        with loading(self.files):
            model, report = getattr(library("transformers"), name).from_pretrained(
                str(self.folder),
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
        missing = sorted(report["missing_keys"])
        if missing:  # they would have been made up at random
            raise EncoderError(
                f"{self.folder} lacks {len(missing)} weights of {name}, the first is {missing[0]}", cure=_COPY
            )
        return model.requires_grad_(False).eval().to(self.device)


class ClipScore:
    """The CLIP score of pictures and their prompts (2104.08718, as torchmetrics scales it): max(0, mean of 100·cos)."""

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self._scores: list[torch.Tensor] = []
        self._truncated = 0

    def add(self, pictures: np.ndarray, prompts: Sequence[str]) -> None:
        """uint8 (B, H, W, 3) and their B prompts."""
        texts, truncated = self.clip.texts(prompts)
        self._scores.append(100 * torch.cosine_similarity(self.clip.pictures(pictures).double(), texts.double()))
        self._truncated += truncated

    def result(self) -> dict[str, Any]:
        """``value``, its standard error over the pictures, and how many prompts were cut to CLIP's length."""
        scores = torch.cat(self._scores)
        error = float(scores.std() / math.sqrt(len(scores))) if len(scores) > 1 else None
        return {
            "value": max(0.0, float(scores.mean())),
            "standard_error": error,
            "count": len(scores),
            "truncated_prompts": self._truncated,
            "clip": self.clip.describe() | {"text_sha256": text_files(self.clip.folder).sha256()},
        }


def check_pictures(pictures: np.ndarray) -> np.ndarray:
    """The array itself. Raises ``DataError`` unless it is uint8 (B, H, W, 3)."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3:
        raise DataError(f"pictures of {pictures.dtype} {pictures.shape}; uint8 (B, H, W, 3) is meant")
    return pictures


_COPY = "copy the whole folder of a CLIPModel there (config, safetensors, tokenizer, preprocessor_config.json)"


def _json(path: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise EncoderError(f"{path} cannot be read: {error}", cure=_COPY) from error
    if not isinstance(value, dict):
        raise EncoderError(f"{path} holds a {type(value).__name__}, not an object", cure=_COPY)
    return value
