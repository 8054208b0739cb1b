"""The tables of ``longskip profile`` for people (rich): as many columns as the terminal is wide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from longskip.profiling.hardware import Device
from longskip.profiling.profile_text import bytes_of, figures, flops, heading, intensity, name_of, percent
from longskip.profiling.profiles import Line, Profile
from longskip.profiling.units import exact, share

Column = tuple[str, Callable[[Line], str]]
# What goes first where the terminal is narrow; what is not in this list always stands.
_LEAVE_OUT = ("weights", "FLOP/B", "bytes", "repeated")


def print_profile(found: Profile, depth: str, files: Sequence[Path] = ()) -> None:
    """The ledger as a table, and below it what it comes to."""
    console = Console(highlight=False)
    subject, total = found.subject, found.total
    lines = found.lines("unit" if depth == "unit" else "op" if depth == "op" else "block")
    columns, left_out = _columns(found, lines, console.width)
    table = _table(footer=True)
    table.add_column("", footer="total", no_wrap=True)
    for title, cell in columns:
        table.add_column(title, footer=cell(total), justify="right", no_wrap=True)
    if depth == "op":
        for block in found.lines("block"):
            table.add_row(name_of(block), *(cell(block) for _, cell in columns), style="bold")
            for line in lines:
                if line.block == block.block:
                    table.add_row(f"  {line.name}", *(cell(line) for _, cell in columns))
    else:
        for line in lines:
            table.add_row(name_of(line) if depth == "block" else line.name, *(cell(line) for _, cell in columns))
    console.print(Text(subject.name, style="bold"), end="")
    console.print(f"  {heading(found)}", soft_wrap=True)
    console.print(table)
    if left_out:
        console.print(f"[dim]left out for want of width: {', '.join(left_out)}; all in --json and --csv[/dim]")
    console.print()
    below = Table.grid(padding=(0, 2, 0, 0))
    below.add_column(no_wrap=True)
    below.add_column(overflow="fold")
    for name, value in figures(found):
        below.add_row(Text(name), Text(value))
    console.print(below)
    for note in found.notes:
        console.print(Text(f"note: {note}"), style="dim")
    for path in files:
        console.print(Text(f"written: {path}"), soft_wrap=True)


def _table(footer: bool = False) -> Table:
    """One blank between columns; the sum of their widths and blanks is what ``_columns`` reckons with."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0), show_edge=False, show_footer=footer)


def _columns(found: Profile, lines: Sequence[Line], width: int) -> tuple[list[Column], list[str]]:
    """The columns that have something to say, as many as fit into ``width``."""
    total = found.total
    all_flops = total.hardware or 1
    columns: list[Column] = [
        ("forward", lambda line: flops(line.forward)),
        ("backward", lambda line: flops(line.backward)),
        ("recomp.", lambda line: flops(line.recomputed)),
        ("repeated", lambda line: flops(line.repeated)),
        ("element-\nwise", lambda line: flops(line.elementwise)),
        ("padded", lambda line: flops(line.padded)),
        ("share", lambda line: percent(line.hardware / all_flops)),
        ("bytes", lambda line: bytes_of(line.bytes)),
        ("FLOP/B", lambda line: intensity(line.intensity)),
        ("weights", lambda line: "" if line is total else line.parameters or ""),
    ]
    empty = {"recomp.": total.recomputed, "repeated": total.repeated}
    columns = [(title, cell) for title, cell in columns if empty.get(title, 1)]
    if not found.capability:
        columns = [(title, cell) for title, cell in columns if title != "padded"]
    needed = max([len(name_of(line)) for line in found.lines("block")] + [2 + len(line.name) for line in lines])
    sizes = {
        title: 1 + max([len(part) for part in title.split("\n")] + [len(cell(line)) for line in (*lines, total)])
        for title, cell in columns
    }
    left_out = []
    for title in _LEAVE_OUT:
        if needed + sum(sizes.values()) <= width:
            break
        if sizes.pop(title, None):
            left_out.append(title)
    return [(title, cell) for title, cell in columns if title in sizes], left_out


def print_all(rows: Sequence[dict[str, Any]], device: Device | None) -> None:
    """Every preset on a line; sizes are left out where the terminal is narrow."""
    console = Console(highlight=False)
    columns: dict[str, Callable[[dict[str, Any]], str]] = {
        "preset": lambda row: row["preset"],
        "pixels": lambda row: "x".join(map(str, row["pixels"])),
        "tokens": lambda row: exact(row["tokens"]),
        "parameters": lambda row: exact(row["parameters"]),
        "forward\nGMACs": lambda row: f"{row['forward_macs'] / 1e9:,.3f}",
        "model\nFLOPs": lambda row: flops(row["model_flops"]),
        "elem-\nwise": lambda row: share(row["elementwise_share"]),
        "exact ÷\n6ND": lambda row: f"{row['exact_over_6nd']:.4f}",
        "image\ntokens": lambda row: f"{row['exact_over_6nd_image_tokens']:.4f}",
    }
    if device is not None:
        columns["MFU\nmost"] = lambda row: share(row["mfu_ceiling"])
    if console.width < 100:
        columns = {title: cell for title, cell in columns.items() if title not in ("pixels", "tokens")}
    table = _table()
    for title in columns:
        table.add_column(title, justify="left" if title == "preset" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(cell(row) for cell in columns.values()))
    console.print(table)
    console.print(
        "model FLOPs of an image: 3 x forward; elementwise: share of all FLOPs that a step of the model executes; "
        "exact ÷ 6ND with all tokens, and with image tokens alone"
        + (f"; MFU at most, by the roofline of {device.name}, batch {rows[0]['batch']}" if device else ""),
        style="dim",
    )
