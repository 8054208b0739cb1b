"""Stored features of a batch: latents, text features and masks, read straight into the batch's arrays.

Shards hold them as ``KEY.latent.npy`` (C, h, w), ``KEY.text.npy`` (captions, n_txt, E) or (n_txt, E) and
``KEY.mask.npy``. A sample's members lie side by side, so one system call reads them, each into its own place; whatever
is unusual about a sample (several captions, another order, damage) is read again with care, and reported from there.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from longskip.engine.data.captions import MAX_TEXT_BYTES, Captions, captions_of
from longskip.engine.data.npy import STORED, array_of
from longskip.engine.data.spans import Wanted, alike, bare
from longskip.errors import BadSampleError, ShardError

if TYPE_CHECKING:
    from longskip.engine.data.sources import ShardSource

LATENT, TEXT, MASK = "latent.npy", "text.npy", "mask.npy"
EMPTY_NAME = "empty.safetensors"
MAX_FEATURE_BYTES = 1 << 28

Choose = Callable[[int, Captions], int]


@dataclass(frozen=True)
class FeatureLayout:
    """What a sample's features look like: the latent's (C, h, w) and dtype, the text's (n_txt, E) and dtype, or None.

    Where latents come in several sizes (buckets), h and w are those of the first sample. ``pictures``: whether pictures
    lie beside them.
    """

    latent: tuple[int, int, int] | None = None
    latent_dtype: np.dtype = STORED["fp16"]
    text: tuple[int, int] | None = None
    text_dtype: np.dtype = STORED["fp16"]
    pictures: bool = False


@dataclass
class FeatureBatch:
    """Where m samples are read to, slot by slot; ``bad`` has the error of each slot that could not be filled.

    What is None is not read. ``captions`` are those chosen.
    """

    latents: np.ndarray | None  # (m, C, h, w) fp16 or fp32
    text: np.ndarray | None  # (m, n_txt, E) fp16 or fp32
    mask: np.ndarray | None  # (m, n_txt) uint8
    keys: list[str]
    captions: list[str]
    bad: dict[int, BadSampleError] = field(default_factory=dict)


def layout_of(source: ShardSource) -> FeatureLayout | None:
    """The layout of a source's features, from the first sample that has any; None where the shards hold none.

    Raises ``ShardError`` where only some shards hold them, where text features lack masks, and where what lies there
    is not what ``index.json`` says of it.
    """
    index = source.index
    counts = {kind: [shard.members.get(kind, 0) for shard in index.shards] for kind in (LATENT, TEXT, MASK)}
    for kind, found in counts.items():
        if any(found) and not all(found):
            raise ShardError(
                f"{index.folder / index.shards[found.index(0)].file} holds no {kind}, other shards do",
                cure="encode all shards alike",
            )
    if any(counts[TEXT]) != any(counts[MASK]):
        raise ShardError(f"{index.folder} holds text features or masks without the other", cure="encode it again")
    layout = FeatureLayout(pictures="image" in index.members)
    if any(counts[LATENT]):
        latent = _probe(source, LATENT, "vae", 3)
        channels, height, width = latent.shape
        layout = replace(layout, latent=(channels, height, width), latent_dtype=latent.dtype)
    if any(counts[TEXT]):
        text = _probe(source, TEXT, "text", 2, 3)
        layout = replace(layout, text=(text.shape[-2], text.shape[-1]), text_dtype=text.dtype)
    return layout if layout.latent or layout.text else None


def _probe(source: ShardSource, kind: str, part: str, *axes: int) -> np.ndarray:
    """The first array of a kind, checked against what the index says of the encoder's part."""
    where = f"{source.index.folder / source.index.shards[0].file}: the first {kind}"
    cure = "encode the pictures again: longskip data encode"
    sample = source.first_with(kind)
    try:
        data = source.member(sample, kind)
        array = array_of(data or b"")
    except BadSampleError as error:
        raise ShardError(f"{where} ({source.key(sample)}) cannot be used: {error.message}", cure=cure) from error
    if array.ndim not in axes or array.dtype not in (STORED["fp16"], STORED["fp32"]) or 0 in array.shape:
        raise ShardError(
            f"{where} is {array.dtype} {array.shape}, expected fp16 or fp32 of {' or '.join(map(str, axes))} axes",
            cure=cure,
        )
    said: Any = source.index.encoders.get(part)
    if isinstance(said, dict):
        found: dict[str, Any] = {"dtype": next(name for name, dtype in STORED.items() if dtype == array.dtype)}
        if part == "text":
            found |= {"n_tokens": array.shape[-2], "width": array.shape[-1]}
        else:
            found["channels"] = array.shape[0]
            if not said.get("buckets") and isinstance(said.get("resolution"), list) and said.get("factor"):
                found["resolution"] = [side * said["factor"] for side in array.shape[1:]]
        for name, value in found.items():
            if name in said and said[name] != value:
                raise ShardError(
                    f"{where} has {name} {value}, index.json says encoders.{part}.{name} {said[name]}", cure=cure
                )
    return array


