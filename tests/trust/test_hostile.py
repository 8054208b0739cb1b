"""Files that would run, read or fill what they must not, each given to everything that takes such files (FAULTS 13, 25-27)."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from longskip.engine import checkpoint
from longskip.engine.config import Config
from longskip.engine.data.buckets import Assignment, assign
from longskip.engine.data.decode import MAX_PIXELS, decode_image
from longskip.engine.data.index import build_index
from longskip.engine.data.pack import pack_folder, write_shards
from longskip.engine.data.plan import Plan
from longskip.engine.data.reader import Reader
from longskip.engine.data.remote import open_remote
from longskip.engine.data.sources import open_source
from longskip.engine.encoderfiles import text_files
from longskip.engine.export import convert_file
from longskip.engine.fidelity import Statistics
from longskip.engine.initial import find_initial
from longskip.engine.inventory import inventory, verify_checkpoints
from longskip.engine.tensorfiles import TensorFile
from longskip.engine.vocabulary import load_vocabulary
from longskip.errors import BadSampleError, CheckpointError, ConfigError, LongskipError
from tests.figures import figure
from tests.ranks import run_ranks, small_config, train_ranks
from tests.saved_runs import saved_run
from tests.trust.data import picture, pictures, tar
from tests.trust.sandbox import Sandbox


class Hostile:
    """Unpickling it creates a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return open, (str(self.target), "w")


def pickles(target: Path) -> dict[str, bytes]:
    """The same hostile object in every wrapping that a reader might take for what it expects."""
    plain = {f"protocol {n}": pickle.dumps(Hostile(target), protocol=n) for n in range(6)}
    zipped = io.BytesIO()
    torch.save({"module": Hostile(target)}, zipped)
    legacy = io.BytesIO()
    torch.save({"module": Hostile(target)}, legacy, _use_new_zipfile_serialization=False)
    array = io.BytesIO()
    np.save(array, np.array([Hostile(target)], dtype=object), allow_pickle=True)
    return plain | {"torch": zipped.getvalue(), "torch legacy": legacy.getvalue(), "npy": array.getvalue()}


def test_the_pickles_are_hostile(tmp_path: Path) -> None:
    """Each really does what the tests below look for."""
    for name, data in pickles(tmp_path / "touched").items():
        if name == "npy":
            np.load(io.BytesIO(data), allow_pickle=True)
        elif name.startswith("torch"):
            torch.load(io.BytesIO(data), weights_only=False)
        else:
            pickle.loads(data)
        assert (tmp_path / "touched").exists(), name
        (tmp_path / "touched").unlink()


# --- FAULTS 13: pickles in checkpoints --------------------------------------------------------------------------------


def attempts(*calls: Callable[[], Any]) -> None:
    """Every call must raise a LongskipError; the last one's is let through, for the sandbox to see."""
    errors = []
    for call in calls:
        try:
            call()
        except LongskipError as error:
            errors.append(error)
        else:
            raise AssertionError(f"call {len(errors)} of {len(calls)} was content")
    raise errors[-1]


def read_everywhere(folder: Path, path: str) -> None:
    """A checkpoint folder, a run, or a file: by all that reads such things."""
    where = folder / path
    if where.is_file():
        attempts(
            lambda: find_initial(where),
            lambda: TensorFile(where),
            lambda: convert_file(where, folder / "out", "longskip", None),
        )
    inventory(where)
    attempts(
        lambda: find_initial(where),
        lambda: TensorFile(where),
        lambda: checkpoint.verify(where),
        lambda: checkpoint.Archive(where),
        lambda: checkpoint.choose(where / "checkpoints", None),
        lambda: verify_checkpoints(where, None) and checkpoint.Archive(where),
    )


