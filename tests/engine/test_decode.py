from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from longskip.engine.data.decode import decode_image, decode_whole, picture_size
from longskip.errors import BadSampleError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encoded(image: Image.Image | np.ndarray, format: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, format, **options)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(width: int, height: int, rows: bytes | None = None) -> bytes:
    """A grey PNG written by hand; without ``rows`` of black pixels."""
    compressor = zlib.compressobj(9)
    if rows is None:
        line = bytes(1 + width)
        body = b"".join(compressor.compress(line) for _ in range(height)) + compressor.flush()
    else:
        body = compressor.compress(rows) + compressor.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def reason(data: bytes, **options) -> str:
    with pytest.raises(BadSampleError) as caught:
        decode_image(data, **{"resolution": (8, 8), **options})
    assert str(caught.value)
    return caught.value.reason


def test_pixels_are_kept_where_nothing_has_to_change():
    data = encoded(PIXELS)
    out = decode_image(data, resolution=(12, 20))
    assert out.dtype == np.uint8
    assert np.array_equal(out, PIXELS)
    assert np.array_equal(decode_image(data, resolution=(12, 20), flip=True), PIXELS[:, ::-1])
    assert picture_size(data) == (20, 12)


def test_crops_are_windows_of_the_picture():
    data = encoded(PIXELS)
    assert np.array_equal(decode_image(data, resolution=(12, 12)), PIXELS[:, 4:16])
    assert np.array_equal(decode_image(data, resolution=(12, 12), crop=(0.3, 0.0)), PIXELS[:, :12])
    assert np.array_equal(decode_image(data, resolution=(12, 12), crop=(0.3, 1.0)), PIXELS[:, 8:])
    tall = encoded(np.ascontiguousarray(PIXELS.transpose(1, 0, 2)))
    assert np.array_equal(decode_image(tall, resolution=(12, 12), crop=(1.0, 0.0)), PIXELS.transpose(1, 0, 2)[8:])


def test_shrinking_keeps_the_mean_and_the_order():
    ramp = np.repeat(np.linspace(0, 255, 256).astype(np.uint8)[None, :, None], 128, 0).repeat(3, 2)
    for format in ("PNG", "JPEG"):
        out = decode_image(encoded(ramp, format), resolution=(16, 32)).astype(float)
        expected = ramp[:16, :, 0].reshape(16, 32, 8).mean(2)
        assert np.abs(out[:, 2:-2, 0] - expected[:, 2:-2]).max() < 4


def test_extreme_shapes_stay_bounded():
    for shape in ((1, 4000, 3), (4000, 1, 3), (1, 1, 3)):
        data = encoded(np.full(shape, 90, dtype=np.uint8))
        tracemalloc.start()
        out = decode_image(data, resolution=(32, 48), crop=(0.9, 0.9))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()
        assert out.shape == (32, 48, 3)
        assert (out == 90).all()


def test_modes_become_rgb():
    grey = PIXELS[:, :, 0].copy()
    three = np.stack([grey] * 3, 2)
    at = {"resolution": (12, 20)}
    assert np.array_equal(decode_image(encoded(grey), **at), three)
    sixteen = Image.fromarray(grey.astype(np.uint16) * 257)
    assert np.array_equal(decode_image(encoded(sixteen), **at), three)
    assert np.array_equal(decode_image(encoded(Image.fromarray(grey > 99)), **at), np.where(three > 99, 255, 0))
    palette = Image.fromarray(PIXELS).quantize(16)
    assert np.array_equal(decode_image(encoded(palette), **at), np.asarray(palette.convert("RGB")))
    cmyk = decode_image(encoded(Image.fromarray(np.full((12, 20, 3), 200, np.uint8)).convert("CMYK"), "JPEG"), **at)
    assert np.abs(cmyk.astype(int) - 200).max() <= 2


def test_transparency_is_laid_on_white():
    alpha = RNG.integers(0, 256, (12, 20, 1), dtype=np.uint8)
    out = decode_image(encoded(np.concatenate([PIXELS, alpha], 2)), resolution=(12, 20)).astype(float)
    share = alpha / 255
    assert np.abs(out - (PIXELS * share + 255 * (1 - share))).max() <= 1
    grey = encoded(np.concatenate([PIXELS[:, :, :1], np.zeros_like(alpha)], 2))
    assert (decode_image(grey, resolution=(12, 20)) == 255).all()
    keyed = Image.new("P", (20, 12), 1)
    keyed.putpalette([0, 0, 0, 10, 20, 30])
    assert (decode_image(encoded(keyed, transparency=1), resolution=(12, 20)) == 255).all()
    rgb = decode_image(encoded(Image.new("RGB", (20, 12), (9, 8, 7)), transparency=(9, 8, 7)), resolution=(12, 20))
    assert (rgb == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    # What a viewer must do to the stored rows, by the EXIF 2.3 table.
    turn = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a, -1), 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
        8: lambda a: np.rot90(a, 1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = turn(PIXELS)
    for options in ({"format": "PNG"}, {"format": "WEBP", "lossless": True}):
        out = decode_image(encoded(PIXELS, exif=exif, **options), resolution=upright.shape[:2])
        assert np.array_equal(out, upright)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_block_does_not_spoil_the_picture():
    data = encoded(PIXELS, "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert np.array_equal(decode_image(data, resolution=(12, 20)), PIXELS)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for options in ({"format": "PNG"}, {"format": "WEBP", "lossless": True}):
        out = decode_image(encoded(frames[0], save_all=True, append_images=frames[1:], **options), resolution=(16, 16))
        assert (out == [255, 0, 0]).all()


def test_a_bomb_is_refused_before_it_is_decoded():
    bomb = raw_png(9000, 9000)
    assert len(bomb) < 230 * 1024
    tracemalloc.start()
    assert reason(bomb) == "image_too_large"
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()
    assert reason(raw_png(30_000, 30_000, b"")) == "image_too_large"
    assert reason(encoded(PIXELS), max_pixels=239) == "image_too_large"
    assert decode_image(encoded(PIXELS), resolution=(8, 8), max_pixels=240).shape == (8, 8, 3)


def test_broken_bytes_have_reasons():
    assert reason(b"") == "image_empty"
    assert reason(b"hello, I am a text") == "image_format"
    assert reason(encoded(PIXELS, "GIF")) == "image_format"
    assert reason(b"%!PS-Adobe-3.0 EPSF-3.0\n") == "image_format"
    assert reason(b"\x89PNG\r\n\x1a\n") == "image_decode"
    assert reason(raw_png(0, 0, b"")) in ("image_decode", "image_size")
    for format in ("PNG", "JPEG", "WEBP"):
        whole = encoded(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8), format)
        assert reason(whole[: len(whole) // 2]) == "image_decode"


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_flipped_bytes_decode_or_are_refused_and_nothing_else():
    for format in ("PNG", "JPEG", "WEBP"):
        whole = bytearray(encoded(PIXELS, format, exif=Image.Exif()))
        for place in range(0, len(whole), 7):
            damaged = bytes(whole[:place]) + bytes([whole[place] ^ 0x5A]) + bytes(whole[place + 1 :])
            try:
                out = decode_image(damaged, resolution=(8, 8), max_pixels=1 << 20)
            except BadSampleError as error:
                assert error.reason.startswith("image_")
            else:
                assert out.shape == (8, 8, 3)


def test_whole_pictures_are_shrunk_and_never_enlarged():
    assert np.array_equal(decode_whole(encoded(PIXELS), side=64), PIXELS)
    assert decode_whole(encoded(PIXELS), side=10).shape == (6, 10, 3)
