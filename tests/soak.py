"""``python -m tests.soak --kills 50 --seed 0``: one run under its supervisor, killed at random, against the unbroken run.

Two ranks train under ``longskip launch --local 2``. Again and again a random rank gets SIGKILL, SIGTERM or SIGSTOP: somewhere
between two commits, while a checkpoint is being written, or while an attempt starts. The supervisor starts the ranks again;
where it ends with 75 (saved on a signal) the same command is given again. At the end every tensor of the last checkpoint, its
state, every step's loss and the ledger's committed sums are compared with a run that nobody disturbed, and every attempt must
have resumed from the newest step that was committed when the attempt before it was gone.

Between two kills there is a new commit, except for kills at a start, of which no two follow each other: three attempts without
one are a crash loop, as they should be, and ``launch.restarts`` stays what it is.
"""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import typer

from longskip.engine import checkpoint, pulse
from longskip.engine.configio import dump_yaml
from longskip.engine.data.shapes import write_shapes
from longskip.errors import EXIT_DONE, EXIT_SAVED
from longskip.profiling import ledger
from tests.faults.__main__ import machine
from tests.faults.running import end_tree, environment
from tests.ranks import small_config

ROOT = Path(__file__).resolve().parents[1]
RANKS = 2
EVERY = 10  # steps from commit to commit
STEPS_PER_KILL = 40  # of the run: more than a kill costs, so that it does not end before the last one
STEP_TIMEOUT = 15.0
PATIENCE = 600.0  # of one wait of this program, on a busy machine
KINDS = ("weight", "ema", "exp_avg", "exp_avg_sq")
COUNTS = ("steps", "images", "image_tokens", "tokens", "model_flops", "hardware_flops", "six_nd")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP)
Aim = Literal["step", "save", "start"]


class SoakError(Exception):
    """Something that must hold did not."""


@dataclass
class Kill:
    """One kill: what was aimed at, what was there, and what became of it."""

    number: int
    seconds: float  # since the beginning of this program
    aim: Aim
    signal: str
    rank: int
    attempt: int  # the last one that had finished a step
    phase: str  # of the rank when it got the signal, as its pulse tells
    step: int  # the last one that it had finished, −1 before the first
    committed: int  # the newest step that lay there when all ranks of the attempt were gone
    saving: bool  # whether a checkpoint was being written
    recovery: float | None = None  # seconds from the signal to the next attempt's first finished step


@dataclass(frozen=True)
class Draw:
    """What chance says of a kill; ``moment`` is a share of the time in which it may fall."""

    aim: Aim
    signal: signal.Signals
    rank: int
    moment: float


def drawn(seed: int, number: int, before: Aim | None) -> Draw:
    """Kill ``number``'s draw; two kills at a start never follow each other, and the first kill is none."""
    draw = random.Random(f"{seed}/{number}")
    aims: list[Aim] = ["step", "save"] if before in (None, "start") else ["step", "save", "start"]
    aim = draw.choices(aims, [9, 9, 2][: len(aims)])[0]
    return Draw(aim, draw.choice(SIGNALS), draw.randrange(RANKS), draw.random())


class Run:
    """The run's folder as it is seen from outside."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"

    def committed(self) -> int:
        steps = checkpoint.steps_in(self.checkpoints)
        return checkpoint.step_of(steps[-1]) if steps else 0

    def saving(self) -> bool:
        return any(self.checkpoints.glob("step-*.tmp"))

    def last_line(self) -> dict[str, Any]:
        """Of metrics.jsonl; {} where there is none, or it is being written."""
        with suppress(OSError, ValueError, IndexError):
            with open(self.path / "metrics.jsonl", "rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                lines = [line for line in file.read().splitlines() if line.endswith(b"}")]
            line = json.loads(lines[-1])
            return line if isinstance(line, dict) else {}
        return {}

    def resumed(self) -> list[ledger.Resumed]:
        entries = ledger.read(self.path / "ledger.jsonl").entries
        return [entry for entry in entries if isinstance(entry, ledger.Resumed)]

    def losses(self) -> dict[int, float]:
        lines = [json.loads(line) for line in (self.path / "metrics.jsonl").read_text("utf-8").splitlines()]
        return {line["step"]: line["loss/global_avg"] for line in lines if "loss/global_avg" in line}


class Command:
    """The launching command, its ranks, and its being given again."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.process: subprocess.Popen[bytes] | None = None
        self.starts = 0

    def start(self) -> None:
        self.starts += 1
        with open(self.folder / f"{self.name}.log", "ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "longskip.launcher", "launch", "--local", str(RANKS), "--",
                    "train", "run.yaml", f"train.name={self.name}",
                ],
                cwd=self.folder, env=environment(ROOT), stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def ended(self) -> int | None:
        """Its exit code once it is over; given again where it saved on a signal. Raises SoakError for any other end."""
        assert self.process is not None
        code = self.process.poll()
        if code == EXIT_SAVED:
            self.start()
            return None
        if code not in (None, EXIT_DONE):
            tail = (self.folder / f"{self.name}.log").read_text("utf-8", errors="replace")[-3000:]
            raise SoakError(f"the command ended with {code}:\n{tail}")
        return code

    def ranks(self) -> dict[int, psutil.Process]:
        """Rank → its process; a process below another rank's is no rank."""
        assert self.process is not None
        found: dict[int, psutil.Process] = {}
        with suppress(psutil.Error):
            for process in psutil.Process(self.process.pid).children(recursive=True):
                with suppress(psutil.Error, KeyError, ValueError):
                    rank = int(process.environ()["RANK"])
                    if rank not in found and process.status() != psutil.STATUS_ZOMBIE:
                        found[rank] = process
        return found

    def stop(self) -> None:
        if self.process is not None:
            end_tree(self.process)


