from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
import zlib

import numpy as np
import pytest
from PIL import Image

from longskip.engine.data.index import build_index, check_shard, index_shard, load_index, load_table, split_member
from longskip.engine.data.pack import write_shards
from longskip.engine.data.sources import ShardSource, open_source
from longskip.errors import BadSampleError, ShardError


def png(i: int, size: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (size, size + 1, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def shards(tmp_path):
    write_shards(({"png": png(i), "txt": f"number {i}"} for i in range(25)), tmp_path / "data", per_shard=10)
    return tmp_path / "data"


def tar(path, members, format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def headers(path) -> list[int]:
    """Where each member's header stands, by tarfile."""
    with tarfile.open(path) as archive:
        return [member.offset for member in archive]


def test_the_table_agrees_with_the_archive(shards):
    index = load_index(shards)
    assert index.total == 25
    assert [shard.count for shard in index.shards] == [10, 10, 5]
    number = 0
    for shard in index.shards:
        data = (shards / shard.file).read_bytes()
        assert shard.bytes == len(data)
        assert shard.sha256 == hashlib.sha256(data).hexdigest()
        assert dict(shard.members) == {"image": shard.count, "txt": shard.count}
        with tarfile.open(shards / shard.file) as archive:
            members = {member.name: archive.extractfile(member).read() for member in archive}
        for row in load_table(shards, shard):
            assert row["key"].decode() == f"{number:09d}"
            assert (row["width"], row["height"]) == (9, 8)
            for kind, extension in (("image", "png"), ("txt", "txt")):
                start, size = int(row[f"{kind}_offset"]), int(row[f"{kind}_size"])
                assert data[start : start + size] == members[f"{number:09d}.{extension}"]
                assert row[f"{kind}_crc32"] == zlib.crc32(members[f"{number:09d}.{extension}"])
            number += 1


def test_indexing_the_same_shards_gives_the_same_index(shards):
    before = (shards / "index.json").read_text()
    for path in [*shards.glob("*.npy"), shards / "index.json"]:
        path.unlink()
    with pytest.raises(ShardError, match=r"3 tars and no index\.json") as caught:
        open_source(shards)
    assert f"longskip data index {shards}" in caught.value.cure
    build_index(shards)
    assert (shards / "index.json").read_text() == before


def test_listed_shards_of_two_folders_are_indexed_above_them(shards, tmp_path):
    other = tmp_path / "more"
    write_shards([{"png": png(99), "txt": "last"}], other)
    index = build_index([shards / "00001.tar", other / "00000.tar"])
    assert [shard.file for shard in index.shards] == ["data/00001.tar", "more/00000.tar"]
    source = open_source(tmp_path)
    assert len(source) == 11
    assert source.read(10).captions == (("last", 1.0),)


def test_the_index_does_not_depend_on_the_place(shards, tmp_path):
    before = open_source(shards).fingerprint()
    shutil.move(shards, tmp_path / "elsewhere")
    assert open_source(tmp_path / "elsewhere").fingerprint() == before


def truncate(path, size):
    with path.open("r+b") as stream:
        stream.truncate(size)


@pytest.mark.parametrize("cut", ["border", "header", "data", "end", "nothing"])
def test_truncated_shards_are_named_with_sizes_and_cure(shards, cut):
    path = shards / "00001.tar"
    size = path.stat().st_size
    border = headers(path)[6]
    new = {"border": border, "header": border + 100, "data": border + 600, "end": size - 9000, "nothing": 0}[cut]
    truncate(path, new)
    with pytest.raises(ShardError, match=rf"00001\.tar is truncated: expected {size} bytes, found {new}\n  cure:"):
        open_source(shards)
    if cut != "end":  # there the end-of-archive blocks are whole and only padding is lost
        with pytest.raises(ShardError, match=r"00001\.tar"):
            build_index(shards)


def test_a_missing_shard_and_a_missing_table_are_named(shards):
    (shards / "00002.idx.npy").rename(shards / "kept")
    with pytest.raises(ShardError, match=r"00002\.idx\.npy does not exist"):
        open_source(shards)
    (shards / "kept").rename(shards / "00002.idx.npy")
    (shards / "00002.tar").unlink()
    with pytest.raises(ShardError, match=r"00002\.tar is missing; the index expects \d+ bytes"):
        open_source(shards)


def test_a_flipped_header_byte_is_found_by_indexing_wherever_it_is(shards):
    path = shards / "00000.tar"
    whole = path.read_bytes()
    for header in headers(path):
        for place in (0, 130, 150, 257):  # name, size, checksum, magic; tarfile alone just ends there
            damaged = bytearray(whole)
            damaged[header + place] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(ShardError, match=r"00000\.tar"):
                index_shard(path)
    path.write_bytes(whole)
    assert index_shard(path)[0] == load_index(shards).shards[0]


def test_a_flipped_header_byte_before_a_probed_member_is_found_on_opening(shards):
    path = shards / "00000.tar"
    damaged = bytearray(path.read_bytes())
    damaged[headers(path)[0] + 130] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ShardError, match=r"expected a tar header for \d+ bytes at byte 0, found none"):
        check_shard(shards, load_index(shards, check=False).shards[0])


def test_a_flipped_data_byte_stops_or_makes_a_bad_sample_as_configured(shards):
    row = load_table(shards, load_index(shards).shards[1])[3]
    path = shards / "00001.tar"
    damaged = bytearray(path.read_bytes())
    damaged[int(row["image_offset"]) + 40] ^= 1
    path.write_bytes(damaged)
    strict = open_source(shards)
    assert strict.read(12).key == "000000012"
    with pytest.raises(ShardError, match=r"00001\.tar: the image of 000000013 .* has the crc32") as caught:
        strict.read(13)
    assert "longskip data lint" in caught.value.cure
    with pytest.raises(BadSampleError) as bad:
        open_source(shards, on_damage="skip").read(13)
    assert bad.value.reason == "shard_crc"


def test_a_shard_that_shrinks_while_open_is_met_as_damage(shards):
    source = ShardSource(shards)
    source.read(20)
    truncate(shards / "00002.tar", 1024)
    with pytest.raises(ShardError, match=r"over \d+ bytes, expected"):
        source.read(24)


def test_empty_tars_are_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(ShardError, match=r"a\.tar is empty"):
        build_index(tmp_path)
    tar(tmp_path / "a.tar", [])
    with pytest.raises(ShardError, match=r"a\.tar holds no picture and no latent in 0 samples"):
        build_index(tmp_path)
    tar(tmp_path / "a.tar", [("a.txt", b"only text")])
    with pytest.raises(ShardError, match="no picture and no latent in 1 samples"):
        build_index(tmp_path)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ShardError, match=r"no \*\.tar"):
        build_index(tmp_path)
    assert not (tmp_path / "index.json").exists()


def test_zeroed_and_appended_archives_are_refused(tmp_path):
    path = tar(tmp_path / "a.tar", [("a.png", png(0)), ("a.txt", b"a"), ("b.png", png(1)), ("b.txt", b"b")])
    whole = path.read_bytes()
    hole = headers(path)[2]
    path.write_bytes(whole[:hole] + bytes(1024) + whole[hole + 1024 :])
    with pytest.raises(ShardError, match=f"data after the end of the archive at byte {hole}"):
        build_index(tmp_path)
    path.write_bytes(whole + whole)
    with pytest.raises(ShardError, match="after the end"):
        build_index(tmp_path)


@pytest.mark.parametrize(
    "name", ["a.pyd", "a.pkl", "a.pickle", "a.pth", "a.PKL", "a.latent.pkl", "a.pkl.gz", "a.pt", "../a.txt", "/a.txt",
             "x/../../a.txt", "a\nb.txt", "a\x1b[2Jb.txt", "x\\..\\a.txt"],
)  # fmt: skip
def test_hostile_members_are_refused(tmp_path, name):
    tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.txt", b"x"), (name, b"cos\nsystem\n(S'true'\ntR.")])
    with pytest.raises(ShardError, match=r"a\.tar: member .* at byte \d+"):
        build_index(tmp_path)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        info = tarfile.TarInfo("0.png")
        info.type, info.linkname = kind, "/etc/hostname"
        archive.addfile(info)
    with pytest.raises(ShardError, match="link, a device or a sparse file"):
        build_index(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", png(0)), ("a.png", png(1))], "second image member"),
        ([("a.png", png(0)), ("a.jpg", png(1))], "second image member"),
        ([("a.png", png(0)), ("b.png", png(1)), ("a.txt", b"x")], "appears a second time"),
    ],
)
def test_duplicates_are_refused(tmp_path, members, message):
    tar(tmp_path / "a.tar", members)
    with pytest.raises(ShardError, match=message):
        build_index(tmp_path)


def test_other_members_are_left_alone_and_derived_ones_found(tmp_path):
    latent = b"\x93NUMPY derived"
    tar(tmp_path / "a.tar", [("x/a.JPG", png(0)), ("x/a.latent.npy", latent), ("x/a.url", b"http://x"),
                             ("x/a.txt", b"t"), ("x/b.txt", b"no picture")])  # fmt: skip
    index = build_index(tmp_path)
    assert dict(index.shards[0].members) == {"image": 1, "txt": 2, "latent.npy": 1}
    source = open_source(tmp_path)
    assert source.read(0).key == "x/a"
    assert source.member(0, "latent.npy") == latent
    assert source.member(1, "latent.npy") is None
    assert source.member(0, "json") is None
    assert source.size(0) == (8, 9)
    with pytest.raises(BadSampleError) as caught:
        source.read(1)
    assert caught.value.reason == "image_missing"


def npy(i, shape=(4, 3, 5), dtype=np.float16) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(i).standard_normal(shape).astype(dtype))
    return buffer.getvalue()


