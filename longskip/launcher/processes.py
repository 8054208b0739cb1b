"""The ranks of one node as processes: started, watched, asked, and ended with everything that they started."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from longskip.engine import pulse
from longskip.engine.pulse import Beat
from longskip.engine.signals import ASKING, SUPERVISOR
from longskip.errors import EXIT_DONE, EXIT_SAVED, EXIT_USAGE, LongskipError
from longskip.launcher import stacks
from longskip.launcher.members import Ending

MODULE = "longskip.launcher"
GRACE_SECONDS = 2.5  # for ranks that a neighbour's death ends, to say so themselves
REAP_SECONDS = 10.0
QUIET_SECONDS = 30.0  # the least time-out of a step, and of a rank that stands still by a signal
TAIL_BYTES, TAIL_LINES = 8192, 12
_OF_ONE_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Limits:
    """How long a rank may stay at one thing, in seconds; ``step`` None: learned from its steps."""

    step: float | None
    phase: float

    def of(self, beat: Beat, slowest: float) -> float:
        """The limit of what ``beat`` tells; ``slowest`` is the longest step that is known, 0 for none.

        ``auto`` is ten times the slowest step, at least 30 s; before the first step is done, which may compile, the limit
        is that of other phases.
        """
        if beat.phase == "end":
            return min(self.phase, 60.0)
        if beat.phase != "step":
            return self.phase
        return self.step or (max(QUIET_SECONDS, 10 * slowest) if slowest else self.phase)

    def of_stopped(self, slowest: float) -> float:
        """The limit of a rank that is stopped by a signal, whatever it was at."""
        return self.step or max(QUIET_SECONDS, 10 * slowest)


@dataclass
class RankProcess:
    """One rank: its process and what its pulse last told, at which moment of this process's clock."""

    rank: int
    process: subprocess.Popen[bytes]
    file: int  # the pulse, an unlinked file
    stacks: Path
    log: Path | None  # where its output goes; None: to ours
    log_start: int
    beat: Beat = field(default_factory=Beat)
    changed: float = field(default_factory=time.monotonic)
    stopped_since: float | None = None
    told: bool = False
    over: bool = False

    def listen(self, now: float) -> None:
        beat = pulse.read(self.file)
        if beat.count != self.beat.count:
            self.beat, self.changed = beat, now
        stopped = stacks.is_stopped(self.process.pid)
        self.stopped_since = (self.stopped_since or now) if stopped else None


