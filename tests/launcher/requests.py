"""Requests for tests of rendering: one of each way, and values that a shell, pdsh, Slurm or Kubernetes would read."""

from __future__ import annotations

from typing import Any

from longskip.engine.config import Config
from longskip.engine.configio import validate
from longskip.launcher.hosts import Cluster
from longskip.launcher.rendering import Request

# What an override, a folder or a variable may hold.
NASTY = [
    "a b", "a;touch pwned", "$(touch pwned)", "`touch pwned`", "a\ntouch pwned\n#SBATCH --nodes=9", "'; touch pwned; '",
    '"; touch pwned; "', "a|b&c", "-oProxyCommand=touch pwned", "*", "~", "$HOME", "$(HOME)", "$$(HOME)", "%h %n", "é☃𝄞", "\\",
    "\\n", "!!", "{a,b}", "#x", "a\tb", "",
]  # fmt: skip


def configured(**launch: Any) -> Config:
    return validate({"data": {"path": "data"}, "train": {"batch_size": 64}, "launch": launch})


def asked(on: Any = "hosts", via: Any = "deepspeed", **changes: Any) -> Request:
    """Two nodes of two ranks, as a user in /home/me would ask for them."""
    given: dict[str, Any] = {
        "cluster": Cluster(2, 2, ("node-1", "node-2")), "train": ("run.yaml", "optim.lr=1e-3"), "run": "runs/run",
        "folder": "/home/me", "python": "/env/bin/python", "master": "node-1", "environment": {"OMP_NUM_THREADS": "4"},
    }  # fmt: skip
    return Request(on=on, via=via, **(given | changes))
