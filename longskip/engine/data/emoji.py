"""The embedded ``emoji`` data: pictures of the system's colour-emoji font, captioned with Unicode names. No torch.

More than a thousand drawn things on white, each a single code point ("dog face", "hot beverage"). Left out: flags,
keycaps, skin tones and whatever is joined from several code points; code points that the font does not draw, draws
blank, or draws as it drew an earlier one; and those that this Python's ``unicodedata`` has no name for. The set
depends on the font's and Python's versions, never on the picture size.
"""

from __future__ import annotations

import hashlib
import io
import os
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longskip.errors import DataError, UnfitDataError

if TYPE_CHECKING:
    from longskip.engine.data.index import Index

FONT_VARIABLE = "LONGSKIP_EMOJI_FONT"
_FONT_NAMES = ("NotoColorEmoji.ttf", "NotoColorEmoji-Regular.ttf", "Apple Color Emoji.ttc")
_FONT_FOLDERS = (
    "~/.local/share/fonts",
    "~/.fonts",
    "/usr/local/share/fonts",
    "/usr/share/fonts",
    "/System/Library/Fonts",
    "~/Library/Fonts",
    "/Library/Fonts",
)
_CURE = f"apt install fonts-noto-color-emoji, or name a colour-emoji font with --font PATH or {FONT_VARIABLE}=PATH"
# Fonts of bitmaps open at their strike's own size only: Noto 109 (its pictures are 136 x 128), Apple 160 and below.
_STRIKES = (109, 136, 160, 128, 96, 72, 64)
# The blocks that hold emoji: Latin-1's two signs, symbols and dingbats, enclosed ideographs, and the pictographs.
_BLOCKS = ((0xA9, 0xAF), (0x203C, 0x329A), (0x1F000, 0x1FB00))
# Regional letters (flags are pairs of them), skin tones, hair styles: parts of other emoji; and the keycap ten.
_LEFT_OUT = ((0x1F1E6, 0x1F200), (0x1F3FB, 0x1F400), (0x1F9B0, 0x1F9B4), (0x1F51F, 0x1F520))
_UNASSIGNED = "\U0010fffd"  # private use: what the font draws for what it does not have
_MIN_SIZE, _MAX_SIZE = 8, 512


def find_font(font: str | os.PathLike[str] | None = None) -> Path:
    """The colour-emoji font: ``font``, else the file that LONGSKIP_EMOJI_FONT names, else the first one found in the
    usual folders. DataError with the cure if there is none."""
    named = os.fspath(font) if font is not None else os.environ.get(FONT_VARIABLE)
    if named:
        path = Path(named).expanduser()
        if not path.is_file():
            raise UnfitDataError(f"emoji font {str(path)!r} is not a file", cure=_CURE)
        return path
    for folder in _FONT_FOLDERS:
        for base, folders, files in os.walk(Path(folder).expanduser()):
            folders.sort()
            for name in _FONT_NAMES:
                if name in files:
                    return Path(base, name)
    raise UnfitDataError(f"no colour-emoji font ({_FONT_NAMES[0]}) in {', '.join(_FONT_FOLDERS)}", cure=_CURE)


def _open(path: Path) -> ImageFont.FreeTypeFont:
    data = path.read_bytes()  # given a path that it cannot read, PIL opens a font of that name from elsewhere
    for strike in _STRIKES:
        try:
            return ImageFont.truetype(io.BytesIO(data), strike)
        except OSError:  # "invalid pixel size", or no font at all
            continue
    raise DataError(f"{str(path)!r} is not a font that FreeType opens at {_STRIKES} px", cure=_CURE)


def _render(font: ImageFont.FreeTypeFont, text: str) -> Image.Image | None:
    """The glyph as RGBA, cut to what is drawn; None if nothing is."""
    left, top, right, bottom = (int(v) for v in font.getbbox(text))
    if right <= left or bottom <= top:
        return None
    image = Image.new("RGBA", (right - left, bottom - top), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((-left, -top), text, font=font, embedded_color=True)
    drawn = image.getbbox()
    return image.crop(drawn) if drawn else None


def _digest(image: Image.Image) -> bytes:
    return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).digest()


