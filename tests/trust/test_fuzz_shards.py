"""Tar shards, arrays and pictures with any bytes: indexed, checked and read, or refused; bad samples have a reason."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from longskip.engine.data.captions import captions_of
from longskip.engine.data.decode import decode_image, picture_size, upright_size
from longskip.engine.data.index import build_index
from longskip.engine.data.lint import lint
from longskip.engine.data.npy import array_of
from longskip.engine.data.pack import pack_folder
from longskip.errors import BadSampleError
from tests.trust.data import features, npy, picture, pictures, tar
from tests.trust.fuzzing import CASES, altered, damaged, fuzz
from tests.trust.sandbox import Sandbox
from tests.trust.test_fuzz_index import read_all


def indexed(folder: Path, data: bytes) -> None:
    """A shard that somebody sent: indexed, checked, read."""
    shutil.rmtree(folder / "new", ignore_errors=True)
    (folder / "new").mkdir()
    (folder / "new" / "00000.tar").write_bytes(data)
    index = build_index(folder / "new")
    assert index.total * 512 <= len(data)
    lint(folder / "new")
    read_all(folder / "new")


def swapped(folder: Path, case: tuple[str, bytes]) -> None:
    """A shard whose bytes are no longer those that were indexed."""
    kind, data = case
    target = folder / kind / "00000.tar"
    whole = target.read_bytes()
    target.write_bytes(data)
    try:
        found = lint(folder / kind)
        assert data == whole or not found.ok
        read_all(folder / kind)
    finally:
        target.write_bytes(whole)


def member(folder: Path, case: tuple[str, bytes]) -> None:
    """The bytes of one member."""
    kind, data = case
    if kind == "npy":
        array_of(data)
    elif kind == "image":
        picture_size(data)
        upright_size(data)
        decode_image(data, resolution=(8, 8), max_pixels=1 << 20)
    else:
        captions_of(data if kind == "txt" else None, data if kind == "json" else None)
        captions_of(b"", data, {"a": 1.0, "txt": 1.0})


def packed(folder: Path, case: dict[str, bytes]) -> None:
    """A folder of files of any names that a disk takes."""
    for name in ("files", "out"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "files").mkdir()
    for name, data in case.items():
        path = folder / "files" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_dir():
            path.write_bytes(data)
    lint(folder / "files")
    pack_folder(folder / "files", folder / "out")
    read_all(folder / "out")


def quiet(target: Any) -> Any:
    """``BadSampleError`` is what a member's reader owes; any other LongskipError would end a run for one sample."""

    def run(folder: Path, case: Any) -> None:
        try:
            target(folder, case)
        except BadSampleError as error:
            assert error.reason and error.reason.replace("_", "").isalpha()

    return run


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("shards")
    pictures(folder / "pictures", 6)
    features(folder / "features")
    targets = {"indexed": indexed, "swapped": swapped, "member": quiet(member), "packed": packed}
    warm: dict[str, Any] = {
        "indexed": (folder / "features" / "00000.tar").read_bytes(),
        "packed": {"a.png": picture(0), "a.txt": b"a"},
        "member": ("image", picture(0, format="WEBP")),
    }
    with Sandbox(folder, targets, warm) as made:
        yield made


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("kind", ["pictures", "features"])
def test_shards_of_any_bytes(sandbox: Sandbox, kind: str, cases: int) -> None:
    whole = (sandbox.folder / kind / "00000.tar").read_bytes()
    assert sandbox.run("indexed", whole).kind == "fine"
    fuzz(cases, damaged(whole), lambda data: sandbox.run("indexed", data))
    fuzz(cases, damaged(whole), lambda data: sandbox.run("swapped", (kind, data)))


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("format", FORMATS)
def test_headers_of_every_format(sandbox: Sandbox, format: str, cases: int) -> None:
    """Long and foreign names need headers of several blocks; the checksum is put right, so that they are believed."""
    name = "é" * 40 + "/" + "n" * 90 if format != "ustar" else "n" * 90
    path = tar(sandbox.folder / "seed.tar", [(f"{name}.png", picture(0)), (f"{name}.txt", b"x")], FORMATS[format])
    whole = path.read_bytes()
    places = [i for i in range(0, len(whole), 512) if whole[i + 257 : i + 262] == b"ustar"]

    @st.composite
    def cases_of(draw: st.DrawFn) -> bytes:
        data = bytearray(whole)
        for _ in range(draw(st.integers(1, 3))):
            at = draw(st.sampled_from(places))
            field, length = draw(
                st.sampled_from(
                    [(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (345, 155), (386, 12), (482, 13)]
                )
            )
            value = draw(
                st.one_of(
                    st.binary(min_size=1, max_size=length),
                    st.integers(-(2**60), 2**60).map(
                        lambda n: (b"\x80" if n >= 0 else b"\xff") + n.to_bytes(11, "big", signed=True)
                    ),
                    st.sampled_from(
                        [
                            b"77777777777\0",
                            b"-0000000001\0",
                            b"L",
                            b"K",
                            b"x",
                            b"g",
                            b"S",
                            b"5",
                            b"2",
                            b"7",
                            b"\xff" * 12,
                            b"../../x\0",
                            b"/x\0",
                        ]
                    ),
                )
            )[:length]
            data[at + field : at + field + len(value)] = value
            data[at + 148 : at + 156] = b" " * 8
            data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])
        return bytes(data)

    assert sandbox.run("indexed", whole).kind == "fine"
    fuzz(cases, cases_of(), lambda data: sandbox.run("indexed", data))


