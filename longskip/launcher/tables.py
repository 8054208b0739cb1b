"""Tables for people: presets and evaluations, and what tables share (rich)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longskip.models.presets import PRESETS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_whole(console: Console, table: Table) -> None:
    """A table of many columns: on a narrow terminal its lines run over, but no number is cut."""
    from rich.console import Console

    width = Console(width=1000).measure(table).maximum
    Console(highlight=False, width=max(console.width, width)).print(table)


def preset_rows() -> list[dict[str, Any]]:
    """One row a preset: shape, exact parameters, tokens and forward MACs (attention counted)."""
    rows = []
    for name, spec in PRESETS.items():
        cost = spec.flops(batch=1)
        rows.append(
            {
                "preset": name,
                "width": spec.width,
                "blocks": spec.n_blocks,
                "heads": spec.n_heads,
                "patch": spec.patch,
                "latents": [spec.channels, *spec.latent_size],
                "text": [spec.n_txt, spec.text_width],
                "tokens": cost.tokens,
                "parameters": spec.param_counts().total,
                "forward_macs": cost.macs,
                "forward_flops": cost.flops,
            }
        )
    return rows


def print_presets() -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        caption="backbones; GMACs of one forward pass of one image; more in --json",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    for title in ("preset", "width", "blocks", "heads", "tokens", "parameters", "GMACs"):
        table.add_column(title, justify="left" if title == "preset" else "right", no_wrap=True)
    for row in preset_rows():
        shape = (str(row[key]) for key in ("width", "blocks", "heads", "tokens"))
        table.add_row(row["preset"], *shape, f"{row['parameters']:,}", f"{row['forward_macs'] / 1e9:,.3f}")
    Console().print(table)


def print_evaluation(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    pictures = f", {result['count']:,} pictures" if result["count"] else ""
    console.print(
        f"{result['checkpoint']}, {result['weights']} weights, {result['sampler']} {result['steps']} steps, "
        f"guidance {result['guidance']}, seed {result['seed']}{pictures}"
    )
    if "loss" in result:
        bins = "  ".join("–" if b is None else f"{b:.3f}" for b in result["loss"]["bins"])
        console.print(f"validation loss {result['loss']['mean']:.4f}; per time bin from 0 to 1: {bins}")
    if "judge" in result:
        parts = [name for name in ("seen", "held_out") if name in result["judge"]]
        table = Table("", *(f"{name} ({result['judge'][name]['count']})" for name in parts))
        for attribute in ("full", "objects", "colour", "size", "shape", "position", "relation"):
            values = [result["judge"][name].get(attribute) for name in parts]
            if any(value is not None for value in values):
                table.add_row(attribute, *("–" if v is None else f"{v:.3f}" for v in values))
        console.print(table)
    if "nearest" in result:
        near = result["nearest"]
        console.print(
            f"of the {near['count']} training pictures asked for, the nearest is the captioned one for {near['hits']} "
            f"({100 * near['share']:.1f}%; chance {100 * near['chance']:.1f}%); among all {near['among_all']:,}: "
            f"{100 * near['share_among_all']:.1f}%"
        )
    for line in score_lines(result):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"in eval/{result['file']}", highlight=False, soft_wrap=True)


def score_lines(result: dict[str, Any]) -> list[str]:
    """FID, KID, CLIP score and likelihood, a line each with what the figure depends on; warnings below theirs."""
    lines = []
    if "fidelity" in result:
        found = result["fidelity"]
        fid, kid, real = found["fid"], found["kid"], found["statistics"]
        left_out = found["prompts"].get("left_out", 0)
        lines += [
            f"FID {fid['value']:.4f}: {found['count']:,} drawn against {real['count']:,} real pictures "
            f"(statistics {real['sha256'][:12]}, network {found['network']['sha256'][:12]}); "
            f"captions of {found['prompts']['of']}" + (f", {left_out:,} left out" if left_out else ""),
            *(f"  warning: {warning}" for warning in fid.get("warnings", ())),
            f"KID {kid['mean']:.6f} ± {kid['std']:.6f} over {kid['subsets']} subsets of {kid['subset_size']:,}",
        ]
    if "clip_score" in result:
        found = result["clip_score"]
        error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.3f}"
        cut = found["truncated_prompts"]
        lines.append(
            f"CLIP score {found['value']:.3f}{error}: {found['count']:,} pictures (CLIP {found['clip']['sha256'][:12]})"
            + (f"; {cut:,} prompts cut to its length" if cut else "")
        )
    if "likelihood" in result:
        found = result["likelihood"]
        for method, name in (("vlb", "variational bound"), ("ode", "probability-flow ODE")):
            if method in found:
                bits, error = found[method]["bits_per_dim"], found[method]["bits_per_dim_error"]
                over = "–" if error["over_samples"] is None else f"{error['over_samples']:.4f}"
                lines.append(
                    f"−log₂ p by the {name}: {bits:.4f} bits/dim ± {over} over {found[method]['count']:,} samples "
                    f"(± {error['monte_carlo']:.4f} of random numbers), of {found['of']}"
                )
    return lines
