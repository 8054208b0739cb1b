"""The judge against true pictures, altered captions, and pictures that the package's drawer did not make."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from longskip.engine.data.judge import judge, look, score, to_lab
from longskip.engine.data.scenes import COLOURS, POSITIONS, SHAPES, SIZES, Scene, Thing, all_scenes, sample_scene
from longskip.engine.data.shapes import draw
from longskip.errors import DataError
from tests.figures import figure


def _pictures(count: int, objects, size: int, noise: float = 0.0, blur: float = 0.0, seed: int = 1):
    rng = np.random.default_rng(seed)
    pictures, scenes = [], []
    for _ in range(count):
        scene = sample_scene(rng, objects, None)
        picture = draw(scene, size, rng).astype(np.float64)
        if blur:
            picture = ndimage.gaussian_filter(picture, (blur, blur, 0))
        picture = picture + rng.normal(0, noise, picture.shape)
        pictures.append(np.clip(np.round(picture), 0, 255).astype(np.uint8))
        scenes.append(scene)
    return pictures, scenes


@pytest.mark.parametrize("size", [32, 64])
def test_every_one_object_scene_is_read_right(size: int) -> None:
    rng = np.random.default_rng(0)
    plain = score([draw(scene, size) for scene in all_scenes()], all_scenes())
    varied = score([draw(scene, size, rng) for scene in all_scenes()], all_scenes())
    assert plain["count"] == varied["count"] == 800
    assert plain["full"] >= 0.99 and varied["full"] >= 0.99
    figure(
        f"judge on true pictures of {size} px, 800 combinations: {plain['full']:.4f} plain, {varied['full']:.4f} varied"
    )
    assert set(plain) == {"count", "full", "objects", "colour", "size", "shape", "position"}


@pytest.mark.parametrize(("size", "count"), [(32, 500), (64, 300), (128, 60)])
def test_two_object_scenes_are_read_right(size: int, count: int) -> None:
    result = score(*_pictures(count, 2, size))
    assert result["full"] >= 0.99
    assert set(result) == {"count", "full", "objects", "colour", "size", "shape", "relation"}


@pytest.mark.parametrize(("objects", "noise", "blur"), [(1, 8, 0.5), (2, 8, 0.5), (1, 0, 0.7), ("mixed", 12, 0)])
def test_mild_noise_and_blur_are_tolerated(objects, noise: float, blur: float) -> None:
    assert score(*_pictures(500, objects, 32, noise, blur))["full"] >= 0.97


def test_small_rings_and_stars_survive_a_blur_of_one_pixel_at_64() -> None:
    assert score(*_pictures(300, "mixed", 64, 8, 1.0))["full"] >= 0.99


def test_wrong_captions_score_near_chance() -> None:
    for objects, attribute, chance in ((1, "position", 1 / 5), (2, "relation", 1 / 4)):
        pictures, _ = _pictures(1200, objects, 32, seed=1)
        _, scenes = _pictures(1200, objects, 32, seed=2)
        result = score(pictures, scenes)
        assert result["full"] <= 0.01
        found = f"full {result['full']:.4f}, {attribute} {result[attribute]:.3f}"
        figure(f"judge on {result['count']} wrong captions, {objects} object(s): {found}")
        assert result["objects"] == 1.0
        assert result[attribute] == pytest.approx(chance, abs=0.05)
        if objects == 1:
            assert result["colour"] == pytest.approx(1 / len(COLOURS), abs=0.04)
            assert result["shape"] == pytest.approx(1 / len(SHAPES), abs=0.04)
            assert result["size"] == pytest.approx(1 / 2, abs=0.06)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), index=st.integers(0, 799))
def test_the_attribute_that_is_wrong_is_the_one_that_fails(data: st.DataObject, index: int) -> None:
    scene = all_scenes()[index]
    picture = draw(scene, 32, np.random.default_rng(index))
    kinds = {"colour": tuple(COLOURS), "shape": SHAPES, "size": SIZES, "position": POSITIONS}
    wrong = data.draw(st.sets(st.sampled_from(sorted(kinds))))
    thing = scene.things[0]
    for kind in wrong:
        others = [value for value in kinds[kind] if value != getattr(thing, kind)]
        thing = replace(thing, **{kind: data.draw(st.sampled_from(others))})
    verdict = judge(picture, Scene((thing,)))
    assert {name for name, right in verdict.attributes.items() if not right} == wrong
    assert verdict.full == (not wrong)
    true = scene.things[0]
    assert verdict.seen == f"{true.size} {true.colour} {true.shape} ({true.position})"


def test_the_relation_alone_can_fail() -> None:
    first, second = Thing("red", "star", "small"), Thing("blue", "star", "big")
    picture = draw(Scene((first, second), "above"), 32)
    for things, relation, right in (
        ((first, second), "above", True),
        ((second, first), "below", True),
        ((second, first), "above", False),
        ((first, second), "left of", False),
    ):
        verdict = judge(picture, Scene(things, relation))
        assert verdict.attributes == {"objects": True, "colour": True, "shape": True, "size": True, "relation": right}
        assert verdict.full == right


def test_swapped_attributes_fail() -> None:
    picture = draw(Scene((Thing("red", "star", "small"), Thing("blue", "ring", "big")), "above"), 32)
    verdict = judge(picture, Scene((Thing("blue", "star", "small"), Thing("red", "ring", "big")), "above"))
    assert verdict.attributes == {"objects": True, "colour": False, "shape": True, "size": True, "relation": True}


def test_what_was_read_amiss_is_said_and_nothing_else() -> None:
    star = Scene((Thing("red", "star", "big", "top left"),))
    one = draw(Scene((Thing("yellow", "star", "big", "center"),)), 32)
    two = draw(Scene((Thing("red", "star", "small"), Thing("blue", "ring", "big")), "above"), 32)
    assert judge(draw(star, 32), star).amiss == ""
    assert judge(one, star).amiss == "yellow for red, center for top left"
    assert judge(np.full((32, 32, 3), 255, np.uint8), star).amiss == "nothing"
    assert judge(two, star).amiss.startswith("2 objects for 1")
    below = Scene((Thing("red", "star", "small"), Thing("blue", "ring", "small")), "below")
    assert judge(two, below).amiss == "big for small, above for below"
    rng = np.random.default_rng(3)
    for _ in range(60):  # said where anything is wrong, of whatever is drawn and asked for
        drawn, asked = sample_scene(rng, "mixed", None), sample_scene(rng, "mixed", None)
        verdict = judge(draw(drawn, 32, rng), asked)
        assert (verdict.amiss == "") == verdict.full


def _own_picture(inside: np.ndarray, ink: tuple[int, int, int], paper: tuple[int, int, int]) -> np.ndarray:
    """A picture ``(s, s, 3)`` from a mask ``(4s, 4s)``: box-filtered, without anything of the package's drawer."""
    size = inside.shape[0] // 4
    part = inside.reshape(size, 4, size, 4).mean((1, 3))[..., None]
    return np.round(part * np.array(ink) + (1 - part) * np.array(paper)).astype(np.uint8)


