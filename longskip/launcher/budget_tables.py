"""Budgets, plans and fits as tables for people (rich)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from longskip.launcher.tables import print_whole
from longskip.profiling import units
from longskip.profiling.laws import LANGUAGE_LAWS, TIFA_FITTED_ON, intervals_at, times_text
from longskip.profiling.predicted import prediction_rows, rough_count, shown, span_text

if TYPE_CHECKING:
    from longskip.profiling.budget import Amount, RunBudget
    from longskip.profiling.budget_plan import Plan
    from longskip.profiling.budget_plots import Fit
    from longskip.profiling.fits import Prediction

_AMOUNTS = (
    ("steps", "steps", units.exact),
    ("images", "images", units.count),
    ("image_tokens", "image tokens", units.count),
    ("tokens", "tokens D", units.count),
    ("model_flops", "model FLOPs C", units.scientific),
    ("hardware_flops", "hardware FLOPs", units.scientific),
    ("six_nd", "6ND", units.scientific),
    ("seconds", "wall time", units.duration),
    ("device_hours", "device hours", lambda value: _amount(value)),
)

_SHORT = {
    "six_nd": "6ND",
    "image_tokens": "6ND image",
    "kaplan": "Kaplan",
    "kaplan_context": "with context",
    "chinchilla": "Chinchilla",
}


def print_report(budgets: Sequence[RunBudget], result: Mapping[str, Any]) -> None:
    console = Console(highlight=False)
    if len(budgets) == 1:
        _one_run(console, budgets[0])
    else:
        _all_runs(console, budgets, result["total"])
    for file in result.get("files", ()):
        console.print(str(file), markup=False, soft_wrap=True)


def _one_run(console: Console, budget: RunBudget) -> None:
    of_them = f" ({units.count(budget.params_token)} act on every token)" if budget.params_token else ""
    console.print(
        f"[bold]{escape(budget.name)}[/bold]  {budget.status or 'status unknown'}, N = {units.count(budget.params)}{of_them}, "
        f"{escape(', '.join(budget.devices))}, {budget.attempts} attempt{'s' if budget.attempts != 1 else ''}",
    )
    table = _table("", "committed", "spent", "redone")
    for key, label, short in _AMOUNTS:
        amount = budget.amounts[key]
        table.add_row(label, *(short(value) for value in (amount.committed, amount.spent, amount.redone)))
    if budget.money is not None:
        table.add_row(f"money, {escape(budget.currency)}", *_three(budget.money, _money))
    if budget.energy_kwh is not None:
        table.add_row("energy, kWh", *_three(budget.energy_kwh, _amount))
    console.print(table)
    table = _table("device time spent on", "hours", "share")
    for use in budget.uses:
        table.add_row(use.name, _amount(use.device_hours), units.share(use.share))
    console.print(table)
    table = _table("accounting", "N", "D", "FLOPs", "exact ÷ it")
    for account in budget.accounts:
        counted = (units.count(account.params) if account.params is not None else "by op", units.count(account.tokens))
        table.add_row(account.label, *counted, units.scientific(account.flops, 4), f"{account.exact_share:.4f}")
    console.print(table)
    _say_covers(console)
    rates = f"committed share of the time {units.share(budget.committed_share)}, "
    rates += (
        f"MFU {units.share(budget.mfu)}, HFU {units.share(budget.hfu)}" if budget.mfu is not None else "MFU unknown"
    )
    console.print(rates)
    if budget.money is None:
        console.print("money unknown: give --price, or set budget.price_per_device_hour")
    for line in _remarks(budget):
        console.print(escape(line))


def _say_covers(console: Console) -> None:
    from longskip.profiling.budget import COVERS

    console.print(COVERS)


def _remarks(budget: RunBudget) -> list[str]:
    return [f"energy: {budget.energy_note}", *(f"note: {note}" for note in budget.notes)]


def _all_runs(console: Console, budgets: Sequence[RunBudget], total: Mapping[str, Any]) -> None:
    table = _table(
        "run", "N", "images", "tokens", "C spent", "C ÷ 6ND", "device h", "redone", "data", "money", "kWh", "loss"
    )
    for budget in budgets:
        uses = {use.name: use for use in budget.uses}
        six_nd = next(account for account in budget.accounts if account.name == "six_nd")
        table.add_row(
            escape(budget.name),
            units.count(budget.params),
            units.count(budget.amounts["images"].committed),
            units.count(budget.amounts["tokens"].committed),
            units.scientific(budget.amounts["model_flops"].spent),
            f"{six_nd.exact_share:.4f}",
            _amount(budget.amounts["device_hours"].spent),
            units.share(uses["redone after a resume"].share),
            units.share(uses["waiting for data"].share),
            units.NONE if budget.money is None else f"{_money(budget.money.spent)} {escape(budget.currency)}",
            _amount(None if budget.energy_kwh is None else budget.energy_kwh.spent),
            units.NONE if budget.loss is None else f"{budget.loss:.4f}",
        )
    spent = {name: None if amount is None else amount["spent"] for name, amount in total.items()}
    money = units.NONE if spent["money"] is None else f"{_money(spent['money'])} {escape(budgets[0].currency)}"
    table.add_section()
    table.add_row("total", "", "", "", units.scientific(spent["model_flops"]), "", _amount(spent["device_hours"]), "", "",
                  money, _amount(spent["energy_kwh"]), "")  # fmt: skip
    print_whole(console, table)
    names = [account.name for account in max((budget.accounts for budget in budgets), key=len)]
    table = _table("exact model FLOPs ÷", *(_SHORT[name] for name in names[1:]))
    for budget in budgets:
        shares = {account.name: f"{account.exact_share:.4f}" for account in budget.accounts}
        table.add_row(escape(budget.name), *(shares.get(name, units.NONE) for name in names[1:]))
    console.print(table)
    _say_covers(console)
    for budget in budgets:
        for line in _remarks(budget):
            console.print(f"{escape(budget.name)}: {escape(line)}")


def print_plan(plan: Plan) -> None:
    from longskip.profiling.budget_plan import NO_MFU

    console, best, law = Console(highlight=False), plan.optimum, plan.law
    far = best.extrapolation
    console.print(
        f"[bold]C = {units.scientific(plan.flops, 4)} training FLOPs[/bold], by {escape(law.source)}"
        + (f", fitted on {escape(law.fitted_on)}" if law.fitted_on else ""),
    )
    spans = {name: span_text(span, far, name) for name, span in intervals_at(law, best.flops).items()}
    console.print(
        f"N_opt {rough_count(best.params, far)}{spans.get('params', '')} parameters · "
        f"D_opt {rough_count(best.tokens, far)}{spans.get('tokens', '')} {law.tokens} tokens"
        f"{'' if law.tokens == 'image' else ' (time, text and image)'}",
    )
    whose = "a language model's loss" if law.name in LANGUAGE_LAWS else "loss"
    expected = (
        [f"{whose} {shown(best.loss, far, '{:.4f}'.format)}{spans.get('loss', '')}"] if best.loss is not None else []
    )
    expected += [f"FID {shown(best.fid, far, '{:.1f}'.format)}"] if best.fid is not None else []
    console.print(f"predicted: {', '.join(expected) or 'no loss'}; {best.range_note}")
    tifa = ", ".join(
        f"{shown(f['tifa'], f['extrapolation'], '{:.3f}'.format)} by {name}{_beyond(f['extrapolation'])}"
        for name, f in plan.tifa.items()
    )
    console.print(f"TIFA by 2404.02883, fitted on {TIFA_FITTED_ON}: {tifa}")
    if plan.hardware is not None:
        _print_hardware(console, plan)
    speaks = plan.candidates[0].loss is not None
    titles = ("model", "shape", "N", "÷ N_opt", "6ND steps", "÷ C", "exact steps", "÷ D_opt")
    table = _table(*titles, *(["loss"] if speaks else []))
    for one in plan.candidates:
        table.add_row(
            one.name,
            f"{one.spec.width}×{one.spec.n_blocks}",
            units.count(one.params),
            f"{one.off:.3f}",
            units.exact(one.steps_6nd),
            f"{one.exact_flops_6nd / plan.flops:.3f}",
            units.exact(one.steps),
            f"{one.data_off:.3f}",
            *([shown(one.loss, far, "{:.4f}".format)] if one.loss is not None else []),
        )
    print_whole(console, table)
    height, width = plan.latent_size
    shape = plan.candidates[0].spec
    console.print(
        "6ND steps: what 6·N·D promises for C, and beside them their exact FLOPs ÷ C. Exact steps: those that spend C. "
        f"Batch {plan.batch:,}, latents {height}×{width}, {shape.n_tokens} tokens an image, {shape.n_img} of them the image's; "
        "shapes are width × blocks",
    )
    console.print(
        f"the custom model: model.preset=uvit-2.3b model.width={shape.width} model.depth={shape.depth} "
        f"model.n_heads={shape.n_heads}",
        soft_wrap=True,
    )
    if spans:
        console.print("in brackets: 95% intervals of the law's own fit, not of one more training")
    for note in plan.notes:
        if note == NO_MFU:  # stands above, where the hours would
            continue
        console.print(f"note: {escape(note)}")


def _print_hardware(console: Console, plan: Plan) -> None:
    on = plan.hardware
    from longskip.profiling.budget_plan import NO_MFU

    assert on is not None
    if plan.device_hours is None or plan.days is None:
        console.print(f"{escape(on.device.name)}: {NO_MFU}")
        return
    many = f"{on.gpus} (assumed; --gpus says another number)" if on.assumed else f"{on.gpus}"
    parts = [
        f"{_amount(plan.device_hours)} GPU-hours of {escape(on.device.name)} at {units.share(on.mfu)} MFU ({on.precision})",
        f"{units.duration(plan.days * 86400)} on {many}",
        f"{_money(plan.money)} {escape(plan.currency)}" if plan.money is not None else "no price given (--price)",
    ]
    if plan.energy_kwh is not None:
        parts.append(f"{_amount(plan.energy_kwh)} kWh")
    console.print(" · ".join(parts))


def print_fit(fit: Fit, predictions: Sequence[Prediction], origin: str, files: Sequence[str]) -> None:
    from longskip.profiling.budget_plots import figure_rows

    console = Console(highlight=False)
    console.print(f"[bold]{escape(fit.law.source)}[/bold]: {len(fit.points)} trainings from {escape(origin)}")
    table = _table("figure", "value", "95% interval")
    for row in figure_rows(fit):
        table.add_row(*row)
    console.print(table)
    parabolas = getattr(fit, "parabolas", ())
    if parabolas:
        table = _table("best of C", "sizes", "N_opt", "95% interval", "D_opt", "loss")
        for one in parabolas:
            spread = one.params_interval
            table.add_row(
                units.scientific(one.flops),
                str(len(one.points)),
                units.count(one.params),
                "needs 5 sizes" if spread is None else f"{units.count(spread[0])} to {units.count(spread[1])}",
                units.count(one.tokens),
                f"{one.loss:.4f}",
            )
        console.print(table)
    table = _table("at C", "N_opt\n95%", "D_opt\n95%", "loss\n95%", "fitted range")
    for c, *cells, reach in prediction_rows(predictions):
        pairs = zip(cells[::2], cells[1::2], strict=True)
        table.add_row(c, *("\n".join(filter(None, pair)) for pair in pairs), reach)
    print_whole(console, table)
    for warning in fit.warnings:
        console.print(f"[bold yellow]warning[/bold yellow]: {escape(warning)}")
    for file in files:
        console.print(file, markup=False, soft_wrap=True)


def _beyond(times: float) -> str:
    return "" if times == 1 else f" (extrapolation: {times_text(times)})"


def _three(amount: Amount, short: Any) -> tuple[str, str, str]:
    return short(amount.committed), short(amount.spent), short(amount.redone)


def _money(value: float) -> str:
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"


def _amount(value: float | None) -> str:
    """Hours and kWh: large ones whole, small ones in three figures."""
    if value is None:
        return units.NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(*titles: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, title in enumerate(titles):
        table.add_column(title, justify="left" if index == 0 else "right", no_wrap=index == 0 or len(titles) > 6)
    return table
