"""Indexes and tables that somebody else wrote: opened and read, or refused with a ShardError."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from longskip.engine.data.index import load_index
from longskip.engine.data.lint import lint
from longskip.engine.data.sources import open_source
from longskip.errors import BadSampleError
from tests.trust.data import features, pictures
from tests.trust.fuzzing import CASES, ODD_NUMBERS, altered, damaged, fuzz
from tests.trust.sandbox import Sandbox

KINDS = ["pictures", "features"]


def read_all(folder: Path) -> None:
    """All that a training asks of a source, on_damage as either."""
    for on_damage in ("stop", "skip"):
        source = open_source(folder, on_damage=on_damage)  # type: ignore[arg-type]
        try:
            _ = source.features
            source.fingerprint()
            list(source.sizes())
            list(source.sizes(latents=True))
            source.caption_fields()
            for i in range(min(len(source), 12)):
                source.key(i)
                source.size(i)
                try:
                    source.read(i)
                    source.captions(i)
                except BadSampleError:
                    continue
        finally:
            source.close()


def opened(folder: Path, case: tuple[str, str, bytes]) -> None:
    """A case: the set of data, the file of it that has other bytes, and these."""
    kind, file, data = case
    work = folder / "work"
    target = work / kind / file
    whole = target.read_bytes()
    target.write_bytes(data)
    try:
        lint(work / kind)
        load_index(work / kind)
        read_all(work / kind)
    finally:
        target.write_bytes(whole)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("index")
    pictures(folder / "work" / "pictures")
    features(folder / "work" / "features")
    warm = ("pictures", "index.json", (folder / "work/pictures/index.json").read_bytes())
    with Sandbox(folder, {"opened": opened}, {"opened": warm}) as made:
        yield made


def check(sandbox: Sandbox, kind: str, file: str, data: bytes) -> str:
    return sandbox.run("opened", (kind, file, data)).kind


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_indexes_of_any_bytes(sandbox: Sandbox, kind: str, cases: int) -> None:
    whole = (sandbox.folder / "work" / kind / "index.json").read_bytes()
    assert check(sandbox, kind, "index.json", whole) == "fine"
    fuzz(cases, damaged(whole) | st.binary(max_size=40), lambda data: check(sandbox, kind, "index.json", data))


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_indexes_with_odd_values(sandbox: Sandbox, kind: str, cases: int) -> None:
    tree = json.loads((sandbox.folder / "work" / kind / "index.json").read_bytes())
    fuzz(cases, altered(tree), lambda data: check(sandbox, kind, "index.json", json.dumps(data).encode()))


def test_deep_and_large_indexes(sandbox: Sandbox) -> None:
    for text in ("[" * 100_000, '{"version": 1, "shards": ' + "[" * 100_000, '{"version": ' + "9" * 5000 + "}"):
        assert check(sandbox, "pictures", "index.json", text.encode()) == "refused"


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_tables_of_any_bytes(sandbox: Sandbox, kind: str, cases: int) -> None:
    """Also with the index's hash of the table put right, as an attacker would."""
    (table, *_) = sorted((sandbox.folder / "work" / kind).glob("*.idx.npy"))
    strategy = damaged(table.read_bytes()[:700]) | damaged(table.read_bytes())
    fuzz(cases, strategy, lambda data: check(sandbox, kind, table.name, data))


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_tables_with_odd_numbers(sandbox: Sandbox, kind: str, cases: int) -> None:
    (path, *_) = sorted((sandbox.folder / "work" / kind).glob("*.idx.npy"))
    table = np.load(path)
    names = [name for name in table.dtype.names if name != "key"]
    changes = st.lists(
        st.tuples(st.sampled_from(names), st.integers(0, len(table) - 1), st.sampled_from([-1, -512, *ODD_NUMBERS])),
        min_size=1, max_size=4,
    )  # fmt: skip

    def one(found: Any) -> None:
        odd = table.copy()
        for name, row, number in found:
            width = 8 * odd.dtype[name].itemsize
            odd[name][row] = number % 2 ** (width - (odd.dtype[name].kind == "i"))
        buffer = io.BytesIO()
        np.save(buffer, odd)
        check(sandbox, kind, path.name, buffer.getvalue())

    fuzz(cases, changes, one)


@pytest.mark.parametrize(
    "start", [b"PK\x03\x04", b"PK\x05\x06", b"\x80\x04\x95", b"\x93NUMPY\x03\x00", b"\x93NUMPY\x01\x00\xff\xff", b""]
)
def test_tables_that_are_other_files(sandbox: Sandbox, start: bytes) -> None:
    (path, *_) = sorted((sandbox.folder / "work" / "pictures").glob("*.idx.npy"))
    assert check(sandbox, "pictures", path.name, start + path.read_bytes()[len(start) :]) == "refused" or not start
    buffer = io.BytesIO()
    np.savez(buffer, key=np.zeros(6))
    assert check(sandbox, "pictures", path.name, buffer.getvalue()) == "refused"