def test_long_names_of_long_names(sandbox: Sandbox) -> None:
    """Each of GNU's long names is followed by what it names, which may be a long name again."""
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 512
    block = info.tobuf(tarfile.GNU_FORMAT) + b"n\0".ljust(512, b"\0")
    assert sandbox.run("indexed", block * 3000 + bytes(1024)).kind == "refused"


@pytest.mark.parametrize("cases", CASES)
def test_arrays(sandbox: Sandbox, cases: int) -> None:
    whole = npy(np.zeros((2, 3, 4), np.float16))
    assert sandbox.run("member", ("npy", whole)).kind == "fine"
    fuzz(cases, damaged(whole) | st.binary(max_size=200), lambda data: sandbox.run("member", ("npy", data)))


@pytest.mark.parametrize("cases", CASES)
def test_captions(sandbox: Sandbox, cases: int) -> None:
    tree = {"captions": [{"text": "a", "weight": 1.0}, {"text": "b"}], "caption": "c", "a": "d"}

    def check(data: Any) -> None:
        import json

        sandbox.run("member", ("json", data if isinstance(data, bytes) else json.dumps(data).encode()))
        sandbox.run("member", ("txt", data if isinstance(data, bytes) else json.dumps(data).encode()))

    fuzz(cases, altered(tree) | st.binary(max_size=60) | damaged(b'{"captions": [{"text": "a"}]}'), check)
    for deep in (b"[" * 200_000, b'{"captions":' + b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"):
        sandbox.run("member", ("json", deep))


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_pictures(sandbox: Sandbox, format: str, cases: int) -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(io.BytesIO(picture(0, 16))).save(buffer, format, exif=exif)
    fuzz(cases, damaged(buffer.getvalue()), lambda data: sandbox.run("member", ("image", data)))


NAMES = st.sampled_from(
    [
        "a.png",
        "a.txt",
        "a.json",
        "b.PNG",
        "b.jpg",
        "b/c.png",
        "-rf.png",
        "metadata.jsonl",
        "a b.png",
        "ä.webp",
        "a\nb.png",
        "a\\b.png",
        "x.pkl",
        ".a.png",
        "a..png",
        "..png",
        "CON.png",
        "a" * 200 + ".png",
    ]
)


@pytest.mark.parametrize("cases", CASES)
def test_folders(sandbox: Sandbox, cases: int) -> None:
    line = b'{"file_name": "a.png", "text": "x"}\n{"file_name": "../a.png"}\n{"file_name": "/etc/passwd", "captions": 1}\n[[\n'
    contents = st.sampled_from([picture(0), picture(1, format="JPEG"), b"", b"a caption", b"\xff\xfe", line]) | damaged(
        line
    )
    fuzz(cases, st.dictionaries(NAMES, contents, min_size=1, max_size=6), lambda case: sandbox.run("packed", case))
