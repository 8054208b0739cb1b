"""A squarified treemap: rectangles with areas in given proportions, as near to squares as rows of them can be (no torch).

Bruls, Huizing and van Wijk, "Squarified Treemaps" (2000): values from the largest on are laid into a row along the
shorter side for as long as that makes the row's worst aspect ratio better; the rest of the area is filled the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Box", "squarified"]


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle; x to the right, y downwards."""

    x: float
    y: float
    width: float
    height: float

    @property
    def area(self) -> float:
        return self.width * self.height

    def inner(self, margin: float, top: float = 0.0) -> Box:
        """The same less a margin all round, and less ``top`` above; empty where nothing is left."""
        width, height = max(0.0, self.width - 2 * margin), max(0.0, self.height - 2 * margin - top)
        return Box(self.x + margin, self.y + margin + top, width, height)


def squarified(values: Sequence[float], box: Box) -> list[Box]:
    """One rectangle a value, in the values' order, which together fill ``box``; an empty one for a value of 0.

    Values are 0 or above; ValueError for a negative one.
    """
    if any(value < 0 for value in values):
        raise ValueError("a treemap has no negative areas")
    whole = sum(values)
    found = [Box(box.x, box.y, 0.0, 0.0)] * len(values)
    order = sorted((at for at, value in enumerate(values) if value > 0), key=lambda at: -values[at])
    if not order or not box.area:
        return found
    areas = {at: values[at] / whole * box.area for at in order}
    while order:
        side = min(box.width, box.height)
        if side <= 0:  # rounding has used the area up
            break
        taken = 1
        while taken < len(order) and _worst(areas, order[: taken + 1], side) <= _worst(areas, order[:taken], side):
            taken += 1
        row, order = order[:taken], order[taken:]
        box = _lay(row, areas, box, found, last=not order)
    return found


def _worst(areas: dict[int, float], row: Sequence[int], side: float) -> float:
    """The aspect ratio of the narrowest rectangle of a row along ``side``."""
    total = sum(areas[at] for at in row)
    extremes = (areas[row[0]], areas[row[-1]])
    return max(max(side**2 * area / total**2, total**2 / (side**2 * area)) for area in extremes)


def _lay(row: Sequence[int], areas: dict[int, float], box: Box, found: list[Box], last: bool) -> Box:
    """Place a row along the shorter side; what remains of the box."""
    total, upright = sum(areas[at] for at in row), box.width >= box.height
    side = box.height if upright else box.width
    depth = (box.width if upright else box.height) if last else total / side
    place = 0.0
    for at in row:
        length = side * areas[at] / total
        if upright:
            found[at] = Box(box.x, box.y + place, depth, length)
        else:
            found[at] = Box(box.x + place, box.y, length, depth)
        place += length
    if upright:
        return Box(box.x + depth, box.y, max(0.0, box.width - depth), box.height)
    return Box(box.x, box.y + depth, box.width, max(0.0, box.height - depth))
