"""``longskip data show``: a contact sheet of pictures with their captions."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from longskip.engine.data.decode import MAX_PIXELS, decode_whole
from longskip.engine.data.plan import permute
from longskip.engine.data.sources import Source
from longskip.errors import BadSampleError, DataError

CELL = 192
"""Pixels of a picture's longer side on the sheet."""

_GAP = 14
_INK = (34, 38, 46)
_FAINT = (120, 126, 138)
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
    a whole factor without smoothing, so that their pixels can be seen. A bad sample stands with its reason. Raises
    ``DataError`` for n or columns below 1.
    """
    if n < 1 or columns < 1:
        raise DataError(f"n {n} and columns {columns} must be 1 or more")
    n = min(n, len(source))
    numbers = list(range(n)) if seed is None else permute(range(n), len(source), seed, 0).tolist()
    font, small = _font(14), _font(11)
    cells = [_cell(source, number, font, max_pixels) for number in numbers]
    columns = min(columns, len(cells))
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    line, small_line = _line_height(font), _line_height(small)
    heights = [CELL + small_line + 8 + line * max(len(cell[2]) for cell in row) + _GAP for row in rows]
    sheet = Image.new("RGB", (_GAP + columns * (CELL + _GAP), _GAP + sum(heights)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    top = _GAP
    for row, height in zip(rows, heights, strict=True):
        for column, (picture, key, lines, bad) in enumerate(row):
            left = _GAP + column * (CELL + _GAP)
            if picture is None:
                pen.rectangle((left, top, left + CELL - 1, top + CELL - 1), outline=_WARNING)
                pen.line((left, top, left + CELL - 1, top + CELL - 1), fill=_WARNING)
            else:
                sheet.paste(picture, (left + (CELL - picture.width) // 2, top + (CELL - picture.height) // 2))
            y = top + CELL + 4
            pen.text((left, y), _shorten(key, small), font=small, fill=_FAINT)
            for i, text in enumerate(lines):
                pen.text((left, y + small_line + i * line), text, font=font, fill=_WARNING if bad else _INK)
        top += height
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, format="PNG")
    return numbers


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _font(size: int) -> _Font:
    """DejaVu Sans as matplotlib ships it: PIL's own default has neither accents nor other scripts."""
    from matplotlib import get_data_path

    return ImageFont.truetype(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)


def _line_height(font: _Font) -> int:
    box = font.getbbox("Ågj")
    return int(box[3] - min(box[1], 0)) + 3


def _cell(source: Source, number: int, font: _Font, max_pixels: int) -> tuple[Image.Image | None, str, list[str], bool]:
    try:
        sample = source.read(number)
        picture = _picture(sample.image, max_pixels)
    except BadSampleError as error:
        return None, source.key(number), wrap(f"{error.reason}: {error.message}", font, CELL), True
    several = len(sample.captions) > 1
    lines: list[str] = []
    for text, weight in sample.captions:
        lines += wrap(f"{weight:g} × {text}" if several else text, font, CELL)
    if len(lines) > _MAX_LINES:
        lines = [*lines[: _MAX_LINES - 1], "…"]
    return picture, sample.key, lines, False


def _picture(data: bytes, max_pixels: int) -> Image.Image:
    picture = Image.fromarray(decode_whole(data, side=CELL, max_pixels=max_pixels))
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
