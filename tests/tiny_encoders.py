"""Small randomly initialised encoders in their own formats, built offline: what a folder of T5, CLIP or a VAE holds.

Same arguments, same bytes. The tokenizers know the words of the shapes captions whole and spell the rest.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

WORDS = (
    "a", "an", "the", "of", "and", "to", "on", "in", "with", "is", "are", "at", "picture", "photo", "drawing",
    "image", "small", "medium", "large", "tiny", "big", "red", "green", "blue", "yellow", "orange", "purple", "pink",
    "cyan", "grey", "gray", "black", "white", "circle", "square", "triangle", "star", "cross", "diamond", "ring",
    "heart", "top", "bottom", "left", "right", "centre", "center", "middle", "upper", "lower", "corner", "above",
    "below", "beside", "next", "background",
)  # fmt: skip


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def tiny_vae(
    folder: str | Path,
    latent_channels: int = 4,
    factor: int = 8,
    *,
    scale: float = 0.18215,
    shift: float | None = None,
    seed: int = 0,
) -> Path:
    """An ``AutoencoderKL`` (config.json, diffusion_pytorch_model.safetensors) that divides pixels by ``factor``."""
    from diffusers import AutoencoderKL

    levels = factor.bit_length()
    if factor != 1 << (levels - 1):
        raise ValueError(f"factor {factor} is not a power of two")
    with _seeded(seed):
        vae = AutoencoderKL(
            block_out_channels=(8,) * levels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=latent_channels,
            sample_size=32,
            scaling_factor=scale,
            shift_factor=shift,
        )
    vae.save_pretrained(folder, safe_serialization=True)
    return Path(folder)


def clip_tokenizer(n_tokens: int = 77) -> Any:
    """A ``CLIPTokenizer``: byte-level BPE whose merges make the known words whole."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*letters, *(letter + "</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:  # the word's end first, so that one merge list serves all words
            pair = (pieces[-2], pieces[-1])
            if pair not in merges:
                merges.append(pair)
                vocabulary.append("".join(pair))
            pieces[-2:] = ["".join(pair)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {piece: i for i, piece in enumerate(dict.fromkeys(vocabulary))}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=n_tokens)


def _clip_text_settings(tokenizer: Any, width: int, n_tokens: int) -> dict[str, int]:
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": n_tokens,
        "projection_dim": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def tiny_clip_text(folder: str | Path, width: int = 32, n_tokens: int = 77, *, seed: int = 0) -> Path:
    """A ``CLIPTextModel`` with its tokenizer, in one folder."""
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = clip_tokenizer(n_tokens)
    with _seeded(seed):
        model = CLIPTextModel(CLIPTextConfig(**_clip_text_settings(tokenizer, width, n_tokens)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def tiny_clip(folder: str | Path, width: int = 32, n_tokens: int = 77, image: int = 32, *, seed: int = 0) -> Path:
    """A whole ``CLIPModel`` (pictures of ``image`` pixels, a space of 16 dimensions) with tokenizer and processor."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer = clip_tokenizer(n_tokens)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": image,
        "patch_size": 8,
        "projection_dim": 16,
    }
    text = _clip_text_settings(tokenizer, width, n_tokens)
    with _seeded(seed):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": image},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image, "width": image},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
    return Path(folder)


def t5_tokenizer(n_tokens: int = 120) -> Any:
    """A ``T5Tokenizer``: unigram pieces, the known words whole, other words letter by letter."""
    from transformers import T5Tokenizer

    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -5.0) for word in WORDS]
    pieces += [(letter, -8.0) for letter in letters]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=n_tokens)


def tiny_t5(folder: str | Path, width: int = 32, n_tokens: int = 120, *, seed: int = 0) -> Path:
    """A ``T5EncoderModel`` (gated GELU, as v1.1) with its tokenizer, in one folder."""
    from transformers import T5Config, T5EncoderModel

    tokenizer = t5_tokenizer(n_tokens)
    with _seeded(seed):
        model = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=width,
                d_kv=8,
                d_ff=2 * width,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
