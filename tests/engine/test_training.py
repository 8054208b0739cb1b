"""The engine against itself at every ZeRO stage, and against a bare torch loop that shares nothing but model and data."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from longskip.engine import checkpoint
from longskip.engine.build import build_model
from longskip.engine.config import Config
from longskip.engine.data.plan import Plan
from longskip.engine.data.reader import Reader
from longskip.engine.data.sources import open_source
from longskip.engine.optim import ema_decay, learning_rate
from longskip.engine.vocabulary import load_vocabulary
from tests.figures import figure
from tests.ranks import run_ranks, small_config, train_ranks

STEPS = 20
LAYERS = {"text": {"kind": "words", "depth": 1}}  # a trained text encoder that is more than its table


def losses(run: Path) -> dict[int, float]:
    """Step → loss, the last line per step."""
    found = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "loss/global_avg" in record:
            found[record["step"]] = record["loss/global_avg"]
    return found


def weights(run: Path, kind: str = "weight", step: int = STEPS) -> dict[str, torch.Tensor]:
    with checkpoint.Archive(run / "checkpoints" / f"step-{step:08d}") as archive:
        return archive.full(kind)


def relative(a: dict[int, float], b: dict[int, float], steps: int = STEPS) -> float:
    assert a.keys() == b.keys() and len(a) == steps
    return max(abs(a[s] - b[s]) / abs(b[s]) for s in a)


@pytest.fixture(scope="module")
def stage0(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "one-rank"
    assert train_ranks(1, small_config(shapes, deepspeed={"zero_stage": 0}, encoders=LAYERS), run) == [0]
    return run


def _prepare_and_save(config: Config, run: Path) -> None:
    from longskip.engine.distributed import join
    from longskip.engine.trainer import prepare

    job = prepare(config, run, join())
    checkpoint.save(run / "checkpoints", 0, job.shards, job.state.to_json(), keep_last=1)
    job.close("done")


@pytest.mark.parametrize(("stage", "layout"), [(0, "named"), (1, "flat"), (2, "named"), (3, "flat"), (3, "named")])
def test_stages_ranks_and_layouts_agree(shapes: Path, stage0: Path, tmp_path: Path, stage: int, layout: str) -> None:
    """Same global batch on 2 ranks at any stage in any layout: losses within 1e-6 of one rank's, fp32, 20 steps."""
    run = tmp_path / "run"
    config = small_config(shapes, deepspeed={"zero_stage": stage}, engine={"layout": layout}, encoders=LAYERS)
    assert train_ranks(2, config, run) == [0, 0]
    worst = relative(losses(run), losses(stage0))
    figure(
        f"stage {stage}, {layout}, 2 ranks against stage 0, flat, 1 rank: worst relative loss difference {worst:.2e}"
    )
    assert worst <= 1e-6
    for kind in ("weight", "ema"):
        ours, theirs = weights(run, kind), weights(stage0, kind)
        assert max(float((ours[n] - theirs[n]).abs().max()) for n in ours) <= 2e-5


@pytest.mark.parametrize(
    ("stage", "layout", "dtype"),
    [(0, "named", "fp32"), (1, "flat", "fp32"), (2, "named", "fp32"), (3, "flat", "fp32"), (1, "named", "bf16"),
     (3, "named", "bf16")],
)  # fmt: skip
def test_initial_parameters_are_bitwise_equal(
    shapes: Path, tmp_path: Path, stage: int, layout: str, dtype: str
) -> None:
    """2 ranks at any stage in any layout against one rank's flat stage 0; bf16 runs have exact fp32 masters too."""
    one, other, world = tmp_path / "one", tmp_path / "other", 2
    base = small_config(shapes, deepspeed={"zero_stage": 0}, train={"dtype": dtype})
    assert run_ranks(1, _prepare_and_save, base, one) == [0]
    config = small_config(shapes, deepspeed={"zero_stage": stage}, engine={"layout": layout}, train={"dtype": dtype})
    assert run_ranks(world, _prepare_and_save, config, other) == [0] * world
    ours, theirs = weights(one, step=0), weights(other, step=0)
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    figure(
        f"initial fp32 weights ({dtype} run), stage {stage}, {layout}, {world} ranks: {len(ours)} tensors bitwise equal"
    )


