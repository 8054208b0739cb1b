"""``longskip checkpoint``: list, verify, export and convert saved weights; one process, no DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from longskip.errors import EXIT_FAILED, ConfigError

app = typer.Typer(help="List, verify, export and convert saved weights.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="a run's folder, or its name under runs/")]
CheckpointOption = Annotated[str | None, typer.Option("--checkpoint", help="step-00001000 or 1000")]


@app.command("list")
def list_checkpoints(run: RunArgument, as_json: JsonOption = False) -> None:
    """The checkpoints of a run: step, size, ranks and ZeRO stage that saved it, whether it is complete, how long kept."""
    from longskip.engine.inventory import inventory
    from longskip.engine.runs import find_run

    found = inventory(find_run(run))
    if as_json:
        print(json.dumps(found))
        return
    for entry in found["checkpoints"]:
        state = f"saved {entry['saved']} by {entry['world']} rank(s) at ZeRO stage {entry['zero_stage']}"
        newest = ", the newest" if entry["name"] == found["newest"] else ""
        newest += ", kept for good" if entry["kept"] == "every" else ""
        print(f"{entry['name']}  {entry['bytes']:>15,} bytes  {entry['problem'] or state + newest}")
    for entry in found["leftovers"]:
        print(f"{entry['name']}  {entry['bytes']:>15,} bytes  not used")
    if not found["checkpoints"]:
        print(f"no checkpoint in {found['run']}")
    elif found["keep_every"]:
        print(f"kept: the last {found['keep_last']}, and every step that is a multiple of {found['keep_every']}")


@app.command()
def verify(
    path: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="a run, or one checkpoint's folder")],
    which: CheckpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read every file and compare its SHA-256 with the manifest's; exit code 1 when something is wrong."""
    from longskip.engine.inventory import verify_checkpoints
    from longskip.engine.runs import find_run

    folder = Path(path) if (Path(path) / "manifest.json").is_file() else find_run(path)
    verdicts = verify_checkpoints(folder, which)
    good = all(verdict["problem"] is None for verdict in verdicts)
    if as_json:
        print(json.dumps({"path": str(folder), "good": good, "checkpoints": verdicts}))
    else:
        for verdict in verdicts:
            whole = f"{verdict['files']} files, {verdict['bytes']:,} bytes: whole"
            print(f"{verdict['name']}: {verdict['problem'] or whole}")
    raise typer.Exit(0 if good else EXIT_FAILED)


@app.command()
def export(
    run: RunArgument,
    out: Annotated[Path, typer.Option(help="a new folder")],
    weights: Annotated[str, typer.Option(help="ema or raw")] = "ema",
    layout: Annotated[str, typer.Option("--format", help="safetensors or diffusers")] = "safetensors",
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp16")] = "fp32",
    which: CheckpointOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a checkpoint's weights as safetensors with metadata, or as a folder that diffusers loads and draws from.

    The newest complete checkpoint by default. Memory stays small whatever the model's size.
    """
    from longskip.engine.export import export as run_export
    from longskip.engine.runs import find_run

    done = run_export(find_run(run), out, which=which, weights=weights, layout=layout, dtype=dtype)
    if as_json:
        print(json.dumps(done))
        return
    print(
        f"{done['tensors']} tensors of {done['checkpoint']} ({weights} weights, {dtype}), {done['bytes']:,} bytes: {out}"
    )
    if layout == "diffusers":
        folder = str(out.resolve())
        print(
            f"load it: DiffusionPipeline.from_pretrained({folder!r}, custom_pipeline={folder!r}, trust_remote_code=True)"
        )


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a .safetensors file, or its .safetensors.index.json")],
    to: Annotated[str, typer.Option(help="original (the original U-ViT's names) or longskip")],
    out: Annotated[Path, typer.Option(help="a new .safetensors file")],
    fields: Annotated[list[str] | None, typer.Argument(metavar="field=value", help="over the preset's")] = None,
    preset: Annotated[str | None, typer.Option(help="the model's shape, where the file does not say it")] = None,
    as_json: JsonOption = False,
) -> None:
    """Rename weights between the original U-ViT's names and ours; the values keep their bits.

    train.init_from takes what --to longskip writes. Pickled files (.pt, .pth, .ckpt) are refused.
    """
    from longskip.engine.export import convert_file

    done = convert_file(file, out, to, _spec(preset, fields or []))
    if as_json:
        print(json.dumps(done))
        return
    print(f"{done['tensors']} tensors with {to} names, {done['bytes']:,} bytes: {out}")
    if done["left_out"]:
        print(f"left out, as the original has no such part: {', '.join(done['left_out'])}")


def _spec(name: str | None, fields: list[str]) -> Any:
    """The spec of ``--preset`` with ``field=value`` over it; None without one."""
    from longskip.engine.configio import parse_override
    from longskip.models.presets import preset

    if name is None:
        if fields:
            raise ConfigError(f"{fields[0]} without --preset", cure="name the preset whose field it replaces")
        return None
    values: dict[str, Any] = {}
    for field in fields:
        values |= parse_override(field)
    return preset(name, **values)
