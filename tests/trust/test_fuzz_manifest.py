"""Checkpoints, safetensors files, encoders' folders and words that somebody else wrote: read whole, or refused by name."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors.numpy import save

from longskip.engine import checkpoint
from longskip.engine.config import TextGroup, VaeGroup
from longskip.engine.encoderfiles import (
    check_text,
    check_vae,
    text_files,
    text_group,
    vae_files,
    vae_group,
    vocabulary_size,
)
from longskip.engine.initial import spec_of_metadata
from longskip.engine.inventory import inventory, verify_checkpoints
from longskip.engine.job import LoopState
from longskip.engine.tensorfiles import TensorFile, parts_of, refuse_pickle
from longskip.engine.vocabulary import load_vocabulary
from longskip.models.presets import PRESETS
from tests.trust.fuzzing import CASES, ODD_NUMBERS, altered, damaged, fuzz, values
from tests.trust.sandbox import Sandbox

SHAPES = {"backbone.a": [2, 3], "backbone.b": [5], "backbone.empty": []}
STATE = {
    "step": 7, "images": 56, "image_tokens": 896, "tokens": 1904, "model_flops": 10**15, "hardware_flops": 10**15,
    "six_nd": 10**14, "bad_samples": 0, "losses": [1.5, 0.25],
    "cursor": {"position": 56, "skipped": [[8, 16]], "samples": 300, "epoch": 0},
}  # fmt: skip


def tensors(kinds: tuple[str, str], part: int, world: int = 2) -> dict[str, np.ndarray]:
    """A rank's share: each tensor cut into ``world`` runs."""
    out = {}
    for name, shape in SHAPES.items():
        cuts = np.linspace(0, int(np.prod(shape)), world + 1).astype(int)
        low, high = cuts[part], cuts[part + 1]
        if high > low:
            out |= {f"{kind}/{name}@{low}": np.arange(low, high, dtype=np.float32) for kind in kinds}
    return out


def files(world: int = 2) -> dict[str, bytes]:
    found = {"state.json": json.dumps(STATE).encode()}
    for stem, kinds in checkpoint.FILES.items():
        for rank in range(world):
            found[f"{stem}-{rank:05d}.safetensors"] = save(tensors(kinds, rank, world))  # type: ignore[arg-type]
    return found


def manifest(of: dict[str, bytes]) -> dict[str, Any]:
    entries = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in of.items()}
    return {"format": checkpoint.FORMAT, "version": checkpoint.VERSION, "step": 7, "world": 2, "zero_stage": 3,
            "model": {"backbone": {"width": 4}, "text": None}, "tensors": SHAPES, "files": entries}  # fmt: skip


def read_checkpoint(folder: Path, case: tuple[bytes, dict[str, bytes]]) -> None:
    """All that reads a checkpoint folder, given its manifest's bytes and its files'."""
    told, of = case
    place = folder / "run" / "checkpoints" / "step-00000007"
    place.mkdir(parents=True, exist_ok=True)
    for old in place.iterdir():
        old.unlink()
    for name, data in {"manifest.json": told, **of}.items():
        (place / name).write_bytes(data)
    inventory(folder / "run")
    verify_checkpoints(place, None)
    checkpoint.newest(place.parent)
    checkpoint.choose(place.parent, None)
    with checkpoint.Archive(place) as archive:
        archive.check_specs({"backbone": {"width": 4}, "text": None})
        for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
            for name, tensor in archive.full(kind).items():  # type: ignore[arg-type]
                assert list(tensor.shape) == archive.manifest["tensors"][name]
                whole = tensor.flatten().tolist()
                if archive.manifest["tensors"] == SHAPES and of == FILES:
                    assert whole == list(range(len(whole)))
    state = LoopState.from_json(checkpoint.read_state(place))
    assert LoopState.from_json(state.to_json()).to_json() == state.to_json()


FILES = files()


