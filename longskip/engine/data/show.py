"""``longskip data show``: a contact sheet of pictures, or of stored latents, with their captions."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longskip.engine.data.decode import MAX_PIXELS, decode_whole
from longskip.engine.data.features import LATENT
from longskip.engine.data.npy import array_of
from longskip.engine.data.plan import permute
from longskip.engine.data.sources import ShardSource, Source
from longskip.errors import BadSampleError, DataError

CELL = 192
"""Pixels of a picture's longer side on the sheet."""
LATENTS_NOTE = (
    "Latents, not pictures: the shards hold none. Red, green and blue are the first three principal components of the "
    "latents' channels."
)

_GAP = 14
_INK = (34, 38, 46)
_FAINT = (120, 126, 138)
_EDGE = (206, 208, 204)
_WARNING = (176, 42, 42)
_PAPER = (250, 250, 248)
_MAX_LINES = 5


def contact_sheet(
    source: Source,
    out: str | os.PathLike[str],
    *,
    n: int = 24,
    columns: int = 6,
    seed: int | None = None,
    max_pixels: int = MAX_PIXELS,
) -> list[int]:
    """Writes a PNG of ``n`` samples with key and captions under each; returns their numbers, in reading order.

    The first ``n``, or with a ``seed`` a random ``n`` without repetition. Pictures smaller than a cell are enlarged by
    a whole factor without smoothing, so that their pixels can be seen. Where the shards hold latents and no pictures,
    latents are drawn in colours that ``latent_colours`` gives them, and the sheet says so. A bad sample stands with its
    reason. Raises ``DataError`` for n or columns below 1.
    """
    if n < 1 or columns < 1:
        raise DataError(f"n {n} and columns {columns} must be 1 or more")
    n = min(n, len(source))
    numbers = list(range(n)) if seed is None else permute(range(n), len(source), seed, 0).tolist()
    font, small = _font(14), _font(11)
    latents = isinstance(source, ShardSource) and source.features is not None and not source.features.pictures
    cells = [_cell(source, number, font, max_pixels, latents) for number in numbers]
    if latents:
        _draw_latents(cells)
    columns = min(columns, len(cells))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    line, small_line = _line_height(font), _line_height(small)
    heights = [CELL + small_line + 8 + line * max(len(cell.lines) for cell in row) + _GAP for row in rows]
    width = columns * (CELL + _GAP) - _GAP
    note = wrap(LATENTS_NOTE, font, width) if latents else []
    top = _GAP + line * len(note) + (_GAP if note else 0)
    sheet = Image.new("RGB", (width + 2 * _GAP, top + sum(heights)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, text in enumerate(note):
        pen.text((_GAP, _GAP + i * line), text, font=font, fill=_INK)
    for row, height in zip(rows, heights, strict=True):
        for column, cell in enumerate(row):
            left = _GAP + column * (CELL + _GAP)
            if cell.picture is None:
                pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline=_WARNING)
                pen.line((left, top, left + CELL - 1, top + CELL - 1), fill=_WARNING)
            else:
                x, y = left + (CELL - cell.picture.width) // 2, top + (CELL - cell.picture.height) // 2
                sheet.paste(cell.picture, (x, y))
                # Outside the picture: where a light one ends is seen, and no pixel is covered.
                pen.rectangle((x - 1, y - 1, x + cell.picture.width, y + cell.picture.height), outline=_EDGE)
            y = top + CELL + 4
            pen.text((left, y), _shorten(cell.key, small), font=small, fill=_FAINT)
            for i, text in enumerate(cell.lines):
                pen.text((left, y + small_line + i * line), text, font=font, fill=_WARNING if cell.bad else _INK)
        top += height
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, format="PNG")
    return numbers


