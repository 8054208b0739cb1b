"""Labelled sample grids: pictures side by side, each over its caption, legible at thumbnail and at full size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longskip.errors import DataError

_READABLE = 144
_MARGIN = 12
_LINES = 6
_FONT_SIZE = 13
_PAPER = (255, 255, 255)
_INK = (40, 42, 46)
_EDGE = (224, 222, 216)


def make_grid(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    columns: int | None = None,
    scale: int | None = None,
    lines: int = _LINES,
) -> Image.Image:
    """The pictures ``(H, W, 3)`` uint8 in rows of ``columns``, each with its caption below, as one RGB picture.

    ``scale`` enlarges by a whole factor without smoothing, so that every pixel of a small picture stays a sharp
    square; None takes the smallest factor that makes the largest picture 144 px wide or high. ``columns`` None gives
    a grid about as wide as high. Captions wrap to their picture's width and end in an ellipsis after ``lines`` lines.
    DataError when there is no picture, a picture of another shape or dtype, or not one caption for each.
    """
    if not images:
        raise DataError("a sample grid needs at least 1 picture, got 0", cure="give at least one prompt")
    if len(images) != len(captions):
        raise DataError(f"{len(images)} pictures but {len(captions)} captions", cure="give one caption per picture")
    for index, image in enumerate(images):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise DataError(
                f"picture {index} of the grid is {image.dtype} {image.shape}, not uint8 (H, W, 3)",
                cure="convert it: values 0-255, channels last",
            )
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1 or (scale is not None and scale < 1):
        raise DataError(f"columns {columns} and scale {scale} must be 1 or more", cure="leave them out for the default")
    high = max(image.shape[0] for image in images)
    wide = max(image.shape[1] for image in images)
    scale = math.ceil(_READABLE / max(high, wide)) if scale is None else scale
    high, wide, columns = high * scale, wide * scale, min(columns, len(images))

    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), _FONT_SIZE)
    texts = [_wrap(caption, font, wide, lines) for caption in captions]
    line_height = _FONT_SIZE + 4
    cell_width = wide + _MARGIN
    tops, top = [], _MARGIN
    rows = math.ceil(len(images) / columns)
    for row in range(rows):
        tops.append(top)
        most = max(len(text) for text in texts[row * columns : (row + 1) * columns])
        top += high + most * line_height + (4 if most else 0) + _MARGIN

    grid = Image.new("RGB", (columns * cell_width + _MARGIN, top), _PAPER)
    pen = ImageDraw.Draw(grid)
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        left, top = _MARGIN + index % columns * cell_width, tops[index // columns]
        enlarged = Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1))
        x, y = left + (wide - enlarged.width) // 2, top + (high - enlarged.height) // 2
        grid.paste(enlarged, (x, y))
        # Outside the picture: a white sample on white paper still shows where it ends, and no pixel is covered.
        pen.rectangle((x - 1, y - 1, x + enlarged.width, y + enlarged.height), outline=_EDGE)
        for number, line in enumerate(text):
            pen.text((left, top + high + 4 + number * line_height), line, fill=_INK, font=font)
    return grid


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """The caption in at most ``most`` lines of ``width`` pixels; a word that is too long is broken."""
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < most:
        fits = _fitting(rest, font, width)
        if fits < len(rest) and len(lines) == most - 1:
            lines.append(rest[: max(_fitting(rest, font, width - int(font.getlength("…"))), 1)].rstrip() + "…")
            break
        space = rest.rfind(" ", 0, fits + 1)
        cut = fits if fits == len(rest) or space <= 0 else space
        lines.append(rest[:cut])
        rest = rest[cut:].lstrip()
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: int) -> int:
    """How many characters of ``text`` fit into ``width`` pixels, at least one."""
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if font.getlength(text[:middle]) <= width:
            low = middle
        else:
            high = middle - 1
    return low
