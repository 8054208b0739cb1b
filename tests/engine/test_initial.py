"""A new run from another model's weights: bitwise but for the positions, which an own bicubic interpolation checks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longskip.engine import checkpoint, vocabulary
from longskip.engine.config import Config
from longskip.engine.configio import validate
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.export import convert_file, export
from longskip.engine.initial import POSITIONS, find_initial, initial_values, initial_vocabulary
from longskip.engine.sample import load_run
from longskip.errors import CheckpointError, ConfigError
from longskip.models.conditioning import Conditioning
from longskip.models.uvit import UViT
from longskip.profiling.yamlfiles import parse_yaml
from tests.figures import figure
from tests.ranks import run_ranks, small_config
from tests.saved_runs import saved_run, saved_tensors


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """uvit-tiny at 32 px: a grid of 4 × 4 patches, 1 time token, 16 text tokens."""
    return saved_run(tmp_path_factory.mktemp("runs") / "parent")


def child(run: Path, **groups: Any) -> tuple[Config, Vocabulary | None]:
    """The parent's configuration with ``groups`` over it, and the words that a child takes over."""
    tree = parse_yaml((run / "config.yaml").read_text())
    for name, group in groups.items():
        tree[name] |= group
    config = validate(tree)
    return config, vocabulary.words_of(run, config)


def bicubic(plane: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """(h, w, C) → (rows, cols, C) in float64: Keys' kernel with a = −0.75 at half-pixel centres, edges repeated."""

    def kernel(x: float) -> float:
        a, x = -0.75, abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    def along(values: np.ndarray, size: int) -> np.ndarray:
        n = values.shape[0]
        out = np.zeros((size, *values.shape[1:]))
        for i in range(size):
            centre = (i + 0.5) * n / size - 0.5
            for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                out[i] += kernel(centre - j) * values[min(max(j, 0), n - 1)]
        return out

    return along(along(plane.astype(np.float64), rows).transpose(1, 0, 2), cols).transpose(1, 0, 2)


def expected_positions(table: torch.Tensor, home: tuple[int, int], grid: tuple[int, int], n_txt: int) -> np.ndarray:
    """Time row, the first ``n_txt`` text rows, and the image's rows interpolated."""
    values = table.numpy()
    extras = values.shape[0] - home[0] * home[1]
    image = bicubic(values[extras:].reshape(*home, -1), *grid).reshape(grid[0] * grid[1], -1)
    return np.concatenate([values[: 1 + n_txt], image])


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("resolution", "grid", "n_txt"), [((64, 64), (8, 8), 16), ((32, 64), (4, 8), 7), ((16, 24), (2, 3), 16)]
)
def test_everything_is_kept_but_positions(
    parent: Path, resolution: tuple[int, int], grid: tuple[int, int], n_txt: int
) -> None:
    config, words = child(parent, model={"resolution": resolution}, encoders={"text": {"n_tokens": n_txt}})
    for kind, saved_kind in (("ema", "ema"), ("raw", "weight")):
        saved = saved_tensors(parent, saved_kind)
        with initial_values(parent, kind, config, words) as values:
            assert values.keys() == saved.keys()
            for name in values.keys() - {POSITIONS}:
                assert torch.equal(values[name], saved[name]), name
            wanted = expected_positions(saved[POSITIONS], (4, 4), grid, n_txt)
            assert values[POSITIONS].shape == wanted.shape and values[POSITIONS].dtype == torch.float32
            apart = float(np.abs(values[POSITIONS].numpy() - wanted).max())
            assert np.array_equal(values[POSITIONS][: 1 + n_txt].numpy(), wanted[: 1 + n_txt].astype(np.float32))
            low, high = 100, values[POSITIONS].numel() - 33
            part = values.read(POSITIONS, low, high - low)
            assert torch.equal(part, values[POSITIONS].reshape(-1)[low:high])
        figure(f"positions 4x4 to {grid[0]}x{grid[1]} ({kind}) against float64: {apart:.1e}")
        assert apart <= 2e-6


