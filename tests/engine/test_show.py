"""Contact sheets of feature shards: latents in colours, pictures where they are kept."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from longskip.engine.data import show
from longskip.engine.data.encoding import npy_bytes
from longskip.engine.data.pack import write_shards
from longskip.engine.data.show import CELL, contact_sheet, latent_colours
from longskip.engine.data.sources import open_source
from tests.engine.stored_features import write_features

RED = [176, 42, 42]


def sheet_of(path, out, **how) -> np.ndarray:
    contact_sheet(open_source(path), out / "sheet.png", **how)
    return np.asarray(Image.open(out / "sheet.png"))


def tile(sheet: np.ndarray, column: int, top: int) -> np.ndarray:
    left = 14 + column * (CELL + 14)
    return sheet[top : top + CELL, left : left + CELL]


def tops(sheet: np.ndarray) -> list[int]:
    """Where the first row's tiles begin: below the first line, the frame's, that is no paper from left to right."""
    inked = (sheet[:, 14 : 14 + CELL] != sheet[0, 0]).any(2).all(1)
    return (np.flatnonzero(inked & ~np.roll(inked, 1)) + 1).tolist()


def test_latents_are_drawn_in_colours_of_their_own(tmp_path):
    """The oracle is a singular value decomposition of the same values, up to each axis' sign."""
    path = write_features(tmp_path / "features", 6)
    source = open_source(path)
    arrays = [np.load(io.BytesIO(source.member(i, "latent.npy"))) for i in range(4)]
    colours = latent_colours(arrays)
    assert [picture.shape for picture in colours] == [(*array.shape[1:], 3) for array in arrays]
    flat = np.concatenate([array.reshape(4, -1).T for array in arrays]).astype(np.float64)
    _, _, rows = np.linalg.svd(flat - flat.mean(0), full_matrices=False)
    for axis in range(3):
        values = (flat - flat.mean(0)) @ rows[axis]
        low, high = np.percentile(values, (1, 99))
        expected = np.clip((values - low) / (high - low), 0, 1) * 255
        found = np.concatenate([picture[..., axis].reshape(-1) for picture in colours]).astype(float)
        assert min(np.abs(found - expected).max(), np.abs(found - 255 + expected).max()) <= 0.51
    sheet = sheet_of(path, tmp_path, n=4, columns=4)
    (top,) = tops(sheet)
    assert top > 14 + 10 and (sheet[14 : top - 14] != sheet[0, 0]).any()  # the note stands above
    for column, picture in enumerate(colours):
        big = np.kron(picture, np.ones((CELL // max(picture.shape[:2]),) * 2 + (1,), np.uint8))
        place = tile(sheet, column, top)
        y, x = ((CELL - side) // 2 for side in big.shape[:2])
        assert (place[y : y + big.shape[0], x : x + big.shape[1]] == big).all()
    assert not (sheet == RED).all(2).any()


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
def test_any_number_of_channels_can_be_drawn(channels):
    latents = [np.random.default_rng(i).standard_normal((channels, 4, 6)).astype(np.float16) for i in range(2)]
    colours = np.stack(latent_colours(latents))
    assert colours.shape == (2, 4, 6, 3) and colours.dtype == np.uint8
    assert (colours[..., 0].min(), colours[..., 0].max()) == (0, 255)
    assert (colours[..., channels:] == 128).all()
    assert np.array_equal(latent_colours([np.zeros((channels, 2, 2), np.float32)])[0][..., 0], np.zeros((2, 2)))


def test_kept_pictures_are_shown_and_bad_latents_have_their_box(tmp_path, monkeypatch):
    def png(i: int) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
        return buffer.getvalue()

    latent = {"latent.npy": npy_bytes(np.ones((4, 2, 2), np.float16))}
    plain = [{"png": png(i), "txt": f"number {i}"} for i in range(3)]
    write_shards(plain, tmp_path / "plain")
    write_shards([sample | latent for sample in plain], tmp_path / "kept")
    kept = sheet_of(tmp_path / "kept", tmp_path, n=3)
    assert np.array_equal(kept, sheet_of(tmp_path / "plain", tmp_path, n=3))

    bad = np.ones((4, 2, 2), np.float16)
    bad[1, 0, 0] = np.nan
    spoilt = [bad, np.ones((3, 2, 2), np.float16), np.ones((4, 4), np.float16)]
    rows = [latent | {"txt": "good"}, *({"latent.npy": npy_bytes(array), "txt": "bad"} for array in spoilt)]
    write_shards(rows, tmp_path / "bad")
    said: list[str] = []
    wrap = show.wrap
    monkeypatch.setattr(show, "wrap", lambda text, *place: said.append(text) or wrap(text, *place))
    sheet = sheet_of(tmp_path / "bad", tmp_path, n=4)
    assert any("Latents, not pictures" in text for text in said)
    for reason in (
        "feature_values",
        "latent_shape: the latent.npy is (3, 2, 2)",
        "latent_shape: the latent.npy is (4, 4)",
    ):
        assert any(text.startswith(reason) for text in said)
    (top, *_) = tops(sheet)
    crossed = [(tile(sheet, column, top) == RED).all(2).any() for column in range(4)]
    assert crossed == [False, True, True, True]


def test_a_white_picture_has_a_frame_round_it(tmp_path):
    """A line of another colour on all four sides, outside the picture, whose pixels stay."""
    for name, size in (("tall", (24, 48)), ("square", (32, 32))):
        Image.new("RGB", size, (255, 255, 255)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(name)
    sheet = sheet_of(tmp_path, tmp_path / "out", columns=2)
    for column, (width, height) in enumerate(((192, 192), (96, 192))):
        left, right = (14 + column * (CELL + 14) + (CELL + sign * width) // 2 for sign in (-1, 1))
        top, bottom = 14 + (CELL - height) // 2, 14 + (CELL + height) // 2
        assert (sheet[top:bottom, left:right] == 255).all()
        edges = sheet[top - 1 : bottom + 1, left - 1 : right + 1].astype(int)
        for line in (edges[0], edges[-1], edges[:, 0], edges[:, -1]):
            assert (line == line[0]).all() and abs(line[0] - sheet[0, 0]).max() > 30