def _figure(name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Figures as inequalities in the box [-1, 1]², y down, in other proportions than the drawer's."""
    radius, angle = np.hypot(x, y), np.arctan2(x, -y)
    if name == "circle":
        return radius < 1
    if name == "ring":
        return (radius < 1) & (radius > 0.6)
    if name == "square":
        return np.maximum(abs(x), abs(y)) < 1
    if name == "diamond":
        return abs(x) + abs(y) < 1
    if name == "triangle":
        return (y < 0.8) & (abs(x) * 1.75 < y + 0.95)
    if name == "cross":
        return (np.minimum(abs(x), abs(y)) < 0.3) & (np.maximum(abs(x), abs(y)) < 1)
    if name == "star":  # between two radii, straight in polar coordinates: its sides are bent
        turn = abs((angle / (2 * np.pi / 5) + 0.5) % 1 - 0.5) * 2
        return radius < 1 - 0.58 * turn
    bent = y - 0.1 + 0.75 * np.sqrt(abs(x))  # the heart of x² + (y - sqrt|x|)² < 1
    return x**2 + (1.15 * bent) ** 2 < 0.95


@pytest.mark.parametrize("size", [32, 48, 96])
@pytest.mark.parametrize("shape", SHAPES)
def test_figures_of_another_drawer_are_recognised(shape: str, size: int) -> None:
    rng = np.random.default_rng(4)
    y, x = (np.mgrid[: 4 * size, : 4 * size] + 0.5) / (4 * size)
    for colour, (word, radius) in [(c, s) for c in COLOURS for s in (("small", 0.14), ("big", 0.22))]:
        cx, cy = 0.5 + rng.uniform(-0.05, 0.05, 2)
        picture = _own_picture(_figure(shape, (x - cx) / radius, (y - cy) / radius), COLOURS[colour], (250, 250, 245))
        verdict = judge(picture, Scene((Thing(colour, shape, word, "center"),)))
        assert verdict.full, (verdict, colour, word)


def test_what_is_none_of_the_figures_is_called_none() -> None:
    y, x = (np.mgrid[:256, :256] + 0.5) / 128 - 1
    frame = (np.maximum(abs(x), abs(y)) < 0.44) & (np.maximum(abs(x), abs(y)) > 0.24)
    bar = (abs(x) < 0.45) & (abs(y) < 0.15)
    half = (np.hypot(x, y) < 0.45) & (x > 0)
    crescent = (np.hypot(x, y) < 0.45) & (np.hypot(x - 0.25, y) > 0.45)
    for mask in (frame, bar, half, crescent):
        (seen,) = look(_own_picture(mask, (220, 25, 30), (255, 255, 255)))
        assert seen.shape is None and seen.colour == "red"
    (grey,) = look(_own_picture(np.hypot(x, y) < 0.4, (150, 150, 150), (255, 255, 255)))
    assert grey.colour is None and grey.shape == "circle"
    (aside,) = look(_own_picture(np.hypot(x - 0.4, y) < 0.28, (220, 25, 30), (255, 255, 255)))
    assert aside.position is None


def test_missing_and_extra_objects_fail() -> None:
    one = Scene((Thing("red", "circle", "big", "top left"),))
    two = Scene((Thing("red", "circle", "big"), Thing("green", "cross", "small")), "left of")
    blank = judge(np.full((32, 32, 3), 255, np.uint8), one)
    assert blank.seen == "nothing" and not any(blank.attributes.values())
    assert not any(judge(np.full((32, 32, 3), 240, np.uint8), two).attributes.values())
    missing = judge(draw(one, 32), two)
    assert not any(missing.attributes[name] for name in ("objects", "colour", "shape", "relation"))
    picture = draw(one, 32)
    picture[22:28, 22:28] = COLOURS["blue"]
    extra = judge(picture, one)
    assert not extra.full
    assert extra.attributes == {"objects": False, "colour": True, "shape": True, "size": True, "position": True}
    speck = draw(one, 32)
    speck[28:30, 28:30] = 0  # four pixels of debris are not an object
    assert judge(speck, one).full


def test_floating_pictures_read_like_bytes() -> None:
    pictures, scenes = _pictures(60, "mixed", 32, 4)
    for picture, scene in zip(pictures, scenes, strict=True):
        assert judge(picture.astype(np.float32) / 255, scene).attributes == judge(picture, scene).attributes
    assert judge(pictures[0] / 255.0 * 1.2 - 0.05, scenes[0]).seen  # a sampler's overshoot is clipped


@settings(max_examples=150, deadline=None)
@given(
    picture=hnp.arrays(np.uint8, st.tuples(st.integers(16, 40), st.integers(16, 40), st.just(3))),
    blur=st.sampled_from([0.0, 1.0, 4.0]),
)
def test_any_picture_gets_a_verdict(picture: np.ndarray, blur: float) -> None:
    smooth = ndimage.gaussian_filter(picture.astype(np.float64), (blur, blur, 0))
    wide = np.clip((smooth - smooth.mean()) * 8 + 128, 0, 255).astype(np.uint8)
    scene = Scene((Thing("red", "circle", "big"), Thing("green", "cross", "small")), "left of")
    for each in (picture, wide):
        verdict = judge(each, scene)
        assert verdict.full == all(verdict.attributes.values())
        assert verdict.attributes["objects"] == (len(verdict.objects) == 2)


def test_a_motley_region_has_no_colour() -> None:
    picture = np.zeros((33, 33, 3), np.uint8)
    for band in range(3):  # on black, the median of red, green and blue thirds is black: the background itself
        picture[9 : 9 + 15, 9 + 5 * band : 14 + 5 * band, band] = 255
    (seen,) = look(picture)
    assert seen.colour is None and seen.shape == "square" and seen.position == "center"


def test_noise_is_never_fully_right() -> None:
    rng = np.random.default_rng(6)
    for i in range(300):
        noise = ndimage.gaussian_filter(rng.normal(0, 1, (32, 32, 3)), (1 + i % 5, 1 + i % 5, 0))
        picture = np.clip(128 + noise / noise.std() * 70, 0, 255).astype(np.uint8)
        assert not judge(picture, sample_scene(rng, "mixed", None)).full


def test_scores_are_the_shares_of_the_verdicts() -> None:
    pictures, scenes = _pictures(80, "mixed", 32, seed=1)
    asked = scenes[:40] + [scenes[(i + 7) % 80] for i in range(40, 80)]
    verdicts = [judge(picture, scene) for picture, scene in zip(pictures, asked, strict=True)]
    result = score(pictures, asked)
    assert result["count"] == 80
    assert round(result["full"] * 80) == sum(v.full for v in verdicts) and 40 <= result["full"] * 80 < 60
    singles = [v for v, scene in zip(verdicts, asked, strict=True) if len(scene.things) == 1]
    assert result["position"] == pytest.approx(np.mean([v.attributes["position"] for v in singles]))
    assert result["colour"] == pytest.approx(np.mean([v.attributes["colour"] for v in verdicts]))


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((32, 32), np.uint8),
        np.zeros((32, 32, 4), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((3, 32, 32), np.float32),
        np.zeros((32, 32, 3), np.int64),
        np.full((32, 32, 3), np.nan),
    ],
)
def test_what_is_no_picture_is_refused(picture: np.ndarray) -> None:
    with pytest.raises(DataError):
        judge(picture, all_scenes()[0])


