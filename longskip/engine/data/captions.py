"""Captions of a sample as its ``.txt`` and ``.json`` members hold them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from longskip.errors import BadSampleError, ConfigError

MAX_TEXT_BYTES = 1 << 20
MAX_WEIGHT = 1e9

Captions = tuple[tuple[str, float], ...]
"""(text, weight) pairs, at least one; weights are above 0."""


TXT = "txt"
"""The name by which ``fields`` call the ``.txt`` member; all other names are fields of the ``.json``."""


def captions_of(text: bytes | None, extra: bytes | None, fields: Mapping[str, float] | None = None) -> Captions:
    """Captions from a ``.txt`` and a ``.json`` member: the JSON's ``captions`` list, else the text, else ``caption``.

    With ``fields`` (name → share) those of them that the sample has, in the order of their names, and no others; the
    share of one that it lacks goes to the rest in proportion.

    Raises ``BadSampleError`` with the reasons ``text_too_large``, ``caption_encoding``, ``caption_json`` and
    ``caption_missing`` (no member, or nothing but blanks).
    """
    for name, data in (("txt", text), ("json", extra)):
        if data is not None and len(data) > MAX_TEXT_BYTES:
            raise BadSampleError("text_too_large", f"the {name} has {len(data)} bytes; the limit is {MAX_TEXT_BYTES}")
    record = json_record(extra) if extra is not None else {}
    if fields:
        if text is not None and TXT in fields:
            record = record | {TXT: _decoded(text)}
        return captions_by_field(record, fields)
    if "captions" in record:
        return weighted_captions(record["captions"])
    if text is not None and (words := _decoded(text).strip()):
        return ((words, 1.0),)
    if isinstance(record.get("caption"), str) and record["caption"].strip():
        return ((_encodable(record["caption"].strip()), 1.0),)
    raise BadSampleError("caption_missing", "the sample has no caption")


def captions_by_field(record: Mapping[str, Any], fields: Mapping[str, float]) -> Captions:
    """The texts of a record's ``fields`` with their shares, by name. Raises ``BadSampleError`` as ``captions_of``."""
    out = []
    for name in sorted(fields):
        value = record.get(name)
        if value is not None and not isinstance(value, str):
            raise BadSampleError("caption_json", f"the field {name!r} is a {type(value).__name__}, not a text")
        if value and (words := _encodable(value.strip())):
            out.append((words, float(fields[name])))
    if not out:
        raise BadSampleError("caption_missing", f"the sample has none of the captions {', '.join(sorted(fields))}")
    return tuple(out)


def fields_in(text: bytes | None, extra: bytes | None) -> set[str]:
    """The names that ``fields`` could have for this sample: those of its texts. Raises ``BadSampleError``."""
    record = json_record(extra) if extra is not None else {}
    return {name for name, value in record.items() if isinstance(value, str)} | ({TXT} if text else set())


def check_fields(fields: Iterable[str], found: set[str]) -> None:
    """Raises ``ConfigError`` for a field (``data.captions``) that is not among those ``found`` in the data."""
    for name in fields:
        if name not in found:
            raise ConfigError(
                f"data.captions names {name!r}, which no sample has among the first",
                cure=f"name some of {', '.join(sorted(found)) or 'the fields of KEY.json'}",
            )


def _decoded(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSampleError("caption_encoding", f"the text is not UTF-8: {error}") from error


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