def sealed(folder: Path, name: str, data: bytes) -> None:
    """Puts ``data`` in place of a checkpoint's file, and the manifest right."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def load_sealed(folder: Path, case: tuple[str, bytes]) -> None:
    """A checkpoint of ours whose file ``name`` is something else, under a manifest that fits."""
    name, data = case
    step = folder / "step"
    shutil.rmtree(step, ignore_errors=True)
    shutil.copytree(folder / "sound" / "checkpoints" / "step-00000007", step)
    if name == "manifest.json":
        (step / name).write_bytes(data)
    else:
        sealed(step, name, data)
        checkpoint.verify(step)  # nothing is wrong with its hashes
    with checkpoint.Archive(step) as archive:
        archive.full("weight")
        archive.full("exp_avg")
    checkpoint.read_state(step)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("hostile")
    saved_run(folder / "sound")
    targets = {"everywhere": read_everywhere, "sealed": load_sealed}
    state = (folder / "sound/checkpoints/step-00000007/state.json").read_bytes()
    with Sandbox(folder, targets, {"sealed": ("state.json", state)}) as made:
        yield made


@pytest.mark.parametrize(
    "name", ["weights-00000.safetensors", "moments-00000.safetensors", "state.json", "manifest.json"]
)
def test_a_pickle_under_a_matching_manifest(sandbox: Sandbox, name: str, tmp_path: Path) -> None:
    """FAULTS 13. The hashes fit, and nothing is unpickled: the sandbox sees every class that a pickle asks for."""
    for kind, data in pickles(tmp_path / "touched").items():
        assert sandbox.run("sealed", (name, data)).kind == "refused", kind
        assert not (tmp_path / "touched").exists()


def deepspeed_folder(folder: Path, hostile: bytes, layout: str) -> None:
    """What DeepSpeed's save_checkpoint, or torch's distributed saving, leaves behind; every file of it hostile."""
    inside = folder / "global_step10"
    inside.mkdir(parents=True)
    names = ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    if layout == "zero3":
        names = ["zero_pp_rank_0_mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"]
    if layout == "distributed":
        names = [".metadata", "__0_0.distcp"]
    for name in names:
        (inside / name).write_bytes(hostile)
    (folder / "latest").write_bytes(hostile if layout == "pointer" else b"global_step10")
    (folder / "zero_to_fp32.py").write_text("raise SystemExit")


@pytest.mark.parametrize("layout", ["zero2", "zero3", "distributed", "pointer"])
def test_a_folder_of_deepspeeds_is_refused_with_the_way_out(sandbox: Sandbox, layout: str, tmp_path: Path) -> None:
    """FAULTS 13: the folder, the folder of its step, and each of its files."""
    for kind, data in pickles(tmp_path / "touched").items():
        folder = sandbox.folder / f"{layout}-{kind}"
        deepspeed_folder(folder, data, layout)
        for path in (folder, folder / "global_step10", *sorted((folder / "global_step10").iterdir())):
            outcome = sandbox.run("everywhere", str(path.relative_to(sandbox.folder)))
            assert outcome.kind == "refused", (kind, path)
        assert not (tmp_path / "touched").exists()
        with pytest.raises(CheckpointError, match="never reads") as caught:
            find_initial(folder)
        assert "--safe_serialization" in (caught.value.cure or "")


@pytest.mark.parametrize(
    "name", ["latest", "checkpoints/latest", "checkpoints/step-00000007/latest", "checkpoints/step-00000007/.metadata"]
)
def test_a_pickle_beside_a_sound_checkpoint(tmp_path: Path, name: str) -> None:
    """The pointer to the newest is for people, and a strange file in a checkpoint spoils it; neither is opened."""
    run = saved_run(tmp_path / "run")
    for data in pickles(tmp_path / "touched").values():
        (run / name).write_bytes(data)
        if "step-" in name:
            with pytest.raises(CheckpointError, match="does not know"):
                checkpoint.choose(run / "checkpoints", "7")
        else:
            assert checkpoint.choose(run / "checkpoints", None).name == "step-00000007"
            assert find_initial(run).name == "step-00000007"
    assert not (tmp_path / "touched").exists()


def test_pickles_where_arrays_weights_and_words_are_meant(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run")
    data = pictures(tmp_path / "data", 12)
    assign(open_source(data), ((8, 16), (16, 8)), 2).save(run, "data")
    assert len(Assignment.load(run, "data")) == 12
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    (encoder / "config.json").write_text('{"model_type": "t5", "d_model": 8}')
    (encoder / "tokenizer.json").write_text("{}")
    for hostile in pickles(tmp_path / "touched").values():
        for target, read in [
            (run / "vocabulary.json", lambda: load_vocabulary(run / "vocabulary.json")),
            (data / "00000.idx.npy", lambda: open_source(data)),
            (data / "index.json", lambda: open_source(data)),
            (run / "buckets.npy", lambda: Assignment.load(run, "data")),
            (run / "buckets.json", lambda: Assignment.load(run, "data")),
            (tmp_path / "stats.npz", lambda: Statistics.load(tmp_path / "stats.npz")),
            (encoder / "pytorch_model.bin", lambda: text_files(encoder)),
        ]:
            before = target.read_bytes() if target.exists() else None
            target.write_bytes(hostile)
            with pytest.raises(LongskipError):
                read()
            target.unlink() if before is None else target.write_bytes(before)
    assert not (tmp_path / "touched").exists()


def test_a_run_that_brings_its_own_program_does_not_have_it_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TorchScript network is run when the user names it, and not because a run's own configuration does."""
    from longskip.engine.evaluate import evaluate

    loaded: list[str] = []

    def load(path: str, **_: Any) -> Any:
        loaded.append(path)
        raise RuntimeError("no network")

    monkeypatch.setattr(torch.jit, "load", load)
    network = tmp_path / "run" / "net.pt"
    named = {"network": str(network), "stats": str(tmp_path / "run" / "stats.npz")}
    run = saved_run(tmp_path / "run", eval=named)
    network.write_bytes(b"program")
    with pytest.raises(ConfigError, match="program") as caught:
        evaluate(run)
    assert f"--network {network}" in str(caught.value) and not loaded
    with pytest.raises(LongskipError, match=r"stats\.npz"):  # named: it is the statistics' turn
        evaluate(run, network=str(network))
    elsewhere = tmp_path / "net.pt"
    elsewhere.write_bytes(b"program")
    with pytest.raises(LongskipError, match=r"stats\.npz"):
        evaluate(saved_run(tmp_path / "other", eval=named | {"network": str(elsewhere)}))


