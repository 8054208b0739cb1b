"""The programmatic judge of ``shapes`` pictures: reads count, colour, shape, size, place and relation off a picture.

Plain image processing, independent of how ``draw`` draws: it never renders a picture to compare with. In order:

1. background: the median colour of the picture's border;
2. regions: connected regions that differ from it, each cut again at half its own contrast, debris left out;
3. coverage: within a region, how much of each pixel is the region's colour (projection of pixel - background on
   colour - background), so that soft edges count by the part they cover;
4. colour: the nearest palette colour in CIELAB;
5. shape: a dark middle is a hole; the outline's radius as a function of the angle, seen from the centroid, is
   described by its Fourier series (Zahn & Roskies, "Fourier descriptors for plane closed curves", IEEE Trans.
   Computers C-21, 1972, with the radius in place of the turning angle) and named after the nearest one among those of
   the figures of school geometry; orientation counts, since a turned square is a diamond;
6. size and position from the region's box, relation from the two boxes' centres.

Lengths are in units of the picture's side; y points down.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations
from typing import Any

import numpy as np
from scipy import ndimage

from longskip.engine.data.scenes import COLOURS, Scene, Thing
from longskip.errors import DataError

_MIN_CONTRAST = 45.0  # RGB distance to the background; 3.5 times what noise of sigma 8 does to a pixel on average
_MIN_AREA = 0.007  # of the picture: half of the smallest thing (a small ring or star)
_SIZE_BORDER = 0.162  # half-width between small (<= 0.145, soft ones seem wider) and big (>= 0.192, soft: narrower)
_CENTER_BORDER = 0.12  # half way between the center and a corner's distance
_COLOUR_LIMIT = 34.0  # Delta E; further from every palette colour is no colour of the language
# Root-sum-square of the difference of two descriptors. Drawn figures stay within 0.08 of theirs, noise and blur of a
# pixel included; a circle and a square, or a circle and a diamond, are 0.15 apart.
_SHAPE_LIMIT = 0.16  # further from every figure is no figure
_RING_LIMIT = 0.1  # a hollow outline further from a circle's is no ring
_HOLE_RADIUS = 0.30  # of the box's half-width: the middle that is looked at for a hole
_HOLE_COVERAGE = 0.55
_SOFTNESSES = (0.0, 0.07, 0.14, 0.21, 0.28)  # standard deviations of the edge, in half-widths of the figure
_ANGLES = 96
_HARMONICS = 8


@dataclass(frozen=True)
class Seen:
    """One object as read off a picture; None where it is nothing the language has a word for."""

    colour: str | None
    shape: str | None
    size: str
    position: str | None
    centre: tuple[float, float]
    half_width: float

    def __str__(self) -> str:
        place = self.position or "no named position"
        return f"{self.size} {self.colour or 'off-colour'} {self.shape or 'figure'} ({place})"


@dataclass(frozen=True)
class Verdict:
    """What a picture got right. ``full``: every attribute; ``attributes``: objects (the count), colour, shape, size and
    position (one object) or relation (two); ``seen``: what was read, in words; ``objects``: the same, as values;
    ``amiss``: of what was read only that which differs, in few words; "" where nothing does."""

    full: bool
    attributes: dict[str, bool]
    seen: str
    objects: tuple[Seen, ...]
    amiss: str


def to_lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB 0-255 ``(..., 3)`` to CIELAB, white D65 (CIE 15; sRGB by IEC 61966-2-1)."""
    linear = np.asarray(rgb, dtype=np.float64) / 255
    linear = np.where(linear <= 0.04045, linear / 12.92, ((linear + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array(
        [[0.4124564, 0.2126729, 0.0193339], [0.3575761, 0.7151522, 0.1191920], [0.1804375, 0.0721750, 0.9503041]]
    )
    xyz = xyz / np.array([0.95047, 1.0, 1.08883])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz * (29 / 6) ** 2 / 3 + 4 / 29)
    return np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)


@cache
def _palette() -> tuple[tuple[str, ...], np.ndarray]:
    return tuple(COLOURS), to_lab(np.array(list(COLOURS.values())))


def _name_colour(rgb: np.ndarray) -> str | None:
    names, lab = _palette()
    distance = np.linalg.norm(lab - to_lab(rgb), axis=1)
    nearest = int(distance.argmin())
    return names[nearest] if distance[nearest] <= _COLOUR_LIMIT else None


# The figures, as corners (y down). Only proportions and orientation matter; the centroid becomes the origin.
def _star_corners() -> list[tuple[float, float]]:
    inner = 0.42  # between the pentagram's 0.382 and the half
    turn = [math.pi * (i / 5 - 0.5) for i in range(10)]
    return [((1, inner)[i % 2] * math.cos(a), (1, inner)[i % 2] * math.sin(a)) for i, a in enumerate(turn)]


def _heart_corners() -> list[tuple[float, float]]:
    # Two half discs side by side over a wedge.
    left = [(-0.5 - 0.5 * math.cos(a), -0.35 - 0.5 * math.sin(a)) for a in np.linspace(-0.25, math.pi, 24)]
    right = [(-x, y) for x, y in reversed(left)]
    return [*left, *right, (0.0, 0.95)]


def _ngon(n: int, start: float) -> list[tuple[float, float]]:
    turn = [start + 2 * math.pi * i / n for i in range(n)]
    return [(math.cos(a), math.sin(a)) for a in turn]


def _figures() -> dict[str, list[tuple[float, float]]]:
    third = 1 / 3
    quarter = [(third, -third), (1.0, -third), (1.0, third)]
    cross = [(x * c - y * s, x * s + y * c) for c, s in ((1, 0), (0, 1), (-1, 0), (0, -1)) for x, y in quarter]
    return {
        "circle": _ngon(96, 0.0),
        "square": _ngon(4, math.pi / 4),
        "triangle": _ngon(3, -math.pi / 2),
        "diamond": _ngon(4, 0.0),
        "star": _star_corners(),
        "cross": cross,
        "heart": _heart_corners(),
    }


def _radii(covered: np.ndarray, centre: tuple[float, float], half: float) -> np.ndarray:
    """How far the figure reaches round ``centre`` (x, y), at ``_ANGLES`` angles from the right clockwise; in pixels.

    Along each ray coverage is summed, so that soft edges give parts of a pixel; what the outline encloses counts as
    covered, holes and all.
    """
    angle = 2 * math.pi * np.arange(_ANGLES) / _ANGLES
    step = half / 24
    reach = (np.arange(48) + 0.5) * step  # to twice the half-width: beyond any corner
    rows = centre[1] + reach[:, None] * np.sin(angle) - 0.5
    columns = centre[0] + reach[:, None] * np.cos(angle) - 0.5
    rays = ndimage.map_coordinates(covered, [rows, columns], order=1, mode="constant")  # (reach, angles)
    rays = np.maximum.accumulate(rays[::-1], axis=0)[::-1]
    return np.maximum(rays.sum(0) * step, 1e-6)


def _centroid(covered: np.ndarray) -> tuple[float, float]:
    total = covered.sum()
    y, x = np.mgrid[: covered.shape[0], : covered.shape[1]] + 0.5
    return float((covered * x).sum() / total), float((covered * y).sum() / total)


def _descriptor(covered: np.ndarray, half: float) -> np.ndarray:
    """Harmonics 1 to 8 of radius over mean radius, as real numbers ``(16,)``: size-free, orientation kept."""
    radii = _radii(covered, _centroid(covered), half)
    spectrum = np.fft.rfft(radii / radii.mean())[1 : _HARMONICS + 1] * (2 / len(radii))
    return np.concatenate([spectrum.real, spectrum.imag])


def _inside(points: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Even-odd rule: which of the places (x, y) lie inside the polygon ``(n, 2)``."""
    inside = np.zeros(x.shape, dtype=bool)
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y1 != y2:
            inside ^= ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
    return inside


@cache
def _figure_descriptors() -> tuple[tuple[str, ...], np.ndarray]:
    """The names ``(m,)`` and descriptors ``(m, 16)`` of the figures, each at several softnesses of its edge.

    Pixels and blur round a figure off, a small one more: without the soft versions a blurred cross is a diamond.
    """
    half = 48.0
    y, x = np.mgrid[:192, :192] + 0.5 - 96.0
    names, descriptors = [], []
    for name, corners in _figures().items():
        points = np.array(corners)
        low, high = points.min(0), points.max(0)
        points = (points - (low + high) / 2) * (2 * half / (high - low).max())
        sharp = _inside(points, x, y).astype(np.float64)
        for softness in _SOFTNESSES:
            names.append(name)
            descriptors.append(_descriptor(ndimage.gaussian_filter(sharp, softness * half), half))
    return tuple(names), np.stack(descriptors)


def _as_pixels(picture: np.ndarray) -> np.ndarray:
    array = np.asarray(picture)
    if array.ndim != 3 or array.shape[2] != 3 or min(array.shape[:2]) < 16:
        raise DataError(f"a picture to judge is (H, W, 3) with H, W >= 16, not {array.shape}")
    if array.dtype == np.uint8:
        return array.astype(np.float64)
    if not np.issubdtype(array.dtype, np.floating):
        raise DataError(f"a picture to judge is uint8 or floating in [0, 1], not {array.dtype}")
    if not np.isfinite(array).all():
        raise DataError("a picture to judge has NaN or infinite pixels", cure="look at the sampler, not at the judge")
    return np.clip(array.astype(np.float64), 0, 1) * 255


def _regions(pixels: np.ndarray, paper: np.ndarray) -> list[np.ndarray]:
    """Masks ``(H, W)`` bool of the objects, biggest first."""
    contrast = np.linalg.norm(pixels - paper, axis=2)
    least = _MIN_AREA * contrast.size
    masks = []
    labels, count = ndimage.label(contrast > _MIN_CONTRAST, np.ones((3, 3)))
    for label in range(1, count + 1):
        rough = labels == label
        if rough.sum() < least:
            continue
        # Half the region's own contrast is where an edge pixel is half covered; it also parts two that nearly touch.
        half = rough & (contrast > 0.5 * np.percentile(contrast[rough], 80))
        parts, number = ndimage.label(half)
        for part in range(1, number + 1):
            mask = parts == part
            if mask.sum() >= least:
                masks.append(mask)
    return sorted(masks, key=lambda mask: -int(mask.sum()))


def _coverage(pixels: np.ndarray, paper: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The region's colour ``(3,)`` and how much of each pixel it covers ``(H, W)`` in [0, 1], 0 away from it."""
    inside = pixels[mask]
    contrast = np.linalg.norm(inside - paper, axis=1)
    colour = np.median(inside[contrast >= 0.92 * np.percentile(contrast, 95)], axis=0)
    axis = colour - paper
    covered = np.clip((pixels - paper) @ axis / max(float(axis @ axis), 1.0), 0, 1)
    near = ndimage.binary_dilation(mask, np.ones((3, 3)))
    return colour, np.where(near, covered, 0.0)


def _box(covered: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of what is covered, in pixels with parts: the last line counts by its fullest pixel."""
    sides = []
    for axis in (0, 1):
        fullest = covered.max(axis)
        lines = np.flatnonzero(fullest > 0.5)
        first, last = int(lines[0]), int(lines[-1])
        before = fullest[first - 1] if first > 0 else 0.0
        after = fullest[last + 1] if last + 1 < len(fullest) else 0.0
        sides.append((first + 1 - fullest[first] - before, last + fullest[last] + after))
    return float(sides[0][0]), float(sides[1][0]), float(sides[0][1]), float(sides[1][1])


def _name_shape(covered: np.ndarray, box: tuple[float, float, float, float]) -> str | None:
    left, top, right, bottom = box
    half = max(right - left, bottom - top) / 2
    if min(right - left, bottom - top) < 1.3 * half:  # longer than 1 : 0.65
        return None
    y, x = np.mgrid[: covered.shape[0], : covered.shape[1]] + 0.5
    middle = np.hypot(x - (left + right) / 2, y - (top + bottom) / 2) <= _HOLE_RADIUS * half
    hollow = bool(middle.any()) and float(covered[middle].mean()) < _HOLE_COVERAGE
    descriptor = _descriptor(covered, half)
    names, ideals = _figure_descriptors()
    distance = np.linalg.norm(ideals - descriptor, axis=1)
    if hollow:
        to_circle = min(d for name, d in zip(names, distance, strict=True) if name == "circle")
        return "ring" if to_circle <= _RING_LIMIT else None
    nearest = int(distance.argmin())
    return names[nearest] if distance[nearest] <= _SHAPE_LIMIT else None


def _name_position(x: float, y: float) -> str | None:
    across = (abs(x - 0.5) > _CENTER_BORDER, abs(y - 0.5) > _CENTER_BORDER)
    if across == (False, False):
        return "center"
    if across == (True, True):
        return f"{'bottom' if y > 0.5 else 'top'} {'right' if x > 0.5 else 'left'}"
    return None


def look(picture: np.ndarray) -> tuple[Seen, ...]:
    """The objects of a picture ``(H, W, 3)``, uint8 or floating in [0, 1], biggest first."""
    pixels = _as_pixels(picture)
    height, width = pixels.shape[:2]
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    paper = np.median(border, axis=0)
    seen = []
    for mask in _regions(pixels, paper):
        colour, covered = _coverage(pixels, paper, mask)
        motley = covered.max() <= 0.5  # of so many colours that the middle one is none of them
        if motley:
            covered = mask.astype(np.float64)
        box = _box(covered)
        x, y = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
        half_width = max((box[2] - box[0]) / width, (box[3] - box[1]) / height) / 2
        seen.append(
            Seen(
                colour=None if motley else _name_colour(colour),
                shape=_name_shape(covered, box),
                size="big" if half_width > _SIZE_BORDER else "small",
                position=_name_position(x, y),
                centre=(x, y),
                half_width=half_width,
            )
        )
    return tuple(seen)


def _relation(first: Seen, second: Seen) -> str:
    dx, dy = second.centre[0] - first.centre[0], second.centre[1] - first.centre[1]
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def _likeness(got: Seen | None, want: Thing) -> int:
    return 0 if got is None else (got.colour == want.colour) + (got.shape == want.shape) + (got.size == want.size)


def _compare(seen: Sequence[Seen | None], scene: Scene, count: int) -> dict[str, bool]:
    pairs: list[tuple[Seen | None, Thing]] = list(zip(seen, scene.things, strict=True))
    result = {"objects": count == len(scene.things)}
    for name in ("colour", "shape", "size") + (("position",) if len(pairs) == 1 else ()):
        result[name] = all(got is not None and getattr(got, name) == getattr(want, name) for got, want in pairs)
    if len(pairs) == 2:
        first, second = seen
        result["relation"] = first is not None and second is not None and _relation(first, second) == scene.relation
    return result


def _amiss(seen: Sequence[Seen | None], scene: Scene, attributes: dict[str, bool], count: int) -> str:
    """What differs from what was asked for, as ``yellow for red``."""
    parts = []
    if not attributes["objects"]:
        parts.append("nothing" if count == 0 else f"{count} object{'s' if count > 1 else ''} for {len(scene.things)}")
    unnamed = {"colour": "off-colour", "shape": "no known shape", "position": "elsewhere"}
    for name in ("colour", "shape", "size", "position"):
        if attributes.get(name, True):
            continue
        for got, want in zip(seen, scene.things, strict=True):
            if got is not None and getattr(got, name) != getattr(want, name):
                parts.append(f"{getattr(got, name) or unnamed[name]} for {getattr(want, name)}")
    first, second = seen if len(seen) == 2 else (None, None)
    if first is not None and second is not None and not attributes["relation"]:
        parts.append(f"{_relation(first, second)} for {scene.relation}")
    return ", ".join(dict.fromkeys(parts))


def judge(picture: np.ndarray, scene: Scene) -> Verdict:
    """Whether ``picture`` shows ``scene``.

    ``picture``: ``(H, W, 3)`` uint8, or floating in [0, 1] (clipped), H and W at least 16. With one thing asked for and
    several seen, the biggest is compared and ``objects`` fails. With two, the objects are assigned to the things they
    share most of colour, shape and size with, and an attribute is right if it is for both; a missing object gets
    nothing right. DataError for what is no picture.
    """
    objects = look(picture)
    wanted = len(scene.things)
    candidates: list[Seen | None] = [*objects[:wanted], *[None] * (wanted - len(objects))]
    # The relation has no say in who is who, else every picture would have the benefit of the doubt.
    assigned = max(permutations(candidates), key=lambda order: sum(map(_likeness, order, scene.things)))
    attributes = _compare(assigned, scene, len(objects))
    seen = " and ".join(map(str, objects)) if objects else "nothing"
    if len(objects) == 2:
        seen += f", the first {_relation(objects[0], objects[1])} the second"
    amiss = _amiss(assigned, scene, attributes, len(objects))
    return Verdict(all(attributes.values()), attributes, seen, objects, amiss)


def score(pictures: Iterable[np.ndarray], scenes: Iterable[Scene]) -> dict[str, Any]:
    """Shares, 0 to 1, over pictures: ``count``, ``full``, and the share right of each attribute that some scene has.

    ``position`` is over the one-object scenes and ``relation`` over the two-object ones; absent where there are none.
    DataError if there is no picture, or not as many pictures as scenes.
    """
    pictures, scenes = list(pictures), list(scenes)
    if not pictures or len(pictures) != len(scenes):
        raise DataError(f"{len(pictures)} pictures for {len(scenes)} scenes", cure="as many of both, at least one")
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    result: dict[str, Any] = {"count": len(verdicts), "full": sum(v.full for v in verdicts) / len(verdicts)}
    for name in ("objects", "colour", "size", "shape", "position", "relation"):
        marks = [verdict.attributes[name] for verdict in verdicts if name in verdict.attributes]
        if marks:
            result[name] = sum(marks) / len(marks)
    return result
