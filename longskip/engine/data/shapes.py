"""The embedded ``shapes`` data: pictures of scenes, drawn with antialiasing, with true captions. No torch.

Coordinates are in units of the picture's side: (0, 0) is the top left, (1, 1) the bottom right. A thing fits in a box
of half-width r round its centre: r = 0.145 for small and 0.225 for big. ``draw`` without a generator draws the class's
plain picture on white; with one it varies what the caption does not say: r by up to -5 %, the place by up to 0.02
(one object) or the free room (two objects, never closer than 0.06), the shade of the colour, and a light background.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw

from longskip.engine.data.draws import generator
from longskip.engine.data.scenes import (
    COLOURS,
    POSITIONS,
    RELATIONS,
    SHAPES,
    SIZES,
    Objects,
    Scene,
    Thing,
    all_scenes,
    captions,
    is_held_out,
    parse_caption,
    sample_scene,
    scene_from_dict,
    scene_to_dict,
)
from longskip.errors import DataError

if TYPE_CHECKING:
    from longskip.engine.data.index import Index

__all__ = [
    "COLOURS",
    "POSITIONS",
    "RELATIONS",
    "SHAPES",
    "SIZES",
    "Scene",
    "Thing",
    "all_scenes",
    "captions",
    "draw",
    "generate",
    "is_held_out",
    "parse_caption",
    "sample_scene",
    "scene_from_dict",
    "scene_to_dict",
    "write_shapes",
]

MIN_SIZE = 16  # pixels; below, the small star and the small circle are the same blob
MAX_SIZE = 2048

_RADIUS = {"small": 0.145, "big": 0.225}
_RADIUS_JITTER = 0.05  # only downwards, so that everything fits
_CORNER = 0.235  # distance of a corner's centre from the picture's centre, along each axis
_PLACE_JITTER = 0.02
_MARGIN, _GAP = 0.02, 0.06  # of two-object pictures: to the edge, and between the two
_ACROSS_JITTER = 0.05  # of two-object pictures, across the axis of the relation
_SUPERSAMPLING = 4
_INNER_RING = 0.5


def _star() -> list[tuple[float, float]]:
    # Inner radius 0.46 of the outer one: fatter than a pentagram (0.38), so that nine pixels still show five points.
    points = []
    for i in range(10):
        radius, angle = (1.05, 0.46 * 1.05)[i % 2], math.pi * (i / 5 - 0.5)
        points.append((radius * math.cos(angle), radius * math.sin(angle) + 0.1))
    return points


def _heart() -> list[tuple[float, float]]:
    points = []
    for i in range(48):
        t = 2 * math.pi * i / 48
        x = 16 * math.sin(t) ** 3
        y = 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        points.append((x / 16, -(y + 2.5) / 15.5))
    return points


_ARM = 0.34
# Outlines in the box [-1, 1] x [-1, 1], y downwards.
_POLYGONS: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0.0, -0.92), (1.0, 0.88), (-1.0, 0.88)],
    "diamond": [(0.0, -1.0), (1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)],
    "star": _star(),
    "cross": [
        (-_ARM, -1.0),
        (_ARM, -1.0),
        (_ARM, -_ARM),
        (1.0, -_ARM),
        (1.0, _ARM),
        (_ARM, _ARM),
        (_ARM, 1.0),
        (-_ARM, 1.0),
        (-_ARM, _ARM),
        (-1.0, _ARM),
        (-1.0, -_ARM),
        (-_ARM, -_ARM),
    ],
    "heart": _heart(),
}

_Placed = tuple[Thing, float, float, float]  # thing, centre x, centre y, half-width; x right, y down


def _layout(scene: Scene, jitter: np.ndarray) -> list[_Placed]:
    """Where the things stand and how big they are; ``jitter`` is four numbers in [-1, 1], all 0 for the plain place."""
    shrink = 1 - _RADIUS_JITTER * np.abs(jitter[:2])
    radii = [_RADIUS[thing.size] * float(s) for thing, s in zip(scene.things, shrink, strict=False)]
    if len(scene.things) == 1:
        thing = scene.things[0]
        x, y = (0.5 + _PLACE_JITTER * float(j) for j in jitter[2:])
        if thing.position != "center":
            x += _CORNER if "right" in str(thing.position) else -_CORNER
            y += _CORNER if "bottom" in str(thing.position) else -_CORNER
        return [(thing, x, y, radii[0])]
    # Along the relation's axis the free room is shared out: before, between and after the two.
    first_leads = scene.relation in ("left of", "above")
    lead, trail = (0, 1) if first_leads else (1, 0)
    room = 1 - 2 * sum(radii) - 2 * _MARGIN - _GAP
    before, between = room * (0.3 + 0.2 * jitter[2]), room * 0.4
    centres = [0.0, 0.0]
    centres[lead] = float(_MARGIN + before + radii[lead])
    centres[trail] = float(centres[lead] + radii[lead] + _GAP + between + radii[trail])
    across = 0.5 + _ACROSS_JITTER * float(jitter[3]), 0.5 - _ACROSS_JITTER * float(jitter[3])
    sideways = scene.relation in ("left of", "right of")
    return [
        (thing, along, over, radius) if sideways else (thing, over, along, radius)
        for thing, along, over, radius in zip(scene.things, centres, across, radii, strict=True)
    ]


@cache
def _polygon(shape: str) -> np.ndarray:
    return np.array(_POLYGONS[shape], dtype=np.float64)


def _paint(brush: ImageDraw.ImageDraw, placed: _Placed, ink: tuple[int, ...], paper: tuple[int, ...], n: int) -> None:
    thing, x, y, radius = placed
    x, y, r = x * n - 0.5, y * n - 0.5, radius * n  # PIL counts from the middle of the first pixel
    if thing.shape in ("circle", "ring"):
        brush.ellipse((x - r, y - r, x + r, y + r), fill=ink)
        if thing.shape == "ring":
            r *= _INNER_RING
            brush.ellipse((x - r, y - r, x + r, y + r), fill=paper)
        return
    points = _polygon(thing.shape) * r + (x, y)
    brush.polygon(points.ravel().tolist(), fill=ink)


def draw(scene: Scene, size: int = 32, rng: np.random.Generator | None = None) -> np.ndarray:
    """The scene's picture, ``(size, size, 3)`` uint8 RGB.

    Without ``rng`` it is the class's plain picture on white; with one, what the caption does not say varies (see the
    top of this file), the same for the same state of ``rng``. DataError for a size outside [16, 2048] pixels.
    """
    return np.array(_image(scene, size, rng))


def _image(scene: Scene, size: int, rng: np.random.Generator | None) -> Image.Image:
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise DataError(f"picture size {size} px is outside [{MIN_SIZE}, {MAX_SIZE}]", cure="32, 64 and 128 are usual")
    paper: tuple[int, ...] = (255, 255, 255)
    inks: list[tuple[int, ...]] = [COLOURS[thing.colour] for thing in scene.things]
    jitter = np.zeros(4)
    if rng is not None:
        draws = rng.random(14)
        jitter = 2 * draws[:4] - 1
        if draws[4] < 0.5:  # half of the pictures are on white, the others on some light paper
            paper = tuple(int(v) for v in 235 + 21 * draws[5:8])
        shades = (draws[8:14].reshape(2, 3) * 21 - 10).astype(int)
        inks = [tuple(int(v) for v in np.clip(ink + shade, 0, 255)) for ink, shade in zip(inks, shades, strict=False)]
    n = size * _SUPERSAMPLING
    image = Image.new("RGB", (n, n), paper)
    brush = ImageDraw.Draw(image)
    for placed, ink in zip(_layout(scene, jitter), inks, strict=True):
        _paint(brush, placed, ink, paper, n)
    return image.reduce(_SUPERSAMPLING)


def generate(
    n: int, seed: int = 0, objects: Objects = 1, held_out: bool | None = False, size: int = 32
) -> Iterator[tuple[str, bytes, list[str], dict[str, Any]]]:
    """Yields ``n`` samples ``(key, PNG bytes, captions, scene as a JSON record)``.

    Sample i is a function of (seed, i, objects, held_out, size) alone, so the first thousand of a large set are the
    small set. DataError for a negative ``n``.
    """
    if n < 0:
        raise DataError(f"{n} pictures were asked for", cure="ask for 0 or more")
    for i in range(n):
        rng = generator(seed, 0, i, "shapes")
        scene = sample_scene(rng, objects, held_out)
        buffer = io.BytesIO()
        _image(scene, size, rng).save(buffer, "png", compress_level=1)
        yield f"{i:09d}", buffer.getvalue(), captions(scene), scene_to_dict(scene)


def write_shapes(
    folder: str | os.PathLike[str],
    n: int,
    seed: int = 0,
    objects: Objects = 1,
    held_out: bool | None = False,
    size: int = 32,
    *,
    per_shard: int = 10_000,
    progress: Callable[[int], None] | None = None,
) -> Index:
    """Writes ``generate``'s pictures as indexed shards, every phrasing with weight 1 and the scene in ``KEY.json``.

    ``progress`` is called with the number written. DataError for a folder that already holds shards, or n < 1.
    """
    from longskip.engine.data.pack import write_shards

    samples = (
        {
            "__key__": key,
            "png": png,
            "txt": texts[0],
            "json": {"captions": [{"text": text, "weight": 1.0} for text in texts], "scene": record},
        }
        for key, png, texts, record in generate(n, seed, objects, held_out, size)
    )
    return write_shards(samples, folder, per_shard=per_shard, progress=progress)
