"""Exports against readers that are not ours: safetensors' own loader, diffusers in a process without longskip."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from longskip.engine import diffusers_layout, tensorfiles
from longskip.engine.data.tokens import FIRST_WORD, Vocabulary
from longskip.engine.drawing import Drawing, prompt_noise
from longskip.engine.export import convert_file, export
from longskip.engine.sample import draw_prompts, load_run
from longskip.engine.tensorfiles import Entry, TensorFile, write_file, write_files
from longskip.errors import CheckpointError, ConfigError, DiskFullError, LongskipError
from longskip.models.conditioning import Conditioning
from longskip.models.convert import from_original
from longskip.models.specs import UViTSpec
from longskip.models.uvit import UViT
from tests.figures import figure
from tests.ranks import small_config, train_ranks
from tests.saved_runs import CAPTIONS, saved_run, saved_tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_run(tmp_path_factory.mktemp("runs") / "small")


def manifest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000007" / "manifest.json"


# --- files ------------------------------------------------------------------------------------------------------------


def entry(name: str, values: torch.Tensor, piece: int = 5) -> Entry:
    return Entry(name, tuple(values.shape), values.dtype, lambda: values.reshape(-1).split(piece))


def test_written_pieces_are_what_safetensors_reads(tmp_path: Path) -> None:
    """Several dtypes, odd sizes, a scalar, an empty tensor and strange names; every tensor aligned to its elements."""
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 5, 7).half(),
        "b/ü": torch.randn(11),
        "c": torch.arange(3, dtype=torch.uint8),
        "d": torch.randn(2, 3).bfloat16(),
        "e": torch.tensor(4.5),
        "f": torch.zeros(0, 4),
        "g": torch.arange(4),
    }
    for size in range(9):  # header lengths of all residues
        about = {"x" * size: "y"}
        write_file(tmp_path / "f.safetensors", [entry(name, value) for name, value in tensors.items()], about)
        read = load_file(tmp_path / "f.safetensors")
        assert read.keys() == tensors.keys()
        for name, value in tensors.items():
            assert read[name].dtype == value.dtype and torch.equal(read[name], value), name
        with safe_open(tmp_path / "f.safetensors", "pt") as file:
            assert file.metadata() == about
    raw = (tmp_path / "f.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    assert length % 8 == 0
    assert all(h["data_offsets"][0] % tensors[name].element_size() == 0 for name, h in header.items())


def test_runs_of_a_file_are_runs_of_the_flattened_tensor(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {"a": torch.randn(4, 3, 2), "b": torch.randn(9), "c": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "f.safetensors")
    with TensorFile(tmp_path / "f.safetensors") as file:
        for name, value in tensors.items():
            flat = value.reshape(-1)
            for low in range(flat.numel()):
                for high in range(low, flat.numel() + 1):
                    assert torch.equal(file.read(name, low, high - low), flat[low:high])


def test_large_models_are_split_with_an_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(10 + i) for i in range(7)}
    entries = [entry(name, value) for name, value in tensors.items()]
    files = write_files(tmp_path, "m", entries, {"k": "v"}, limit=120)
    assert [path.name for path in files][-1] == "m.safetensors.index.json"
    index = json.loads(files[-1].read_text())
    assert index["metadata"]["total_size"] == sum(4 * value.numel() for value in tensors.values())
    assert set(index["weight_map"].values()) == {path.name for path in files[:-1]}
    for name, value in tensors.items():
        part = load_file(tmp_path / index["weight_map"][name])
        assert torch.equal(part[name], value) and sum(4 * t.numel() for t in part.values()) <= 120
    with TensorFile(files[-1]) as file:
        assert all(torch.equal(file.full(name), value) for name, value in tensors.items())
        assert file.metadata == {"k": "v"}
    index["weight_map"]["t0"] = "../elsewhere.safetensors"
    files[-1].write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="elsewhere"):
        TensorFile(files[-1])


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = Entry("w", (3,), torch.float16, lambda: [torch.tensor([1.0, 1e6, 2.0])])
    with pytest.raises(CheckpointError, match=r"w holds 1e\+06(.|\n)*bf16"):
        write_file(tmp_path / "f.safetensors", [big], {})
    write_file(tmp_path / "f.safetensors", [replace(big, dtype=torch.bfloat16)], {})
    short = Entry("w", (3,), torch.float32, lambda: [torch.zeros(2)])
    with pytest.raises(CheckpointError, match="2 of 3"):
        write_file(tmp_path / "g.safetensors", [short], {})
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_file(tmp_path / "nowhere" / "f.safetensors", [big], {})
    monkeypatch.setattr(tensorfiles.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(DiskFullError, match="10 are free"):
        write_file(tmp_path / "g.safetensors", [big], {})
    assert [path.name for path in tmp_path.iterdir()] == ["f.safetensors"]


def test_pickles_are_refused_and_safetensors_are_not_taken_for_them(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "zip.safetensors")
    torch.save({"w": torch.zeros(2)}, tmp_path / "old.safetensors", _use_new_zipfile_serialization=False)
    torch.save({"w": torch.zeros(2)}, tmp_path / "model.pth")
    for name in ("zip.safetensors", "old.safetensors", "model.pth"):
        with pytest.raises(CheckpointError, match=r"is a pickle(.|\n)*weights_only"):
            TensorFile(tmp_path / name)
    for size in range(600, 660):  # header lengths whose first bytes are those of a pickle are among them
        save_file({"w": torch.ones(2)}, tmp_path / "f.safetensors", {"k": "x" * size})
        with TensorFile(tmp_path / "f.safetensors") as file:
            assert torch.equal(file.full("w"), torch.ones(2))
    (tmp_path / "f.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(CheckpointError, match="no readable safetensors"):
        TensorFile(tmp_path / "f.safetensors")


# --- model.safetensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "kind"), [("ema", "ema"), ("raw", "weight")])
def test_safetensors_holds_the_checkpoints_values(run: Path, tmp_path: Path, weights: str, kind: str) -> None:
    out = tmp_path / "out"
    said = export(run, out, weights=weights)
    assert sorted(said["files"]) == ["config.yaml", "model.safetensors", "vocabulary.json"]
    read, saved = load_file(out / "model.safetensors"), saved_tensors(run, kind)
    assert list(saved) and read.keys() == saved.keys()
    assert all(torch.equal(read[name], saved[name]) for name in saved)
    with safe_open(out / "model.safetensors", "pt") as file:
        about = file.metadata()
    assert about["format"] == "pt" and about["weights"] == weights and about["step"] == "7" and about["run"] == "small"
    assert about["manifest_sha256"] == hashlib.sha256(manifest(run).read_bytes()).hexdigest()
    assert UViTSpec(**json.loads(about["spec"])) == load_run(run).config.backbone()
    assert json.loads(about["diffusion"])["prediction"] == "x" and about["preset"] == "uvit-tiny"
    assert about["vocabulary"] == Vocabulary.from_json(json.loads((out / "vocabulary.json").read_text())).fingerprint()
    assert (out / "config.yaml").read_bytes() == (run / "config.yaml").read_bytes()


def test_dtypes_and_splitting(run: Path, tmp_path: Path) -> None:
    saved = saved_tensors(run, "ema")
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        export(run, tmp_path / dtype, dtype=dtype, limit=60_000)
        assert len(list((tmp_path / dtype).glob("model-*-of-*.safetensors"))) > 1
        with TensorFile(tmp_path / dtype / "model.safetensors.index.json") as file:
            for name, value in saved.items():
                assert torch.equal(file.full(name), value.to(torch_dtype)), name


def test_export_refuses(run: Path, tmp_path: Path) -> None:
    for choice in ({"weights": "best"}, {"layout": "onnx"}, {"dtype": "int8"}):
        with pytest.raises(ConfigError, match=next(iter(choice.values()))):
            export(run, tmp_path / "out", **choice)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("x")
    with pytest.raises(ConfigError, match="already"):
        export(run, tmp_path / "there")
    broken = tmp_path / "broken"
    shutil.copytree(run, broken)
    file = broken / "checkpoints" / "step-00000007" / "weights-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"weights-00000\.safetensors was altered"):
        export(broken, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "there"]


def test_export_takes_little_memory(tmp_path: Path) -> None:
    """Anonymous memory of the process, looked at all the while: a few pieces of 4 MB, not the 54 MB of EMA."""
    run, out = saved_run(tmp_path / "run", model={"width": 384, "depth": 7, "n_heads": 6}), tmp_path / "out"
    code = (
        "import sys, threading, time\n"
        "from pathlib import Path\n"
        "from longskip.engine import diffusers_layout, export, tensorfiles\n"
        "import safetensors.torch\n"
        "tensorfiles.PIECE = export.PIECE = 1 << 20\n"
        "def now(): return int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0]) * 1024\n"
        "before, most, done = now(), 0, threading.Event()\n"
        "def look():\n"
        "    global most\n"
        "    while not done.wait(0.0005): most = max(most, now())\n"
        "watcher = threading.Thread(target=look); watcher.start()\n"
        "export.export(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "done.set(); watcher.join(); print(most - before)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code, run, out], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    size = (out / "model.safetensors").stat().st_size
    figure(f"export of {size / 1e6:.0f} MB of EMA in pieces of 4 MB: {int(done.stdout) / 1e6:.0f} MB of memory at most")
    assert size > 50e6 and int(done.stdout) < 20e6
    saved, read = saved_tensors(run, "ema"), load_file(out / "model.safetensors")
    assert all(torch.equal(read[name], value) for name, value in saved.items())


# --- original names ---------------------------------------------------------------------------------------------------


def test_convert_to_original_names_and_back(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    said = convert_file(tmp_path / "out" / "model.safetensors", tmp_path / "theirs.safetensors", "original", None)
    assert said["left_out"] == ["text.embedding.weight"]
    theirs, saved = load_file(tmp_path / "theirs.safetensors"), saved_tensors(run, "ema")
    assert {"pos_embed", "mid_block.attn.qkv.weight", "patch_embed.proj.weight"} <= theirs.keys()
    spec = load_run(run).config.backbone()
    ours = from_original(theirs, spec)  # the state-dict way, tested against an independent writing of the model
    assert all(torch.equal(ours[name], saved[f"backbone.{name}"]) for name in ours)
    bare = {name: value.half() for name, value in theirs.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.raises(ConfigError, match="--preset"):
        convert_file(tmp_path / "bare.safetensors", tmp_path / "ours.safetensors", "longskip", None)
    convert_file(tmp_path / "bare.safetensors", tmp_path / "ours.safetensors", "longskip", spec)
    back = load_file(tmp_path / "ours.safetensors")
    assert back.keys() == {name for name in saved if name.startswith("backbone.")}
    assert all(torch.equal(value, saved[name].half()) for name, value in back.items())
    with pytest.raises(CheckpointError, match=r"missing: (.|\n)*pos_embed"):
        convert_file(tmp_path / "ours.safetensors", tmp_path / "no.safetensors", "longskip", spec)
    with pytest.raises(CheckpointError, match="misshaped"):
        other = replace(spec, width=128)
        convert_file(tmp_path / "bare.safetensors", tmp_path / "no.safetensors", "longskip", other)
    assert not (tmp_path / "no.safetensors").exists()


# --- diffusers --------------------------------------------------------------------------------------------------------


def component(name: str) -> Any:
    """A python file of the exported pipeline, imported by itself."""
    spec = importlib.util.spec_from_file_location(name, diffusers_layout.SOURCES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.sampled_from(["red", "circle", "zebra", "é", "e\u0301", ", ", " ", "İ", "\ud800", "ß", "_x", "42"]),
        max_size=8,
    )
)
def test_the_tokenizer_is_the_vocabulary(parts: list[str]) -> None:
    vocabulary = Vocabulary.build(CAPTIONS, FIRST_WORD + 9)
    tokenizer = component("longskip_tokenizer").WordTokenizer(vocabulary.words, 16, True)
    for text in ("".join(parts), " ".join(parts)):
        assert tokenizer.encode(text) == vocabulary.ids(text)
        assert tokenizer([text])[0].tolist() == vocabulary.encode(text, 16, truncate=True).tolist()


def test_the_model_is_longskips() -> None:
    """Every switch, classes, masks, short texts and another resolution against ``UViT``, values N(0, 0.15²)."""
    UViTModel = component("longskip_uvit").UViTModel
    switches = ("time_mlp", "conv", "skips", "qk_norm", "adaln")
    base = UViTSpec(48, 4, 4, channels=4, latent_size=(8, 6), n_txt=5, text_width=10)
    specs = [replace(base, **dict(zip(switches, on, strict=True))) for on in itertools.product((False, True), repeat=5)]
    specs += [replace(base, depth=5, out_channels=6), replace(base, n_txt=0, text_width=0, n_classes=7)]
    worst = 0.0
    for spec in specs:
        torch.manual_seed(1)
        ours = UViT(spec)
        for parameter in ours.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
        settings_ = asdict(spec) | {"out_channels": spec.c_out, "sample_size": spec.latent_size}
        settings_ = {name: value for name, value in settings_.items() if name not in ("latent_size", "pos_init")}
        theirs = UViTModel(**settings_)
        theirs.load_state_dict(ours.state_dict())
        for size, n_txt in (((8, 6), 5), ((4, 12), 3)):
            latents, time = torch.randn(3, 4, *size), torch.tensor([0.0, 0.3, 1.0])
            text = torch.randn(3, n_txt, 10) if spec.n_txt else None
            mask = torch.rand(3, n_txt) < 0.6 if spec.n_txt else None
            label = torch.tensor([0, 6, 3]) if spec.n_classes else None
            with torch.no_grad():
                wanted = ours(latents, time, Conditioning(text=text, text_mask=mask, label=label))
                got = theirs(latents, time, text, mask, label)
            worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max()))
    figure(f"exported model against longskip's over {len(specs)} specs: {worst:.1e} of the largest output")
    assert worst <= 2e-5


DRAWER = """
import json, sys
class Nowhere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("longskip", "deepspeed"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nowhere())
import numpy as np
import torch
torch.set_num_threads(1)
from diffusers import DiffusionPipeline
for job in json.load(open(sys.argv[1])):
    pipe = DiffusionPipeline.from_pretrained(job["folder"], custom_pipeline=job["folder"], trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.from_numpy(np.load(job["noise"]))
    how = dict(num_inference_steps=job["steps"], guidance_scale=job["guidance"], latents=noise)
    latents = pipe(job["prompts"], output_type="latent", **how).images
    pictures = pipe(job["prompts"], **how).images
    np.savez(job["out"], latents=latents.numpy(), pictures=np.stack([np.asarray(p) for p in pictures]))
assert "longskip" not in sys.modules
"""


def draw_elsewhere(jobs: list[dict[str, Any]], folder: Path) -> list[dict[str, np.ndarray]]:
    """The jobs' pictures, drawn in one process that has diffusers and cannot import longskip."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [sys.executable, "-c", DRAWER, folder / "jobs.json"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [dict(np.load(job["out"])) for job in jobs]


def compare(
    run: Path, folder: Path, prompts: list[str], *, steps: int = 5, guidance: float = 3.0, **how: Any
) -> dict[str, Any]:
    """A job of ``run``'s export, with what longskip itself draws from the same noise under ``ours``."""
    out = folder / run.name
    export(run, out, layout="diffusers", **how)
    loaded = load_run(run)
    latents: list[torch.Tensor] = []
    to_pictures = loaded.inputs.to_pictures
    loaded.inputs.to_pictures = lambda x: latents.append(x) or to_pictures(x)  # type: ignore[method-assign,func-returns-value]
    drawing = Drawing.of(
        loaded.config.eval, loaded.config.diffusion, sampler=None, steps=steps, guidance=guidance, seed=3
    )
    pictures = draw_prompts(loaded, prompts, drawing)
    noise = np.stack([prompt_noise(3, prompt, 0, loaded.inputs.latent_shape) for prompt in prompts])
    np.save(folder / f"{run.name}.npy", noise)
    job = {"folder": str(out), "noise": str(folder / f"{run.name}.npy"), "out": str(folder / f"{run.name}.npz")}
    job |= {"prompts": prompts, "steps": steps, "guidance": guidance}
    return {"job": job, "ours": {"latents": torch.cat(latents).numpy(), "pictures": pictures}}


def test_diffusers_draws_what_longskip_draws(shapes: Path, tmp_path: Path) -> None:
    """A run trained on 2 ranks with ZeRO-3, and models of every kind: pixels, latents, CLIP, T5, no text."""
    from tests.tiny_encoders import tiny_clip_text, tiny_t5, tiny_vae

    trained = tmp_path / "trained"
    config = small_config(shapes, train={"steps": 6}, checkpoint={"every": 6})
    assert train_ranks(2, config, trained) == [0, 0]
    vae = {"kind": "vae", "path": str(tiny_vae(tmp_path / "vae", scale=0.5, shift=0.1)), "scale": 0.5, "shift": 0.1}
    clip = {"kind": "clip", "path": str(tiny_clip_text(tmp_path / "clip", 24, 16)), "width": 24, "n_tokens": 16}
    t5 = {"kind": "t5", "path": str(tiny_t5(tmp_path / "t5", 20)), "width": 20, "n_tokens": 14}
    small = {"patch": 2, "resolution": 64}
    runs = {
        "trained": trained,
        "v": saved_run(tmp_path / "v", diffusion={"prediction": "v"}, model={"qk_norm": True, "adaln": True}),
        "words": saved_run(tmp_path / "words", encoders={"text": {"kind": "words", "width": 20, "depth": 2}}),
        "shifted": saved_run(
            tmp_path / "shifted", diffusion={"shift": 2.5}, encoders={"vae": vae, "text": clip}, model=small
        ),
        "t5": saved_run(
            tmp_path / "t5-run", diffusion={"prediction": "v"}, encoders={"vae": vae, "text": t5}, model=small
        ),
        "ddpm": saved_run(tmp_path / "ddpm", diffusion={"objective": "ddpm", "prediction": "v"}),
        "ddpm-epsilon": saved_run(
            tmp_path / "ddpm-epsilon", diffusion={"objective": "ddpm", "prediction": "epsilon", "train_steps": 50}
        ),
        "silent": saved_run(
            tmp_path / "silent", encoders={"text": {"kind": "none"}}, diffusion={"caption_dropout": 0.0}, model=small
        ),
    }
    (tmp_path / "out").mkdir()
    prompts = ["a small red circle, center", "a big blue star"]
    made = {}
    for name, saved in runs.items():
        steps = 7 if name == "ddpm-epsilon" else 5  # 7 divides no schedule
        how = {"limit": 100_000} if name == "v" else {}  # in several files
        made[name] = compare(saved, tmp_path / "out", [""] if name == "silent" else prompts, steps=steps, **how)
    assert len(list((tmp_path / "out" / "v" / "transformer").glob("*.safetensors"))) > 1
    theirs = draw_elsewhere([one["job"] for one in made.values()], tmp_path / "out")
    for (name, one), drawn in zip(made.items(), theirs, strict=True):
        apart = float(np.abs(drawn["latents"] - one["ours"]["latents"]).max())
        spread = float(np.std(one["ours"]["latents"]))
        figure(f"diffusers against longskip, {name}: latents {apart:.1e} apart (their spread is {spread:.2f})")
        assert apart <= 1e-4 and spread > 0.05, name
        pictures = drawn["pictures"].astype(int), one["ours"]["pictures"].astype(int)
        assert pictures[0].shape == pictures[1].shape and np.abs(pictures[0] - pictures[1]).max() <= 1, name


def test_a_folder_without_its_encoders(tmp_path: Path) -> None:
    """Features in the shards, no paths: the layout says null, and encoders that do not fit are refused by name."""
    from tests.tiny_encoders import tiny_vae

    encoders = {"vae": {"kind": "vae"}, "text": {"kind": "clip", "width": 24}}
    run = saved_run(tmp_path / "run", encoders=encoders, model={"patch": 2, "resolution": 64})
    export(run, tmp_path / "out", layout="diffusers")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["vae"] == index["text_encoder"] == index["tokenizer"] == [None, None]
    assert index["factor"] == 8 and not (tmp_path / "out" / "vae").exists()
    encoders["vae"] = {"kind": "vae", "path": str(tiny_vae(tmp_path / "vae", scale=0.5))}
    run = saved_run(tmp_path / "other", encoders=encoders, model={"patch": 2, "resolution": 64})
    with pytest.raises(LongskipError, match=r"scale is 0\.18215(.|\n)*0\.5"):
        export(run, tmp_path / "other-out", layout="diffusers")
