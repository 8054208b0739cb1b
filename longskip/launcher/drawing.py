"""``longskip sample``: prompts to a folder of pictures with a grid."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from longskip.engine.drawing import Drawing
from longskip.engine.runs import find_run
from longskip.engine.sample import check_prompts, draw_prompts, load_run, read_prompts
from longskip.engine.validation import write_pictures
from longskip.launcher.progress import counting


def draw_to_folder(
    run: str,
    prompts: list[str],
    file: Path | None,
    *,
    steps: int | None,
    guidance: float | None,
    sampler: str | None,
    seed: int,
    weights: str,
    which: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Draw every prompt into ``out`` (RUN/drawn/001, 002 … by default) and print where.

    LongskipError for what cannot be drawn.
    """
    path = find_run(run)
    asked = [*prompts, *(read_prompts(file) if file else [])]
    loaded = load_run(path, which=which, weights=weights)
    check_prompts(loaded, asked)
    words = loaded.inputs.vocabulary
    strange = {prompt: words.unknown(prompt) for prompt in asked} if words else {}
    for prompt, unknown in strange.items():
        if unknown:
            print(f"longskip: {prompt!r}: not in the training captions: {', '.join(unknown)}", file=sys.stderr)
    how = Drawing.of(
        loaded.config.eval, loaded.config.diffusion, sampler=sampler, steps=steps, guidance=guidance, seed=seed
    )
    with counting("drawing", len(asked)) as progress:
        pictures = draw_prompts(loaded, asked, how, progress=progress)
    folder = out or _next_folder(path / "drawn")
    write_pictures(folder, pictures, asked, how, weights=weights)
    if as_json:
        files = [str(folder / f"{i:03d}.png") for i in range(len(asked))]
        print(json.dumps({"files": files, "checkpoint": loaded.checkpoint.name, "weights": weights} | how.to_json()))
    else:
        print(f"{len(asked)} picture(s) from {loaded.checkpoint.name} ({weights} weights): {folder / 'grid.png'}")


def _next_folder(parent: Path) -> Path:
    """``parent/001``, ``002`` …: the first that is not there, so that no earlier pictures are lost."""
    number = 1
    while (parent / f"{number:03d}").exists():
        number += 1
    return parent / f"{number:03d}"