def test_samples_of_latents_need_no_picture(tmp_path):
    """Sizes of latents of every header that numpy writes; others stand in the table as unknown."""
    shapes = [(4, 3, 5), (4, 16, 2), (3, 5), (1, 4, 3, 5), (4, 1, 1), (4, 0, 5)]
    stored = [npy(i, shape) for i, shape in enumerate(shapes)]
    odd = [b"\x93NUMPY derived", b"", npy(9)[:20], npy(9, dtype=np.float64)]
    members = []
    for i, latent in enumerate([*stored, *odd]):
        members += [(f"{i:02d}.latent.npy", latent), (f"{i:02d}.text.npy", npy(i, (7, 6))), (f"{i:02d}.txt", b"t")]
    tar(tmp_path / "a.tar", members)
    index = build_index(tmp_path)
    assert index.members == {"latent.npy": 10, "text.npy": 10, "txt": 10}
    table = load_table(tmp_path, index.shards[0])
    assert list(zip(table["latent_height"].tolist(), table["latent_width"].tolist(), strict=True)) == [
        (3, 5), (16, 2), (0, 0), (0, 0), (1, 1), (0, 5), *[(0, 0)] * 4,
    ]  # fmt: skip
    assert table["width"].tolist() == table["height"].tolist() == [0] * 10
    source = open_source(tmp_path)
    assert [source.member(i, "latent.npy") for i in range(6)] == stored
    assert source.captions(3) == (("t", 1.0),)