def test_the_new_model_is_the_old_one_at_the_new_resolution(parent: Path) -> None:
    loaded = load_run(parent)
    config, words = child(parent, model={"resolution": 64})
    with initial_values(parent, "ema", config, words) as values:
        model = UViT(config.backbone())
        model.load_state_dict({n.removeprefix("backbone."): v for n, v in values.items() if n.startswith("backbone.")})
    torch.manual_seed(0)
    latents, time, text = torch.randn(2, 3, 64, 64), torch.tensor([0.2, 0.9]), torch.randn(2, 16, 64)
    with torch.no_grad():
        now = model(latents, time, Conditioning(text=text))
        before = loaded.model.backbone(latents, time, Conditioning(text=text))
    assert torch.equal(now, before) and now.std() > 0.1


def test_every_kind_of_source_agrees(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run by path and by name, its checkpoint folder, exports in one file and several, folder or file."""
    export(parent, tmp_path / "one")
    export(parent, tmp_path / "many", limit=60_000)
    monkeypatch.chdir(parent.parent)
    Path("runs").mkdir(exist_ok=True)
    Path("runs/by-name").symlink_to(parent)
    step = parent / "checkpoints" / "step-00000007"
    sources = [
        parent, "by-name", step, os.path.relpath(step), tmp_path / "one", tmp_path / "one" / "model.safetensors",
        tmp_path / "many", tmp_path / "many" / "model.safetensors.index.json",
    ]  # fmt: skip
    config, words = child(parent, model={"resolution": 64})
    with initial_values(parent, "ema", config, words) as reference:
        for source in sources:
            found = find_initial(source)
            path = initial_vocabulary(source)
            assert path is not None and vocabulary.load_vocabulary(path) == words
            with initial_values(found, "ema", config, words) as values:
                assert values.keys() == reference.keys()
                assert all(torch.equal(values[name], reference[name]) for name in reference), source
                told = values.describe()
            assert (
                told["step"] == 7
                and told["weights"] == "ema"
                and told["positions"] == "grid 4x4 to 8x8, 16 of 16 text tokens"
            )
            assert len(told["manifest_sha256"]) == 64
    half = tmp_path / "half"
    export(parent, half, dtype="bf16")
    saved = saved_tensors(parent, "ema")
    same, words = child(parent)
    with initial_values(half, "ema", same, words) as values:
        assert values.describe()["positions"] == "kept"
        for name, value in values.items():
            assert value.dtype == torch.float32 and torch.equal(value, saved[name].bfloat16().float())


def test_original_weights_start_a_run(tmp_path: Path) -> None:
    """A file in the original U-ViT's names, converted, starts a run with a frozen text encoder at another resolution."""
    encoders = {"text": {"kind": "clip", "width": 24, "n_tokens": 9}}
    run = saved_run(tmp_path / "run", encoders=encoders)
    export(run, tmp_path / "out")
    convert_file(tmp_path / "out" / "model.safetensors", tmp_path / "theirs.safetensors", "original", None)
    convert_file(tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors", "longskip", None)
    config, words = child(run, model={"resolution": 48})
    assert words is None and initial_vocabulary(tmp_path / "ours.safetensors") is None
    saved = saved_tensors(run, "ema")
    with initial_values(tmp_path / "ours.safetensors", "ema", config, words) as values:
        assert all(torch.equal(values[name], saved[name]) for name in values.keys() - {POSITIONS})
        assert np.abs(values[POSITIONS].numpy() - expected_positions(saved[POSITIONS], (4, 4), (6, 6), 9)).max() <= 2e-6


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_other_models_are_refused_by_name(parent: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": {"width": 128, "n_heads": 4}}, r"misshaped: .*backbone\.embed\.patch\.weight \(64, 192\)"),
        ({"model": {"n_heads": 4}}, "n_heads 2 there, 4 here"),
        ({"model": {"depth": 6}}, r"missing: (.|\n)*backbone\.blocks\.[56]"),
        ({"model": {"skips": False}}, r"unexpected: backbone\.blocks\.3\.skip\.weight"),
        ({"model": {"qk_norm": True}}, r"missing: backbone\.blocks\.0\.attn\.q_norm\.weight"),
        ({"encoders": {"text": {"n_tokens": 20}}}, r"16 text tokens, this run asks for 20(.|\n)*at most 16"),
        ({"encoders": {"text": {"kind": "clip", "width": 64, "n_tokens": 16}}}, r"unexpected: text\.embedding\.weight"),
    ]
    for groups, message in cases:
        config, words = child(parent, **groups)
        with pytest.raises(CheckpointError, match=message):
            initial_values(parent, "ema", config, words)


def test_words_belong_to_their_table(parent: Path, tmp_path: Path) -> None:
    config, words = child(parent)
    with pytest.raises(CheckpointError, match="other words"):
        initial_values(parent, "ema", config, Vocabulary(tuple(reversed(words.words if words else ()))))
    export(parent, tmp_path / "out")
    (tmp_path / "out" / "vocabulary.json").unlink()
    assert initial_vocabulary(tmp_path / "out") is None
    with pytest.raises(CheckpointError, match=r"no vocabulary\.json"):
        initial_values(tmp_path / "out", "ema", config, words)


def test_sources_that_cannot_be_used(parent: Path, tmp_path: Path) -> None:
    config, words = child(parent)
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="is a pickle"):
        find_initial(tmp_path / "model.pt")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ConfigError, match=r"no \.safetensors file"):
        find_initial(tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match="no run at"):
        find_initial(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"best(.|\n)*ema, raw"):
        initial_values(parent, "best", config, words)
    shutil.copytree(parent, tmp_path / "broken")
    file = tmp_path / "broken" / "checkpoints" / "step-00000007" / "weights-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    for source in (tmp_path / "broken", file.parent):
        with pytest.raises(CheckpointError, match=r"weights-00000\.safetensors has"):
            find_initial(source)