def read_features(
    source: ShardSource, slots: Sequence[int] | np.ndarray, samples: np.ndarray, into: FeatureBatch, choose: Choose
) -> None:
    """Fills the ``slots`` of ``into`` with ``samples``; ``choose(slot, captions)`` says which caption a sample takes.

    Every member's crc32 is checked. Bad samples are noted with the reasons ``latent_missing``, ``text_missing``,
    ``mask_missing``, ``latent_shape``, ``text_shape``, ``mask_shape``, ``mask_values``, ``feature_dtype``,
    ``feature_format``, ``feature_too_large``, captions' reasons, and ``shard_crc`` where the source skips damage;
    their slots are left with any content. Raises ``ShardError`` where the source stops at damage.
    """
    if not len(samples):
        return
    order = np.argsort(samples, kind="stable")  # a shard's samples together, in the order of the file
    shards, rows = source.locate(samples[order])
    chosen = np.asarray(slots)[order].tolist()
    starts = [0, *(np.flatnonzero(np.diff(shards)) + 1).tolist(), len(order)]
    groups: dict[Any, _Group] = {}  # by what the rows of a table look like
    for start, stop in pairwise(starts):
        shard = int(shards[start])
        descriptor, table, names = source.opened(shard)
        group = groups.setdefault((names, table.itemsize), _Group(table.dtype, [], []))
        group.samples.extend((shard, descriptor, slot) for slot in chosen[start:stop])
        group.records.append(bare(table)[rows[start:stop]])
    batch = _Batch(source, into, choose)
    for group in groups.values():
        batch.read(group.samples, np.concatenate(group.records).view(group.dtype))
    if into.mask is not None:
        for slot in chosen if into.mask.max() > 1 else ():
            if into.mask[slot].max() > 1 and slot not in into.bad:
                into.bad[slot] = BadSampleError("mask_values", f"the mask of {into.keys[slot]} has values above 1")


class _Group(NamedTuple):
    """Samples of shards whose tables are made alike."""

    dtype: np.dtype
    samples: list[tuple[int, int, int]]  # shard, its descriptor, slot
    records: list[np.ndarray]  # the tables' rows, as bytes


