"""A run's saves: copied at a step's end, written while training goes on, committed once every rank has said that it is done.

Between the copy and the commit no rank waits for another: a rank adds one figure to the step's control figures (1 where its
part is done), and when the sum says that all are, all of them meet twice, for a moment, at a step's end: to give the first
rank the hashes of their files, and to hear from it that the checkpoint is committed. A thread never communicates. So all
ranks agree at the same step what became of a save.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from longskip.engine import faults
from longskip.engine.checkpoint import Draft, attempt, live
from longskip.engine.config import CheckpointGroup
from longskip.engine.shards import Shards
from longskip.engine.snapshot import Snapshot
from longskip.errors import CheckpointError

PATIENCE = 2.0  # seconds that a rank which fails waits for its thread


@dataclass(frozen=True)
class Saved:
    """What became of the save of ``step``: committed, or an ``error`` that is the same on all ranks.

    ``seconds`` from its begin to the commit, as the first rank's clock says; ``held`` of this rank's training, of which
    ``waited`` for the save before it. In the foreground training is held all the time.
    """

    step: int
    seconds: float
    held: float
    waited: float
    background: bool
    error: CheckpointError | None = None


@dataclass
class _Running:
    """A save in the background; ``result`` is that of the thread that runs, or has run last."""

    draft: Draft
    state: str
    begun: float
    waited: float
    held: float = 0.0  # none in the foreground
    seconds: float = 0.0
    committing: bool = False
    thread: threading.Thread | None = None
    result: dict[str, Any] | None = None

    def start(self, act: Callable[[], dict[str, Any]]) -> None:
        self.result = None

        def run() -> None:
            try:
                result = attempt(act)
            except Exception as error:  # of any kind: the other ranks must hear of it
                result = {"error": f"{type(error).__name__}: {error}", "disk_full": False}
            self.result = result | {"seconds": result.get("committed", 0.0) - self.begun}

        self.thread = threading.Thread(target=run, name="longskip-save", daemon=True)
        self.thread.start()


class Saving:
    """The saves of one run, one at a time. Every rank calls ``save``, ``settle`` and ``hear`` at the same places.

    ``records`` are files that must be on the disk before a checkpoint is seen. ``ended`` is told, on every rank, what
    became of each save; ``say`` what else is worth a line.
    """

    def __init__(
        self,
        checkpoints: Path,
        shards: Shards,
        group: CheckpointGroup,
        *,
        records: tuple[Path, ...] = (),
        ended: Callable[[Saved], None] = lambda saved: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._checkpoints, self._shards, self._group = checkpoints, shards, group
        self._records, self.ended, self._say = records, ended, say
        self._background = group.background
        self._snapshot: Snapshot | None = None
        self._running: _Running | None = None

    # --- the verbs ----------------------------------------------------------------------------------------------------

    def save(self, step: int, state: dict[str, Any], *, now: bool = False) -> Saved | None:
        """Save ``step``; in the background unless ``now`` or the configuration says otherwise.

        Waits for the save that is still being written. What became of this one is returned where it has ended already.
        """
        begun = time.monotonic()
        self.settle()
        draft = Draft(
            self._checkpoints, step, self._shards, self._group.keep_last, self._group.keep_every, self._records
        )
        run = _Running(draft, json.dumps(state, indent=1), begun, waited=time.monotonic() - begun)
        try:
            if self._opened_for_background(draft, now) and self._snapshot is not None:
                self._snapshot.take()
                faults.point("save.snapshot", step=step)
                run.start(partial(draft.write, self._snapshot.pieces))
                self._running, run.held = run, time.monotonic() - begun
                return None
            draft.join(draft.write(partial(live, self._shards)))
            draft.close(draft.commit(run.state) if self._shards.rank == 0 else None)
        except CheckpointError as error:
            return self._end(run, error)
        return self._end(run)

    def _opened_for_background(self, draft: Draft, now: bool) -> bool:
        """Open the draft; whether it is to be written in the background: where every rank's memory holds a copy."""
        wanted = self._background and not now
        if wanted and self._snapshot is None:
            self._snapshot = Snapshot(self._shards)
        rooms = draft.open(reserved=wanted and self._snapshot is not None and self._snapshot.reserve())
        without = [str(rank) for rank, room in enumerate(rooms) if not room["reserved"]]
        if not wanted or not without:
            return wanted
        self._background, self._snapshot = False, None
        self._say(
            f"host memory of rank {', '.join(without)} does not hold a copy of its state: saving in the foreground, "
            "which holds the training until all is written"
        )
        return False

    @property
    def figure(self) -> float:
        """What this rank adds to the control figures: 1.0 once what the others wait for is done here."""
        run = self._running
        if run is None or (run.committing and self._shards.rank > 0):
            return 0.0
        return float(run.result is not None)

    def hear(self, total: float) -> None:
        """``total``: every rank's ``figure``, summed. Where all are done the save goes on, or ends."""
        run = self._running
        if run is not None and round(total) == (1 if run.committing else self._shards.world):
            self._advance(run)

    def settle(self) -> None:
        """Return once the save in the background, if there is one, is committed or has failed; all ranks call it."""
        while (run := self._running) is not None:
            self._advance(run)

    def release(self) -> None:
        """Give the memory of the copy back; the next save asks for it anew."""
        self._snapshot = None

    def close(self) -> None:
        """At the end of a rank that does not reach the others any more: what is half-way is given up.

        Where all parts are there the first rank still commits them, if that is soon done.
        """
        if (run := self._running) is not None and run.thread is not None:
            if not run.committing:
                run.draft.disk.stop()
            run.thread.join(PATIENCE)
            run.draft.disk.stop()

    # --- the way of a save in the background --------------------------------------------------------------------------

    def _advance(self, run: _Running) -> None:
        """From written to committing, or from committing to the end; all ranks together."""
        begun, first = time.monotonic(), self._shards.rank == 0
        if run.thread is not None:
            run.thread.join()
        try:
            if run.committing:
                run.seconds = run.draft.close(run.result if first else None)["seconds"]
                self._running = None
            else:
                run.draft.join(run.result or {})
                run.committing, run.thread = True, None
                if first:
                    run.start(partial(run.draft.commit, run.state))
        except CheckpointError as error:
            self._running = None
            run.held += time.monotonic() - begun
            self._end(run, error)
            return
        run.held += time.monotonic() - begun
        if self._running is None:
            self._end(run)

    def _end(self, run: _Running, error: CheckpointError | None = None) -> Saved:
        background = run.held > 0
        seconds = run.seconds if background and error is None else time.monotonic() - run.begun
        saved = Saved(run.draft.step, seconds, run.held if background else seconds, run.waited, background, error)
        self.ended(saved)
        return saved
