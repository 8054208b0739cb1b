"""Memory, predicted and traced, of this machine: ``python -m tests.memory`` writes docs/results/memory.md. Some minutes.

Activations are traced in this process, in fp32; what a rank holds in two forked ranks of DeepSpeed's engine.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from longskip.engine.config import Config
from longskip.engine.distributed import join
from longskip.models.presets import preset
from longskip.models.specs import UViTSpec
from longskip.profiling.activations import activations
from tests.activation_trace import trace
from tests.memory_trace import predicted, traced
from tests.ranks import run_ranks, small_config

RESULT = Path("docs/results/memory.md")
TINY = UViTSpec(64, 6, 2, channels=3, latent_size=(16, 12), n_txt=5, text_width=16)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no skips, no convolution": {"skips": False, "conv": False},
    "adaLN": {"adaln": True},
    "adaLN, time MLP, qk-norm": {"adaln": True, "time_mlp": True, "qk_norm": True},
}
SHAPE = {"depth": 6, "width": 128}


def activation_rows() -> list[str]:
    rows = []
    for name, change in OPTIONS.items():
        for checkpointing in (0, 1, 2, 3):
            rows.append(_activations(f"tiny, {name}", replace(TINY, **change), 2, checkpointing))
    large = preset("uvit-0.3b", n_txt=77, text_width=1024)
    return [*rows, *(_activations("uvit-0.3b at 256²", large, 1, checkpointing) for checkpointing in (0, 1, 2))]


def _activations(name: str, spec: UViTSpec, batch: int, checkpointing: int) -> str:
    form = activations(spec, batch, 4, checkpointing, gradients="apart")
    lived = trace(spec, batch, checkpointing=checkpointing)
    print(name, checkpointing, form.peak, lived, flush=True)
    return (
        f"| {name} | {checkpointing or 'none'} | {batch} | {form.saved:,} | {form.moment} | {form.peak:,} | {lived:,} | "
        f"{form.peak / lived - 1:+.3%} |"
    )


def _rank(config: Config, out: Path) -> int:
    world = join()
    form, lived = predicted(config, world), traced(config, world)
    found = {
        "standing": (form.device + form.host, lived["standing"]),
        "passes": (max(form.backward.total, form.reduce.total) + form.host, lived["passes"]),
        "step": (form.step.total + form.host, lived["step"]),
    }
    (out / f"{world.rank}.json").write_text(json.dumps(found))
    return 0


def rank_rows() -> list[str]:
    rows = []
    for stage in (0, 1, 2, 3):
        for dtype in ("fp32", "bf16"):
            for layout in ("flat", "named"):
                config = small_config(
                    Path("data"), model=SHAPE, train={"dtype": dtype, "batch_size": 8}, engine={"layout": layout},
                    deepspeed={"zero_stage": stage},
                )  # fmt: skip
                with tempfile.TemporaryDirectory() as name:
                    assert run_ranks(2, _rank, config, Path(name)) == [0, 0]
                    ranks = [json.loads((Path(name) / f"{rank}.json").read_text()) for rank in (0, 1)]
                cells = []
                for moment in ("standing", "step", "passes"):
                    form, lived = max((rank[moment] for rank in ranks), key=lambda pair: pair[1])
                    cells.append(f"{form:,} | {lived:,} | {form / lived - 1:+.3%}")
                rows.append(f"| {stage} | {dtype} | {layout} | {' | '.join(cells)} |")
                print(rows[-1], flush=True)
    return rows


TEXT = """# Memory, predicted and traced

Written by `python -m tests.memory` on a CPU. What lived is every storage that was made, followed through every dispatched
op (`tests/live_bytes.py`); what was predicted comes from `longskip/profiling/activations.py` and `memory.py`, which import
no torch. No figure here is of a GPU: `tests/gpu/test_memory_on_gpu.py` asks for 3% there.

## Activations of one step

Bytes in fp32, weights and their gradients apart. "Saved" is what autograd keeps at the end of the forward pass; the peak is
at the derivative of the operation that is named.

| model | checkpointed, every | images | saved | worst moment | peak predicted | lived | error |
|---|---|---|---|---|---|---|---|
{activations}

## A rank of DeepSpeed's engine

U-ViT of width 128 and 6 blocks deep with a word encoder, 2 ranks, 4 images each; the rank that held more. "Standing":
weights, gradients, masters, moments, EMA and buffers after the backward pass of the third step; "step": the most within the
optimizer's step; "passes": the most within the forward and backward pass. In bf16 a CPU keeps float32 copies for its norms
that a GPU does not, and that are not predicted: the passes' error there is theirs.

| stage | type | layout | standing predicted | lived | error | step predicted | lived | error | passes predicted | lived | error |
|---|---|---|---|---|---|---|---|---|---|---|---|
{ranks}
"""


def main() -> None:
    text = TEXT.format(activations="\n".join(activation_rows()), ranks="\n".join(rank_rows()))
    RESULT.write_text(text, "utf-8")
    print(f"{RESULT} is written")


if __name__ == "__main__":
    main()