def test_latents_and_pictures_stand_side_by_side(tmp_path):
    tar(tmp_path / "a.tar", [("0.png", png(0)), ("0.latent.npy", npy(0)), ("1.latent.npy", npy(1)), ("2.png", png(2))])
    tar(tmp_path / "b.tar", [("3.png", png(3))])
    index = build_index(tmp_path)
    assert index.members == {"image": 3, "latent.npy": 2}
    assert [dict(shard.members) for shard in index.shards] == [{"image": 2, "latent.npy": 2}, {"image": 1}]
    first, second = (load_table(tmp_path, shard) for shard in index.shards)
    assert first["latent_width"].tolist() == [5, 5, 0]
    assert first["width"].tolist() == [9, 0, 9]
    assert "latent_width" not in second.dtype.names


def test_indexing_feature_shards_again_keeps_what_is_known_of_their_encoders(tmp_path):
    said = {"vae": {"sha256": "ab"}}
    for name in ("a", "b"):
        tar(tmp_path / f"{name}.tar", [(f"{name}{i}.latent.npy", npy(i)) for i in range(3)])
    assert build_index(tmp_path).encoders == {}
    assert build_index(tmp_path, encoders=said).encoders == said
    (tmp_path / "a.idx.npy").unlink()
    assert build_index(tmp_path).encoders == said
    assert load_index(tmp_path).encoders == said
    (tmp_path / "b.tar").unlink()
    assert build_index(tmp_path).encoders == said
    assert build_index(tmp_path, encoders={}).encoders == {}
    build_index(tmp_path, encoders=said)
    tar(tmp_path / "c.tar", [("c.latent.npy", npy(7))])  # whose encoder nobody knows
    assert build_index(tmp_path).encoders == {}
    build_index(tmp_path, encoders=said)
    (tmp_path / "index.json").write_text("{")
    assert build_index(tmp_path).encoders == {}