def safetensors_file(folder: Path, case: tuple[str, bytes]) -> None:
    name, data = case
    path = folder / name
    path.write_bytes(data)
    try:
        with TensorFile(path) as file:
            for tensor, shape in file.shapes.items():
                assert file.full(tensor).shape == shape
                numel = int(np.prod(shape))
                assert sum(piece.numel() for piece in file.pieces(tensor)) == numel
                file.read(tensor, numel // 2, numel - numel // 2)
            spec_of_metadata(file.metadata, path)
    finally:
        path.unlink()


def encoder_folder(folder: Path, case: tuple[str, dict[str, Any]]) -> None:
    kind, settings = case
    place = folder / "encoder"
    place.mkdir(exist_ok=True)
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors", "tokenizer.json"):
        (place / name).write_bytes(b"")
    for name, value in settings.items():
        (place / name).write_text(value if isinstance(value, str) else json.dumps(value))
    if kind == "vae":
        vae_group(vae_files(place))
        check_vae(VaeGroup(kind="vae", path=str(place)))
    else:
        found = text_files(place)
        text_group(found)
        text_group(found, 20)
        vocabulary_size(found)
        check_text(TextGroup(kind="clip", path=str(place)))


def words(folder: Path, data: bytes) -> None:
    (folder / "vocabulary.json").write_bytes(data)
    load_vocabulary(folder / "vocabulary.json").encode("a cat", 16)


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    targets = {"checkpoint": read_checkpoint, "file": safetensors_file, "encoder": encoder_folder, "words": words}
    warm = {
        "checkpoint": (json.dumps(manifest(FILES)).encode(), FILES),
        "file": ("a.safetensors", FILES["weights-00000.safetensors"]),
        "encoder": ("vae", {"config.json": VAE}),
    }
    with Sandbox(tmp_path_factory.mktemp("manifest"), targets, warm) as made:
        yield made


def test_the_sound_one_is_read(sandbox: Sandbox) -> None:
    outcome = sandbox.run("checkpoint", (json.dumps(manifest(FILES)).encode(), FILES))
    assert outcome.kind == "fine", outcome


@pytest.mark.parametrize("cases", CASES)
def test_manifests_of_any_bytes(sandbox: Sandbox, cases: int) -> None:
    whole = json.dumps(manifest(FILES)).encode()
    fuzz(cases, damaged(whole) | st.binary(max_size=40), lambda told: sandbox.run("checkpoint", (told, FILES)))
    for deep in (b"[" * 100_000, b'{"format": ' + b"[" * 100_000, b'{"version": ' + b"9" * 5000 + b"}"):
        assert sandbox.run("checkpoint", (deep, FILES)).kind == "refused"


@pytest.mark.parametrize("cases", CASES)
def test_manifests_with_odd_values(sandbox: Sandbox, cases: int) -> None:
    fuzz(
        2 * cases, altered(manifest(FILES)), lambda told: sandbox.run("checkpoint", (json.dumps(told).encode(), FILES))
    )


@pytest.mark.parametrize("cases", CASES)
def test_files_under_a_manifest_that_was_made_to_fit(sandbox: Sandbox, cases: int) -> None:
    """Hashes are no defence against whoever writes both."""

    @st.composite
    def cases_of(draw: st.DrawFn) -> dict[str, bytes]:
        name = draw(st.sampled_from(sorted(FILES)))
        if name == "state.json" and draw(st.booleans()):
            return FILES | {name: json.dumps(draw(altered(STATE))).encode()}
        return FILES | {name: draw(damaged(FILES[name]))}

    fuzz(2 * cases, cases_of(), lambda of: sandbox.run("checkpoint", (json.dumps(manifest(of)).encode(), of)))


RUNS = {
    "overlapping": {"weight/backbone.b@0": 3, "weight/backbone.b@2": 2},
    "beyond the end": {"weight/backbone.b@0": 3, "weight/backbone.b@3": 200},
    "with a gap": {"weight/backbone.b@0": 2, "weight/backbone.b@4": 1},
    "at a negative place": {"weight/backbone.b@-3": 8},
    "at no place": {"weight/backbone.b@": 5},
    "at a place that is no number": {"weight/backbone.b@1e3": 5},
    "with no name": {"": 5},
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_that_do_not_make_a_tensor(sandbox: Sandbox, name: str) -> None:
    """Elements that no run gives would be whatever lay in memory."""
    others = {key: value for part in (0, 1) for key, value in tensors(("weight", "ema"), part).items()}
    others = {key: value for key, value in others.items() if not key.startswith("weight/backbone.b")}
    odd = {key: np.zeros(size, np.float32) for key, size in RUNS[name].items()}
    of = FILES | {"weights-00000.safetensors": save(others | odd), "weights-00001.safetensors": save({})}
    outcome = sandbox.run("checkpoint", (json.dumps(manifest(of)).encode(), of))
    assert outcome.kind == "refused" and "step-00000007" in outcome.text, outcome


@pytest.mark.parametrize(
    "shape", [[1 << 40, 1 << 20], [1 << 36], [-1], [2.0], ["2"], [[2]], {"0": 2}, None, [True], [1] * 50]
)
def test_shapes_that_no_file_holds(sandbox: Sandbox, shape: Any) -> None:
    """Memory is asked for by the manifest's shapes: for no more than the files have."""
    told = manifest(FILES)
    told["tensors"] = SHAPES | {"backbone.b": shape}
    outcome = sandbox.run("checkpoint", (json.dumps(told).encode(), FILES))
    assert outcome.kind == "refused" and "manifest.json" in outcome.text, outcome


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HEADERS = {
    "length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "length of 16 EiB": struct.pack("<Q", 2**64 - 1) + b"{}",
    "length of 1 GiB": struct.pack("<Q", 1 << 30) + b"{}",
    "no header": b"",
    "cut in the length": b"\0\0\0",
    "overlapping": header({"a": ONE, "b": {**ONE, "data_offsets": [4, 12]}}, bytes(12)),
    "negative": header({"a": {**ONE, "data_offsets": [-8, 0]}}, bytes(8)),
    "negative shape": header({"a": {**ONE, "shape": [-2]}}, bytes(8)),
    "huge shape": header({"a": {**ONE, "shape": [1 << 62, 8]}}, bytes(8)),
    "other size than shape": header({"a": {**ONE, "shape": [3]}}, bytes(8)),
    "beyond the data": header({"a": {**ONE, "data_offsets": [0, 80], "shape": [20]}}, bytes(8)),
    "unknown dtype": header({"a": {**ONE, "dtype": "OBJ"}}, bytes(8)),
    "deep": struct.pack("<Q", 200_000) + b"[" * 200_000,
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_of_safetensors(sandbox: Sandbox, name: str) -> None:
    assert sandbox.run("file", ("a.safetensors", HEADERS[name])).kind == "refused"


@pytest.mark.parametrize("cases", CASES)
def test_safetensors_of_any_bytes(sandbox: Sandbox, cases: int) -> None:
    spec = {"spec": json.dumps({"width": 64, "depth": 4, "n_heads": 2}), "step": "7", "weights": "ema"}
    whole = save({"a": np.zeros((3, 4), np.float32), "b": np.ones(5, np.float16), "c": np.zeros((0, 2))}, metadata=spec)
    assert sandbox.run("file", ("a.safetensors", whole)).kind == "fine"
    fuzz(cases, damaged(whole) | damaged(whole[:300]), lambda data: sandbox.run("file", ("a.safetensors", data)))


@pytest.mark.parametrize("cases", CASES)
def test_what_metadata_say_of_a_model(sandbox: Sandbox, cases: int) -> None:
    from dataclasses import asdict

    def check(spec: Any) -> None:
        metadata = {"spec": spec if isinstance(spec, str) else json.dumps(spec)}
        sandbox.run("file", ("a.safetensors", save({"a": np.zeros(1)}, metadata=metadata)))

    fuzz(cases, altered(asdict(PRESETS["uvit-tiny"])) | values.map(json.dumps), check)
    check("[" * 100_000)


@pytest.mark.parametrize("cases", CASES)
def test_indexes_of_safetensors(sandbox: Sandbox, cases: int) -> None:
    tree = {
        "metadata": {"total_size": 4},
        "weight_map": {"a": "x-00001-of-00002.safetensors", "b": "x-00002-of-00002.safetensors"},
    }

    def check(data: Any) -> None:
        text = data if isinstance(data, bytes) else json.dumps(data).encode()
        sandbox.run("file", ("x.safetensors.index.json", text))

    fuzz(cases, altered(tree) | damaged(json.dumps(tree).encode()), check)
    for text in (
        b'{"weight_map": ' + b"[" * 100_000,
        json.dumps({"weight_map": {"a": "../../etc/passwd"}}).encode(),
        json.dumps({"weight_map": {"a": "/etc/passwd"}}).encode(),
        json.dumps({"weight_map": {"a": "x\0.safetensors"}}).encode(),
        json.dumps({"weight_map": {"a": ""}}).encode(),
        json.dumps({"weight_map": {"a": ".."}}).encode(),
    ):
        assert sandbox.run("file", ("x.safetensors.index.json", text)).kind == "refused"


VAE = {"_class_name": "AutoencoderKL", "block_out_channels": [8, 8], "latent_channels": 4, "scaling_factor": 0.18,
       "in_channels": 3, "out_channels": 3}  # fmt: skip
CLIP = {"model_type": "clip", "text_config": {"hidden_size": 32, "max_position_embeddings": 77, "vocab_size": 100}}
T5 = {"model_type": "t5", "d_model": 32, "vocab_size": 100}


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize(("kind", "settings"), [("vae", VAE), ("text", CLIP), ("text", T5)])
def test_folders_of_encoders(sandbox: Sandbox, kind: str, settings: dict[str, Any], cases: int) -> None:
    fuzz(cases, altered(settings) | values.map(json.dumps),
         lambda data: sandbox.run("encoder", (kind, {"config.json": data})))  # fmt: skip
    for text in ("[" * 100_000, '{"model_type": ' + "9" * 5000 + "}"):
        assert sandbox.run("encoder", (kind, {"config.json": text})).kind == "refused"


@pytest.mark.parametrize("cases", CASES)
def test_words(sandbox: Sandbox, cases: int) -> None:
    whole = {"version": 1, "words": ["a", "cat", "red"]}

    def check(data: Any) -> None:
        sandbox.run("words", data if isinstance(data, bytes) else json.dumps(data).encode())

    fuzz(cases, altered(whole) | damaged(json.dumps(whole).encode()), check)
    check(b"[" * 100_000)


def test_a_pickle_is_known_by_its_first_bytes(tmp_path: Path) -> None:
    assert parts_of(tmp_path / "a.safetensors") == [tmp_path / "a.safetensors"]
    refuse_pickle(tmp_path / "none.safetensors")
    assert ODD_NUMBERS
