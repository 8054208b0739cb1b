"""``longskip data``: make, pack, index, lint and show sets of captioned pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from longskip.errors import ConfigError
from longskip.launcher.cli_encode import encode, parse_size
from longskip.launcher.progress import counting

app = typer.Typer(help="Make, pack, encode, check and look at sets of captioned pictures.", no_args_is_help=True)

JsonOption = Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")]
PathArgument = Annotated[Path, typer.Argument(metavar="DATA", help="a folder of shards, or of pictures with captions")]


@app.command()
def make(
    kind: Annotated[str, typer.Argument(metavar="shapes|emoji")],
    out: Annotated[Path | None, typer.Option(help="the folder for the shards; data/KIND by default")] = None,
    count: Annotated[int, typer.Option(min=1, help="pictures (shapes)")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="the set is a function of it (shapes)")] = 0,
    objects: Annotated[str, typer.Option(help="1, 2 or mixed (shapes)")] = "1",
    held_out: Annotated[bool, typer.Option("--held-out", help="only the combinations kept from training")] = False,
    size: Annotated[int, typer.Option(min=16, help="pixels")] = 32,
    font: Annotated[Path | None, typer.Option(help="the colour-emoji font (emoji)")] = None,
) -> None:
    """Draw a set: shapes with true captions, or the system's colour-emoji font with Unicode names."""
    out = out or Path("data") / kind
    if kind == "shapes":
        from longskip.engine.data.shapes import write_shapes

        if objects not in ("1", "2", "mixed"):
            raise ConfigError(f"--objects {objects!r}", cure="one of 1, 2, mixed")
        how = "mixed" if objects == "mixed" else int(objects)
        with counting("drawing", count) as progress:
            index = write_shapes(out, count, seed, how, held_out, size, progress=progress)  # type: ignore[arg-type]
    elif kind == "emoji":
        from longskip.engine.data.emoji import write_emoji

        with counting("drawing", None) as progress:
            index = write_emoji(out, size, font, progress=progress)
    else:
        raise ConfigError(f"data make knows no {kind!r}", cure="one of shapes, emoji")
    print(f"{index.total:,} samples in {len(index.shards)} shard(s) at {out}")


@app.command()
def pack(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="pictures + .txt beside, or metadata.jsonl")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="a new folder for the shards")],
    per_shard: Annotated[int, typer.Option(min=1, help="samples a shard")] = 10_000,
    as_json: JsonOption = False,
) -> None:
    """Pack a folder of captioned pictures into webdataset shards with an index."""
    from longskip.engine.data.pack import pack_folder

    with counting("packing", None) as progress:
        done = pack_folder(folder, out, per_shard=per_shard, progress=progress)
    if as_json:
        print(json.dumps({"packed": done.packed, "shards": done.shards, "bad": done.bad}))
        return
    print(f"{done.packed:,} samples in {done.shards} shard(s) at {out}")
    for name, reason, detail in done.bad:
        print(f"  left out {name}: {reason} ({detail})")


@app.command()
def index(
    shards: Annotated[Path, typer.Argument(metavar="SHARDS", help="a folder of .tar shards made elsewhere")],
) -> None:
    """Index shards made elsewhere (img2dataset, webdataset): counts, offsets, hashes, picture sizes."""
    from longskip.engine.data.index import build_index

    made = build_index(shards)
    print(f"{made.total:,} samples in {len(made.shards)} shard(s) at {made.folder}: indexed")


