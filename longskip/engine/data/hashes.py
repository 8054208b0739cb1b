"""Hashes of files (no torch, no numpy)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import IO


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _pieces(stream)


def _pieces(stream: IO[bytes]) -> str:  # python 3.10
    digest = hashlib.sha256()
    while piece := stream.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()
