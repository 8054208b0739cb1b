"""A profile's figures in words, the same in the terminal and on the page (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from longskip.profiling.profiles import Line, Profile
from longskip.profiling.units import NONE, exact, rate, share

__all__ = ["bytes_of", "figures", "flops", "heading", "intensity", "name_of", "percent", "seconds", "si"]

WEIGHTS = {"token": "every token", "image": "once per image", "partial": "one kind of token", "none": "no weights"}


def si(value: float, unit: str = "") -> str:
    """A number in three figures with an SI prefix: ``5.41 T``, ``812 GB``."""
    size, letters = abs(value), ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
    at = 0
    while size >= 999.5 and at < len(letters) - 1:
        size, at = size / 1000, at + 1
    digits = f"{size:.2f}" if size < 9.995 else f"{size:.1f}" if size < 99.95 else f"{size:.0f}"
    if not at and float(value).is_integer():
        digits = f"{size:.0f}"
    suffix = f"{letters[at]}{unit}"
    return f"{'-' if value < 0 else ''}{digits}{' ' + suffix if suffix else ''}"


def flops(value: int) -> str:
    """FLOPs, blank for none."""
    return si(value) if value else ""


def percent(part: float) -> str:
    """A share in a column: blank for none, to a tenth of a percent."""
    return "" if not part else "<0.1%" if part < 0.0005 else f"{100 * part:.1f}%"


def bytes_of(value: int) -> str:
    return si(value, "B") if value else NONE


def intensity(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def seconds(value: float) -> str:
    """A step's time in three figures: ``41.3 ms``, ``2.13 s``."""
    scale, unit = (1.0, "s") if value >= 1 else (1e-3, "ms") if value >= 1e-3 else (1e-6, "µs")
    return f"{rate(value / scale)} {unit}"


def name_of(line: Line) -> str:
    """A block with the number of its units where there are several."""
    return f"{line.name} ×{len(line.units)}" if len(line.units) > 1 and line.name == line.block else line.name


def heading(found: Profile) -> str:
    """The sizes that the figures are of."""
    subject, spec = found.subject, found.subject.spec
    height, width = subject.pixels
    latents = f" = {spec.channels}x{spec.latent_size[0]}x{spec.latent_size[1]} latents" if subject.factor > 1 else ""
    backends = ", ".join(backend if op == "all" else f"{op} {backend}" for op, backend in subject.kernels.items())
    again = {0: "nothing recomputed", 1: "every block recomputed"}.get(
        subject.checkpointing, f"of {subject.checkpointing} blocks one recomputed"
    )
    preset = f"{subject.preset}, " if subject.preset != subject.name else ""
    size = f"{preset}{height}x{width} pixels{latents}, batch {exact(found.ledger.batch)}"
    return f"{size}, {subject.precision}, kernels {backends}, {again}"


def figures(found: Profile) -> list[tuple[str, str]]:
    """What stands below the table: a name and a sentence of figures each."""
    ledger, counts = found.ledger, found.counts
    text = found.parameters - counts.total
    rows = [
        (
            "parameters N",
            f"{exact(found.parameters)}, of which N_token {exact(counts.per_token)} act on every token"
            + (f", {exact(counts.per_image)} once per image" if counts.per_image else "")
            + f", {exact(counts.partial)} on one kind of token"
            + (f", {exact(text)} in the text encoder" if text else ""),
        ),
        ("tokens per image", f"{exact(sum(found.tokens.values()))} = {tokens_of(found)}"),
        ("forward by tokens", shares(ledger.forward_by_tokens(), ledger.forward_flops)),
        ("forward by weights", shares(ledger.forward_by_parameters(), ledger.forward_flops, WEIGHTS)),
        ("forward", f"{exact(ledger.forward_flops)} FLOPs"),
        (
            "model FLOPs",
            f"{exact(ledger.model_flops)} per step = 3 x forward; {exact(ledger.model_flops // ledger.batch)} per image",
        ),
        ("hardware FLOPs", f"{exact(ledger.hardware_flops)} per step = {executed(found)}"),
        ("elementwise", f"{exact(ledger.elementwise_flops)} FLOPs; {bytes_of(ledger.bytes)} moved"),
    ]
    if found.capability:
        rows.append(("padded", f"{exact(ledger.padded_flops)} FLOPs beyond the edges of our kernels' tiles"))
    six_nd = next(account for account in found.accounts if account.name == "six_nd")
    rows += [
        ("6·N·D", f"{exact(six_nd.flops)} with all tokens of the step"),
        ("exact ÷ 6ND", f"{found.ratio('six_nd'):.4f} all tokens, {found.ratio('image_tokens'):.4f} image tokens only"),
    ]
    return rows + (_on_device(found) if found.device else [])


