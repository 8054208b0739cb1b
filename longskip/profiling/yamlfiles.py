"""YAML of the user's: safe loading, without aliases, duplicate keys and surprises of size; typed errors (no torch)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from longskip.errors import ConfigError

__all__ = ["parse_yaml", "read_yaml"]

MAX_BYTES = 1 << 20


class _Loader(yaml.SafeLoader):
    """Safe loading that refuses duplicate keys and aliases (an alias bomb needs them, these files do not)."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ConfigError(f"{mark.name}:{mark.line + 1}: YAML aliases are not allowed", cure="write the value out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            mark = key_node.start_mark
            if not isinstance(key, str):
                raise ConfigError(f"{mark.name}:{mark.line + 1}: key {key!r} is no text", cure="keys are words")
            if key in seen:
                raise ConfigError(f"{mark.name}:{mark.line + 1}: key {key!r} stands twice", cure="keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str, cure: str | None = None) -> dict[str, Any]:
    """One YAML mapping from ``path``, which is to be a ``what``; raises ConfigError for anything else, with the ``cure``
    where there is no file."""
    try:
        text = path.read_text("utf-8") if path.stat().st_size <= MAX_BYTES else None
    except FileNotFoundError:
        raise ConfigError(f"no {what} at {path}", cure=cure) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if text is None:
        raise ConfigError(f"{path} is larger than {MAX_BYTES} bytes; that is no {what}")
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str = "the text") -> dict[str, Any]:
    """The mapping in ``text``, {} where it is empty; ConfigError, which names ``name``, for anything else."""
    try:
        loader = _Loader(text)
        loader.name = name
        try:
            tree = loader.get_single_data()  # type: ignore[no-untyped-call]
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{name} is not valid YAML: {error}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{name} holds a {type(tree).__name__}, not a mapping")
    return tree