def latent_colours(latents: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Latents (C, h, w) of any sizes → uint8 (h, w, 3), the same colours for the same values in all of them.

    Red, green and blue are the first three principal components of the C values of a place, over all places, each from
    its 1st to its 99th percentile; of fewer than three channels the components that there are not stay grey.
    """
    places = np.concatenate([latent.reshape(len(latent), -1).T for latent in latents]).astype(np.float64)  # (n, C)
    mean = places.mean(0)
    _, axes = np.linalg.eigh((places - mean).T @ (places - mean))  # of rising variance
    axes = axes[:, ::-1][:, :3]
    axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] < 0, -1.0, 1.0)  # no sign by chance
    low, high = np.percentile((places - mean) @ axes, (1, 99), axis=0)
    out = []
    for latent in latents:
        values = (latent.reshape(len(latent), -1).T.astype(np.float64) - mean) @ axes
        scaled = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
        colours = np.full((len(scaled), 3), 128, dtype=np.uint8)
        colours[:, : scaled.shape[1]] = np.round(scaled * 255)
        out.append(colours.reshape(*latent.shape[1:], 3))
    return out


@dataclass
class _Cell:
    """What stands at one place of the sheet; ``picture`` is None for a bad sample."""

    key: str
    lines: list[str]
    picture: Image.Image | None = None
    latent: np.ndarray | None = None  # (C, h, w), until it is drawn with the others
    bad: bool = False


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _font(size: int) -> _Font:
    """DejaVu Sans as matplotlib ships it: PIL's own default has neither accents nor other scripts."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _line_height(font: _Font) -> int:
    box = font.getbbox("Ågj")
    return int(box[3] - min(box[1], 0)) + 3


def _cell(source: Source, number: int, font: _Font, max_pixels: int, latents: bool) -> _Cell:
    picture = latent = None
    try:
        if latents:
            captions = source.captions(number)
            latent = _latent(cast(ShardSource, source), number)
        else:
            _, image, captions = source.read(number)
            picture = _enlarged(Image.fromarray(decode_whole(image, side=CELL, max_pixels=max_pixels)))
    except BadSampleError as error:
        return _Cell(source.key(number), wrap(f"{error.reason}: {error.message}", font, CELL), bad=True)
    several = len(captions) > 1
    lines: list[str] = []
    for text, weight in captions:
        lines += wrap(f"{weight:g} × {text}" if several else text, font, CELL)
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], "…"]
    return _Cell(source.key(number), lines, picture, latent)


def _latent(source: ShardSource, number: int) -> np.ndarray:
    """The stored latent (C, h, w) of a sample. Raises ``BadSampleError`` where it is missing, of no use or not finite."""
    data = source.member(number, LATENT)
    if data is None:
        raise BadSampleError("latent_missing", f"{source.key(number)} has no {LATENT}")
    latent = array_of(data)
    if latent.ndim != 3 or source.features is None or len(latent) != (source.features.latent or (0,))[0]:
        raise BadSampleError("latent_shape", f"the {LATENT} is {latent.shape}")
    if not np.isfinite(latent).all():
        raise BadSampleError("feature_values", f"the {LATENT} holds NaN or infinity")
    return latent


def _draw_latents(cells: Sequence[_Cell]) -> None:
    found = [cell for cell in cells if cell.latent is not None]
    colours = latent_colours([cell.latent for cell in found if cell.latent is not None]) if found else []
    for cell, pixels in zip(found, colours, strict=True):
        cell.picture = _enlarged(Image.fromarray(pixels))


def _enlarged(picture: Image.Image) -> Image.Image:
    """By a whole factor, or where it is larger than a cell (latents) made to fit into one."""
    picture.thumbnail((CELL, CELL), Image.Resampling.BOX)
    factor = CELL // max(picture.size)
    if factor < 2:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def _shorten(text: str, font: _Font) -> str:
    if font.getlength(text) <= CELL:
        return text
    while text and font.getlength("…" + text) > CELL:
        text = text[1:]
    return "…" + text


def wrap(text: str, font: _Font, width: float) -> list[str]:
    """Lines of at most ``width`` pixels; words that are longer are cut."""
    lines: list[str] = []
    line = ""
    for word in _printable(text[:2000]).split():
        if line and font.getlength(f"{line} {word}") <= width:
            line = f"{line} {word}"
            continue
        if line:
            lines.append(line)
        while font.getlength(word) > width and len(word) > 1:
            cut = next(i for i in range(len(word) - 1, 0, -1) if i == 1 or font.getlength(word[:i]) <= width)
            lines.append(word[:cut])
            word = word[cut:]
        line = word
    return [*lines, line] if line else lines


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)
