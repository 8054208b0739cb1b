"""JSON objects from files that anybody may have written: bounded, and with a typed error for all that is none (no torch)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longskip.errors import LongskipError

MAX_BYTES = 1 << 28


def read_object(
    path: Path, kind: type[LongskipError], *, limit: int = MAX_BYTES, cure: str | None = None
) -> dict[str, Any]:
    """The JSON object at ``path``; raises ``kind``, with the ``cure``, where there is none of at most ``limit`` bytes."""
    try:
        with open(path, "rb") as file:
            data = file.read(limit + 1)
        value = json.loads(data.decode("utf-8")) if len(data) <= limit else None
    except FileNotFoundError:
        raise kind(f"{path} does not exist", cure=cure) from None
    except (OSError, ValueError, RecursionError) as error:
        raise kind(f"{path} cannot be read as JSON: {str(error)[:200]}", cure=cure) from None
    if len(data) > limit:
        raise kind(f"{path} is larger than {limit} bytes", cure=cure)
    if not isinstance(value, dict):
        raise kind(f"{path} holds a {type(value).__name__}, not an object", cure=cure)
    return value