def bare_loop(
    config: Config, vocabulary_file: Path, missed: tuple[int, ...] = ()
) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same training without DeepSpeed, our optimizer, shards or kernels' loss: plain torch in fp32.

    Of the steps ``missed`` the loss is found, and nothing is moved.
    """
    vocabulary = load_vocabulary(vocabulary_file)
    model = build_model(config, len(vocabulary), layout="named").materialize(config.train.seed)
    decay = [p for n, p, _, _ in model.canonical() if _decays(model, n)]
    plain = [p for n, p, _, _ in model.canonical() if not _decays(model, n)]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": config.optim.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        betas=config.optim.betas,
        eps=config.optim.eps,
    )
    ema = {n: p.detach().clone() for n, p, _, _ in model.canonical()}
    source = open_source(config.data.path)
    reader = Reader(
        source, Plan(len(source), config.train.batch_size, config.train.seed), vocabulary, resolution=config.resolution,
        n_txt=16, micro=config.train.batch_size, seed=config.train.seed,
        caption_dropout=config.diffusion.caption_dropout,
    )  # fmt: skip
    values = []
    for step, (batch,) in zip(range(1, config.train.steps + 1), reader, strict=False):
        t = torch.sigmoid(batch.time_normal)[:, None, None, None]
        predicted = model((1 - t) * batch.clean + t * batch.noise, t.view(-1), batch.conditions["tokens"])
        squared = ((predicted - batch.clean) ** 2).mean((1, 2, 3)) / t.view(-1).clamp(min=0.05) ** 2
        loss = squared.mean()
        optimizer.zero_grad()
        values.append(loss.item())
        if step in missed:
            continue
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, config.train.steps)
        optimizer.step()
        rate = 1 - ema_decay(config.optim, step)
        for name, p, _, _ in model.canonical():
            ema[name] += rate * (p.detach() - ema[name])
    reader.close()
    return values, {n: p.detach().clone() for n, p, _, _ in model.canonical()}, ema


def _decays(model: torch.nn.Module, name: str) -> bool:
    return any(unit.specs()[name].decay for unit in model.units() if name in unit.specs())


def test_engine_equals_a_bare_torch_loop_and_its_unsharded_ema(shapes: Path, tmp_path: Path) -> None:
    """2 ranks, ZeRO-3, flat: losses and EMA of a plain loop with torch's own AdamW and an unsharded average."""
    run = tmp_path / "run"
    config = small_config(shapes)
    assert train_ranks(2, config, run) == [0, 0]
    plain, final, ema = bare_loop(config, run / "vocabulary.json")
    ours = losses(run)
    worst = max(abs(ours[i + 1] - value) / value for i, value in enumerate(plain))
    sharded = weights(run, "ema")
    apart = max(float((sharded[n] - ema[n]).abs().max()) for n in ema)
    moved = max(float((final[n] - ema[n]).abs().max()) for n in ema)
    figure(
        f"engine against bare loop: losses {worst:.2e} relative; EMA {apart:.2e} absolute (EMA to weights {moved:.2e})"
    )
    assert worst <= 1e-6
    assert apart <= 1e-6 < moved


def test_evaluation_and_samples_leave_training_bitwise_unchanged(shapes: Path, tmp_path: Path) -> None:
    """Swapping the EMA in and out under ZeRO-3 must not leave a trace (gathered copies are kept for reuse)."""
    quiet, busy = tmp_path / "quiet", tmp_path / "busy"
    assert train_ranks(2, small_config(shapes), quiet) == [0, 0]
    looking = small_config(
        shapes, eval={"every": 4, "samples": 8, "time_bins": 4}, logging={"samples_every": 7, "sample_steps": 2}
    )
    assert train_ranks(2, looking, busy) == [0, 0]
    assert losses(busy) == losses(quiet)
    for kind in ("weight", "ema", "exp_avg", "exp_avg_sq"):
        ours, theirs = weights(busy, kind), weights(quiet, kind)
        assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    assert (busy / "samples" / "step-00000007" / "grid.png").is_file()
    validation = [
        json.loads(line) for line in (busy / "metrics.jsonl").read_text().splitlines() if "validation" in line
    ]
    assert [v["step"] for v in validation] == [4, 8, 12, 16, 20]
    assert all(np.isfinite(v["validation/loss"]) and len(v["validation/loss_bins"]) == 4 for v in validation)


def test_accumulation_and_bf16(shapes: Path, tmp_path: Path, stage0: Path) -> None:
    """Accumulation changes nothing but rounding; bf16 trains close to fp32 at stages 0 and 3 alike."""
    run = tmp_path / "accumulated"
    assert train_ranks(2, small_config(shapes, train={"micro_batch": 2}, encoders=LAYERS), run) == [0, 0]
    assert relative(losses(run), losses(stage0)) <= 1e-6
    curves = []
    for stage in (0, 3):
        run = tmp_path / f"bf16-{stage}"
        config = small_config(shapes, train={"dtype": "bf16"}, deepspeed={"zero_stage": stage}, encoders=LAYERS)
        assert train_ranks(2, config, run) == [0, 0]
        curves.append(losses(run))
    for curve in curves:
        assert abs(curve[1] - losses(stage0)[1]) / losses(stage0)[1] < 0.02
        assert abs(curve[STEPS] - losses(stage0)[STEPS]) / losses(stage0)[STEPS] < 0.15
