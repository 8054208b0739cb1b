"""Small sets of captioned pictures for tests of hostile data."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from longskip.engine.data.pack import write_shards


def picture(i: int, size: int = 8, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (size, size + 1, 3), dtype=np.uint8)).save(buffer, format)
    return buffer.getvalue()


def pictures(folder: Path, count: int = 12, per_shard: int = 6) -> Path:
    write_shards(({"png": picture(i), "txt": f"number {i}"} for i in range(count)), folder, per_shard=per_shard)
    return folder


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def features(folder: Path, count: int = 6) -> Path:
    """Shards of latents (4, 4, 4) and text features (3, 8), as ``longskip data encode`` writes them."""
    numbers = np.random.default_rng(0)
    write_shards(
        (
            {
                "latent.npy": npy(numbers.normal(size=(4, 4, 4)).astype(np.float16)),
                "text.npy": npy(numbers.normal(size=(1, 3, 8)).astype(np.float16)),
                "mask.npy": npy(np.ones((1, 3), np.uint8)),
                "txt": f"number {i}",
            }
            for i in range(count)
        ),
        folder,
    )
    return folder


def tar(path: Path, members: Iterable[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
