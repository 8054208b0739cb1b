"""Tables for people: presets and evaluations (rich)."""

from __future__ import annotations

from typing import Any

from longskip.models.presets import PRESETS


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
    console.print(
        f"{result['checkpoint']}, {result['weights']} weights, {result['sampler']} {result['steps']} steps, "
        f"guidance {result['guidance']}, seed {result['seed']}, {result['count']} pictures"
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
