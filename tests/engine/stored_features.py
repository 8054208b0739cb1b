"""Shards of latents and text features that no encoder made."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from longskip.engine.data.encoding import npy_bytes
from longskip.engine.data.pack import write_shards

N_TOKENS, WIDTH = 6, 8
SIDES = [(8, 8), (4, 16)]  # of latents: a factor of 4 below 32x32 and 16x64 pixels


def write_features(folder: Path, count: int = 60) -> Path:
    """Latents of two sizes in turn; the first sample has no text features, the second's captions are two."""
    random = np.random.default_rng(0)
    folder.mkdir(parents=True)

    def text(rows: int) -> dict[str, bytes]:
        return {
            "text.npy": npy_bytes(random.standard_normal((rows, N_TOKENS, WIDTH)).astype(np.float16)),
            "mask.npy": npy_bytes(random.integers(0, 2, (rows, N_TOKENS), dtype=np.uint8)),
        }

    def rows():
        for i in range(count):
            latent = random.standard_normal((4, *SIDES[i % 2])).astype(np.float16)
            sample: dict[str, Any] = {"latent.npy": npy_bytes(latent), "txt": f"number {i}"}
            if i == 1:
                sample["json"] = {"captions": [{"text": "one"}, {"text": "another"}]}
            yield sample | (text(2 if i == 1 else 1) if i else {})

    empty = {"text": np.full((N_TOKENS, WIDTH), 7, np.float16), "mask": np.eye(1, N_TOKENS, dtype=np.uint8)[0]}
    save_file(empty, folder / "empty.safetensors")
    sha256 = hashlib.sha256((folder / "empty.safetensors").read_bytes()).hexdigest()
    write_shards(rows(), folder, per_shard=20, encoders={"text": {"empty_sha256": sha256}})
    return folder