def wait_for(what: str, ready: Callable[[], Any], command: Command) -> Any:
    """What ``ready`` returns once it is true; SoakError after ``PATIENCE`` seconds or where the run is over before."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if value := ready():
            return value
        if command.ended() is not None:
            raise SoakError(f"the run was over while this program waited for {what}")
        time.sleep(0.01)
    raise SoakError(f"{PATIENCE:.0f} s went by without {what}")


class Soak:
    """One seeded soak in ``folder``; begun again there, it goes on after the kills that are written down."""

    def __init__(self, folder: Path, kills: int, seed: int, say: Callable[[str], None]) -> None:
        self.folder, self.wanted, self.seed, self.say = folder, kills, seed, say
        self.begin = time.monotonic()
        self.run, self.straight = Run(folder / "runs" / "soak"), Run(folder / "runs" / "straight")
        self.record = folder / "kills.jsonl"
        self.kills = (
            [Kill(**json.loads(line)) for line in self.record.read_text().splitlines()] if self.record.exists() else []
        )
        self.known = len(self.run.resumed())  # attempts whose start has been checked
        self.newest = self.run.committed()
        self.attempts_checked = 0

    def prepare(self) -> None:
        if not (self.folder / "run.yaml").exists():
            write_shapes(self.folder / "data" / "train", 300, seed=0)
            write_shapes(self.folder / "data" / "validation", 16, seed=1, held_out=None)
            config = small_config(
                self.folder / "data",
                train={"steps": STEPS_PER_KILL * self.wanted},
                checkpoint={"every": EVERY},
                launch={"step_timeout": STEP_TIMEOUT},
            )
            (self.folder / "run.yaml").write_text(dump_yaml(config))

    def train_straight(self) -> float:
        """The run that nobody disturbs; its seconds."""
        begin = time.monotonic()
        command = Command(self.folder, "straight")
        command.start()
        try:
            while command.ended() is None:
                time.sleep(0.1)
        finally:
            command.stop()
        return time.monotonic() - begin

    def train_under_fire(self) -> None:
        command = Command(self.folder, "soak")
        command.start()
        try:
            while len(self.kills) < self.wanted:
                self._kill(command)
            self.say(f"all {self.wanted} kills are done; the run goes on to its end")
            while command.ended() is None:
                time.sleep(0.1)
            self._check_starts()
        finally:
            command.stop()

    def _kill(self, command: Command) -> None:
        """Aim, wait for the moment, send the signal, see the attempt gone and what it left."""
        number = len(self.kills)
        before = self.kills[-1].aim if self.kills else None
        draw = drawn(self.seed, number, before)
        aim, number_sent, victim, moment = draw.aim, draw.signal, draw.rank, draw.moment
        ranks = wait_for("all ranks", lambda: len(found := command.ranks()) == RANKS and found, command)
        if aim == "start":
            time.sleep(8 * moment)
        else:
            self._wait_for_progress(command)
            if aim == "save":
                wait_for("a checkpoint in the making", self.run.saving, command)
            time.sleep(moment * (0.05 if aim == "save" else 0.5))
        attempt, saving = int(self.run.last_line().get("attempt", 0)), self.run.saving()
        try:
            beat = _beat(ranks[victim])
            ranks[victim].send_signal(number_sent)
        except (psutil.NoSuchProcess, FileNotFoundError):
            raise SoakError(f"rank {victim} of the attempt was gone before anybody killed it") from None
        sent = time.monotonic()
        wait_for("the end of the attempt's ranks", lambda: not any(_alive(p) for p in ranks.values()), command)
        kill = Kill(
            number, sent - self.begin, aim, number_sent.name, victim, attempt, beat.phase, beat.finished,
            self.run.committed(), saving and beat.finished >= 0,  # at a start it is what the last attempt left
        )  # fmt: skip
        self._check_starts()
        self.newest = kill.committed
        self.kills.append(kill)
        if aim != "start" and drawn(self.seed, number + 1, aim).aim != "start":  # which may come before a step is done
            kill.recovery = self._recovered(command, sent, kill)
        with open(self.record, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(kill)) + "\n")
        self._tell(kill)

    def _wait_for_progress(self, command: Command) -> None:
        """A commit that was not there when the last attempt ended."""
        wait_for("a new commit", lambda: self.run.committed() > self.newest, command)

    def _recovered(self, command: Command, sent: float, kill: Kill) -> float:
        """Seconds from the signal to the first step that a later attempt has finished."""
        wait_for(
            "the next attempt's first step", lambda: self.run.last_line().get("attempt", 0) > kill.attempt, command
        )
        return time.monotonic() - sent

    def _check_starts(self) -> None:
        """Every attempt that began since the last look began at the newest commit of that time; raises SoakError."""
        new = self.run.resumed()[self.known :]
        for entry in new:
            if entry.resumed_from != self.newest:
                raise SoakError(
                    f"attempt {entry.attempt} resumed from step {entry.resumed_from}, the newest commit was {self.newest}"
                )
        self.known += len(new)
        self.attempts_checked += len(new)

    def _tell(self, kill: Kill) -> None:
        done = len(self.kills)
        per_kill = (time.monotonic() - self.begin) / done
        recovery = f"next step after {kill.recovery:.1f} s  " if kill.recovery is not None else ""
        self.say(
            f"{done}/{self.wanted}  {kill.signal} to rank {kill.rank} after step {kill.step} in {kill.phase!r}"
            f"{' while saving' if kill.saving else ''}  committed {kill.committed}  {recovery}"
            f"about {per_kill * (self.wanted - done) / 60:.0f} min left"
        )

    # --- what must be the same ----------------------------------------------------------------------------------------

    def compare(self) -> dict[str, Any]:
        """Each thing that must be the same, and whether it is."""
        ours, theirs = (checkpoint.steps_in(run.checkpoints)[-1] for run in (self.run, self.straight))
        results: dict[str, Any] = {"last checkpoint": [ours.name, theirs.name]}
        same = {"the last step": ours.name == theirs.name}
        elements = 0
        with checkpoint.Archive(ours) as mine, checkpoint.Archive(theirs) as its:
            for kind in KINDS:
                same[f"tensors: {kind}"], count = _same_tensors(mine, its, kind)
                elements += count
        same["state.json (cursor, counters)"] = checkpoint.read_state(ours) == checkpoint.read_state(theirs)
        same["the loss of every step"] = self.run.losses() == self.straight.losses()
        mine_sums, its_sums = (
            ledger.sums(ledger.read(run.path / "ledger.jsonl").entries) for run in (self.run, self.straight)
        )
        for count_ in COUNTS:
            same[f"committed {count_}"] = getattr(mine_sums.committed, count_) == getattr(its_sums.committed, count_)
        same["no step missing in the ledger"] = mine_sums.missing_steps == 0
        same["no checkpoint was ever bad"] = not list(self.run.checkpoints.glob("*.bad*"))
        same["nothing half-written is left"] = not list(self.run.checkpoints.glob("*.tmp")) + list(
            self.run.checkpoints.glob("*.old")
        )
        spent = mine_sums.spent.steps
        return results | {
            "same": same, "elements": elements, "steps": mine_sums.committed.steps, "steps_spent": spent,
            "committed_share": mine_sums.committed_share, "attempts": len(self.run.resumed()),
        }  # fmt: skip


def _same_tensors(mine: checkpoint.Archive, its: checkpoint.Archive, kind: Any) -> tuple[bool, int]:
    import torch

    a, b = mine.full(kind), its.full(kind)
    same = a.keys() == b.keys() and all(torch.equal(a[name].view(torch.int32), b[name].view(torch.int32)) for name in b)
    return same, sum(tensor.numel() for tensor in b.values())


def _beat(rank: psutil.Process) -> pulse.Beat:
    """What a rank's pulse tells now, by its own open file."""
    file = rank.environ()[pulse.VARIABLE].removeprefix("/dev/fd/")
    return pulse.read(f"/proc/{rank.pid}/fd/{file}")


