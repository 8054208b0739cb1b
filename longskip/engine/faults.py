"""Named fault points: where a test (or a rehearsal) kills, delays or fails this process.

``LONGSKIP_FAULT="POINT:ACTION[:rank=R][:step=S][:nth=N]"`` (several with ``;``) acts when the engine passes ``POINT`` on
rank R at step S; with ``nth`` only the N-th time that this process passes it at a step. The points of a save act in the
thread that writes it; ``save.io`` is passed before every write, fsync and rename. Actions: ``kill`` (SIGKILL), ``term``
(SIGTERM to this process), ``disk_full`` (ENOSPC), ``sleep`` (5 s), and those that are handed back to the engine, which does
them itself: ``nan`` (the loss is NaN) and ``inf_grad`` (a finite loss with an infinite gradient) at ``step.loss``, ``flip``
(one bit of a weight) at ``step.done``. Without the variable a point costs one dictionary look-up.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

from longskip.errors import ConfigError

Action = Literal["kill", "term", "disk_full", "sleep", "nan", "inf_grad", "flip"]

POINTS = (
    "step.begin",
    "step.loss",
    "step.backward",
    "step.done",
    "save.begin",
    "save.snapshot",
    "save.io",
    "save.shard_half",
    "save.shard_written",
    "save.before_manifest",
    "save.before_rename",
    "save.before_latest",
    "save.done",
)
VARIABLE = "LONGSKIP_FAULT"
SLEEP_SECONDS = 5.0


@dataclass(frozen=True)
class Fault:
    point: str
    action: Action
    rank: int | None = None
    step: int | None = None
    nth: int | None = None


_passed: Counter[tuple[str, int]] = Counter()  # (point, step), counted only where the variable is set


def parse(text: str) -> tuple[Fault, ...]:
    """Faults of a ``LONGSKIP_FAULT`` value; raises ConfigError naming the unknown part."""
    found = []
    for item in filter(None, text.split(";")):
        point, _, rest = item.partition(":")
        action, *conditions = rest.split(":")
        if point not in POINTS:
            raise ConfigError(f"{VARIABLE}: unknown point {point!r}", cure=f"one of {', '.join(POINTS)}")
        if action not in get_args(Action):
            raise ConfigError(f"{VARIABLE}: unknown action {action!r}", cure=f"one of {', '.join(get_args(Action))}")
        where: dict[str, int] = {}
        for condition in conditions:
            key, _, value = condition.partition("=")
            if key not in ("rank", "step", "nth") or not value.isdigit():
                raise ConfigError(f"{VARIABLE}: cannot read {condition!r}", cure="rank=R, step=S or nth=N")
            where[key] = int(value)
        found.append(Fault(point, action, **where))  # type: ignore[arg-type]
    return tuple(found)


def point(name: str, *, step: int) -> frozenset[Action]:
    """Pass the named point; acts only where ``LONGSKIP_FAULT`` says so. Returns the actions that are left to the caller."""
    text = os.environ.get(VARIABLE)
    if not text:
        return frozenset()
    rank = int(os.environ.get("RANK", "0"))
    left: set[Action] = set()
    _passed[name, step] += 1
    for fault in parse(text):
        here = fault.point == name and fault.rank in (None, rank) and fault.step in (None, step)
        if here and fault.nth in (None, _passed[name, step]):
            _act(fault.action, name)
            left.add(fault.action)
    return frozenset(left)


def _act(action: Action, name: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif action == "disk_full":
        raise OSError(errno.ENOSPC, "No space left on device (fault injected)", name)
    elif action == "sleep":
        time.sleep(SLEEP_SECONDS)
