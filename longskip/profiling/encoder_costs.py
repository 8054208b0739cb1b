"""What frozen encoders cost that run beside the backbone, in closed form from the config.json they are stored with (no torch).

Counted is what ``engine/encoders.py`` executes: the posterior of diffusers' ``AutoencoderKL`` (its encoder half, never
tiled or sliced), the encoder of T5, and the text model of CLIP up to the last hidden state. A frozen encoder has no
backward pass, so its forward is all. What a config leaves out has the default of the library that reads it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from longskip.errors import EncoderError, SpecError, did_you_mean
from longskip.models.specs import Contractions

__all__ = ["KNOWN", "EncoderCost", "encoder_cost"]

Layer = tuple[str, int, int]  # the part it belongs to, multiply-adds of one picture or text, parameters


@dataclass(frozen=True)
class EncoderCost(Contractions):
    """Contractions of one forward pass of ``batch`` pictures or texts, and the parameters of what runs for them.

    ``macs_by_op`` holds multiply-adds (linear, convolution, QKᵀ and PV, a causal mask's half included, since it is
    computed and masked); no norms, activations, softmax, biases, lookups. ``parameters_by_part``: of an autoencoder the
    encoder and ``quant_conv`` alone, though the decoder is loaded along. ``tokens``: text tokens of the batch.
    """

    kind: str
    batch: int
    tokens: int
    macs_by_op: dict[str, int]
    parameters_by_part: dict[str, int]

    @property
    def parameters(self) -> int:
        return sum(self.parameters_by_part.values())


def encoder_cost(
    config: Mapping[str, Any],
    *,
    pixels: tuple[int, int] | None = None,
    tokens: int | None = None,
    batch: int = 1,
    projection: bool = False,
) -> EncoderCost:
    """The cost of encoding ``batch`` pictures of ``pixels`` (H, W), or ``batch`` texts padded to ``tokens``.

    ``config``: the parsed config.json of an ``AutoencoderKL`` (diffusers), or of a T5, a CLIP text model or a whole CLIP
    (transformers). ``projection`` adds the linear that ``CLIPTextModelWithProjection`` applies to one token a text; the
    engine takes the hidden states and leaves it out, also where the folder holds it.

    Raises ``EncoderError`` for an encoder of another kind and for a malformed config, ``SpecError`` for sizes that are
    missing, too many, or do not fit the encoder.
    """
    kind = _kind(config)
    _size("batch", batch)
    layers: list[Layer]
    if kind == "AutoencoderKL":
        _only(kind, "pixels", pixels, {"tokens": tokens, "projection": projection or None})
        layers = list(_autoencoder(config, pixels))
    else:
        wrong = {"pixels": pixels} | ({"projection": projection or None} if kind == "t5" else {})
        _only(kind, "tokens", tokens, wrong)
        text = _size("tokens", tokens)
        layers = list(_t5(config, text) if kind == "t5" else _clip(config, text, projection))
    macs, parameters = dict[str, int](), dict[str, int]()
    for part, once, count in layers:
        if once:
            macs[part] = macs.get(part, 0) + batch * once
        if count:
            parameters[part] = parameters.get(part, 0) + count
    return EncoderCost(kind, batch, batch * (tokens or 0), macs, parameters)


# -- AutoencoderKL -----------------------------------------------------------------------------------------------------

_DOWN_BLOCKS = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")


def _autoencoder(config: Mapping[str, Any], pixels: tuple[int, int] | None) -> Iterable[Layer]:
    """Every convolution on the way from pixels to the posterior's mean and log-variance (arXiv 2112.10752, app. E.1).

    A level's first residual block changes the width, by a 1x1 convolution on its shortcut where it does; every level but
    the last ends in a 3x3 convolution of stride 2 over a side padded by one, which halves an even side.
    """
    widths = _widths(config)
    kinds = config.get("down_block_types", ("DownEncoderBlock2D",))
    if not isinstance(kinds, (list, tuple)) or len(kinds) != len(widths):
        raise _malformed(
            config, "down_block_types", kinds, f"one name for each of the {len(widths)} block_out_channels"
        )
    for kind in kinds:
        if kind not in _DOWN_BLOCKS:
            raise _malformed(config, "down_block_types", kind, f"of {' and '.join(_DOWN_BLOCKS)}")
    depth, latent = _whole(config, "layers_per_block", 1), _whole(config, "latent_channels", 4)
    area = _area(pixels, 2 ** (len(widths) - 1))
    yield _conv("conv_in", area, _whole(config, "in_channels", 3), widths[0])
    before = widths[0]
    for level, (kind, width) in enumerate(zip(kinds, widths, strict=True)):
        for index in range(depth):
            yield from _resnet("down", area, width if index else before, width)
            if kind == "AttnDownEncoderBlock2D":
                yield from _pixel_attention("down", area, width)
        if level < len(widths) - 1:
            area //= 4
            yield _conv("downsample", area, width, width)
        before = width
    yield from _resnet("mid", area, before, before)
    if _flag(config, "mid_block_add_attention"):
        yield from _pixel_attention("mid", area, before)
    yield from _resnet("mid", area, before, before)
    yield ("conv_out", 0, 2 * before)  # the norm before it
    yield _conv("conv_out", area, before, 2 * latent)
    if _flag(config, "use_quant_conv"):
        yield _conv("quant_conv", area, 2 * latent, 2 * latent, kernel=1)


def _conv(part: str, area: int, n_in: int, n_out: int, kernel: int = 3) -> Layer:
    """A convolution to ``area`` pixels; what it multiplies with padding counts, as it is computed."""
    weights = n_in * n_out * kernel**2
    return part, area * weights, weights + n_out


def _resnet(part: str, area: int, n_in: int, n_out: int) -> Iterable[Layer]:
    name = f"{part}_resnets"
    yield _conv(name, area, n_in, n_out)
    yield _conv(name, area, n_out, n_out)
    yield (name, 0, 2 * n_in + 2 * n_out)  # two group norms
    if n_in != n_out:
        yield _conv(name, area, n_in, n_out, kernel=1)


def _pixel_attention(part: str, area: int, width: int) -> Iterable[Layer]:
    """One head over all pixels, behind a group norm; q, k, v and the output have biases."""
    yield (f"{part}_attention_linears", 4 * area * width**2, 4 * (width**2 + width) + 2 * width)
    yield (f"{part}_attention", 2 * area**2 * width, 0)


def _widths(config: Mapping[str, Any]) -> list[int]:
    widths = config.get("block_out_channels", (64,))
    good = isinstance(widths, (list, tuple)) and len(widths) > 0
    if not good or not all(_is_whole(width) and width > 0 for width in widths):
        raise _malformed(config, "block_out_channels", widths, "a list of positive integers")
    return list(widths)


def _area(pixels: tuple[int, int] | None, factor: int) -> int:
    whole = isinstance(pixels, (tuple, list)) and len(pixels) == 2 and all(_is_whole(n) and n > 0 for n in pixels)
    if not whole or pixels is None:
        raise SpecError(f"pixels = {pixels!r} is not two positive integers", cure="give (H, W)")
    height, width = pixels
    if height % factor or width % factor:
        raise SpecError(
            f"pictures of {height}x{width} pixels; this autoencoder divides the sides by {factor}",
            cure=f"take sides that are multiples of {factor}",
        )
    return height * width


# -- texts -------------------------------------------------------------------------------------------------------------


def _t5(config: Mapping[str, Any], tokens: int) -> Iterable[Layer]:
    """T5's encoder (arXiv 1910.10683; gated: 2002.05202): no biases, one table of relative positions for all layers."""
    width = _whole(config, "d_model", 512, "hidden_size")
    heads = _whole(config, "num_heads", 8, "num_attention_heads")
    inner = heads * _whole(config, "d_kv", 64, "head_dim")
    hidden, depth = _whole(config, "d_ff", 2048), _whole(config, "num_layers", 6, "num_hidden_layers")
    yield ("embedding", 0, _whole(config, "vocab_size", 32128) * width)
    yield ("positions", 0, _whole(config, "relative_attention_num_buckets", 32) * heads)
    matrices = 3 if _gated(config) else 2
    yield ("qkv", depth * tokens * 3 * width * inner, depth * 3 * width * inner)
    yield ("attention", depth * 2 * tokens**2 * inner, 0)
    yield ("proj", depth * tokens * inner * width, depth * inner * width)
    yield ("mlp", depth * tokens * matrices * width * hidden, depth * matrices * width * hidden)
    yield ("norms", 0, (2 * depth + 1) * width)


