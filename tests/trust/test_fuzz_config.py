"""Configurations as a user, or somebody else, may write them: accepted or refused with a ConfigError, in no time."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from longskip.engine.config import Config
from longskip.engine.configio import load_config
from longskip.errors import ConfigError
from tests.trust.fuzzing import CASES, altered, damaged, fuzz, values
from tests.trust.sandbox import Sandbox

WHOLE = Config.model_validate(
    {"data": {"path": "data/shapes", "captions": {"txt": 1.0}}, "logging": {"prompts": ["a cat"]}}
).model_dump(mode="json")
TEXT = yaml.safe_dump(WHOLE, sort_keys=False)
SMALL = "model: {preset: uvit-tiny, resolution: 32}\ndata: {path: data}\ntrain: {steps: 5, batch_size: 8}\n"


def load(folder: Path, case: tuple[bytes, list[str]]) -> None:
    """What ``longskip train CONFIG …`` does with it before anything is started."""
    text, overrides = case
    (folder / "config.yaml").write_bytes(text)
    config = load_config(folder / "config.yaml", overrides)
    for world in (1, 2):
        try:
            config.batch(world)
        except ConfigError as error:
            assert len(str(error)) < 20_000
    config.text_encoder(10)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    warm = (TEXT.replace("buckets: 'off'", "buckets: auto").encode(), ["optim.lr=1e-4"])
    with Sandbox(tmp_path_factory.mktemp("config"), {"load": load}, {"load": warm}) as made:
        yield made


@pytest.mark.parametrize("cases", CASES)
def test_texts_of_any_bytes(sandbox: Sandbox, cases: int) -> None:
    fuzz(cases, damaged(TEXT.encode()) | damaged(SMALL.encode()) | st.binary(max_size=60),
         lambda text: sandbox.run("load", (text, [])))  # fmt: skip


@pytest.mark.parametrize("cases", CASES)
def test_sound_configurations_with_odd_values(sandbox: Sandbox, cases: int) -> None:
    def check(tree: Any) -> None:
        try:
            text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")
        except yaml.YAMLError:
            return
        sandbox.run("load", (text, []))

    fuzz(2 * cases, altered(WHOLE), check)


KEYS = [f"{group}.{name}" for group, body in WHOLE.items() for name in body]
SNIPPETS = [
    "1e-4",
    "nan",
    ".inf",
    "-1",
    "true",
    "null",
    "{a: b}",
    "[1, [2]]",
    "!!python/object/apply:os.system [id]",
    "&a 1",
    "*a",
    "0x" + "f" * 5000,
    "9" * 4000,
    "9" * 5000,
    "1_000",
    "0b1",
    "1:60",
    "2020-13-45",
    "!!timestamp x",
    "!!int ''",
    "!!bool maybe",
    "!!float x",
    "!!binary ä",
    "!!set {a}",
    "!!omap [a]",
    "!!pairs [a]",
    "<<",
    "{<<: {a: 1}}",
    "\ud800",
    "'\\",
    "? a",
    "[" * 2000,
    "{a: " * 500,
    "%",
    "@",
    "`",
    "\t",
    "a: b: c",
    "- a",
    "|2",
    "!<x> 1",
    "",
    "\x00",
    "\ufeff",
]


@pytest.mark.parametrize("cases", CASES)
def test_overrides(sandbox: Sandbox, cases: int) -> None:
    texts = st.tuples(st.sampled_from(KEYS) | st.text(max_size=6), st.sampled_from(SNIPPETS) | st.text(max_size=10))
    overrides = st.lists(texts.map("=".join) | st.text(max_size=12), min_size=1, max_size=3)
    fuzz(cases, overrides, lambda case: sandbox.run("load", (SMALL.encode(), case)))


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_every_snippet_at_some_keys(sandbox: Sandbox, snippet: str) -> None:
    for key in random.Random(len(snippet)).sample(KEYS, 5):
        sandbox.run("load", (SMALL.encode(), [f"{key}={snippet}"]))
    sandbox.run("load", (f"optim:\n  lr: {snippet}\n".encode("utf-8", "surrogatepass"), []))
    sandbox.run("load", (snippet.encode("utf-8", "surrogatepass"), []))


BOMB = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)
REFUSED = {
    "alias bomb": (BOMB, "aliases are not allowed"),
    "python tag": ("optim: !!python/object/apply:os.system ['touch executed']", "tag:yaml.org,2002:python"),
    "python name": ("optim: {lr: !!python/name:os.system }", "tag:yaml.org,2002:python"),
    "python tuple": ("optim: {betas: !!python/tuple [0.9, 0.99]}", "tag:yaml.org,2002:python"),
    "duplicate key": ("optim: {lr: 1, lr: 2}", "'lr' stands twice"),
    "duplicate group": ("optim: {lr: 1}\noptim: {lr: 2}", "'optim' stands twice"),
    "deep": ("optim: " + "[" * 3000 + "]" * 3000, "deeper than"),
    "deep, not closed": ("optim: " + "{a: " * 3000, "deeper than"),
    "huge": ("#" + "x" * (1 << 18), "larger than"),
    "values without end": ("a: [" + "x," * 40_000 + "]", "more than 20000 values"),
    "whole number with many digits": ("train: {batch_size: " + "9" * 4000 + "}", "train.batch_size"),
    "hexadecimal number without end": ("train: {batch_size: 0x" + "f" * 100_000 + "}", "train.batch_size"),
    "divisors without end": ("train: {batch_size: 1000000000000000000000000000057, micro_batch: 1}", "train.batch_size"),
    "blocks without end": ("model: {depth: 1000000000000}", "model.depth"),
    "pixels without end": ("model: {preset: uvit-tiny, resolution: 8000000000}", "model.resolution"),
    "not a number": ("optim: {lr: .nan}", "optim.lr"),
    "infinite": ("optim: {lr: .inf}", "optim.lr"),
    "negative": ("optim: {lr: -1}", "optim.lr"),
    "a negative step": ("train: {steps: -5}", "train.steps"),
    "indivisible": ("train: {batch_size: 32, micro_batch: 5}", "divisible"),
    "unknown key": ("optim: {lrr: 1}", "did you mean 'optim.lr'"),
    "a list of groups": ("- optim", "not a mapping"),
    "two documents": ("optim: {lr: 1}\n---\noptim: {lr: 2}", "not valid YAML"),
    "a byte that is no text": ("\x00", "not valid YAML"),
    "merge keys": ("optim: {<<: {lr: 1}}", "merge"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_and_where(sandbox: Sandbox, name: str) -> None:
    """FAULTS 30."""
    text, said = REFUSED[name]
    outcome = sandbox.run("load", (text.encode(), []))
    assert outcome.kind == "refused" and said in outcome.text, outcome
    assert len(outcome.text) < 5000  # a value of megabytes is not printed whole
    assert not (sandbox.folder / "executed").exists()


def test_numbers_as_yaml_reads_them_and_a_mark_of_byte_order(sandbox: Sandbox) -> None:
    assert sandbox.run("load", (b"\xef\xbb\xbfoptim: {lr: 1e-4}", ["optim.lr=1e-3"])).kind == "fine"


@pytest.mark.parametrize("cases", CASES)
def test_any_tree(sandbox: Sandbox, cases: int) -> None:
    groups = st.dictionaries(st.sampled_from(list(WHOLE)), st.dictionaries(st.sampled_from(
        [name for body in WHOLE.values() for name in body]), values, max_size=3), max_size=3)  # fmt: skip

    def check(tree: Any) -> None:
        sandbox.run("load", (yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass"), []))

    fuzz(cases, groups, check)