def tokens_of(found: Profile) -> str:
    return " + ".join(f"{exact(count)} {name}" for name, count in found.tokens.items())


def executed(found: Profile) -> str:
    """The kinds of executed contractions that there are, in words."""
    total = found.total
    kinds = {
        "forward": total.forward, "backward": total.backward, "recomputed": total.recomputed,
        "repeated by attention's backward": total.repeated,
    }  # fmt: skip
    return " + ".join(f"{si(value)} {name}" for name, value in kinds.items() if value)


def shares(parts: Mapping[Any, int], whole: int, names: Mapping[str, str] | None = None) -> str:
    return ", ".join(
        f"{(names or {}).get(name, name)} {share(value / whole)}" for name, value in parts.items() if value
    )


def _on_device(found: Profile) -> list[tuple[str, str]]:
    device, predicted = found.device, found.prediction
    assert device is not None and predicted is not None
    dtype = found.subject.precision
    bound, ceiling = found.bound_seconds, found.mfu_ceiling
    rows = [
        ("device", f"{device.name}: {si(device.peak(dtype), 'FLOP/s')} {dtype}, {si(device.bandwidth, 'B/s')}"),
        (
            "roofline bound",
            f"{seconds(bound)} a step, no less: every op at the peak or the bandwidth"
            + ("; rates were measured, so no MFU" if ceiling is None else f"; MFU at most {share(ceiling)}")
            + _without_optimizer(found),
        ),
        ("memory bound", memory_bound(found)),
    ]
    known = predicted.measured_share
    rest = (
        "with measured efficiencies"
        if known > 0.995
        else (
            f"with efficiencies measured for {share(known)} of it, else assumed"
            if known
            else "with assumed efficiencies"
        )
    )
    mfu = "" if predicted.mfu is None else f", MFU {share(predicted.mfu)}, HFU {share(predicted.hfu)}"
    images = f"{rate(predicted.images_per_second)} images/s"
    rest += "; processor time, not the wall clock's" if device.measured else ""
    spread = "" if predicted.certain else f" ({seconds(predicted.fastest)} to {seconds(predicted.slowest)})"
    return [*rows, ("predicted step", f"{seconds(predicted.seconds)}{spread}, {images}{mfu}; one device, {rest}")]


def _without_optimizer(found: Profile) -> str:
    """What the ceiling is where many micro-batches share one optimizer step."""
    passes = sum(bound.seconds for bound in found.bounds if bound.block != "optimizer")
    if found.mfu_ceiling is None or not passes:
        return ""
    return (
        f" ({share(found.mfu_ceiling * found.bound_seconds / passes)} where many micro-batches share an optimizer step)"
    )


def memory_bound(found: Profile) -> str:
    """Which ops wait for memory, and what part of the bound they are."""
    waiting = [bound for bound in found.bounds if bound.binds == "memory"]
    names: dict[str, float] = {}
    for bound in waiting:
        names[bound.name] = names.get(bound.name, 0.0) + bound.seconds
    if not names:
        return "no op"
    whole = found.bound_seconds
    first = [name for name in sorted(names, key=lambda name: -names[name]) if names[name] >= 0.001 * whole][:6]
    listed = ", ".join(f"{name} {share(names[name] / whole)}" for name in first)
    return f"{share(sum(names.values()) / whole)} of the bound" + (f": {listed}" if listed else "")
