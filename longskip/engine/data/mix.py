"""Several data sets as one source: their samples one after another, with the weights by which a plan mixes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np

from longskip.engine.data.captions import Captions
from longskip.engine.data.features import Choose, FeatureBatch, FeatureLayout
from longskip.engine.data.interleave import Interleave, Weight
from longskip.engine.data.sources import FeatureSource, RawSample, SizedSource
from longskip.errors import DataError

_CURE = "encode all data sets of a mix alike (longskip data encode)"


class MixedSource:
    """The samples of ``members``, numbered through in their order; ``weights`` are relative shares of what is served.

    ``names`` tell them apart for people (``data.mix``'s paths). What a sample is, its key included, its member says.

    Raises ``DataError`` for no member, weights that are not above 0, and names that are not one per member and unique.
    """

    def __init__(self, members: Sequence[SizedSource], weights: Sequence[Weight], names: Sequence[str]) -> None:
        if not len(members) == len(weights) == len(names):
            raise DataError(
                f"{len(members)} data sets, {len(weights)} weights and {len(names)} names; one of each is due"
            )
        if len(set(names)) < len(names):
            twice = next(name for name in names if list(names).count(name) > 1)
            raise DataError(f"the mix names {twice} twice", cure="give it once, with the sum of the weights")
        self.members = tuple(members)
        self.weights = Interleave(weights).weights
        self.names = tuple(names)
        self.ends = np.cumsum([len(member) for member in members], dtype=np.int64)
        self.starts = self.ends - np.array([len(member) for member in members], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _at(self, i: int) -> tuple[SizedSource, int]:
        if not 0 <= i < len(self):
            raise DataError(f"sample {i}; the mix holds {len(self)}")
        number = int(np.searchsorted(self.ends, i, side="right"))
        return self.members[number], i - int(self.starts[number])

    def key(self, i: int) -> str:
        """The key of sample ``i`` in its data set; two data sets may have the same."""
        member, at = self._at(i)
        return member.key(at)

    def read(self, i: int) -> RawSample:
        """Sample ``i``, as its data set reads it."""
        member, at = self._at(i)
        return member.read(at)

    def captions(self, i: int) -> Captions:
        """The captions of sample ``i`` alone."""
        member, at = self._at(i)
        return member.captions(at)

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of sample ``i``, as its data set knows it."""
        member, at = self._at(i)
        return member.size(at)

    def sizes(self, *, latents: bool = False) -> Iterator[np.ndarray]:
        """(m, 2) int64 (height, width), data set by data set."""
        for member in self.members:
            yield from member.sizes(latents=latents)

    def caption_fields(self) -> set[str]:
        """The names that ``data.captions`` could have in any of the data sets."""
        return set().union(*(member.caption_fields() for member in self.members))

    def fingerprint(self) -> str:
        """SHA-256 over the data sets' fingerprints and their weights."""
        parts = [[member.fingerprint(), weight] for member, weight in zip(self.members, self.weights, strict=True)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    @cached_property
    def features(self) -> FeatureLayout | None:
        """The layout that all data sets share; None where they are pictures alone.

        Raises ``DataError`` where their layouts differ in more than the latents' height and width.
        """
        layouts = [member.features for member in self.members]
        first = layouts[0]
        for layout, name in zip(layouts, self.names, strict=True):
            if _comparable(layout) != _comparable(first):
                raise DataError(
                    f"{self.names[0]} holds {_described(first)}, {name} {_described(layout)}; they cannot be in one batch",
                    cure=_CURE,
                )
        return first and replace(first, pictures=all(layout.pictures for layout in layouts if layout))

    def read_features(
        self, slots: Sequence[int] | np.ndarray, samples: np.ndarray, into: FeatureBatch, choose: Choose
    ) -> None:
        """Fills the slots of a batch, data set by data set: see ``features.read_features``."""
        slots, samples = np.asarray(slots), np.asarray(samples, dtype=np.int64)
        for number, chosen in self._shared(samples):
            member = cast(FeatureSource, self.members[number])
            member.read_features(slots[chosen], samples[chosen] - self.starts[number], into, choose)

    @cached_property
    def empty_text(self) -> tuple[np.ndarray, np.ndarray]:
        """The empty caption's features (n_txt, E) and mask (n_txt) uint8, the same in all data sets, or ``DataError``."""
        found = [cast(FeatureSource, member).empty_text for member in self.members]
        for (text, mask), name in zip(found, self.names, strict=True):
            if text.tobytes() != found[0][0].tobytes() or mask.tobytes() != found[0][1].tobytes():
                raise DataError(
                    f"{self.names[0]} and {name} have other features for the empty caption: they were made by "
                    "different encoders",
                    cure=_CURE,
                )
        return found[0]

    def follow(self, epochs: Sequence[int] | np.ndarray, samples: Sequence[int] | np.ndarray) -> None:
        """Says to the data sets that fetch ahead what is read next."""
        epochs, samples = np.asarray(epochs, dtype=np.int64), np.asarray(samples, dtype=np.int64)
        for number, chosen in self._shared(samples):
            follow = getattr(self.members[number], "follow", None)
            if follow is not None:
                follow(epochs[chosen], samples[chosen] - self.starts[number])

    def close(self) -> None:
        """Closes the data sets that hold files open; reading opens them again."""
        for member in self.members:
            close = getattr(member, "close", None)
            if close is not None:
                close()

    def _shared(self, samples: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(data set, which of the samples are its own) of every data set that has any."""
        if samples.size and not (samples.min() >= 0 and samples.max() < len(self)):
            raise DataError(f"samples {samples.min()} to {samples.max()}; the mix holds {len(self)}")
        of = np.searchsorted(self.ends, samples, side="right")
        for number in np.unique(of):
            yield int(number), of == number


def _comparable(layout: FeatureLayout | None) -> Any:
    if layout is None:
        return None
    latent = layout.latent and layout.latent[0]
    return latent, latent and layout.latent_dtype, layout.text, layout.text and layout.text_dtype


def _described(layout: FeatureLayout | None) -> str:
    parts = []
    if layout and layout.latent:
        parts.append(f"{layout.latent_dtype} latents of {layout.latent[0]} channels")
    if layout and layout.text:
        parts.append(f"{layout.text_dtype} text features {layout.text}")
    return " and ".join(parts) or "pictures alone"
