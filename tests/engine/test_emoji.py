"""The emoji pictures against the Unicode database and against each other; skipped without a colour-emoji font."""

from __future__ import annotations

import io
import json
import tarfile
import unicodedata
from itertools import islice
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from longskip.engine.data.emoji import FONT_VARIABLE, emoji_names, find_font, generate_emoji, write_emoji
from longskip.errors import DataError

TEXT_FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")


def _has_font() -> bool:
    try:
        find_font()
    except DataError:
        return False
    return True


needs_font = pytest.mark.skipif(
    not _has_font(), reason="no colour-emoji font on this machine (apt install fonts-noto-color-emoji)"
)


@pytest.fixture(scope="module")
def samples():
    return list(generate_emoji(32))


def _pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


@needs_font
def test_more_than_a_thousand_named_pictures(samples) -> None:
    names = emoji_names()
    assert len(names) == len(samples) > 1000
    for key, _, captions, record in samples:
        character = record["character"]
        assert len(character) == 1 and key == f"{ord(character):05x}"
        assert captions == [unicodedata.name(character).lower()] == [names[record["codepoint"]]]
        assert record["codepoint"] == f"U+{key.lstrip('0').upper().rjust(4, '0')}"
    assert len({captions[0] for _, _, captions, _ in samples}) == len(samples)
    assert {"dog face", "hot beverage", "red apple", "grinning face", "rainbow"} <= set(names.values())


@needs_font
def test_parts_flags_keycaps_and_skin_tones_are_left_out(samples) -> None:
    words = " ".join(captions[0] for _, _, captions, _ in samples)
    for part in ("regional indicator", "emoji modifier", "variation selector", "joiner", "emoji component", "keycap"):
        assert part not in words
    shown = {record["character"] for *_, record in samples}
    assert not shown & set("#*0123456789")
    assert all(unicodedata.category(character)[0] in "SP" for character in shown)


@needs_font
@pytest.mark.parametrize("size", [24, 32, 100])
def test_pictures_are_drawn_on_white_and_unlike_each_other(size: int, samples) -> None:
    pictures = [_pixels(png) for _, png, *_ in (samples if size == 32 else islice(generate_emoji(size), 300))]
    assert all(picture.shape == (size, size, 3) and picture.dtype == np.uint8 for picture in pictures)
    for picture in pictures:
        assert (255 - picture.astype(np.int64)).mean() > 2, "blank"
        assert picture[[0, 0, -1, -1], [0, -1, 0, -1]].min() >= 240, "corners are not white"
        inked = np.argwhere(picture.min(2) < 240)
        assert (inked.max(0) - inked.min(0)).max() >= 0.75 * size, "small in its picture"
    if size == 32:
        assert len({picture.tobytes() for picture in pictures}) == len(pictures)


@needs_font
def test_what_the_font_draws_for_unknown_code_points_is_left_out(samples) -> None:
    shown = {record["character"] for *_, record in samples}
    # Symbols with names, in the same blocks, that are no emoji.
    assert not shown & {"\u2603\ufe0f", "\u2190", "\u2596", "\U0001f0a1", "\U0001f700", "\U0001fb00"}


@needs_font
def test_colours_are_those_of_the_things(samples) -> None:
    by_name = {captions[0]: _pixels(png).astype(np.int64) for _, png, captions, _ in samples}
    middle = {name: by_name[name][12:20, 12:20].mean((0, 1)) for name in ("large red circle", "large blue circle")}
    assert middle["large red circle"][0] > middle["large red circle"][2] + 80
    assert middle["large blue circle"][2] > middle["large blue circle"][0] + 80


@needs_font
def test_the_set_is_reproducible_and_packs_into_shards(tmp_path, samples) -> None:
    index = write_emoji(tmp_path / "emoji", 32, per_shard=700)
    assert sum(entry.count for entry in index.shards) == len(samples)
    members: dict[str, bytes] = {}
    for entry in index.shards:
        with tarfile.open(tmp_path / "emoji" / entry.file) as archive:
            members.update({m.name: archive.extractfile(m).read() for m in archive})  # type: ignore[union-attr]
    for key, png, captions, record in samples:
        assert members[f"{key}.png"] == png
        assert members[f"{key}.txt"].decode() == captions[0]
        assert json.loads(members[f"{key}.json"]) == record


def test_a_missing_font_names_the_cure(monkeypatch, tmp_path) -> None:
    with pytest.raises(DataError, match="fonts-noto-color-emoji"):
        find_font(tmp_path / "none.ttf")
    monkeypatch.setenv(FONT_VARIABLE, str(tmp_path / "other.ttf"))
    with pytest.raises(DataError, match=r"other\.ttf.*\n.*--font PATH"):
        next(generate_emoji())
    monkeypatch.delenv(FONT_VARIABLE)
    monkeypatch.setattr("longskip.engine.data.emoji._FONT_FOLDERS", (str(tmp_path),))
    with pytest.raises(DataError, match="apt install fonts-noto-color-emoji"):
        emoji_names()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "NotoColorEmoji.ttf").write_bytes(b"no font")
    assert find_font() == tmp_path / "deep" / "NotoColorEmoji.ttf"
    with pytest.raises(DataError, match="not a font"):
        emoji_names()


def test_a_font_without_colour_emoji_is_refused() -> None:
    with pytest.raises(DataError, match="in colour"):
        next(generate_emoji(32, TEXT_FONT))


@pytest.mark.parametrize("size", [0, 7, 513])
def test_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(DataError, match=str(size)):
        next(generate_emoji(size))
