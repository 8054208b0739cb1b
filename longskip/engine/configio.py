"""YAML in and out: ``extends:``, dotted overrides, duplicate and unknown keys refused with "did you mean" (no torch)."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from longskip.engine.config import Config
from longskip.engine.secrets import hidden, redacted
from longskip.errors import ConfigError
from longskip.profiling.yamlfiles import parse_yaml, read_yaml

MAX_DEPTH = 8


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid upon ``base``, group by group; lists and scalars replace."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def load_tree(path: Path, *, _chain: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The YAML at ``path`` with every ``extends:`` resolved (relative to the file that names it)."""
    path = path.resolve()
    if path in _chain:
        raise ConfigError(f"extends goes round in a circle: {' → '.join(p.name for p in (*_chain, path))}")
    if len(_chain) >= MAX_DEPTH:
        raise ConfigError(f"extends is nested deeper than {MAX_DEPTH} files at {path}")
    tree = read_yaml(path, "configuration", cure="longskip config new --help makes one")
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends must name one file, got {parent!r}")
    return merge(load_tree(path.parent / parent, _chain=(*_chain, path)), tree)


def parse_override(text: str) -> dict[str, Any]:
    """``a.b=value`` → ``{"a": {"b": value}}``, the value read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key or not all(part.isidentifier() for part in key.split(".")):
        raise ConfigError(
            f"override {hidden(text)[:200]!r} is not of the form group.key=value", cure="for instance optim.lr=1e-4"
        )
    leaf: Any = parse_yaml(f"value: {value}" if value else "", f"override {hidden(text)[:200]}").get("value")
    for part in reversed(key.split(".")):
        leaf = {part: leaf}
    return typing.cast("dict[str, Any]", leaf)


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The resolved configuration of a YAML file with dotted overrides on top; raises ConfigError."""
    tree = load_tree(path)
    for override in overrides:
        tree = merge(tree, parse_override(override))
    return validate(tree)


def validate(tree: dict[str, Any]) -> Config:
    """A nested mapping as Config; every complaint names the key's path, the value and what is allowed."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_complaint(item) for item in error.errors())) from None


def dump_yaml(config: Config) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _complaint(item: Any) -> str:
    path = hidden(".".join(str(part) for part in item["loc"]))
    if item["type"] == "extra_forbidden":
        known = _fields_at([str(part) for part in item["loc"][:-1]])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
        parent = path.rpartition(".")[0]
        meant = f"{parent}.{close[0]}" if close and parent else "".join(close)
        hint = f"did you mean {meant!r}?" if close else f"known here: {', '.join(known)}"
        return f"unknown key {path!r}; {hint}"
    message = str(item["msg"]).removeprefix("Value error, ")
    if not path:
        return message
    return f"{path}: {message} (got {_told(path.rpartition('.')[2], item['input'])})"


def _told(name: str, value: Any) -> str:
    """A value for people: not longer than a line or two, and without what must not be shown."""
    try:
        text = repr(redacted({name: value})[name])
    except ValueError:  # a whole number with more digits than Python writes
        return "a number without end"
    return text if len(text) <= 200 else f"{text[:200]}…"


def _fields_at(path: list[str]) -> list[str]:
    """The field names of the group at ``path``."""
    model: type[BaseModel] = Config
    for part in path:
        annotation = model.model_fields[part].annotation if part in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)