# --- FAULTS 25: damaged shards, on two ranks --------------------------------------------------------------------------


def damages(folder: Path) -> dict[str, Callable[[bytes], bytes]]:
    """Ways in which a shard is damaged; places are taken from the shard itself."""
    whole = (folder / "00000.tar").read_bytes()
    headers = [i for i in range(0, len(whole), 512) if whole[i + 257 : i + 262] == b"ustar"]
    middle = headers[len(headers) // 2]
    size = next(at for at in headers if b".png" in whole[at : at + 100]) + 124
    return {
        "at a member's border": lambda data: data[:middle],
        "at a member's border, with an end": lambda data: data[:middle] + bytes(1024),
        "in a header": lambda data: data[: middle + 100],
        "in data": lambda data: data[: middle + 512 + 7],
        "empty": lambda data: b"",
        "a flipped header byte": lambda data: data[:size] + bytes([data[size] ^ 1]) + data[size + 1 :],
        "a lost end": lambda data: data[:-1024] + b"x" * 1024,
        "longer": lambda data: data + bytes(512),
    }


def _verdicts(data: Path, folder: Path, config: Config) -> None:
    """Every rank's error for each damage, as files; none reaches the building of a model."""
    from longskip.engine.distributed import join
    from longskip.engine.prepare import prepare

    world = join()
    for name, harm in damages(data / "train").items():
        target = data / "train" / "00000.tar"
        whole = target.read_bytes()
        world_barrier()
        if world.is_main:
            target.write_bytes(harm(whole))
        world_barrier()
        try:
            prepare(config, folder / f"run-{name.replace(' ', '-')}", world)
            said = "none"
        except LongskipError as error:
            said = f"{type(error).__name__}: {error.message}"
        world_barrier()
        if world.is_main:
            target.write_bytes(whole)
        (folder / f"{name}-{world.rank}").write_text(said)
        world_barrier()


def world_barrier() -> None:
    from longskip.engine.distributed import barrier

    barrier()


def test_damaged_shards_are_met_by_both_ranks_alike(tmp_path: Path, shapes: Path) -> None:
    """FAULTS 25, ``stop``: found by size, header or end when the data are opened, before a model is built."""
    shutil.copytree(shapes, tmp_path / "data")
    assert run_ranks(2, _verdicts, tmp_path / "data", tmp_path, small_config(tmp_path / "data")) == [0, 0]
    for name in damages(tmp_path / "data" / "train"):
        said = [(tmp_path / f"{name}-{rank}").read_text() for rank in (0, 1)]
        assert said[0].startswith("ShardError: ") and "00000.tar" in said[0], (name, said)
        assert said[1].startswith("ShardError: ") and "00000.tar" in said[1], (name, said)


# --- FAULTS 26: pictures and texts ------------------------------------------------------------------------------------


def bomb(side: int) -> bytes:
    """A black RGB PNG of ``side`` × ``side`` pixels; of zeros, so that it is small."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    body = b"".join(packer.compress(bytes(3 * side + 1)) for _ in range(side)) + packer.flush()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def _growth(data: bytes) -> tuple[str, int]:
    """What becomes of a picture, and by how much the process grew at its worst, in bytes; in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        decode_image(picture(0), resolution=(8, 8))  # what is loaded at first use
        before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
        try:
            said = str(decode_image(data, resolution=(64, 64)).shape)
        except BadSampleError as error:
            said = error.reason
        peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        os.write(write, json.dumps([said, 1024 * int(peak.split()[1]) - before]).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as told:
        said, grown = json.loads(told.read())
    return said, grown


def test_a_bomb_takes_no_memory() -> None:
    """FAULTS 26: 230 KiB that would be 231 MiB. The largest picture that is taken grows the process by what it is."""
    data = bomb(9000)
    assert len(data) < 240 * 1024 and 9000 * 9000 * 3 > 231 << 20
    said, grown = _growth(data)
    figure(f"a PNG of {len(data):,} bytes and {9000 * 9000 * 3 / 2**20:.0f} MiB: {said}, RSS +{grown / 2**20:.1f} MiB")
    assert said == "image_too_large" and grown < 16 << 20
    side = int(MAX_PIXELS**0.5)
    said, grown = _growth(bomb(side))
    figure(f"a PNG of {side} x {side} pixels: RSS +{grown / 2**20:.0f} MiB, {3 * MAX_PIXELS / 2**20:.0f} MiB as RGB")
    assert said == "(64, 64, 3)" and grown < 3 * 3 * MAX_PIXELS


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


@functools.cache
def hostile_samples() -> list[tuple[str | None, dict[str, bytes]]]:
    """(reason, or None where it can be trained on; the files of the sample)."""
    rgb = Image.open(io.BytesIO(picture(3, 32)))
    sixteen = Image.fromarray(np.arange(1024, dtype=np.uint16).reshape(32, 32) * 60)
    frames = [Image.new("RGB", (9, 8), colour) for colour in ("red", "blue")]
    zero = bytearray(picture(4))
    zero[16:24] = bytes(8)  # the width and height of a PNG
    zero[29:33] = struct.pack(">I", zlib.crc32(bytes(zero[12:29])))
    text = {"txt": b"a red square"}
    return [
        (None, {"png": picture(0, 32), **text}),
        (None, {"jpg": encoded(rgb.convert("CMYK"), "JPEG"), **text}),
        (None, {"png": encoded(sixteen), **text}),
        (None, {"webp": encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True), **text}),
        (None, {"png": encoded(Image.new("RGB", (1, 1), "red")), **text}),
        ("image_decode", {"png": picture(1, 32)[:400], **text}),
        ("image_decode", {"png": picture(2, 32)[:60] + b"\xff" * 40 + picture(2, 32)[100:], **text}),
        ("image_format", {"png": b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run", **text}),
        ("image_empty", {"png": b"", **text}),
        ("image_too_large", {"png": bomb(9000), **text}),
        ("zero", {"png": bytes(zero), **text}),
        ("caption_missing", {"png": picture(5, 32)}),
        ("caption_missing", {"png": picture(6, 32), "txt": b" \n"}),
        ("caption_encoding", {"png": picture(7, 32), "txt": b"\xff\xfe\xfa"}),
        ("text_too_large", {"png": picture(8, 32), "txt": b"x" * ((1 << 20) + 1)}),
        ("caption_json", {"png": picture(9, 32), "json": b"[" * 100_000}),
        ("text_too_long", {"png": picture(10, 32), "txt": b"word " * 400}),
    ]


def hostile_shards(folder: Path) -> Counter[str]:
    """Shards of 64 samples with each of the above; the reasons that must be found in one pass."""
    members, reasons = [], Counter[str]()
    samples = hostile_samples()
    samples = [*samples, *((None, {"png": picture(i, 32), "txt": b"a cat"}) for i in range(len(samples), 64))]
    for i, (reason, files) in enumerate(samples):
        members += [(f"{i:03d}.{kind}", data) for kind, data in files.items()]
        reasons.update([reason] if reason else [])
    folder.mkdir()
    tar(folder / "00000.tar", members)
    build_index(folder)
    return reasons


def test_every_bad_sample_is_counted_under_its_reason(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """FAULTS 26, on two ranks: one pass over the data counts each reason as often as it was planted."""
    reasons = hostile_shards(tmp_path / "train")
    for kind in ("image_decode", "image_size"):  # what PIL says of a picture of 0 × 0 pixels is its own affair
        if reasons["zero"] and kind in _zero_reason():
            reasons[kind] += reasons.pop("zero")
    bad = sum(reasons.values())
    shutil.copytree(pictures(tmp_path / "v", 16), tmp_path / "validation")
    groups: dict[str, Any] = {"train": {"steps": 8, "batch_size": 8}, "logging": {"every": 4}, "eval": {"samples": 8}}
    config = small_config(tmp_path, **groups, data={"max_bad_share": 0.5})
    assert train_ranks(2, config, tmp_path / "run") == [0, 0]
    summary = json.loads((tmp_path / "run" / "run.json").read_text())
    assert summary["bad_samples"] == dict(reasons)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {key.removeprefix("bad/"): n for key, n in lines[-1].items() if key.startswith("bad/")} == dict(reasons)
    assert lines[-1]["bad_samples"] == bad
    told = Counter(
        json.loads(line)["reason"] for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    )
    assert told == reasons
    assert "bad: " in capfd.readouterr().out


@pytest.mark.slow
def test_too_many_bad_samples_stop_both_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """FAULTS 26: above ``data.max_bad_share``, with the reasons."""
    hostile_shards(tmp_path / "train")
    groups: dict[str, Any] = {"train": {"steps": 8, "batch_size": 8}, "eval": {"samples": 8}}
    config = small_config(tmp_path, **groups, data={"max_bad_share": 0.05, "validation": str(tmp_path / "train")})
    assert train_ranks(2, config, tmp_path / "strict") == [1, 1]
    said = capfd.readouterr().out
    for rank in (0, 1):
        assert f"rank {rank}: DataError: " in said
    assert "above data.max_bad_share 0.05" in said and "caption" in said


def _zero_reason() -> str:
    zero = dict(hostile_samples())["zero"]["png"]
    with pytest.raises(BadSampleError) as caught:
        decode_image(zero, resolution=(8, 8))
    return caught.value.reason


# --- FAULTS 27: names that lead elsewhere, and members that run -------------------------------------------------------

ADDRESSES = [
    "pipe:touch executed",
    " pipe:touch executed",
    "PIPE:touch executed",
    "pipe:touch executed;x.tar",
    "a::pipe:touch executed",
    "http://127.0.0.1:1/x",
    "file:///etc",
    "s3://x",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_that_are_commands(address: str, in_tmp: Path) -> None:
    for act in (
        open_source,
        build_index,
        lambda path: pack_folder(path, in_tmp / "out"),
        lambda path: open_remote(path, transport="none"),
        lambda path: open_remote(path, transport="webdataset") if "pipe" in path.lower() else open_source(path),
    ):
        with pytest.raises(LongskipError):
            act(address)
    assert not list(in_tmp.glob("executed*"))


@pytest.mark.parametrize("key", ["../a", "/a", "a/../../b", "x\\..\\b", "a\nb", ""])
def test_keys_that_lead_elsewhere_are_not_written(key: str, tmp_path: Path) -> None:
    with pytest.raises(LongskipError):
        write_shards([{"__key__": key, "png": picture(0), "txt": "x"}], tmp_path / "out")  # type: ignore[dict-item]
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}
    assert not list(tmp_path.glob("out/*.tar"))


def test_links_in_a_folder_of_pictures(tmp_path: Path) -> None:
    """A link is followed as the file system follows it; a fifo, which would be waited for, is not."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(0))
    (folder / "a.txt").write_text("a")
    os.mkfifo(folder / "b.png")
    (folder / "b.txt").write_text("b")
    source = open_source(folder)
    with pytest.raises(BadSampleError, match="not a plain file"):
        source.read(1)


# --- FAULTS 29: few shards --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fewer_shards_than_ranks_times_workers(tmp_path: Path) -> None:
    """One shard, 3 ranks of 2 workers: every rank has as many steps, and together they read what one would."""
    folder = pictures(tmp_path / "a", 24, per_shard=24)
    assert len(list(folder.glob("*.tar"))) == 1
    source = open_source(folder)
    plan = Plan(24, 6, 1)
    straight = [plan.batch_at(k)[1].tolist() for k in range(8)]
    found: list[list[int]] = [[] for _ in range(8)]
    for rank in range(3):
        with Reader(source, plan, None, resolution=(8, 8), n_txt=0, micro=2, rank=rank, world=3, workers=2) as reader:
            for k in range(8):  # two epochs
                (micro,) = next(reader)
                assert len(micro) == 2
                found[k] += micro.samples.tolist()
    assert found == straight


# --- FAULTS 30: configurations, by the command ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["optim: {lrr: 1}", "optim: {lr: .nan}", "a: &a [1]\nb: *a", "optim: !!python/object/apply:os.system [id]"]
)
def test_a_wrong_configuration_costs_less_than_two_seconds(text: str, tmp_path: Path) -> None:
    """FAULTS 30, as a user meets it: processor time of the whole command, without torch and so without a process group."""
    (tmp_path / "bad.yaml").write_text(text)
    code = (
        "import os, sys\nfrom longskip.launcher.cli import main\n"
        "try:\n    main(['train', 'bad.yaml'])\nexcept SystemExit as end:\n    code = end.code\n"
        "t = os.times()\nprint(code, t.user + t.system, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    code_, seconds, torch_there = done.stdout.split()[-3:]
    assert (code_, torch_there) == ("2", "False"), done
    assert float(seconds) < 2.0
    assert "bad.yaml" in done.stderr or "optim" in done.stderr
    assert "Traceback" not in done.stderr
