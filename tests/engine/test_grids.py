from __future__ import annotations

import numpy as np
import pytest

from longskip.engine.grids import make_grid
from longskip.errors import DataError

MARGIN = 12


def pictures(count: int, height: int = 4, width: int = 6) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def corner(grid, index: int, columns: int, wide: int, row_top: int) -> np.ndarray:
    left = MARGIN + index % columns * (wide + MARGIN)
    return np.asarray(grid)[row_top:, left:]


@pytest.mark.parametrize("scale", [1, 3, 5])
def test_every_pixel_becomes_a_sharp_square(scale: int) -> None:
    images = pictures(3)
    grid = make_grid(images, ["", "", ""], columns=3, scale=scale)
    assert grid.mode == "RGB" and grid.size == (3 * (6 * scale + MARGIN) + MARGIN, 4 * scale + 2 * MARGIN)
    for index, image in enumerate(images):
        shown = corner(grid, index, 3, 6 * scale, MARGIN)
        for y, x in np.ndindex(4, 6):
            square = shown[y * scale : (y + 1) * scale, x * scale : (x + 1) * scale]
            assert (square == image[y, x]).all()


def test_rows_columns_and_defaults() -> None:
    grid = make_grid(pictures(5, 32, 32), ["a"] * 5)
    wide = 32 * 5  # the smallest factor that reaches 144 px
    assert grid.width == 3 * (wide + MARGIN) + MARGIN  # ceil(sqrt(5)) columns
    assert 2 * wide < grid.height < 2 * (wide + 50)
    assert make_grid(pictures(1, 200, 300), [""]).size == (300 + 2 * MARGIN, 200 + 2 * MARGIN)  # large stays as it is
    assert make_grid(pictures(2), ["", ""], columns=9, scale=1).width == 2 * (6 + MARGIN) + MARGIN


def test_captions_are_drawn_below_and_never_over_a_picture() -> None:
    images = pictures(2, 32, 32)
    plain = np.asarray(make_grid(images, ["", ""], columns=2, scale=4))
    labelled = np.asarray(make_grid(images, ["a red circle", "a red circle"], columns=2, scale=4))
    bottom = MARGIN + 128
    assert (labelled[:bottom] == plain[:bottom]).all()
    first, second = labelled[bottom + 1 :, MARGIN : MARGIN + 128], labelled[bottom + 1 :, 2 * MARGIN + 128 :][:, :128]
    assert (first == second).all() and (first < 100).all(axis=2).sum() > 40


def test_long_captions_wrap_to_their_width_and_end() -> None:
    images = pictures(1, 32, 32)
    heights = [
        make_grid(images, [text], scale=4).height for text in ("", "one", "one two three four five", "word " * 99)
    ]
    assert heights[0] < heights[1] < heights[2] < heights[3] <= heights[1] + 5 * 17
    for text in ("x" * 400, "word " * 99, "ü “quoted” \n\t <b>", "W" * 40):
        ink = (np.asarray(make_grid(images, [text], scale=4)) < 200).all(axis=2)[MARGIN + 129 + 1 :]
        columns = np.flatnonzero(ink.any(axis=0))
        assert columns.size and columns[0] >= MARGIN - 1 and columns[-1] <= MARGIN + 128


def test_more_lines_hold_a_longer_caption() -> None:
    images = pictures(1, 32, 32)
    heights = [make_grid(images, ["word " * 40], scale=4, lines=lines).height for lines in (2, 6, 10, 99)]
    assert heights[1] == make_grid(images, ["word " * 40], scale=4).height
    assert (
        heights[0] < heights[1] < heights[2] < heights[3] < make_grid(images, ["word " * 80], scale=4, lines=99).height
    )


def test_pictures_of_several_sizes_are_centred() -> None:
    small, large = pictures(1, 2, 2)[0], pictures(1, 6, 8)[0]
    grid = np.asarray(make_grid([small, large], ["", ""], columns=2, scale=2))
    assert (grid[MARGIN + 4 : MARGIN + 8, MARGIN + 6 : MARGIN + 10] == small.repeat(2, 0).repeat(2, 1)).all()
    assert (grid[MARGIN : MARGIN + 12, 2 * MARGIN + 16 :][:, :16] == large.repeat(2, 0).repeat(2, 1)).all()


@pytest.mark.parametrize(
    ("images", "captions", "message"),
    [
        ([], [], "at least 1"),
        (pictures(2), ["one"], "2 pictures but 1 captions"),
        ([np.zeros((4, 4, 3))], ["x"], "float64"),
        ([np.zeros((3, 4, 4), np.uint8)], ["x"], r"\(3, 4, 4\)"),
        ([np.zeros((0, 4, 3), np.uint8)], ["x"], r"\(0, 4, 3\)"),
    ],
)
def test_unusable_input_is_named(images: list, captions: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_grid(images, captions)


def test_columns_and_scale_must_be_positive() -> None:
    with pytest.raises(DataError, match="columns 0"):
        make_grid(pictures(1), [""], columns=0)
    with pytest.raises(DataError, match="scale 0"):
        make_grid(pictures(1), [""], scale=0)
