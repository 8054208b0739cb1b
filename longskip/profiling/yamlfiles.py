"""YAML of the user's: safe loading, without aliases, duplicate keys and surprises of size or depth; typed errors (no torch)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from longskip.errors import ConfigError

__all__ = ["MAX_BYTES", "MAX_DEPTH", "parse_yaml", "read_yaml"]

MAX_BYTES = 1 << 17
MAX_DEPTH = 32
"""Mappings and lists within one another."""
MAX_VALUES = 20_000
"""Values and keys; the parser takes about half a second for so many."""

# A text is encoded, a date has no thirteenth month, `!!bool maybe` is a KeyError: what values raise that are no such thing.
_BROKEN = (yaml.YAMLError, ArithmeticError, LookupError, ValueError, TypeError, AttributeError)


class _Loader(yaml.SafeLoader):
    """Safe loading that refuses duplicate keys, aliases (an alias bomb needs them, these files do not) and depth."""

    depth = count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        where = f"{event.start_mark.name}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{where}: YAML aliases are not allowed", cure="write the value out")
        if self.depth > MAX_DEPTH:
            raise ConfigError(
                f"{where}: nested deeper than {MAX_DEPTH}", cure="groups and their keys need two or three"
            )
        self.count += 1
        if self.count > MAX_VALUES:
            raise ConfigError(f"{where}: more than {MAX_VALUES} values and keys", cure="write fewer")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            mark = key_node.start_mark
            if not isinstance(key, str):
                raise ConfigError(
                    f"{mark.name}:{mark.line + 1}: key {str(key)[:80]!r} is no text", cure="keys are words"
                )
            if key in seen:
                raise ConfigError(f"{mark.name}:{mark.line + 1}: key {key!r} stands twice", cure="keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str, cure: str | None = None) -> dict[str, Any]:
    """One YAML mapping from ``path``, which is to be a ``what``; raises ConfigError for anything else, with the ``cure``
    where there is no file."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)  # and no more, whatever the file is
        text = data.decode("utf-8-sig") if len(data) <= MAX_BYTES else None
    except FileNotFoundError:
        raise ConfigError(f"no {what} at {path}", cure=cure) from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if text is None:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes; that is no {what}")
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str = "the text") -> dict[str, Any]:
    """The mapping in ``text``, {} where it is empty; ConfigError, which names ``name``, for anything else."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{name} is larger than {MAX_BYTES} bytes")
    try:
        loader = _Loader(text)
        loader.name = name
        try:
            tree = loader.get_single_data()  # type: ignore[no-untyped-call]
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
    except _BROKEN as error:
        raise ConfigError(f"{name} is not valid YAML: {_said(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{name} holds a {type(tree).__name__}, not a mapping")
    return tree


def _said(error: Exception) -> str:
    """What is wrong and where, without the lines of the file around it, which are nobody's business in a log."""
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        said = " ".join(part for part in (error.context, error.problem) if part)
        return f"line {mark.line + 1}, column {mark.column + 1}: {said}" if mark else said
    if isinstance(error, yaml.YAMLError):
        return " ".join(str(error).split())
    return f"a value that is not what its form or tag says ({type(error).__name__}: {str(error)[:200]})"
