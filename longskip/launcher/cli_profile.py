"""``longskip profile``: what a model costs, op by op, before anything is run. Imports torch for ``--kernels triton`` alone."""

from __future__ import annotations

import csv
import io
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from longskip.errors import ConfigError

if TYPE_CHECKING:
    from longskip.profiling.hardware import Device
    from longskip.profiling.profiles import Profile
    from longskip.profiling.subjects import Subject

DEPTHS = ("block", "op", "unit")


def profile(
    target: Annotated[
        str | None, typer.Argument(metavar="MODEL|CONFIG", help="a preset (longskip presets), or a run's YAML")
    ] = None,
    resolution: Annotated[str | None, typer.Option(help="pixels: 512, or 512x768 (height x width)")] = None,
    batch: Annotated[int | None, typer.Option(help="images a step of one device; 1, or the run's micro-batch")] = None,
    text_tokens: Annotated[int | None, typer.Option(help="length of the texts")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32; bf16, or the run's")] = None,
    checkpointing: Annotated[
        int | None, typer.Option(metavar="K", help="every K-th block is computed again in the backward pass; 0: none")
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(
            help="torch, triton or reference; with triton and a --gpu padded tiles are counted (imports torch)"
        ),
    ] = None,
    gpu: Annotated[str | None, typer.Option(help="roofline and step time on it: h200, a100-80gb, …; this")] = None,
    hardware: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML with devices of your own for --gpu")
    ] = None,
    capability: Annotated[int | None, typer.Option(help="tiles of 80, 90 or 100, whatever the --gpu is called")] = None,
    encoders: Annotated[
        str, typer.Option(help="a CONFIG's frozen encoders: online (in every step), stored, or auto: as its data are")
    ] = "auto",
    depth: Annotated[str, typer.Option(help="the table's rows: block, op or unit")] = "op",
    every: Annotated[bool, typer.Option("--all", help="a table of every preset instead")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")] = False,
    csv_file: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="every row, full integers")] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="one self-contained page: treemap, roofline")
    ] = None,
) -> None:
    """What a training step costs, exactly: FLOPs forward, backward, recomputed and elementwise, bytes, 6ND, roofline.

    In closed form from the model's own declaration, in milliseconds and without a GPU. FLOPs are 2 per multiply-add;
    model FLOPs are 3 x the forward's contractions; hardware FLOPs are all contractions that are executed.
    """
    from longskip.profiling import hardware as devices
    from longskip.profiling import profiles, subjects

    if depth not in DEPTHS:
        raise ConfigError(f"--depth {depth!r}", cure=f"one of {', '.join(DEPTHS)}")
    if every == (target is not None):
        raise ConfigError(
            "--all is a table of every preset: no MODEL goes with it" if every else "no MODEL or CONFIG is given",
            cure="longskip profile uvit-8b, or longskip profile --all",
        )
    if hardware is not None and gpu is None:
        raise ConfigError(
            "--hardware without --gpu: no device of it is asked for", cure="add --gpu NAME, or leave it out"
        )
    device = devices.find(gpu, hardware) if gpu else None
    if target is None:
        _no_encoders("--all", encoders)
    chosen = subjects.subjects() if target is None else [_subject(target, encoders)]
    pixels = _pixels(resolution) if resolution else None
    chosen = [
        subjects.resized(
            subject, resolution=pixels, batch=batch, text_tokens=text_tokens, precision=precision,
            checkpointing=checkpointing, kernels=kernels,
        )
        for subject in chosen
    ]  # fmt: skip
    if target is None:
        _all(chosen, device, capability, as_json, csv_file, html)
    else:
        _one(profiles.profile(chosen[0], device, capability), depth, as_json, csv_file, html)


def _subject(target: str, encoders: str) -> Subject:
    from longskip.models.presets import PRESETS
    from longskip.profiling import subjects

    if target in PRESETS or not (target.endswith((".yaml", ".yml")) or os.sep in target):
        found = subjects.of_preset(target)
        _no_encoders(target, encoders)
        return found
    from longskip.engine.configio import load_config
    from longskip.engine.profiled import subject_of

    path = Path(target)
    return subject_of(load_config(path), path.stem, encoders)


def _no_encoders(target: str, asked: str) -> None:
    """ConfigError where frozen encoders are asked for of what has none."""
    if asked != "auto":
        raise ConfigError(
            f"--encoders {asked!r}: a preset has no frozen encoders ({target})",
            cure="give a run's YAML, or leave it out",
        )


def _pixels(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(-?\d{1,18})(?:[x×](-?\d{1,18}))?", text.strip().lower())
    if found is None:
        raise ConfigError(f"--resolution {text!r} is no size", cure="pixels: 512, or 512x768 (height x width)")
    height = int(found[1])
    return height, int(found[2]) if found[2] else height


def _one(found: Profile, depth: str, as_json: bool, csv_file: Path | None, html: Path | None) -> None:
    from longskip.launcher.profile_tables import print_profile
    from longskip.profiling.outputs import json_text

    _ = found.prediction  # what it has to refuse comes before the first line that is printed or written
    tree = found.to_json(depth) if as_json or csv_file else {}
    if csv_file is not None:
        _write_csv(csv_file, [row | {"units": " ".join(row["units"])} for row in tree["rows"]])
    if html is not None:
        from longskip.profiling.profile_report import render_profile

        render_profile(found, html)
    if as_json:
        print(json_text(tree))
    else:
        print_profile(found, depth, [path for path in (csv_file, html) if path is not None])


def _all(
    subjects: list[Subject],
    device: Device | None,
    capability: int | None,
    as_json: bool,
    csv_file: Path | None,
    html: Path | None,
) -> None:
    from longskip.launcher.profile_tables import print_all
    from longskip.profiling.outputs import json_text
    from longskip.profiling.profiles import all_presets

    if html is not None:
        raise ConfigError("--html is of one model", cure="longskip profile MODEL --html FILE")
    rows = all_presets(subjects, device, capability)
    if csv_file is not None:
        _write_csv(csv_file, [row | {"pixels": "x".join(map(str, row["pixels"]))} for row in rows])
    if as_json:
        print(json_text(rows))
    else:
        print_all(rows, device)


def _write_csv(path: Path, rows: list[dict[str, object]]) -> None:
    """One line a row under a head; ConfigError where the file cannot be written."""
    from longskip.profiling.outputs import write_text

    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
