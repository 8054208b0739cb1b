"""``longskip config``: write a new configuration, show a resolved one (no torch)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from longskip.errors import ConfigError

app = typer.Typer(help="Write a new configuration, or show a resolved one.", no_args_is_help=True)

BATCH = 32
TEMPLATE = """\
# longskip train {name}            (resume: the same command)
# longskip launch --local 2 -- train {name}
model:
  preset: {preset}        # longskip presets lists them
  resolution: {resolution}        # pixels, or [height, width]
data:
  path: {data}
  # validation: another/folder   # its loss is reported per time bin
  flip: false
encoders:
  text: {{kind: words, width: {text_width}, n_tokens: {n_txt}, too_long: truncate}}
diffusion:
  prediction: x           # v, or x with the velocity's weighting
  caption_dropout: 0.1    # for guidance
optim:
  lr: {lr}
  warmup_steps: 100
  ema_decay: 0.999
train:
  steps: {steps}
  batch_size: {batch}          # of all ranks together = micro_batch × accumulation × ranks
  micro_batch: {micro}          # of one rank at a time: so this run goes on over 1, 2 or 4 ranks
  dtype: fp32             # bf16 on a GPU
logging:
  samples_every: 500
  prompts: []             # drawn while training; captions of the data when empty
eval:
  judge: none             # nearest: do the training pictures come back? (for small sets)
deepspeed:
  zero_stage: 3
"""


@app.command()
def new(
    preset: Annotated[str, typer.Option(help="the model's size; longskip presets lists them")] = "uvit-shapes",
    data: Annotated[Path, typer.Option(help="a folder of shards, or of pictures with captions")] = Path("data/shapes"),
    out: Annotated[Path, typer.Option(help="the YAML to write")] = Path("run.yaml"),
    steps: Annotated[int, typer.Option(min=1)] = 3000,
    resolution: Annotated[int | None, typer.Option(min=1, help="pixels; the preset's by default")] = None,
) -> None:
    """Write a commented YAML that trains PRESET on DATA."""
    from longskip.engine.configio import validate
    from longskip.models.presets import preset as preset_of
    from longskip.profiling.yamlfiles import parse_yaml

    spec = preset_of(preset)
    if spec.n_classes:
        raise ConfigError(
            f"preset {preset} takes classes; training takes captions",
            cure="longskip presets lists others: text is theirs",
        )
    if spec.channels != 3 and resolution is None:
        raise ConfigError(
            f"preset {preset} takes latents of {spec.channels} channels, which need an autoencoder; this command writes "
            "configurations for pixels",
            cure='give --resolution in pixels; or begin your YAML with "extends: configs/t2i-256.yaml" and set '
            f"model.preset={preset}, data.path and encoders.vae.path",
        )
    if not data.exists():
        print(f"note: {data} is not there yet", file=sys.stderr)
    if out.exists():
        raise ConfigError(f"{out} is there already", cure="choose another --out")
    text = TEMPLATE.format(
        name=out,
        preset=preset,
        data=json.dumps(str(data), ensure_ascii=False),
        resolution=resolution or spec.latent_size[0],
        text_width=spec.text_width or 64,
        n_txt=spec.n_txt or 16,
        lr="1.5e-3" if spec.width <= 256 else "2e-4",
        steps=steps,
        batch=BATCH,
        micro=BATCH // 4,
    )
    validate(parse_yaml(text, str(out)))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, "utf-8")
    print(f"{out}: longskip train {out}")


@app.command()
def show(
    config: Annotated[Path, typer.Argument(metavar="CONFIG")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """The resolved configuration: extends followed, overrides applied, every default written out."""
    from longskip.engine.configio import dump_yaml, load_config

    resolved = load_config(config, overrides or ())
    print(json.dumps(resolved.model_dump(mode="json")) if as_json else dump_yaml(resolved), end="")
