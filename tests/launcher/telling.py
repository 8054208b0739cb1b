"""A node's supervisor whose ranks train and write down the samples of every step: ``python -m tests.launcher.telling``.

Arguments: ``nodes node ranks store elastic CONFIG [overrides]``; ``LONGSKIP_PAUSE``: seconds that a step lasts longer.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from longskip.launcher.cli import main


def tell() -> None:
    """From here on a rank tells in ``ids-RANK`` of the current folder: attempt, step, world, ids."""
    from longskip.engine.job import Job

    plain = Job.step

    def step(self: Job, micro_batches: list[Any]) -> None:
        ids = [int(i) for micro in micro_batches for i in micro.samples]
        with open(f"ids-{os.environ['RANK']}", "a") as file:
            file.write(json.dumps([self.attempt, self.state.step + 1, self.world.size, ids]) + "\n")
        time.sleep(float(os.environ.get("LONGSKIP_PAUSE", "0")))
        plain(self, micro_batches)

    Job.step = step  # type: ignore[method-assign]


def be_rank(words: list[str]) -> None:
    """``longskip train``, telling."""
    tell()
    main(words)


def samples_of(folder: Path) -> dict[int, dict[int, list[int]]]:
    """Step → attempt → the ids of its global batch, sorted, over all ranks."""
    seen: dict[int, dict[int, list[int]]] = {}
    for path in folder.glob("ids-*"):
        for line in path.read_text().splitlines():
            attempt, step, _, ids = json.loads(line)
            seen.setdefault(step, {}).setdefault(attempt, []).extend(ids)
    return {step: {a: sorted(ids) for a, ids in by.items()} for step, by in sorted(seen.items())}


def supervise(words: list[str]) -> int:
    from longskip.launcher import processes
    from longskip.launcher.supervisor import Supervision
    from longskip.launcher.supervisor import supervise as run

    def command(arguments: Any) -> list[str]:
        program = f"from tests.launcher.telling import be_rank; be_rank({list(arguments)!r})"
        return [sys.executable, "-c", program]

    processes.rank_command = command
    nodes, node, ranks = map(int, words[:3])
    return run(
        Supervision(
            nodes=nodes,
            node=node,
            ranks=ranks,
            store=words[3],
            bind=None,
            elastic=words[4] == "elastic",
            min_nodes=1,
            preflight="no",
            arguments=("train", *words[5:]),
        )
    )


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:]))