class _Batch:
    """One call of ``read_features``."""

    def __init__(self, source: ShardSource, into: FeatureBatch, choose: Choose) -> None:
        self.source, self.into, self.choose = source, into, choose
        self.wanted: dict[str, Wanted] = {}
        if into.latents is not None:
            self.wanted[LATENT] = Wanted(LATENT, into.latents, (into.latents.shape[1:],))
        if into.text is not None and into.mask is not None:
            for kind, array in ((TEXT, into.text), (MASK, into.mask)):
                self.wanted[kind] = Wanted(kind, array, (array.shape[1:], (1, *array.shape[1:])))

    def read(self, samples: Sequence[tuple[int, int, int]], records: np.ndarray) -> None:
        """Fills the slots of (shard, its descriptor, slot), given their rows of the tables."""
        into, names, wanted = self.into, records.dtype.names or (), list(self.wanted.values())
        for (_, _, slot), key in zip(samples, records["key"].tolist(), strict=True):
            into.keys[slot] = key.decode("utf-8", "replace")
        texts = [kind for kind in ("txt", "json") if f"{kind}_offset" in names]
        if hasattr(os, "preadv") and all(f"{kind}_offset" in names for kind in self.wanted):
            groups = alike(records, wanted, texts)
        else:
            groups = iter([(np.arange(len(records)), None)])
        for group, span in groups:
            alone = group.tolist()
            if span is not None:
                chosen = [samples[i] for i in alone]
                slots = [slot for _, _, slot in chosen]
                those = bare(records)[group].view(records.dtype)
                whole, found = span.read([descriptor for _, descriptor, _ in chosen], those, slots, wanted)
                self._take_captions(slots, whole.tolist(), found)
                alone = group[~whole].tolist()
            for i in alone:
                shard, descriptor, slot = samples[i]
                try:
                    self._with_care(shard, descriptor, dict(zip(names, records[i].item(), strict=True)), slot)
                except BadSampleError as error:
                    into.bad[slot] = error

    def _take_captions(self, slots: Sequence[int], whole: Sequence[bool], texts: Mapping[str, Sequence[bytes]]) -> None:
        """The captions of samples that were read at once, one row of text features each."""
        into, nothing = self.into, [None] * len(slots)
        for slot, there, txt, json in zip(
            slots, whole, texts.get("txt", nothing), texts.get("json", nothing), strict=True
        ):
            try:
                if there:
                    captions = captions_of(txt, json, self.source.fields)
                    if len(captions) > 1 and into.text is not None:
                        raise _rows_differ(TEXT, 1, captions)
                    into.captions[slot] = captions[0 if len(captions) == 1 else self.choose(slot, captions)][0]
            except BadSampleError as error:
                into.bad[slot] = error

    def _with_care(self, shard: int, descriptor: int, row: dict[str, Any], slot: int) -> None:
        """Member by member. Raises ``BadSampleError``, or ``ShardError`` where the source stops at damage."""
        into = self.into
        key = into.keys[slot]

        def array(kind: str, name: str) -> np.ndarray:
            data = self.source.checked(shard, descriptor, row, kind, MAX_FEATURE_BYTES)
            if data is None:
                raise BadSampleError(f"{name}_missing", f"{key} has no {kind}")
            try:
                found = array_of(data)
            except BadSampleError as error:
                raise BadSampleError(error.reason, f"the {kind} of {key}: {error.message}") from error
            wanted = self.wanted[kind]
            if found.dtype != wanted.array.dtype:
                raise BadSampleError(
                    "feature_dtype",
                    f"the {kind} of {key} is {found.dtype}, expected {wanted.array.dtype} as in the others",
                )
            shape = wanted.shapes[0]
            rows = found if found.ndim == len(shape) + 1 and len(wanted.shapes) > 1 else found[None]
            if rows.shape[1:] != shape:
                raise BadSampleError(f"{name}_shape", f"the {kind} of {key} is {found.shape}, expected {shape}")
            return rows

        texts = [self.source.checked(shard, descriptor, row, kind, MAX_TEXT_BYTES) for kind in ("txt", "json")]
        latent = array(LATENT, "latent")[0] if into.latents is not None else None
        captions = captions_of(texts[0], texts[1], self.source.fields)
        if into.text is None or into.mask is None:
            pick = self.choose(slot, captions)
        else:
            text, mask = array(TEXT, "text"), array(MASK, "mask")
            for kind, rows in ((TEXT, text), (MASK, mask)):
                if len(rows) != len(captions):
                    raise _rows_differ(kind, len(rows), captions)
            pick = self.choose(slot, captions)
            into.text[slot], into.mask[slot] = text[pick], mask[pick]
        if into.latents is not None:
            into.latents[slot] = latent
        into.captions[slot] = captions[pick][0]


def load_empty(folder: Path, encoders: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The empty caption's features (n_txt, E) and mask (n_txt) uint8, from ``empty.safetensors`` beside the index.

    Raises ``ShardError`` where the file is missing, malformed, or not the one that the index names by its SHA-256.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    path = folder / EMPTY_NAME
    cure = "copy it along with the shards, or encode them again: longskip data encode"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path} cannot be read ({error.strerror}); dropped captions need it", cure=cure) from error
    part = encoders.get("text")
    said = part.get("empty_sha256") if isinstance(part, dict) else None
    found = hashlib.sha256(data).hexdigest()
    if said is not None and said != found:
        raise ShardError(f"{path} has the SHA-256 {found}, index.json says {said}", cure=cure)
    try:
        arrays = load(data)
        text, mask = arrays["text"], arrays["mask"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ShardError(f"{path} does not hold 'text' and 'mask': {error}", cure=cure) from error
    fits = text.ndim == 2 and mask.shape == text.shape[:1] and text.dtype in (STORED["fp16"], STORED["fp32"])
    if not fits or mask.dtype != STORED["uint8"] or mask.max(initial=0) > 1:
        raise ShardError(
            f"{path} holds text {text.dtype} {text.shape} and mask {mask.dtype} {mask.shape}; expected fp16 or fp32 "
            "(n_txt, E) and uint8 0 or 1 (n_txt)",
            cure=cure,
        )
    return text, mask


def _rows_differ(kind: str, rows: int, captions: Captions) -> BadSampleError:
    name = kind.partition(".")[0]
    return BadSampleError(f"{name}_shape", f"the {kind} has {rows} rows for {len(captions)} captions")