def _gated(config: Mapping[str, Any]) -> bool:
    name = config.get("feed_forward_proj", "relu")
    words = name.split("-") if isinstance(name, str) else []
    if not 1 <= len(words) <= 2 or (len(words) == 2 and words[0] != "gated"):
        raise _malformed(config, "feed_forward_proj", name, "an activation, or gated- and an activation")
    return words[0] == "gated"


def _clip(config: Mapping[str, Any], tokens: int, projection: bool) -> Iterable[Layer]:
    """CLIP's text transformer (arXiv 2103.00020): biases everywhere, learned positions, a norm at the end."""
    if config.get("model_type") == "clip":
        whole, config = config, config.get("text_config")  # type: ignore[assignment]
        if not isinstance(config, Mapping):
            raise _malformed(whole, "text_config", config, "an object")
    width, hidden = _whole(config, "hidden_size", 512), _whole(config, "intermediate_size", 2048)
    depth, limit = _whole(config, "num_hidden_layers", 12), _whole(config, "max_position_embeddings", 77)
    if tokens > limit:
        raise SpecError(f"tokens = {tokens}, this CLIP has {limit} positions", cure=f"give {limit} or fewer")
    yield ("embedding", 0, _whole(config, "vocab_size", 49408) * width)
    yield ("positions", 0, limit * width)
    yield ("qkv", depth * tokens * 3 * width**2, depth * 3 * (width**2 + width))
    yield ("attention", depth * 2 * tokens**2 * width, 0)
    yield ("proj", depth * tokens * width**2, depth * (width**2 + width))
    yield ("mlp", depth * tokens * 2 * width * hidden, depth * (2 * width * hidden + width + hidden))
    yield ("norms", 0, (2 * depth + 1) * 2 * width)
    if projection:
        out = width * _whole(config, "projection_dim", 512)
        yield ("projection", out, out)


