"""Words as token ids, with bytes for the unknown ones: the vocabulary of the small text encoder.

Ids: 0 pads, 1 to 256 are the bytes 0 to 255, and from 257 on stand words, most frequent first.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from longskip.errors import DataError, TextTooLongError

PAD = 0
FIRST_BYTE = 1
FIRST_WORD = 257

_PIECE = re.compile(r"\w+|[^\w\s]")
_SPACE = FIRST_BYTE + 0x20


def split_words(text: str) -> list[str]:
    """Lower-cased words and single punctuation marks of a text, in NFC, so that two spellings of é are one word."""
    return _PIECE.findall(unicodedata.normalize("NFC", text).lower())


class Vocabulary:
    """A frozen list of words; ``len(vocabulary)`` is the number of ids (rows of the embedding).

    Raises ``DataError`` for repeated or empty words.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._id = {word: FIRST_WORD + i for i, word in enumerate(self.words)}
        if len(self._id) != len(self.words) or "" in self._id:
            raise DataError("a vocabulary's words must be non-empty and differ from each other")

    @classmethod
    def build(cls, texts: Iterable[str], size: int) -> Vocabulary:
        """The vocabulary of at most ``size`` ids: the 257 fixed ones and the most frequent words of ``texts``.

        Equal counts are ordered alphabetically, so the same texts in any order give the same ids. Raises ``DataError``
        for a size below 257.
        """
        if size < FIRST_WORD:
            raise DataError(f"vocabulary size {size}; padding and the bytes alone take {FIRST_WORD}")
        counts: Counter[str] = Counter()
        for text in texts:
            counts.update(split_words(text))
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(ranked[: size - FIRST_WORD])

    def __len__(self) -> int:
        return FIRST_WORD + len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and other.words == self.words

    def __hash__(self) -> int:
        return hash(self.words)

    def ids(self, text: str) -> list[int]:
        """All ids of a text, unpadded. Unknown words become their UTF-8 bytes, neighbouring ones parted by a space."""
        out: list[int] = []
        known = True
        for word in split_words(text):
            number = self._id.get(word)
            if number is not None:
                out.append(number)
            else:
                if not known:
                    out.append(_SPACE)
                out.extend(FIRST_BYTE + byte for byte in word.encode("utf-8", "surrogatepass"))
            known = number is not None
        return out

    def unknown(self, text: str) -> list[str]:
        """The words of a text that the vocabulary does not hold, which are spelt in bytes."""
        return [word for word in dict.fromkeys(split_words(text)) if word not in self._id]

    def encode(self, text: str, n_tokens: int, *, truncate: bool = False) -> np.ndarray:
        """``(n_tokens,)`` int64, padded with 0. Raises ``TextTooLongError`` unless ``truncate`` cuts the end off."""
        ids = self.ids(text)
        if len(ids) > n_tokens:
            if not truncate:
                shown = text if len(text) <= 60 else text[:57] + "..."
                strange = self.unknown(text)
                spelt = f" (unknown words are spelt in bytes: {', '.join(strange[:6])})" if strange else ""
                raise TextTooLongError(
                    f"the text {shown!r} has {len(ids)} tokens; the limit is {n_tokens}{spelt}",
                    cure="shorten it, use words of the training captions, or train with more encoders.text.n_tokens "
                    "or encoders.text.too_long: truncate",
                )
            del ids[n_tokens:]
        out = np.zeros(n_tokens, dtype=np.int64)
        out[: len(ids)] = ids
        return out

    def decode(self, ids: Iterable[int]) -> str:
        """The words and byte runs of ids, joined by spaces, without padding. Raises ``DataError`` for unknown ids."""
        parts: list[bytes] = []
        run: list[int] = []
        for number in [*(int(i) for i in ids), PAD]:
            if FIRST_BYTE <= number < FIRST_WORD:
                run.append(number - FIRST_BYTE)
                continue
            if run:
                parts.append(bytes(run))
                run = []
            if number >= FIRST_WORD:
                if number >= len(self):
                    raise DataError(f"token id {number}; the vocabulary ends at {len(self) - 1}")
                parts.append(self.words[number - FIRST_WORD].encode())
            elif number < 0:
                raise DataError(f"token id {number}; ids start at 0")
        return b" ".join(parts).decode("utf-8", "replace")

    def fingerprint(self) -> str:
        """A stable hash of the words and their order, 16 hexadecimal digits."""
        return hashlib.blake2b("\n".join(self.words).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """``{"version": 1, "words": [...]}``."""
        return {"version": 1, "words": list(self.words)}

    @classmethod
    def from_json(cls, data: Any) -> Vocabulary:
        """The inverse of ``to_json``. Raises ``DataError`` for another version or anything that is not a word list."""
        if not isinstance(data, dict) or data.get("version") != 1:
            raise DataError("not a vocabulary of version 1", cure="build it again with this version of longskip")
        words = data.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise DataError("a vocabulary's 'words' must be a list of strings")
        return cls(words)
