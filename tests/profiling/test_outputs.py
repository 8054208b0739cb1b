from __future__ import annotations

import json
import math
import os
import threading
from pathlib import Path

import pytest

from longskip.errors import ConfigError
from longskip.profiling.outputs import json_text, made_folder, write_bytes, write_json, write_text


def test_files_are_replaced_as_a_whole_and_leave_nothing_beside_them(tmp_path: Path) -> None:
    file = tmp_path / "new" / "deep" / "page.html"
    assert write_text(file, "ä" * 9) == file and file.read_text("utf-8") == "ä" * 9
    write_bytes(file, b"short")
    assert file.read_bytes() == b"short" and [path.name for path in file.parent.iterdir()] == ["page.html"]


@pytest.mark.parametrize("name", ["/", "", ".", "folder", "file/below", "/dev/null/below", "x" * 300])
def test_what_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write") as raised:
        write_text(name, "x")
    assert ("it is a folder" in str(raised.value)) == (name in ("/", "", ".", "folder"))
    assert raised.value.cure and sorted(os.listdir()) == ["file", "folder"]


def test_pipes_are_written_to_and_links_stay_links(tmp_path: Path) -> None:
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    write_text(pipe, "through")
    reader.join(timeout=20)
    assert got == [b"through"] and pipe.is_fifo()
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_folders_are_made_or_refused(tmp_path: Path) -> None:
    assert made_folder(tmp_path / "a" / "b").is_dir() and made_folder(tmp_path / "a").is_dir()
    (tmp_path / "file").write_text("")
    for name, said in (("file", "is a file"), ("file/below", "cannot make"), ("x" * 300, "cannot make")):
        with pytest.raises(ConfigError, match=said):
            made_folder(tmp_path / name)


def test_json_has_no_numbers_that_are_none(tmp_path: Path) -> None:
    body = {"a": [math.inf, (1.5, -math.inf)], "b": {"c": math.nan}, "n": 10**30, "t": True, "s": "NaN"}
    expected = {"a": [None, [1.5, None]], "b": {"c": None}, "n": 10**30, "t": True, "s": "NaN"}
    assert json.loads(json_text(body), parse_constant=pytest.fail) == expected
    assert json.loads(write_json(tmp_path / "x.json", body).read_text(), parse_constant=pytest.fail) == expected
