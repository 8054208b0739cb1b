"""N ranks on this machine under a supervisor in this process."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from longskip.errors import EXIT_DONE, ConfigError
from longskip.launcher.processes import MODULE, rank_environment

__all__ = ["launch", "rank_environment"]


def launch(ranks: int, arguments: Sequence[str], *, dry_run: bool = False) -> int:
    """Run ``longskip ARGUMENTS`` on ``ranks`` ranks; returns 0 done, 2 configuration, 75 saved on a signal, 1 failed."""
    from longskip.launcher.supervisor import Supervision, supervise

    if ranks < 1:
        raise ConfigError(f"--local {ranks}: at least one rank is needed")
    if dry_run:
        print(" ".join([sys.executable, "-m", MODULE, "supervise", "--ranks", str(ranks), "--", *arguments]))
        return EXIT_DONE
    return supervise(
        Supervision(
            nodes=1,
            node=0,
            ranks=ranks,
            store="127.0.0.1:0",
            bind=None,
            elastic=False,
            min_nodes=1,
            preflight="no",
            arguments=tuple(arguments),
        )
    )
