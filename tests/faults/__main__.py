"""``python -m tests.faults``: the tests of the thirty faults, or with ``--defences`` the proof that each can fail."""

from __future__ import annotations

import json
import os
import platform
import queue
import tempfile
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tests.faults.defences import ROOT, Copy, Defence, Fault, Proof, stale
from tests.faults.running import run_tests, summary
from tests.faults.table import FAULTS


def main(
    numbers: Annotated[list[int] | None, typer.Argument(metavar="[NUMBER]...", help="faults; all by default")] = None,
    defences: Annotated[
        bool, typer.Option("--defences", help="take each defence out in a copy: one of its tests must fail")
    ] = False,
    jobs: Annotated[int, typer.Option("-j", "--jobs", min=1, help="processes that run tests")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")] = False,
    out: Annotated[Path | None, typer.Option(help="also write the table to this Markdown file")] = None,
    listed: Annotated[bool, typer.Option("--list", help="show faults, tests and defences; run nothing")] = False,
) -> None:
    """Run the named tests of every fault and print a table; 1 where one fails, was skipped or is not there."""
    known = {fault.number: fault for fault in FAULTS}
    strange = sorted(set(numbers or ()) - set(known))
    if strange:
        raise typer.BadParameter(f"no fault {strange[0]}: they are numbered 1 to {max(known)}")
    chosen = [known[number] for number in numbers or known]
    begin = time.monotonic()
    if listed:
        rows = [_listed(fault) for fault in chosen]
    elif defences:
        rows = _prove(chosen, jobs, quiet=as_json)
    else:
        rows = _run(chosen, jobs, quiet=as_json)
    seconds = time.monotonic() - begin
    if as_json:
        print(json.dumps({"seconds": seconds, "machine": machine(), "rows": rows}, indent=1))
    else:
        _print(rows, seconds, defences)
    if out is not None:
        out.write_text(markdown(rows, seconds, defences), "utf-8")
    raise typer.Exit(0 if all(row["result"] in ("passed", "seen", "listed") for row in rows) else 1)


def _listed(fault: Fault) -> dict[str, Any]:
    return {
        "number": fault.number, "fault": fault.title, "holds": fault.holds, "tests": list(fault.tests),
        "defences": [defence.what for defence in fault.defences], "result": "listed", "seconds": 0.0, "wrong": "",
    }  # fmt: skip


def _run(chosen: list[Fault], jobs: int, *, quiet: bool) -> list[dict[str, Any]]:
    """One session of pytest for all, so that what tests share is made once; a row for each fault."""
    tests = list(dict.fromkeys(test for fault in chosen for test in fault.tests))
    session = run_tests(tests, ROOT, jobs=jobs, seconds=3600, show=not quiet)
    rows = []
    for fault in chosen:
        outcomes = [outcome for test in fault.tests for outcome in session.of(test)]
        missing = [test for test in fault.tests if not session.of(test)]
        wrong = [
            f"{o.test} {o.status}: {o.message.strip()[-1500:]}" for o in outcomes if o.status in ("failed", "error")
        ]
        wrong += [f"{o.test} was skipped: {o.message.strip()[:200]}" for o in outcomes if o.status == "skipped"]
        wrong += [f"{test} did not run" for test in missing] or ([] if fault.tests else ["no test is named"])
        result = "missing" if missing or not fault.tests else summary(outcomes)
        rows.append(
            _listed(fault)
            | {
                "ran": len(outcomes),
                "passed": sum(outcome.status == "passed" for outcome in outcomes),
                "result": "skipped" if result == "passed" and wrong else result,
                "seconds": sum(outcome.seconds for outcome in outcomes),
                "wrong": "\n".join(wrong),
            }
        )
    if not session.outcomes:
        rows[0]["wrong"] += f"\n{session.output[-3000:]}"
    return rows


def _prove(chosen: list[Fault], jobs: int, *, quiet: bool) -> list[dict[str, Any]]:
    """A row for each defence, in the faults' order; every thread has a copy of the tree for itself."""
    waiting: queue.SimpleQueue[tuple[int, Fault, Defence]] = queue.SimpleQueue()
    every = [(fault, defence) for fault in chosen for defence in fault.defences]
    for place, (fault, defence) in enumerate(every):
        waiting.put((place, fault, defence))
    rows: dict[int, dict[str, Any]] = {}

    def work(folder: Path) -> None:
        copy = None
        while True:
            try:
                place, fault, defence = waiting.get_nowait()
            except queue.Empty:
                return
            wrong = stale(defence)
            proof = None
            if not wrong:
                copy = copy or Copy(folder)
                proof = copy.prove(defence)
            rows[place] = _proved(fault, defence, proof, wrong)
            if not quiet:
                row = rows[place]
                print(f"{row['number']:>2} {row['result']:8} {row['seconds']:6.1f} s  {defence.what}", flush=True)

    with tempfile.TemporaryDirectory(prefix="longskip-defences-") as copies:
        threads = [threading.Thread(target=work, args=(Path(copies) / f"copy-{n}",)) for n in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for place, (fault, defence) in enumerate(every):
        rows.setdefault(place, _proved(fault, defence, None, ["its thread died"]))
    bare = [_listed(f) | {"result": "missing", "wrong": "no defence is named"} for f in chosen if not f.defences]
    return sorted([*rows.values(), *bare], key=lambda row: row["number"])


def _proved(fault: Fault, defence: Defence, proof: Proof | None, wrong: list[str]) -> dict[str, Any]:
    said = "\n".join(wrong) if wrong else (proof.wrong or "" if proof else "")
    return {
        "number": fault.number,
        "fault": fault.title,
        "holds": fault.holds,
        "defence": defence.what,
        "tests": list(defence.caught_by),
        "failed": proof.failed if proof else [],
        "result": "seen" if not said else "stale" if wrong else "unseen",
        "seconds": proof.seconds if proof else 0.0,
        "wrong": said,
    }


def _print(rows: list[dict[str, Any]], seconds: float, defences: bool) -> None:
    console = Console()
    table = Table()
    for name in ("fault", "", "defence taken out" if defences else "tests", "result", "s"):
        table.add_column(name, overflow="fold", justify="right" if name == "s" else "left")
    for row in rows:
        good = row["result"] in ("passed", "seen", "listed")
        what = row["defence"] if "defence" in row else f"{row['passed']}/{row['ran']}" if "ran" in row else _names(row)
        table.add_row(
            str(row["number"]),
            row["fault"],
            what,
            f"[{'green' if good else 'red'}]{row['result']}",
            f"{row['seconds']:.0f}",
        )
    console.print(table)
    for row in rows:
        if row["wrong"]:
            console.rule(f"{row['number']} {row['fault']}: {row['result']}", style="red")
            console.print(row["wrong"], markup=False, highlight=False)
    console.print(f"{len(rows)} rows, {seconds / 60:.1f} minutes")


def _names(row: dict[str, Any]) -> str:
    return "\n".join(test.removeprefix("tests/") for test in row["tests"])


def machine() -> str:
    from importlib import metadata

    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "deepspeed"))
    return f"{os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}, {versions}"


