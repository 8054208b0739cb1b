"""The ways in which papers account for training compute, side by side: what each would have called the same training.

==================  ==================================================================================================
``exact``           model FLOPs: 3 × the forward's contractions, by op
``six_nd``          6·N·D: N all trainable parameters, D all tokens (time, text, image)
``image_tokens``    6·N·D with image tokens alone (scaling laws for diffusion transformers, arXiv 2410.08184)
``kaplan``          6·N·D without embeddings and output projection in N (arXiv 2001.08361, §2.1)
``kaplan_context``  3·(2·N + 2·n_layer·n_ctx·d_attn)·D, the same N (its Table 1; attention as if causal: half of it)
``chinchilla``      3 × forward with the softmax as 3·heads·n_ctx² a layer, embeddings and output in (2203.15556, App. F)
==================  ==================================================================================================
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from longskip.errors import ConfigError
from longskip.models.specs import UViTSpec

LABELS = {
    "exact": "exact model FLOPs",
    "six_nd": "6ND, all tokens",
    "image_tokens": "6ND, image tokens (2410.08184)",
    "kaplan": "Kaplan 6ND",
    "kaplan_context": "Kaplan with context",
    "chinchilla": "Chinchilla, App. F",
}
# The parts of a U-ViT that stand for a language model's embeddings and output projection.
_EMBEDDINGS = ("patch", "pos", "text", "label", "head_linear", "conv")


@dataclass(frozen=True, slots=True)
class Account:
    """One accounting of a training: the N and D that it counts (None where it goes by op), and its FLOPs.

    ``exact_share`` is exact model FLOPs ÷ these FLOPs.
    """

    name: str
    params: int | None
    tokens: int | None
    flops: int
    exact_share: float

    @property
    def label(self) -> str:
        return LABELS[self.name]

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "label": self.label,
            "params": self.params,
            "tokens": self.tokens,
            "flops": self.flops,
            "exact_share": self.exact_share,
        }


@dataclass(frozen=True, slots=True)
class Work:
    """What was trained: images and tokens that the backbone processed, and exact model FLOPs; all counts."""

    images: int
    image_tokens: int
    tokens: int
    model_flops: int


def of_spec(spec: UViTSpec, images: int) -> Work:
    """``images`` through a model of this shape at its own resolution, with whole texts."""
    cost = spec.flops(1)
    return Work(images, images * cost.image_tokens, images * cost.tokens, images * cost.model_flops)


def params_without_embeddings(spec: UViTSpec) -> int:
    """Kaplan's N: without patch, text and label embeddings, positions, and the output projection."""
    counts = spec.param_counts()
    return counts.total - sum(counts.by_part[part] for part in _EMBEDDINGS)


def accounts(works: Iterable[Work], params: int, spec: UViTSpec | None) -> list[Account]:
    """All accountings of the given pieces of work of one model with ``params`` trainable parameters.

    Each piece's context is its mean tokens per image, which is exact where its images are of one size. Without the
    ``spec`` those that need the model's shape are left out.
    """
    works = list(works)
    image_tokens, tokens, exact = (
        sum(getattr(work, name) for work in works) for name in ("image_tokens", "tokens", "model_flops")
    )
    found: list[tuple[str, int | None, int | None, int]] = [
        ("exact", None, tokens, exact),
        ("six_nd", params, tokens, 6 * params * tokens),
        ("image_tokens", params, image_tokens, 6 * params * image_tokens),
    ]
    if spec is not None:
        own = params_without_embeddings(spec)
        pairs = round(sum((Fraction(work.tokens**2, work.images) for work in works if work.images), Fraction(0)))
        context = 6 * spec.n_blocks * spec.width * pairs
        softmax = 9 * spec.n_blocks * spec.n_heads * pairs
        found += [
            ("kaplan", own, tokens, 6 * own * tokens),
            ("kaplan_context", own, tokens, 6 * own * tokens + context),
            ("chinchilla", None, tokens, exact + softmax),
        ]
    return [
        Account(name, counted, seen, flops, exact / flops if flops else float("nan"))
        for name, counted, seen, flops in found
    ]


@dataclass(frozen=True, slots=True)
class LanguageModel:
    """A decoder as in Chinchilla's Table A9: width, MLP width, width of a head, heads, layers."""

    width: int
    mlp_width: int
    head_width: int
    n_heads: int
    n_layers: int

    def __post_init__(self) -> None:
        for name in ("width", "mlp_width", "head_width", "n_heads", "n_layers"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"{name} = {getattr(self, name)} is below its limit 1", cure="give a positive integer"
                )


def chinchilla_params(model: LanguageModel, vocabulary: int = 32_000) -> int:
    """Parameters with the embedding table, relative positions, biases and norms (arXiv 2203.15556; N of Table A4)."""
    d, ff = model.width, model.mlp_width
    layer = (3 * d**2 + 3 * d) + (d**2 + 2 * d) + (d**2 + d) + (2 * d * ff + ff + d) + 4 * d
    return model.n_layers * layer + 2 * d + d * vocabulary


def chinchilla_flops(model: LanguageModel, context: int = 2048, vocabulary: int = 0) -> int:
    """Training FLOPs of one sequence, 3 × forward by App. F of arXiv 2203.15556.

    With a ``vocabulary`` the embedding and the logits are counted; Table A4's figures come out without.
    """
    d, inner, s = model.width, model.head_width * model.n_heads, context
    attention = 2 * 3 * s * d * inner + 2 * 2 * s**2 * inner + 3 * model.n_heads * s**2 + 2 * s * inner * d
    dense = 2 * s * 2 * d * model.mlp_width
    return 3 * (model.n_layers * (attention + dense) + 2 * 2 * s * d * vocabulary)


def chinchilla_ratio(model: LanguageModel, context: int = 2048) -> float:
    """Table A4: FLOPs by op ÷ 6·N·D of one sequence."""
    return chinchilla_flops(model, context) / (6 * chinchilla_params(model) * context)
