"""Captions of a sample as its ``.txt`` and ``.json`` members hold them."""

from __future__ import annotations

import json
from typing import Any

from longskip.errors import BadSampleError

MAX_TEXT_BYTES = 1 << 20
MAX_WEIGHT = 1e9

Captions = tuple[tuple[str, float], ...]
"""(text, weight) pairs, at least one; weights are above 0."""


def captions_of(text: bytes | None, extra: bytes | None) -> Captions:
    """Captions from a ``.txt`` and a ``.json`` member: the JSON's ``captions`` list, else the text, else ``caption``.

    Raises ``BadSampleError`` with the reasons ``text_too_large``, ``caption_encoding``, ``caption_json`` and
    ``caption_missing`` (no member, or nothing but blanks).
    """
    for name, data in (("txt", text), ("json", extra)):
        if data is not None and len(data) > MAX_TEXT_BYTES:
            raise BadSampleError("text_too_large", f"the {name} has {len(data)} bytes; the limit is {MAX_TEXT_BYTES}")
    record = json_record(extra) if extra is not None else {}
    if "captions" in record:
        return weighted_captions(record["captions"])
    if text is not None:
        try:
            words = text.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            raise BadSampleError("caption_encoding", f"the text is not UTF-8: {error}") from error
        if words:
            return ((words, 1.0),)
    if isinstance(record.get("caption"), str) and record["caption"].strip():
        return ((_encodable(record["caption"].strip()), 1.0),)
    raise BadSampleError("caption_missing", "the sample has no caption")


def _encodable(text: str) -> str:
    """``text`` itself. JSON can spell half of a surrogate pair, which is no text and cannot be written anywhere."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadSampleError("caption_encoding", f"the caption is not Unicode text: {error}") from error
    return text


def json_record(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises ``BadSampleError`` with ``caption_encoding`` or ``caption_json`` for anything else."""
    try:
        record = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadSampleError("caption_encoding", f"the JSON is not UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise BadSampleError("caption_json", f"the JSON cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise BadSampleError("caption_json", f"the JSON holds a {type(record).__name__}, not an object")
    return record


def weighted_captions(items: Any) -> Captions:
    """``[{"text", "weight"?}, …]`` as pairs; weights from 0 to 1e9, one above 0. Raises ``BadSampleError``."""
    if not isinstance(items, list):
        raise BadSampleError("caption_json", f"'captions' is a {type(items).__name__}, not a list")
    out = []
    for item in items:
        record = item if isinstance(item, dict) else {}
        text, weight = record.get("text"), record.get("weight", 1.0)
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not isinstance(text, str) or not number or not 0 <= weight <= MAX_WEIGHT:  # NaN fails this too
            raise BadSampleError("caption_json", f"the caption {str(item)[:80]!r} is not {{text, 0 <= weight <= 1e9}}")
        if weight and (words := _encodable(text.strip())):
            out.append((words, float(weight)))
    if not out:
        raise BadSampleError("caption_missing", "no caption with a text and a weight above 0")
    return tuple(out)