def markdown(rows: list[dict[str, Any]], seconds: float, defences: bool) -> str:
    """The table for docs/results."""
    command = "python -m tests.faults --defences" if defences else "python -m tests.faults"
    head = (
        ["", "fault", "defence taken out", "tests that see it"]
        if defences
        else ["", "fault", "what holds", "tests", "defences"]
    )
    explained = (
        "each defence is taken out in a copy of the tree, and a test of its fault must fail by its own assertions"
        if defences
        else "the tests are named below tests/; `--defences` takes each defence out in a copy of the tree, where a test must fail"
    )
    lines = [
        "# The thirty faults" + (": each defence taken out" if defences else ""), "",
        f"`{command}`: {len(rows)} rows in {seconds / 60:.1f} minutes ({machine()}); {explained}.", "",
        f"| {' | '.join([*head, 'result', 's'])} |", "|---" * (len(head) + 2) + "|",
    ]  # fmt: skip
    for row in rows:
        tests = "<br>".join(f"`{name.removeprefix('tests/')}`" for name in row.get("failed") or row["tests"])
        more = [row.get("defence", "–"), tests] if defences else [row["holds"], tests, "<br>".join(row["defences"])]
        cells = [str(row["number"]), row["fault"], *more, row["result"], f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    typer.run(main)
