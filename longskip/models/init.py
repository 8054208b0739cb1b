"""Initial values as a pure function of (seed, canonical name, shape, kind).

Nothing here depends on rank, layout, device, construction order or earlier draws: whoever materialises a parameter,
whole or unit by unit, gets the same bits. The draws are counter-based (Philox), keyed by a hash of seed and name; they
are the same for one version of numpy, which guards the raw counter stream but not the normal sampler for ever.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from longskip.errors import SpecError

__all__ = ["initial_value"]

_CHUNK = 1 << 20  # stays in cache, so 100M elements pass once through memory
_STD = 0.02
KINDS = ("zeros", "ones", "normal", "trunc_normal", "fan_in", "xavier", "sincos:ROWSxCOLS")


def initial_value(seed: int, name: str, shape: tuple[int, ...], kind: str) -> Tensor:
    """The float32 initial value of parameter ``name``, on the CPU, filled in row-major order.

    Kinds: ``zeros``, ``ones``; ``normal`` N(0, 1), for embedding tables; ``trunc_normal`` N(0, 0.02²) cut at two
    standard deviations, for linear weights (U-ViT); ``fan_in`` uniform in ±1/√fan_in, for the patch projection and the
    output convolution, which U-ViT's code leaves at torch's default; ``xavier`` uniform in ±√(6/(fan_in + fan_out));
    ``sincos:ROWSxCOLS`` fixed 2-D sin-cos rows (DiT, MAE) for the last ROWS·COLS tokens of a ``(L, h)`` table and
    ``trunc_normal`` for the tokens before. Raises ``SpecError`` on another kind.
    """
    if kind == "zeros":
        return torch.zeros(shape)
    if kind == "ones":
        return torch.ones(shape)
    generator = _generator(seed, name)
    count = math.prod(shape)
    if kind == "normal":
        return torch.from_numpy(_normal(generator, count)).view(shape)
    if kind == "trunc_normal":
        return torch.from_numpy(_trunc_normal(generator, count)).view(shape)
    if kind in ("fan_in", "xavier"):
        fan_in = math.prod(shape[1:])
        fan_out = shape[0] * math.prod(shape[2:])
        bound = fan_in**-0.5 if kind == "fan_in" else (6 / (fan_in + fan_out)) ** 0.5
        return torch.from_numpy(_uniform(generator, count, bound)).view(shape)
    word, _, grid = kind.partition(":")
    rows, _, cols = grid.partition("x")
    if word == "sincos" and rows.isdigit() and cols.isdigit():
        return _positions(generator, shape, int(rows), int(cols))
    raise SpecError(f"unknown kind of initial value {kind!r} for {name}", cure=f"one of {', '.join(KINDS)}")


def _generator(seed: int, name: str) -> np.random.Generator:
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64)))


def _normal(generator: np.random.Generator, count: int) -> np.ndarray:
    return generator.standard_normal(count, dtype=np.float32)


def _trunc_normal(generator: np.random.Generator, count: int) -> np.ndarray:
    """0.02·z, |z| ≤ 2; a draw outside is drawn again, chunk by chunk."""
    out = np.empty(count, np.float32)
    for start in range(0, count, _CHUNK):
        z = out[start : start + _CHUNK]
        generator.standard_normal(dtype=np.float32, out=z)
        outside = np.flatnonzero(np.abs(z) > 2)
        while outside.size:
            again = generator.standard_normal(outside.size, dtype=np.float32)
            z[outside] = again
            outside = outside[np.abs(again) > 2]
        z *= np.float32(_STD)
    return out


def _uniform(generator: np.random.Generator, count: int, bound: float) -> np.ndarray:
    out = generator.random(count, dtype=np.float32)
    out *= np.float32(2 * bound)
    out -= np.float32(bound)
    return out


def _positions(generator: np.random.Generator, shape: tuple[int, ...], rows: int, cols: int) -> Tensor:
    tokens, width = shape
    extras = tokens - rows * cols
    if extras < 0 or width % 4:
        raise SpecError(
            f"sin-cos positions of a {rows}x{cols} grid do not fit a table of {tokens} tokens and width {width}",
            cure="take at least rows x cols tokens and a width divisible by 4",
        )
    omega = 10000.0 ** (-np.arange(width // 4) / (width // 4))
    row, col = np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij")
    angles = [axis.reshape(-1, 1) * omega for axis in (row, col)]
    table = np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)
    extra = _trunc_normal(generator, extras * width).reshape(extras, width)
    return torch.from_numpy(np.concatenate([extra, table]))