# -- reading -----------------------------------------------------------------------------------------------------------

KNOWN: dict[str, str] = {"AutoencoderKL": "AutoencoderKL", "t5": "t5", "clip": "clip", "clip_text_model": "clip"}
"""What ``_class_name`` (diffusers) or ``model_type`` (transformers) may say, and the kind of cost it gets."""


def _kind(config: Mapping[str, Any]) -> str:
    if not isinstance(config, Mapping):
        raise EncoderError(f"an encoder's configuration is a mapping, not {type(config).__name__}")
    found = config.get("_class_name") or config.get("model_type")
    if found is None:
        raise EncoderError(
            "the configuration has neither _class_name nor model_type, so it is not known what it describes",
            cure="give the config.json that save_pretrained of diffusers or transformers writes",
        )
    kind = KNOWN.get(found) if isinstance(found, str) else None
    if kind is None:
        raise EncoderError(f"no cost is known of the encoder {found!r}", cure=did_you_mean(str(found), KNOWN))
    return kind


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(config: Mapping[str, Any], name: str, default: int, alias: str | None = None) -> int:
    """A positive integer of the config, under its name or the alias that transformers reads as well."""
    value = config.get(name, default if alias is None else config.get(alias, default))
    if not _is_whole(value) or value < 1:
        raise _malformed(config, name, value, "a positive integer")
    return int(value)


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name, True)
    if not isinstance(value, bool):
        raise _malformed(config, name, value, "true or false")
    return value


def _malformed(config: Mapping[str, Any], name: str, value: Any, meant: str) -> EncoderError:
    kind = config.get("_class_name") or config.get("model_type") or "encoder"
    return EncoderError(
        f"the configuration of this {kind} has {name} = {value!r}, meant is {meant}",
        cure="give the config.json that save_pretrained writes, unchanged",
    )


def _size(name: str, value: Any) -> int:
    if not _is_whole(value) or value < 1:
        raise SpecError(f"{name} = {value!r} is not a positive integer", cure=f"give {name} as 1 or more")
    return int(value)


def _only(kind: str, wanted: str, value: Any, others: Mapping[str, Any]) -> None:
    given = [name for name, other in others.items() if other is not None]
    if value is None or given:
        what = f"{' and '.join(given)} given" if given else f"{wanted} missing"
        raise SpecError(f"the cost of {kind} depends on {wanted} and batch: {what}", cure=f"give {wanted} alone")