def _is_coloured(image: Image.Image) -> bool:
    pixels = np.asarray(image).astype(np.int64)
    spread = pixels[..., :3].max(-1) - pixels[..., :3].min(-1)
    return bool((spread[pixels[..., 3] > 127] > 40).any())


def _candidates() -> Iterator[tuple[str, str]]:
    for first, end in _BLOCKS:
        for point in range(first, end):
            if any(low <= point < high for low, high in _LEFT_OUT):
                continue
            name = unicodedata.name(chr(point), "").lower()
            if name and "variation selector" not in name and unicodedata.category(chr(point))[0] in "SP":
                yield chr(point), name


def _glyphs(font: str | os.PathLike[str] | None) -> Iterator[tuple[str, str, Image.Image]]:
    """(character, name, RGBA picture) of every emoji that is in the set, by code point."""
    path = find_font(font)
    opened = _open(path)
    face = _render(opened, "\U0001f600")
    if face is None or not _is_coloured(face):
        raise DataError(f"{str(path)!r} does not draw U+1F600 (grinning face) in colour", cure=_CURE)
    missing = _render(opened, _UNASSIGNED)
    known = {_digest(missing)} if missing is not None else set()
    for character, name in _candidates():
        image = _render(opened, character)
        if image is None:
            continue
        digest = _digest(image)
        if digest not in known:
            known.add(digest)
            yield character, name, image


def emoji_names(font: str | os.PathLike[str] | None = None) -> dict[str, str]:
    """Code point ("U+1F436") to Unicode name in lower case ("dog face"), for every emoji of the set.

    ``font``: see ``find_font``. DataError if there is no font or it has no colour emoji. A few seconds.
    """
    return {f"U+{ord(character):04X}": name for character, name, _ in _glyphs(font)}


def _on_white(image: Image.Image, size: int) -> Image.Image:
    side = max(image.size)
    margin = round(side * 0.04)
    canvas = Image.new("RGBA", (side + 2 * margin,) * 2, (255, 255, 255, 255))
    canvas.alpha_composite(image, (margin + (side - image.width) // 2, margin + (side - image.height) // 2))
    return canvas.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def generate_emoji(
    size: int = 32, font: str | os.PathLike[str] | None = None
) -> Iterator[tuple[str, bytes, list[str], dict[str, Any]]]:
    """Yields ``(key, PNG bytes, [caption], record)`` by code point; pictures are ``size`` x ``size`` RGB on white.

    The key is the code point ("1f436"), the caption the Unicode name in lower case, the record ``{"codepoint",
    "character"}``. DataError for a size outside [8, 512], or without a colour-emoji font.
    """
    if not _MIN_SIZE <= size <= _MAX_SIZE:
        raise DataError(f"picture size {size} px is outside [{_MIN_SIZE}, {_MAX_SIZE}]", cure="32 and 64 are usual")
    for character, name, image in _glyphs(font):
        buffer = io.BytesIO()
        _on_white(image, size).save(buffer, "png")
        record = {"codepoint": f"U+{ord(character):04X}", "character": character}
        yield f"{ord(character):05x}", buffer.getvalue(), [name], record


def write_emoji(
    folder: str | os.PathLike[str],
    size: int = 32,
    font: str | os.PathLike[str] | None = None,
    *,
    per_shard: int = 10_000,
    progress: Callable[[int], None] | None = None,
) -> Index:
    """Writes ``generate_emoji``'s pictures as indexed shards, the code point in ``KEY.json``.

    ``progress`` is called with the number written. DataError for a folder that already holds shards, or no font.
    """
    from longskip.engine.data.pack import write_shards

    samples = (
        {"__key__": key, "png": png, "txt": names[0], "json": record}
        for key, png, names, record in generate_emoji(size, font)
    )
    return write_shards(samples, folder, per_shard=per_shard, progress=progress)