def _alive(process: psutil.Process) -> bool:
    with suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def recoveries(kills: list[Kill], name: str) -> list[float]:
    return sorted(kill.recovery for kill in kills if kill.signal == name and kill.recovery is not None)


def markdown(result: dict[str, Any]) -> str:
    """The result for people."""
    same, kills = result["compared"]["same"], [Kill(**kill) for kill in result["kills"]]
    compared = result["compared"]
    facts = (
        f"{len(kills)} kills in {result['seconds'] / 60:.1f} minutes, the unbroken run beside it "
        f"{result['straight_seconds']:.0f} s. {compared['steps']} steps committed, {compared['steps_spent']} executed in "
        f"{compared['attempts']} attempts, a commit every {EVERY} steps; {compared['elements']:,} elements compared bit by bit. "
        f"`launch.step_timeout` {STEP_TIMEOUT:.0f} s (a stopped rank is found after that), `launch.restarts` 3 as by default."
    )
    lines = [
        "# Soak: one run, killed again and again", "",
        f"`python -m tests.soak --kills {result['wanted']} --seed {result['seed']}` ({result['machine']}): {facts}", "",
        "| what must hold | |", "|---|---|",
        *(f"| the same: {what} | {'yes' if held else '**NO**'} |" for what, held in same.items()),
        f"| {result['starts_checked']} attempts began at the newest commit of their time | yes |", "",
        "| signal | kills | while a save went on | at a start | signal → next step, median | longest |", "|---" * 6 + "|",
    ]  # fmt: skip
    for name in [s.name for s in SIGNALS]:
        of = [kill for kill in kills if kill.signal == name]
        times = recoveries(kills, name)
        figures = f"{statistics.median(times):.1f} s | {times[-1]:.1f} s" if times else "– | –"
        saving, starting = sum(kill.saving for kill in of), sum(kill.phase in ("none", "start") for kill in of)
        lines.append(f"| {name} | {len(of)} | {saving} | {starting} | {figures} |")
    lines += [
        "",
        "| kill | after s | signal | rank | aimed at | phase | after step | a save going on | committed then |",
    ]
    lines.append("|---" * 9 + "|")
    for k in kills:
        cells = [
            k.number + 1,
            f"{k.seconds:.1f}",
            k.signal,
            k.rank,
            k.aim,
            k.phase,
            k.step,
            "yes" if k.saving else "",
            k.committed,
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(
    kills: Annotated[int, typer.Option(min=1, help="signals sent")] = 50,
    seed: Annotated[int, typer.Option(help="draws ranks, signals and moments")] = 0,
    folder: Annotated[
        Path | None, typer.Option(help="where the runs lie, kept; given again, the soak goes on there")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="write OUT.json and OUT.md, for instance docs/results/soak")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")] = False,
) -> None:
    """Kill one run at random, again and again, and compare its end with the unbroken run's; 0 where all of it holds."""
    begin = time.monotonic()

    def say(text: str) -> None:
        print(text, file=sys.stderr if as_json else sys.stdout, flush=True)

    with tempfile.TemporaryDirectory(prefix="longskip-soak-") as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        soak = Soak(place.resolve(), kills, seed, say)
        soak.prepare()
        try:
            straight_seconds = soak.train_straight()
            say(f"the unbroken run took {straight_seconds:.0f} s")
            soak.train_under_fire()
        except SoakError as error:
            say(f"FAILED after {len(soak.kills)} kills: {error}")
            raise typer.Exit(1) from None
        compared = soak.compare()
    result = {
        "wanted": kills, "seed": seed, "machine": machine(), "seconds": time.monotonic() - begin,
        "straight_seconds": straight_seconds, "starts_checked": soak.attempts_checked, "compared": compared,
        "kills": [asdict(kill) for kill in soak.kills],
    }  # fmt: skip
    if out is not None:
        out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
        out.with_suffix(".md").write_text(markdown(result), "utf-8")
    for what, held in compared["same"].items():
        say(f"{'same' if held else 'DIFFERENT'}: {what}")
    for name in ("SIGKILL", "SIGTERM", "SIGSTOP"):
        if times := recoveries(soak.kills, name):
            say(f"figure: {name} to the next step: median {statistics.median(times):.1f} s, longest {times[-1]:.1f} s")
    if as_json:
        print(json.dumps(result))
    raise typer.Exit(0 if all(compared["same"].values()) else 1)


if __name__ == "__main__":
    typer.run(main)