class Team:
    """The ranks of this node in one attempt. Use it from one thread that lives as long as the ranks may."""

    def __init__(self, arguments: Sequence[str], run: Path, limits: Limits) -> None:
        self.arguments, self.run, self.limits = arguments, run, limits
        self.endings: list[Ending] = []
        self.slowest = 0.0  # over the attempts of one world
        self._ranks: list[RankProcess] = []
        self._world = 0
        self._mark = f"{os.getpid()}-{secrets.token_hex(8)}"  # in the environment of all that our ranks start

    def start(self, attempt: int, first: int, share: int, world: int, environment: Mapping[str, str]) -> None:
        """Start ranks ``first`` to ``first + share`` of ``world``; rank 0's output is ours, the others have logs."""
        self.kill()  # what is left of the attempt before
        self._ranks.clear()
        if world != self._world:
            self._world, self.slowest = world, 0.0
        self.endings = []
        for local in range(share):
            own = {"RANK": first + local, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": share, "WORLD_SIZE": world}
            self._ranks.append(
                self._start(first + local, attempt, {**environment, **{k: str(v) for k, v in own.items()}})
            )

    def _start(self, rank: int, attempt: int, environment: dict[str, str]) -> RankProcess:
        logs = self.run / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"rank-{rank}.log" if rank else None
        shown = logs / f"stacks-{attempt}-rank-{rank}.txt"
        with tempfile.TemporaryFile() as file:
            file.write(bytes(pulse.SIZE))
            file.flush()
            descriptor = os.dup(file.fileno())
        environment |= {
            pulse.VARIABLE: f"/dev/fd/{descriptor}",
            pulse.STACKS: str(shown.absolute()),
            SUPERVISOR: self._mark,
        }
        command = rank_command(self.arguments)
        with open(log, "ab") if log else contextlib.nullcontext(None) as output:
            # A session of its own: Ctrl-C reaches the supervisor alone, and its group holds what the rank starts.
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, pass_fds=[descriptor],
                start_new_session=True,
            )  # fmt: skip
            begin = output.tell() if output else 0
        return RankProcess(rank, process, descriptor, shown, log, begin)

    @property
    def running(self) -> bool:
        return any(not rank.over for rank in self._ranks)

    @property
    def step(self) -> int:
        """The newest step that one of these ranks has finished; −1 where none has told of one."""
        return max((rank.beat.finished for rank in self._ranks), default=-1)

    def poll(self) -> None:
        """See who ended and who hangs; ``endings`` holds what was seen in this attempt."""
        now = time.monotonic()
        for rank in self._ranks:
            if not rank.over:
                rank.listen(now)
                if _has_ended(rank.process):
                    self._ended(rank)
        alive = [rank for rank in self._ranks if not rank.over]
        self.slowest = max([self.slowest, *(rank.beat.slowest for rank in alive)])
        if not any(ending.kind == "hung" for ending in self.endings):
            self._look_for_hung(alive, now)

    def forgive(self, seconds: float) -> None:
        """Count so many seconds of standing still less, of every rank."""
        for rank in self._ranks:
            rank.changed += seconds
            rank.stopped_since = None

    def _look_for_hung(self, alive: list[RankProcess], now: float) -> None:
        limit = self.limits.of_stopped(self.slowest)
        still = [rank for rank in alive if rank.stopped_since is not None and now - rank.stopped_since > limit]
        late = [rank for rank in alive if now - rank.changed > self.limits.of(rank.beat, self.slowest)]
        if late:  # a stopped one among them is the cause, however long the others wait for it
            still += [rank for rank in alive if rank.stopped_since is not None and rank not in still]
        for rank in still or late:
            since = now - (rank.stopped_since or rank.changed if rank in still else rank.changed)
            what = "stopped by a signal" if rank in still else f"in {rank.beat.phase!r}"
            detail = f"{what} for {since:.0f} s"
            self.endings.append(
                Ending(rank.rank, "hung", detail, rank.beat.finished, signal=signal.SIGSTOP if rank in still else 0)
            )

    def _ended(self, rank: RankProcess, put_down: bool = False) -> None:
        """Sweep the group of a rank that has ended, before its number can be another's, and keep how it ended."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(rank.process.pid, signal.SIGKILL)
        code = rank.process.wait()
        rank.over = True
        rank.beat = pulse.read(rank.file)
        os.close(rank.file)
        if rank.stacks.is_file() and not rank.stacks.stat().st_size:
            rank.stacks.unlink(missing_ok=True)
        if not put_down:
            self.endings.append(_classify(rank, code))

    def ask(self, number: int) -> None:
        """Pass a signal on to each rank once, and not before its handler is there (its pulse beats from then on)."""
        for rank in self._ranks:
            if not rank.over and not rank.told and rank.beat.count:
                rank.process.send_signal(number)
                rank.told = True

    def end(self, *, dump: bool = False, at_once: bool = False) -> None:
        """Put all ranks down: after their stacks were dumped where ``dump``, after a short time to end themselves, or now.

        Raises LongskipError where one cannot be killed.
        """
        if not self.running:
            return
        if dump:
            stacks.dump({rank.process.pid: rank.stacks for rank in self._ranks if not rank.over and rank.beat.count})
        deadline = time.monotonic() + (0.0 if dump or at_once else GRACE_SECONDS)
        while self.running and time.monotonic() < deadline:
            self.poll()
            time.sleep(0.05)
        self.kill()

    def kill(self) -> None:
        """Kill the ranks and all that they started, at once."""
        alive = [rank for rank in self._ranks if not rank.over]
        for rank in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(rank.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + REAP_SECONDS
        for rank in alive:
            while not _has_ended(rank.process):
                if time.monotonic() > deadline:
                    raise LongskipError(f"rank {rank.rank} (process {rank.process.pid}) cannot be killed")
                time.sleep(0.01)
            self._ended(rank, put_down=True)
        if self._ranks:
            self._sweep(deadline)

    def _sweep(self, deadline: float) -> None:
        """Kill what ranks that are gone have started in sessions of its own: it is known by its environment."""
        left = [process for process in psutil.process_iter() if _environment_of(process).get(SUPERVISOR) == self._mark]
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=max(0.0, deadline - time.monotonic()))

    def last_words(self, rank: int) -> str:
        """The end of what a rank wrote to its log in this attempt; empty where its output is ours."""
        for each in self._ranks:
            if each.rank == rank and each.log is not None:
                with contextlib.suppress(OSError), open(each.log, "rb") as file:
                    size = file.seek(0, os.SEEK_END)
                    file.seek(max(each.log_start, size - TAIL_BYTES))
                    lines = file.read().decode("utf-8", "replace").splitlines()
                    return "\n".join([line for line in lines if line.strip()][-TAIL_LINES:])
        return ""


def rank_command(arguments: Sequence[str]) -> list[str]:
    """What a rank is: ``longskip ARGUMENTS`` in a process of its own."""
    return [sys.executable, "-m", MODULE, *arguments]


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Whether the process has ended; its number stays its own until it is waited for."""
    if process.returncode is not None:
        return True
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _classify(rank: RankProcess, code: int) -> Ending:
    step = rank.beat.finished
    if code == EXIT_DONE:
        return Ending(rank.rank, "done", step=step)
    if code == EXIT_SAVED:
        return Ending(rank.rank, "saved", step=step)
    if code == EXIT_USAGE:
        return Ending(rank.rank, "refused", "a configuration that cannot be run", step)
    if code < 0:
        asking = rank.told and -code in ASKING
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return Ending(rank.rank, "died", f"killed by {name}", step, signal=0 if asking else -code)
    if rank.beat.word == "final":
        return Ending(rank.rank, "final", "an error that a new start would meet again", step)
    return Ending(rank.rank, "died", f"exit code {code}", step)


def _environment_of(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ()
    except (psutil.Error, OSError):  # another user's, or gone
        return {}


def rank_environment(ranks: int) -> dict[str, str]:
    """The ranks' environment: an even share of the cores each, sleeping rather than spinning OpenMP threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not Path("/dev/nvidiactl").exists():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    for inherited in list(environment):
        if inherited in _OF_ONE_RANK or inherited.startswith("TORCHELASTIC_"):
            del environment[inherited]
    return environment
