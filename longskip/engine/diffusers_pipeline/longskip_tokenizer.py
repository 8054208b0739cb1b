"""The word tokenizer of an exported folder: known words as ids, unknown ones as their UTF-8 bytes; torch alone."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch

PAD, FIRST_BYTE, FIRST_WORD = 0, 1, 257
PIECE = re.compile(r"\w+|[^\w\s]")


class WordTokenizer:
    """Ids: 0 pads, 1 to 256 are the bytes, from 257 on stand the words of ``vocabulary.json``."""

    def __init__(self, words: Sequence[str], n_tokens: int, truncate: bool) -> None:
        self.words, self.n_tokens, self.truncate = list(words), n_tokens, truncate
        self.ids = {word: FIRST_WORD + i for i, word in enumerate(self.words)}

    @classmethod
    def from_pretrained(cls, folder: str, **_: object) -> WordTokenizer:
        config = json.loads((Path(folder) / "tokenizer_config.json").read_text("utf-8"))
        words = json.loads((Path(folder) / "vocabulary.json").read_text("utf-8"))["words"]
        return cls(words, config["n_tokens"], config["truncate"])

    def save_pretrained(self, folder: str) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        config = {"n_tokens": self.n_tokens, "truncate": self.truncate}
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config, indent=2), "utf-8")
        vocabulary = {"version": 1, "words": self.words}
        (Path(folder) / "vocabulary.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """(B, n_tokens) int64, padded with 0. ValueError for a text that is too long, where texts are not cut."""
        rows = []
        for text in texts:
            ids = self.encode(text)
            if len(ids) > self.n_tokens and not self.truncate:
                raise ValueError(f"the prompt {text!r} has {len(ids)} tokens; the limit is {self.n_tokens}")
            rows.append((ids + [PAD] * self.n_tokens)[: self.n_tokens])
        return torch.tensor(rows, dtype=torch.int64)

    def encode(self, text: str) -> list[int]:
        """All ids of a text; neighbouring unknown words are parted by a space's byte."""
        ids: list[int] = []
        known = True
        for word in PIECE.findall(unicodedata.normalize("NFC", text).lower()):
            if word in self.ids:
                ids.append(self.ids[word])
                known = True
                continue
            if not known:
                ids.append(FIRST_BYTE + 0x20)
            ids += [FIRST_BYTE + byte for byte in word.encode("utf-8", "surrogatepass")]
            known = False
        return ids
