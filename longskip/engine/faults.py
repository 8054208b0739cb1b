"""Named fault points: where a test (or a rehearsal) kills, delays or fails this process.

``LONGSKIP_FAULT="POINT:ACTION[:rank=R][:step=S]"`` (several with ``;``) acts when the engine passes ``POINT`` on rank R at
step S. Actions: ``kill`` (SIGKILL), ``term`` (SIGTERM to this process), ``disk_full`` (ENOSPC), ``sleep`` (5 s).
Without the variable a point costs one dictionary look-up.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass
from typing import Literal, get_args

from longskip.errors import ConfigError

Action = Literal["kill", "term", "disk_full", "sleep"]

POINTS = (
    "step.begin",
    "step.backward",
    "step.done",
    "save.begin",
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
            if key not in ("rank", "step") or not value.isdigit():
                raise ConfigError(f"{VARIABLE}: cannot read {condition!r}", cure="rank=R or step=S")
            where[key] = int(value)
        found.append(Fault(point, action, **where))  # type: ignore[arg-type]
    return tuple(found)


def point(name: str, *, step: int) -> None:
    """Pass the named point; acts only where ``LONGSKIP_FAULT`` says so."""
    text = os.environ.get(VARIABLE)
    if not text:
        return
    rank = int(os.environ.get("RANK", "0"))
    for fault in parse(text):
        if fault.point == name and fault.rank in (None, rank) and fault.step in (None, step):
            _act(fault.action, name)


def _act(action: Action, name: str) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "term":
        os.kill(os.getpid(), signal.SIGTERM)
    elif action == "disk_full":
        raise OSError(errno.ENOSPC, "No space left on device (fault injected)", name)
    elif action == "sleep":
        time.sleep(SLEEP_SECONDS)