def test_scores_of_nothing_are_refused() -> None:
    with pytest.raises(DataError):
        score([], [])
    with pytest.raises(DataError):
        score([draw(all_scenes()[0])], all_scenes()[:2])


def test_lab_has_its_published_values_and_keeps_the_palette_apart() -> None:
    # sRGB's primaries and white in CIELAB (D65), as tabulated by Lindbloom's colour calculator.
    known = {
        (255, 0, 0): (53.24, 80.09, 67.20),
        (0, 255, 0): (87.73, -86.18, 83.18),
        (0, 0, 255): (32.30, 79.19, -107.86),
        (255, 255, 255): (100.0, 0.0, 0.0),
        (0, 0, 0): (0.0, 0.0, 0.0),
    }
    for rgb, lab in known.items():
        assert to_lab(np.array(rgb)) == pytest.approx(lab, abs=0.02)
    lab_of = to_lab(np.array(list(COLOURS.values())))
    apart = np.linalg.norm(lab_of[:, None] - lab_of[None], axis=2)
    assert apart[~np.eye(len(lab_of), dtype=bool)].min() > 40
    papers = to_lab(np.array([(r, g, b) for r in (235, 255) for g in (235, 255) for b in (235, 255)]))
    assert np.linalg.norm(lab_of[:, None] - papers[None], axis=2).min() > 30
