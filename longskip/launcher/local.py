"""N ranks on this machine under a supervisor in this process."""

from __future__ import annotations

from collections.abc import Sequence

from longskip.errors import ConfigError
from longskip.launcher.processes import rank_environment

__all__ = ["launch", "rank_environment"]


def launch(ranks: int, arguments: Sequence[str]) -> int:
    """Run ``longskip ARGUMENTS`` on ``ranks`` ranks; returns 0 done, 2 configuration, 75 saved on a signal, 1 failed."""
    from longskip.launcher.supervisor import Supervision, supervise

    if ranks < 1:
        raise ConfigError(f"--local {ranks}: at least one rank is needed")
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