def test_headers_before_latents_are_probed_on_opening(tmp_path):
    path = tar(tmp_path / "a.tar", [(f"{i}.latent.npy", npy(i)) for i in range(4)])
    index = build_index(tmp_path)
    damaged = bytearray(path.read_bytes())
    damaged[headers(path)[3] + 130] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ShardError, match=r"expected a tar header for \d+ bytes at byte \d+, found none"):
        check_shard(tmp_path, index.shards[0])


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names_in_every_tar_format(tmp_path, format):
    name = "täglich/" + "x" * 80
    tar(tmp_path / "a.tar", [(f"{name}.png", png(0)), (f"{name}.txt", b"t")], format)
    build_index(tmp_path)
    assert open_source(tmp_path).read(0)[0] == name


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(version=2),
        lambda d: d.pop("shards"),
        lambda d: d.update(total=24),
        lambda d: d["shards"][0].update(file="../00000.tar"),
        lambda d: d["shards"][0].update(file="/etc/x.tar"),
        lambda d: d["shards"][0].update(file="pipe:cat x.tar"),
        lambda d: d["shards"][0].update(count=11),
        lambda d: d["shards"][0].update(count=-1),
        lambda d: d["shards"][0].update(bytes="10240"),
        lambda d: d["shards"].insert(0, None),
    ],
)
def test_altered_indexes_are_refused(shards, change):
    data = json.loads((shards / "index.json").read_text())
    change(data)
    (shards / "index.json").write_text(json.dumps(data))
    with pytest.raises(ShardError):
        open_source(shards)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000])
def test_indexes_that_are_not_indexes_are_refused(shards, text):
    (shards / "index.json").write_text(text)
    with pytest.raises(ShardError):
        open_source(shards)


def test_a_pickled_table_is_not_unpickled(shards):
    with (shards / "00000.idx.npy").open("wb") as stream:
        np.save(stream, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ShardError, match="is not a table"):
        open_source(shards)


def test_tables_of_another_length_or_kind_are_refused(shards):
    table = np.load(shards / "00000.idx.npy")
    np.save(shards / "00000.idx.npy", table[:9])
    with pytest.raises(ShardError, match="has 9 rows, expected 10"):
        open_source(shards)
    np.save(shards / "00000.idx.npy", np.arange(10))
    with pytest.raises(ShardError, match="not a table of shard members"):
        open_source(shards)
    table["image_offset"][0] = 1 << 60
    np.save(shards / "00000.idx.npy", table)
    with pytest.raises(ShardError, match="points to byte"):
        open_source(shards)


@pytest.mark.parametrize("path", ["pipe:cat a.tar", "http://x/a.tar", "s3://bucket/x", "file:/x", " pipe: ls", "x://y"])
def test_urls_are_refused(path):
    for call in (open_source, build_index, load_index, lambda p: build_index([p]), lambda p: write_shards([], p)):
        with pytest.raises(ShardError, match="URL or a pipe"):
            call(path)


def test_members_are_split_as_webdataset_does():
    assert split_member("a/b.c/d.e.F") == ("a/b.c/d", "e.f")
    assert split_member("noextension") == ("noextension", "")
