"""The language of the embedded ``shapes`` data: scenes of one or two coloured shapes and their captions. No torch.

A one-object scene is (colour, shape, size, position): 10 x 8 x 2 x 5 = 800 combinations. A two-object scene is two
different (colour, shape, size) and a relation between them. Every phrasing is a template of one table, which
``captions`` fills and ``parse_caption`` reads back, so that parsing is the inverse of captioning by construction.

What is held out of training. One object: each (colour, shape) pair has ten (size, position) combinations; exactly one
of them, chosen by a keyed hash of the pair, is held out. So exactly a tenth of all combinations is held out, and every
pair is still seen in the nine others. Two objects: a scene is held out if either thing's (colour, shape, size) is among
about a tenth of the triples, again chosen by a keyed hash: of at most one of the two sizes of a pair, so that every
(colour, shape) pair is seen in two-object training pictures too. About a fifth of the two-object scenes are held out.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from dataclasses import asdict, dataclass
from functools import cache
from itertools import product
from typing import Any, Literal

import numpy as np

from longskip.errors import DataError

# Far apart from each other in CIELAB (>= 40 of Delta E 1976) and from every background that ``draw`` makes.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 25, 30),
    "orange": (255, 140, 0),
    "yellow": (245, 225, 30),
    "green": (20, 150, 45),
    "cyan": (0, 200, 215),
    "blue": (25, 70, 230),
    "purple": (145, 35, 150),
    "pink": (255, 125, 195),
    "brown": (125, 75, 30),
    "black": (20, 20, 25),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")
SIZES: tuple[str, ...] = ("small", "big")
POSITIONS: tuple[str, ...] = ("center", "top left", "top right", "bottom left", "bottom right")
RELATIONS: tuple[str, ...] = ("left of", "right of", "above", "below")

Objects = Literal[1, 2, "mixed"]

_AT = {place: f"in the {place}" if place == "center" else f"at the {place}" for place in POSITIONS}
_SIDE = {name: f"to the {name}" if name.endswith(" of") else name for name in RELATIONS}

# Every phrasing keeps the words of one thing together; none has more than MAX_CAPTION_WORDS words.
_ONE = (
    "a {first} {at}",
    "{first}, {place}",
    "there is a {first} in the {place} of the picture",
    "a picture of a {first} {at}",
    "{at} there is a {first}",
)
_TWO = (
    "a {first} {relation} a {second}",
    "{first} {relation} {second}",
    "there is a {first} {side} a {second}",
    "a picture of a {first} {relation} a {second}",
    "a {second} with a {first} {side} it",
)
MAX_CAPTION_WORDS = 15

_HASH_KEY = b"longskip shapes 1"  # changing it changes what is held out: a new data set
_CURE = (
    "say '[a] SIZE COLOUR SHAPE at the POSITION' or 'a SIZE COLOUR SHAPE RELATION a SIZE COLOUR SHAPE'; "
    f"sizes: {', '.join(SIZES)}; colours: {', '.join(COLOURS)}; shapes: {', '.join(SHAPES)}; "
    f"positions: {', '.join(POSITIONS)}; relations: {', '.join(RELATIONS)}"
)


@dataclass(frozen=True)
class Thing:
    """One object of a scene. ``position`` is set in one-object scenes and None in two-object scenes."""

    colour: str
    shape: str
    size: str
    position: str | None = None

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("colour", self.colour, tuple(COLOURS)),
            ("shape", self.shape, SHAPES),
            ("size", self.size, SIZES),
            ("position", self.position, (None, *POSITIONS)),
        ):
            if value not in known:
                raise DataError(
                    f"{kind} {value!r} is not one of the shapes language", cure=f"one of {', '.join(map(str, known))}"
                )

    @property
    def noun(self) -> str:
        """The words for the thing alone, as "small red circle"."""
        return f"{self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """One thing at a position, or two different things and the relation of the first to the second."""

    things: tuple[Thing, ...]
    relation: str | None = None

    def __post_init__(self) -> None:
        if len(self.things) == 1:
            if self.things[0].position is None or self.relation is not None:
                raise DataError("a one-object scene has a position and no relation", cure=_CURE)
            return
        if len(self.things) != 2:
            raise DataError(f"a scene has 1 or 2 things, not {len(self.things)}", cure=_CURE)
        if self.relation not in RELATIONS:
            raise DataError(
                f"relation {self.relation!r} is not one of the shapes language", cure=f"one of {', '.join(RELATIONS)}"
            )
        if any(thing.position is not None for thing in self.things):
            raise DataError("the things of a two-object scene have no position of their own", cure=_CURE)
        if self.things[0] == self.things[1]:
            raise DataError(
                f"both things are a {self.things[0].noun}: their relation would mean nothing",
                cure="let them differ in size, colour or shape",
            )


def scene_to_dict(scene: Scene) -> dict[str, Any]:
    """The scene as what JSON can hold; ``scene_from_dict`` is the inverse."""
    return {"things": [asdict(thing) for thing in scene.things], "relation": scene.relation}


def scene_from_dict(record: dict[str, Any]) -> Scene:
    """The scene of a JSON record; DataError if it is none."""
    try:
        return Scene(tuple(Thing(**thing) for thing in record["things"]), record.get("relation"))
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"not a scene: {record!r}", cure="a record made by scene_to_dict") from error


@cache
def all_scenes() -> tuple[Scene, ...]:
    """The 800 one-object scenes, in the order colour, shape, size, position."""
    return tuple(Scene((Thing(*values),)) for values in product(COLOURS, SHAPES, SIZES, POSITIONS))


def _hash(*words: str) -> int:
    digest = hashlib.blake2b("/".join(words).encode(), digest_size=8, key=_HASH_KEY)
    return int.from_bytes(digest.digest(), "little")


@cache
def _held_out_place(colour: str, shape: str) -> tuple[str, str]:
    size, position = divmod(_hash("one", colour, shape) % 10, len(POSITIONS))
    return SIZES[size], POSITIONS[position]


@cache
def _held_out_size(colour: str, shape: str) -> str | None:
    draw = _hash("two", colour, shape) % 10  # a fifth of the pairs lose one of their two sizes: a tenth of the triples
    return SIZES[draw] if draw < len(SIZES) else None


def is_held_out(scene: Scene) -> bool:
    """True if the scene is kept out of training (the rule stands at the top of this file); a pure function."""
    if len(scene.things) == 1:
        thing = scene.things[0]
        return (thing.size, thing.position) == _held_out_place(thing.colour, thing.shape)
    return any(thing.size == _held_out_size(thing.colour, thing.shape) for thing in scene.things)


def _any_scene(rng: np.random.Generator, count: int) -> Scene:
    if count == 1:
        scenes = all_scenes()
        return scenes[int(rng.integers(len(scenes)))]
    nouns = _nouns()
    first, second = int(rng.integers(len(nouns))), int(rng.integers(len(nouns) - 1))
    second += second >= first  # uniform over the ordered pairs of different nouns
    return Scene((nouns[first], nouns[second]), RELATIONS[int(rng.integers(len(RELATIONS)))])


@cache
def _nouns() -> tuple[Thing, ...]:
    return tuple(Thing(*values) for values in product(COLOURS, SHAPES, SIZES))


def sample_scene(rng: np.random.Generator, objects: Objects = 1, held_out: bool | None = False) -> Scene:
    """A scene drawn uniformly from those asked for.

    ``objects`` is 1, 2 or "mixed" (one or two with equal chance); ``held_out`` False draws training scenes, True
    held-out ones, None either. DataError for another ``objects``.
    """
    if objects not in (1, 2, "mixed"):
        raise DataError(f"objects {objects!r} is not known", cure='one of 1, 2, "mixed"')
    count = objects if isinstance(objects, int) else 1 + int(rng.integers(2))
    while True:  # a tenth is held out, so the longest expected search is ten draws
        scene = _any_scene(rng, count)
        if held_out is None or is_held_out(scene) == held_out:
            return scene


def captions(scene: Scene) -> list[str]:
    """Every phrasing of the scene, the plainest first; five of them, at most MAX_CAPTION_WORDS words each."""
    first = scene.things[0]
    if len(scene.things) == 1:
        assert first.position is not None  # Scene's own check
        words = {"first": first.noun, "place": first.position, "at": _AT[first.position]}
        return [template.format(**words) for template in _ONE]
    assert scene.relation is not None
    words = {
        "first": first.noun,
        "second": scene.things[1].noun,
        "relation": scene.relation,
        "side": _SIDE[scene.relation],
    }
    return [template.format(**words) for template in _TWO]


@cache
def _patterns() -> tuple[re.Pattern[str], ...]:
    def noun(which: str) -> str:
        lists = (("size", SIZES), ("colour", tuple(COLOURS)), ("shape", SHAPES))
        return " ".join(f"(?P<{which}_{kind}>{'|'.join(values)})" for kind, values in lists)

    slots = {
        "first": noun("first"),
        "second": noun("second"),
        "place": f"(?P<place>{'|'.join(POSITIONS)})",
        "at": f"(?P<at>{'|'.join(_AT.values())})",
        "relation": f"(?P<relation>{'|'.join(RELATIONS)})",
        "side": f"(?P<side>{'|'.join(_SIDE.values())})",
    }
    return tuple(re.compile(template.format(**slots)) for template in _ONE + _TWO)


def parse_caption(text: str) -> Scene:
    """The scene that a caption describes: the inverse of every phrasing of ``captions``.

    Case, doubled spaces and a full stop at the end do not matter, "centre" is read as "center". DataError for any
    other text, with the nearest known word for the first unknown one.
    """
    plain = " ".join(text.lower().split()).rstrip(". ").replace("centre", "center")
    for pattern in _patterns():
        match = pattern.fullmatch(plain)
        if match is None:
            continue
        got = match.groupdict()
        place = got.get("place") or next((p for p, at in _AT.items() if at == got.get("at")), None)
        relation = got.get("relation") or next((r for r, side in _SIDE.items() if side == got.get("side")), None)
        things = [Thing(got["first_colour"], got["first_shape"], got["first_size"], place)]
        if relation is not None:
            things.append(Thing(got["second_colour"], got["second_shape"], got["second_size"]))
        return Scene(tuple(things), relation)
    raise DataError(f"caption {text!r} is not of the shapes language{_hint(plain)}", cure=_CURE)


def _hint(plain: str) -> str:
    known = set(COLOURS) | set(SHAPES) | set(SIZES)
    for phrase in (*_ONE, *_TWO, *POSITIONS, *_AT.values(), *_SIDE.values()):
        known.update(re.sub(r"\{\w+\}", " ", phrase).replace(",", " ").split())
    for word in re.findall(r"\w+", plain):
        if word not in known:
            near = difflib.get_close_matches(word, sorted(known), 1)
            return f": {word!r} is no word of it" + (f" (did you mean {near[0]!r}?)" if near else "")
    return ""
