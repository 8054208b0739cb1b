"""What a node found before the first step, as it is sent to node 0 (no torch).

A probe's facts are JSON values under the probe's name:

- ``software``: ``python``, ``packages`` {name: version or None}, ``code`` (SHA-256 of longskip's files), ``config`` {key: short
  hash of its value}, ``deepspeed`` (SHA-256 of the DeepSpeed JSON, None where there is none)
- ``devices``: ``kind`` (``cpu`` or ``cuda``), ``cores``, ``threads`` (OMP_NUM_THREADS), ``open_files`` and ``open_files_most``
  (soft and hard limit), ``available`` and ``total`` bytes of host memory, ``shared`` (free bytes of /dev/shm), ``gpus``
  [{``name``, ``free``, ``total`` bytes, ``uncorrected`` errors, ``slowed`` [reasons]}], ``health`` (None, or why it is unknown)
- ``data``: ``sets`` [{``name``, ``path``, ``kind``, ``shards``, ``samples``, ``fingerprint``, ``checked``, ``error``, ``cure``}],
  ``files`` {setting: path that is not there}
- ``run``: ``path``, ``seen``, ``writable``, ``locked`` (None: not tried), ``free`` bytes, ``steps`` (checkpoints there),
  ``owner`` (another job, or None), ``error``
- ``reach``: ``address``, ``interface``, ``mtu``, ``unreached`` {node: why}, ``reached``, ``offset`` and ``uncertainty`` (seconds,
  of this node's clock against node 0's), ``listening`` [addresses beyond loopback], ``error``
- ``interconnect``: ``backend``, ``cuda`` (devices that torch sees), ``latency`` (seconds), ``busbw`` and ``inward`` (bytes/s),
  ``right`` (whether the sum was)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from longskip.errors import RendezvousError


@dataclass(frozen=True)
class Facts:
    """One node's facts: probe → what it found, why it failed where it did, and its seconds."""

    node: int
    host: str
    found: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def of(self, probe: str) -> Mapping[str, Any]:
        """What a probe found; nothing where it did not get so far."""
        return self.found.get(probe, {})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any, node: int) -> Facts:
        """The facts that node ``node`` sent; RendezvousError for what no node of this version sends."""
        maps = ("found", "failed", "seconds")
        if (
            not isinstance(value, dict)
            or value.get("node") != node
            or not isinstance(value.get("host"), str)
            or any(not isinstance(value.get(name), dict) for name in maps)
            or any(not isinstance(found, dict) for found in value["found"].values())
        ):
            raise RendezvousError(f"node {node} sent no facts that can be read", cure="the same longskip on all nodes")
        return cls(node, value["host"], *(value[name] for name in maps))
