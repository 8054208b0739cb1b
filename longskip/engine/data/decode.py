"""Picture bytes → a bounded, checked RGB array at a resolution.

The header is read first and a picture past the pixel bound is refused before anything is decoded, so a small file
cannot fill the memory. Only JPEG, PNG and WebP are opened: PIL's other readers include one that calls Ghostscript.
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageOps

from longskip.errors import BadSampleError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 1 << 26
"""67 million pixels: 201 MiB as RGB."""

# What PIL's readers were seen to raise on damaged bytes. MemoryError: a header may ask for more than there is.
_DAMAGE = (
    OSError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, EOFError, RuntimeError, MemoryError,
    struct.error, zlib.error,
)  # fmt: skip
_BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
_ORIENTED = ("exif", "Raw profile type exif")
_ORIENTATION = 0x0112
_SIDEWAYS = (5, 6, 7, 8)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadSampleError("image_empty", "the picture has 0 bytes")
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except _BOMB as error:
        raise BadSampleError("image_too_large", str(error)) from error
    except Image.UnidentifiedImageError as error:
        known = data[:3] == b"\xff\xd8\xff" or data[:8] == b"\x89PNG\r\n\x1a\n" or data[8:12] == b"WEBP"
        if known:
            raise BadSampleError("image_decode", "the picture's header is damaged") from error
        raise BadSampleError("image_format", f"neither JPEG, PNG nor WebP (starts with {data[:8]!r})") from error
    except _DAMAGE as error:
        raise BadSampleError("image_decode", f"{type(error).__name__}: {error}") from error


def picture_size(data: bytes) -> tuple[int, int]:
    """(width, height) in pixels from the header alone, before EXIF orientation. Raises ``BadSampleError``."""
    with _open(data) as image:
        return image.size


def upright_size(data: bytes) -> tuple[int, int]:
    """(height, width) in pixels from the header alone, as seen: EXIF orientation applied. Raises ``BadSampleError``."""
    with _open(data) as image:
        width, height = image.size
        try:
            sideways = _oriented(image) and image.getexif().get(_ORIENTATION, 1) in _SIDEWAYS
        except _DAMAGE:
            sideways = False
    return (width, height) if sideways else (height, width)


def decode_image(
    data: bytes,
    *,
    resolution: tuple[int, int],
    max_pixels: int = MAX_PIXELS,
    flip: bool = False,
    crop: tuple[float, float] | None = None,
) -> np.ndarray:
    """``(H, W, 3)`` uint8 RGB at ``resolution`` = (H, W) pixels.

    The largest window of the resolution's aspect ratio is cut out and resized. It stands in the centre, or where
    ``crop`` = (y, x), two numbers in [0, 1], puts it within the room that is left. ``flip`` mirrors left and right.
    EXIF orientation is applied; palettes, greys, CMYK and 16 bits become 8-bit RGB; transparency is laid on white; of
    an animation the first frame is taken. Raises ``BadSampleError`` with the reasons ``image_empty``, ``image_format``,
    ``image_decode``, ``image_size``, ``image_too_large`` or ``image_mode``.
    """
    height, width = resolution
    image = _load(data, max_pixels, (width, height))
    try:
        return _fit(image, height, width, flip, crop or (0.5, 0.5))
    except _DAMAGE as error:
        raise BadSampleError("image_decode", f"{type(error).__name__}: {error}") from error


def decode_whole(data: bytes, *, side: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """``(h, w, 3)`` uint8 RGB of the uncut picture, shrunk to fit ``side`` x ``side`` pixels and never enlarged."""
    image = _load(data, max_pixels, (side, side))
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _load(data: bytes, max_pixels: int, wanted: tuple[int, int]) -> Image.Image:
    """The upright RGB picture; a JPEG may come smaller than stored, but never below ``wanted`` = (width, height)."""
    with _open(data) as image:
        if image.width < 1 or image.height < 1:
            raise BadSampleError("image_size", f"the picture is {image.width} x {image.height} pixels")
        if image.width * image.height > max_pixels:
            raise BadSampleError(
                "image_too_large",
                f"the picture is {image.width} x {image.height} = {image.width * image.height} pixels; "
                f"the limit is {max_pixels}",
            )
        try:
            if image.format == "JPEG":  # decodes at 1/2, 1/4 or 1/8 where that is still at least what is asked for
                image.draft("RGB", (max(wanted), max(wanted)) if _oriented(image) else wanted)
            image.load()
            return _to_rgb(_upright(image))
        except BadSampleError:
            raise
        except _DAMAGE as error:
            raise BadSampleError("image_decode", f"{type(error).__name__}: {error}") from error


def _oriented(image: Image.Image) -> bool:
    return any(name in image.info for name in _ORIENTED)


def _upright(image: Image.Image) -> Image.Image:
    if not _oriented(image):
        return image
    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
    except _DAMAGE:  # a broken EXIF block does not spoil the pixels
        return image
    return (ImageOps.exif_transpose(image) or image) if turned else image


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image
    if mode.startswith("I"):  # 16-bit grey; PIL's own conversion clips at 255 instead of scaling
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 0xFFFF:
            raise BadSampleError("image_mode", f"integer pixels from {grey.min()} to {grey.max()}, not 16 bits")
        return Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        white = Image.new("RGBA", over.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, over).convert("RGB")
    if mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB", "HSV"):
        return image.convert("RGB")
    raise BadSampleError("image_mode", f"pixel mode {mode} cannot be made RGB")


def _fit(image: Image.Image, height: int, width: int, flip: bool, crop: tuple[float, float]) -> np.ndarray:
    if image.size != (width, height):
        # Cutting while resizing keeps a 1 x 10000 picture from becoming 32 x 320000 on the way.
        scale = min(image.width / width, image.height / height)
        box_width, box_height = width * scale, height * scale
        left = min((image.width - box_width) * crop[1], image.width - box_width)
        top = min((image.height - box_height) * crop[0], image.height - box_height)
        left, top = max(left, 0.0), max(top, 0.0)
        box = (left, top, min(left + box_width, image.width), min(top + box_height, image.height))
        resample = Image.Resampling.BICUBIC if scale < 1 else Image.Resampling.LANCZOS
        image = image.resize((width, height), resample, box=box, reducing_gap=3.0)
    array = np.asarray(image)
    return np.ascontiguousarray(array[:, ::-1]) if flip else array
