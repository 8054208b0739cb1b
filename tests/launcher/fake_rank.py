"""A rank that trains nothing: it tells its pulse, commits empty folders, saves on a signal; no torch, up in a moment.

Run as ``python -m tests.launcher.fake_rank`` it is a node's supervisor with such ranks; ``LONGSKIP_FAKE`` holds JSON:
``steps``, ``every`` (steps per commit), ``pause`` (seconds per step), ``acts`` (``{"ATTEMPT:RANK:STEP": ACTION}``, attempt or
step ``*`` for any), ``children`` (each rank starts a process that would outlive it).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

from longskip.engine import pulse, signals
from longskip.engine.runs import RUNS, write_atomic

SETTINGS = "LONGSKIP_FAKE"


def be_rank(config: str) -> int:
    """The life of one rank; returns its exit code."""
    signals.listen()
    signals.end_with_supervisor()
    pulse.show_stacks_when_asked()
    beat = pulse.own()
    beat.phase("start")
    told = json.loads(os.environ.get(SETTINGS, "{}"))
    rank, attempt = int(os.environ["RANK"]), os.environ["LONGSKIP_ATTEMPT"]
    run = RUNS / Path(config).stem
    if told.get("children"):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stdin=subprocess.DEVNULL)
        subprocess.Popen(["sleep", "600"], start_new_session=True)
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    if rank == 0:
        write_atomic(run / "config.yaml", "{}")
    alive = run / f"alive-{attempt}-{rank}"
    alive.write_text(str(os.getpid()))
    done = [int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")]
    step = max(done, default=0)
    while True:
        beat.step(step + 1)
        with open(run / f"steps-{rank}", "a") as file:
            file.write(f"{attempt} {step + 1} {os.environ['WORLD_SIZE']}\n")
        time.sleep(told.get("pause", 0.02))
        look_at_neighbours(run, attempt)
        act(told.get("acts", {}), attempt, rank, step + 1)
        step += 1
        if rank == 0 and (step % told.get("every", 10) == 0 or signals.asked()):
            (run / "checkpoints" / f"step-{step:08d}").mkdir(exist_ok=True)
        if signals.asked():
            beat.end("saved")
            alive.unlink()
            return 75
        if step >= told.get("steps", 40):
            beat.end("done")
            alive.unlink()
            return 0


def look_at_neighbours(run: Path, attempt: str) -> None:
    """Fail as a collective does when a neighbour of this machine has gone without a word."""
    for path in run.glob(f"alive-{attempt}-*"):
        try:
            os.kill(int(path.read_text() or os.getpid()), 0)
        except ProcessLookupError:
            if path.exists():
                raise ConnectionError("a neighbour was lost") from None
        except FileNotFoundError:
            continue


def act(acts: dict[str, str], attempt: str, rank: int, step: int) -> None:
    for where, what in acts.items():
        at = where.split(":")
        if at[0] in ("*", attempt) and int(at[1]) == rank and at[2] in ("*", str(step)):
            if what == "raise":
                raise ValueError("something that nobody foresaw")
            if what == "final":
                pulse.own().end("final")
                print("longskip: too many bad samples", file=sys.stderr)
                sys.exit(1)
            if what == "wait":
                time.sleep(600)
            if what.startswith("exit"):
                sys.exit(int(what[4:]))
            os.kill(os.getpid(), getattr(signal, what))


def supervise(words: list[str]) -> int:
    """A supervisor whose ranks are this file: ``nodes node ranks store WAY CONFIG [overrides]``, WAY
    ``elastic`` or ``fixed``, and ``,preflight`` where there is one."""
    from longskip.launcher import processes, store
    from longskip.launcher.supervisor import Supervision
    from longskip.launcher.supervisor import supervise as run

    def command(arguments: object) -> list[str]:
        return [
            sys.executable,
            "-c",
            f"import sys; from tests.launcher.fake_rank import be_rank; sys.exit(be_rank({words[5]!r}))",
        ]

    processes.rank_command = command  # type: ignore[assignment]
    nodes, node, ranks = map(int, words[:3])
    way = words[4].split(",")
    if nodes == 1:
        store.open_server = lambda *_: mock.MagicMock()  # nobody meets at it, and torch need not be imported
    return run(
        Supervision(
            nodes=nodes, node=node, ranks=ranks, store=words[3], bind=None, elastic="elastic" in way, min_nodes=1,
            preflight="yes" if "preflight" in way else "no", arguments=("train", *words[5:]),
        )
    )  # fmt: skip


if __name__ == "__main__":
    from longskip.errors import LongskipError

    try:
        sys.exit(supervise(sys.argv[1:]))
    except LongskipError as error:
        print(f"longskip: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
