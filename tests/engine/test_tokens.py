from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.engine.data.tokens import FIRST_WORD, Vocabulary, split_words
from longskip.errors import BadSampleError, DataError, TextTooLongError

TEXTS = ["A red circle, left of a blue square.", "a red star", "A blue circle"]


def test_words_stand_by_frequency_then_alphabet():
    vocabulary = Vocabulary.build(TEXTS, 300)
    # a: 4, blue, circle, red: 2, then the rest alphabetically
    assert vocabulary.words == ("a", "blue", "circle", "red", ",", ".", "left", "of", "square", "star")
    assert Vocabulary.build(reversed(TEXTS), 300) == vocabulary
    assert len(vocabulary) == 267
    assert Vocabulary.build(TEXTS, FIRST_WORD + 2).words == ("a", "blue")
    assert Vocabulary.build(TEXTS, FIRST_WORD).words == ()
    with pytest.raises(DataError, match="257"):
        Vocabulary.build(TEXTS, 256)


def test_encoding_by_hand():
    vocabulary = Vocabulary(["a", "red"])
    assert vocabulary.encode("A red dé a xy z", 16).tolist() == [
        257, 258, 1 + ord("d"), 1 + 0xC3, 1 + 0xA9, 257, 1 + ord("x"), 1 + ord("y"), 1 + ord(" "), 1 + ord("z"),
        0, 0, 0, 0, 0, 0,
    ]  # fmt: skip
    assert vocabulary.encode("", 3).tolist() == [0, 0, 0]
    assert vocabulary.encode("a", 1).dtype == np.int64
    assert vocabulary.ids("de\u0301") == vocabulary.ids("dé")


def test_too_long_names_count_limit_and_cure():
    vocabulary = Vocabulary(["a"])
    with pytest.raises(TextTooLongError, match=r"'a a a' has 3 tokens; the limit is 2\n  cure: shorten") as caught:
        vocabulary.encode("a a a", 2)
    assert caught.value.reason == "text_too_long"
    assert isinstance(caught.value, BadSampleError)
    assert vocabulary.encode("a a a", 2, truncate=True).tolist() == [257, 257]
    with pytest.raises(TextTooLongError) as caught:
        vocabulary.encode("a " * 100_000, 2)
    assert len(str(caught.value)) < 300


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(st.text(max_size=30), max_size=4), text=st.text(max_size=30), size=st.integers(257, 270))
def test_any_text_survives_up_to_its_spacing(texts, text, size):
    vocabulary = Vocabulary.build(texts, size)
    ids = vocabulary.ids(text)
    assert all(1 <= number < len(vocabulary) for number in ids)
    assert vocabulary.decode(vocabulary.encode(text, len(ids) + 2)).split() == split_words(text)
    again = Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json())))
    assert again == vocabulary
    assert again.fingerprint() == vocabulary.fingerprint()
    assert again.ids(text) == ids


@pytest.mark.parametrize(
    "data", [None, [], {"version": 2, "words": []}, {"version": 1}, {"version": 1, "words": [1]},
             {"version": 1, "words": ["a", "a"]}, {"version": 1, "words": [""]}],
)  # fmt: skip
def test_broken_vocabularies_are_refused(data):
    with pytest.raises(DataError):
        Vocabulary.from_json(data)


def test_ids_outside_the_vocabulary_are_refused():
    for number in (-1, 258):
        with pytest.raises(DataError, match=str(number)):
            Vocabulary(["a"]).decode([number])
    assert Vocabulary(["a"]).fingerprint() != Vocabulary(["b"]).fingerprint()