# --- ranks ------------------------------------------------------------------------------------------------------------


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 3, 64, 64), torch.tensor([0.2, 0.9]), torch.randint(0, 258, (2, 16))


def _prepare_and_save(config: Config, run: Path, outputs: torch.Tensor, tolerance: float) -> None:
    """The engine computes with the new weights (they are published), and a checkpoint of step 0 holds them."""
    from longskip.engine.distributed import join
    from longskip.engine.prepare import prepare

    job = prepare(config, run, join())
    job.engine.eval()
    with torch.no_grad():
        assert (job.engine(*_inputs()) - outputs).abs().max() <= tolerance
    job.engine.train()
    checkpoint.save(run / "checkpoints", 0, job.shards, job.state.to_json(), keep_last=1)
    job.close("done")


@pytest.mark.parametrize(("stage", "layout", "dtype"), [(3, "flat", "fp32"), (1, "named", "bf16")])
def test_a_run_at_twice_the_resolution(
    shapes: Path, parent: Path, tmp_path: Path, stage: int, layout: str, dtype: str
) -> None:
    """2 ranks, 32 to 64 px: the fp32 masters and the EMA are the parent's EMA, the moments zero, the words its own."""
    run = tmp_path / "run"
    config = small_config(
        shapes,
        model={"resolution": 64},
        train={"init_from": str(parent), "dtype": dtype},
        deepspeed={"zero_stage": stage},
        engine={"layout": layout},
    )
    with torch.no_grad():
        outputs = load_run(parent).model(*_inputs())
    tolerance = (1e-5 if dtype == "fp32" else 0.05) * float(outputs.abs().max())
    assert run_ranks(2, _prepare_and_save, config, run, outputs, tolerance) == [0, 0]
    assert (run / "vocabulary.json").read_text() == (parent / "vocabulary.json").read_text()
    saved = saved_tensors(parent, "ema")
    wanted = expected_positions(saved[POSITIONS], (4, 4), (8, 8), 16)
    for kind in ("weight", "ema"):
        begun = saved_tensors(run, kind, step=0)
        assert begun.keys() == saved.keys()
        for name in saved.keys() - {POSITIONS}:
            assert torch.equal(begun[name], saved[name]), (kind, name)
        assert np.abs(begun[POSITIONS].numpy() - wanted).max() <= 2e-6
    for kind in ("exp_avg", "exp_avg_sq"):
        assert all(not bool(value.any()) for value in saved_tensors(run, kind, step=0).values())
    figure(
        f"run at 64 px from 32 px, stage {stage}, {layout}, {dtype}, 2 ranks: {len(saved) - 1} tensors bitwise equal"
    )


def test_another_model_is_refused_before_the_first_step(shapes: Path, parent: Path, tmp_path: Path) -> None:
    """Both ranks end with the error, and nothing of the run stays."""
    from longskip.engine.trainer import train

    run = tmp_path / "run"
    config = small_config(shapes, model={"n_heads": 4}, train={"init_from": str(parent)})
    assert run_ranks(2, train, config, run) == [1, 1]
    assert not run.exists()
    assert json.loads((parent / "checkpoints" / "step-00000007" / "manifest.json").read_text())["step"] == 7
