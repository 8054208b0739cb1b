"""What the tests of remote data share: a folder of shards, a server that serves it, and its opening into a fresh cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.remote_server import Server, forget_connections, opening, write_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield write_folder(tmp_path_factory.mktemp("remote") / "shards")
    forget_connections()  # a process forked later would wait for their threads


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    served = Server(folder)
    yield served
    served.close()


@pytest.fixture
def opened(server: Server, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    with opening(server, tmp_path / "cache") as open_:
        yield open_