@app.command()
def lint(
    path: PathArgument,
    config: Annotated[Path | None, typer.Option(help="a run's YAML: its caption limit is checked too")] = None,
    quarantine: Annotated[
        Path | None, typer.Option(help="write the samples that cannot be trained on here, for data.quarantine")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Read everything once: hashes, pictures, captions; exit code 1 when something is bad."""
    from longskip.engine.config import Config
    from longskip.engine.configio import load_config
    from longskip.engine.data.lint import lint as check
    from longskip.engine.data.sources import open_source
    from longskip.engine.opening import told_of_bad
    from longskip.engine.quarantine import quarantine_of

    run = load_config(config) if config else Config()
    text = run.encoders.text if config else None
    limit = text.n_tokens if text and text.too_long == "error" else None
    bad: list[dict[str, Any]] = []
    with counting("reading", None) as progress:
        found = check(path, n_txt=limit, progress=progress, bad=bad.append)
    of_run, passed = found.good + found.bad, 0
    if run.data.quarantine and Path(run.data.path) == path:
        listed = set(quarantine_of(run.data.quarantine, open_source(path)).samples.tolist())
        passed = sum(entry["sample"] in listed for entry in bad)
    share = told_of_bad(
        run, found.bad - passed, of_run, f" without the {passed:,} of data.quarantine" if passed else ""
    )
    if quarantine is not None:
        from longskip.engine.data.index import write_atomically

        write_atomically(quarantine, "".join(f"{json.dumps(entry)}\n" for entry in bad).encode())
    if as_json:
        of_bad = {
            "bad_share": (found.bad - passed) / of_run if of_run else None,
            "max_bad_share": run.data.max_bad_share,
        }
        print(json.dumps(found.to_json() | of_bad))
    else:
        print(f"{found.good:,} of {found.samples:,} samples can be trained on; {found.sha256_checked} shard(s) hashed")
        if found.bad:
            print(share)
        if found.tables_unhashed:
            print(
                f"the index holds no hash of {found.tables_unhashed} table(s): picture sizes in them are taken as they "
                f"are; longskip data index {path} adds the hashes"
            )
        print(f"longest caption: {found.longest_caption} words")
        for reason, count in sorted(found.counts.items()):
            print(f"  {reason}: {count:,}")
        for name, reason, detail in found.examples:
            print(f"    {name}: {reason} ({detail})")
        if found.n_captions_alone:
            print(f"{found.n_captions_alone:,} caption file(s) without a picture of their name, which are no samples:")
            print("".join(f"    {name}\n" for name in found.captions_alone), end="")
        if quarantine is not None:
            print(
                f"{len(bad):,} sample(s) written to {quarantine}; they are passed over with data.quarantine={quarantine}"
            )
    raise typer.Exit(0 if found.ok else 1)


@app.command()
def show(
    path: PathArgument,
    out: Annotated[Path, typer.Option(help="the PNG")] = Path("contact-sheet.png"),
    count: Annotated[int, typer.Option(min=1, help="pictures")] = 48,
    columns: Annotated[int, typer.Option(min=1)] = 8,
    seed: Annotated[int, typer.Option(min=0, help="which ones")] = 0,
) -> None:
    """A contact sheet: pictures (or latents, where there are no pictures) with their captions underneath, as one PNG."""
    from longskip.engine.data.show import contact_sheet
    from longskip.engine.data.sources import open_source

    contact_sheet(open_source(path), out, n=count, columns=columns, seed=seed)
    print(out)


@app.command()
def stats(
    path: PathArgument,
    network: Annotated[
        Path, typer.Option(help="a TorchScript file (a program: it runs; name one that you trust) or a CLIP's folder")
    ],
    out: Annotated[Path, typer.Option(help="the file for the statistics, .npz")],
    resolution: Annotated[
        str | None, typer.Option(help="pixels that the model draws: 256, or HxW; the pictures' own where all are alike")
    ] = None,
    count: Annotated[int | None, typer.Option(min=2, help="pictures, chosen at random; all by default")] = None,
    seed: Annotated[int, typer.Option(min=0, help="which ones")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Statistics of real pictures in a network's features, for FID and KID: longskip evaluate RUN --fid OUT."""
    size = parse_size(resolution) if resolution else None
    if out.suffix != ".npz":
        raise ConfigError(f"--out {out}", cure="a file that ends in .npz")

    import torch

    from longskip.engine.data.sources import open_source
    from longskip.engine.feature_network import FeatureNetwork
    from longskip.engine.fidelity import gather

    source = open_source(path)
    loaded = FeatureNetwork.load(network, "cuda" if torch.cuda.is_available() else "cpu")
    with counting("reading", count or len(source)) as progress:
        found = gather(source, loaded, data=str(path), resolution=size, count=count, seed=seed, progress=progress)
    written = found.save(out)
    if as_json:
        print(json.dumps({"out": str(out), "sha256": written.sha256, **written.about}))
        return
    sides = "x".join(map(str, written.about["resolution"]))
    print(
        f"{written.count:,} pictures at {sides} pixels, {loaded.n_features:,} features: {out} ({written.sha256[:12]})"
    )
    if written.about["bad"]:
        print(f"  {written.about['bad']:,} could not be used; longskip data lint names them")
    if written.count <= loaded.n_features:
        print("  no more pictures than features: the covariance is rank-deficient, and FID will say so")


app.command()(encode)
