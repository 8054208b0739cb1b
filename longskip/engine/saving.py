"""A run's saves: copied at a step's end, written while training goes on, committed once every rank has brought its part.

Between the copy and the commit no rank waits for another: each rank's thread posts the hashes of its files, the first rank's
thread commits once it has all of them, and adds one figure to the step's control figures. When that is told, all ranks meet
for a moment at the step's end, to hear what became of the save: so all of them know it from the same step on. A thread takes
part in no collective.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longskip.engine import faults
from longskip.engine.checkpoint import Draft, Pieces, attempt
from longskip.engine.config import CheckpointGroup
from longskip.engine.distributed import barrier
from longskip.engine.post import Post
from longskip.engine.shards import Shards
from longskip.engine.snapshot import Snapshot
from longskip.errors import CheckpointError, PeerLostError

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
    """A save in the background: this rank's part of it, and on the first rank, which waits for all parts, the commit."""

    draft: Draft
    state: str
    begun: float
    waited: float
    held: float = 0.0  # none in the foreground
    seconds: float = 0.0
    committing: bool = False
    brought: threading.Event = field(
        default_factory=threading.Event
    )  # this rank's part is written and posted, or failed
    outcome: dict[str, Any] | None = None  # on the first rank
    lost: PeerLostError | None = None  # what the thread met where the others cannot hear of it

    def start(self, pieces: Pieces, post: Post, name: str) -> None:
        self.thread = threading.Thread(target=self._run, args=(pieces, post, name), name="longskip-save", daemon=True)
        self.thread.start()

    def _run(self, pieces: Pieces, post: Post, name: str) -> None:
        part = _foreseen_or_not(lambda: self.draft.write(pieces))
        try:
            if post.rank > 0:
                post.tell(name, part)
        except PeerLostError as error:
            self.lost = error
        finally:
            self.brought.set()
        if post.rank == 0:
            self.outcome = _foreseen_or_not(lambda: self._commit(post.hear(name, part, self.draft.disk.pause)))

    def _commit(self, parts: list[dict[str, Any]]) -> dict[str, Any]:
        self.committing = True
        outcome = self.draft.commit(self.state, parts)
        return outcome | {"seconds": outcome.get("committed", 0.0) - self.begun}


def _foreseen_or_not(act: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A thread's result, which may be an error."""
    try:
        return attempt(act)
    except Exception as error:  # of any kind: the other ranks must hear of it
        return {"error": f"{type(error).__name__}: {error}", "disk_full": False}


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
        self._post: Post | None = None
        self._begun = 0

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
                self._start(run, self._snapshot)
                run.held = time.monotonic() - begun
                return None
            draft.in_the_foreground(run.state)
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
        """What this rank adds to the control figures: 1.0 on the first one once it knows what became of the save.

        Raises PeerLostError where this rank's part cannot be told to the first one any more.
        """
        run = self._running
        if run is not None and run.lost is not None:
            raise run.lost
        return float(run is not None and run.outcome is not None)

    def hear(self, total: float) -> None:
        """``total``: every rank's ``figure``, summed. Where the first rank knows what became of the save, all hear it."""
        if self._running is not None and total:
            self._conclude(self._running)

    def settle(self) -> None:
        """Return once the save in the background, if there is one, is committed or has failed; all ranks call it.

        They meet when each has brought its part, so that a rank which is gone is missed there, and not waited for.
        """
        if (run := self._running) is not None:
            begun = time.monotonic()
            run.brought.wait()
            if run.lost is not None:
                raise run.lost
            barrier()
            run.thread.join()
            run.held += time.monotonic() - begun
            self._conclude(run)

    def release(self) -> None:
        """Give the memory of the copy back; the next save asks for it anew."""
        self._snapshot = None

    def close(self) -> None:
        """At the end of a rank that does not reach the others any more: what is half-way is given up.

        Where all parts are there the first rank still commits them, if that is soon done.
        """
        if (run := self._running) is not None:
            if not run.committing:
                run.draft.disk.stop()
            run.thread.join(PATIENCE)
            run.draft.disk.stop()

    # --- the way of a save in the background --------------------------------------------------------------------------

    def _start(self, run: _Running, snapshot: Snapshot) -> None:
        self._post = self._post or Post(self._shards.rank, self._shards.world)
        self._begun += 1
        run.start(snapshot.pieces, self._post, f"save-{self._begun}")
        self._running = run

    def _conclude(self, run: _Running) -> None:
        """All ranks hear from the first one what became of the save."""
        begun, self._running, failed = time.monotonic(), None, None
        try:
            run.seconds = run.draft.close(run.outcome)["seconds"]
        except CheckpointError as error:
            failed = error
        run.held += time.monotonic() - begun
        self._end(run, failed)

    def _end(self, run: _Running, error: CheckpointError | None = None) -> Saved:
        background = run.held > 0
        seconds = run.seconds if background and error is None else time.monotonic() - run.begun
        saved = Saved(run.draft.step, seconds, run.held if background else seconds, run.waited, background, error)
        self.ended(saved)
        return saved
