"""Pictures with captions, tiny encoders, and what encoding the ones with the others gives."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from longskip.engine.config import Config
from longskip.engine.data.encode import EncodeReport, encode_shards
from longskip.engine.data.pack import write_shards
from longskip.engine.data.sources import ShardSource, open_source
from longskip.engine.encoders import Encoders, check_manifest
from tests.tiny_encoders import tiny_clip_text, tiny_t5, tiny_vae

SIZES = [(40, 40), (32, 64), (64, 32), (35, 50)]  # (H, W)


def picture(i: int, size: tuple[int, int] | None = None, format: str = "PNG", **how) -> bytes:
    height, width = size or SIZES[i % len(SIZES)]
    low = np.random.default_rng(i).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(low).resize((width, height), Image.Resampling.BICUBIC).save(buffer, format, **how)
    return buffer.getvalue()


def sample(i: int) -> dict:
    """Every third sample has three captions with weights and something else in its JSON."""
    made = {"__key__": f"s{i:03d}", "png": picture(i), "txt": f"a red star {i}"}
    if i % 3 == 0:
        texts = [f"a large blue circle {i}", "a star", "the small green square"]
        made["json"] = {"captions": [{"text": t, "weight": k + 0.5} for k, t in enumerate(texts)], "scene": [i]}
    return made


def make_folder(folder: Path) -> Path:
    """Tiny encoders, and ten samples in three shards."""
    tiny_vae(folder / "vae")
    tiny_vae(folder / "other_vae", seed=1)
    tiny_t5(folder / "t5")
    tiny_clip_text(folder / "clip")
    write_shards((sample(i) for i in range(10)), folder / "shards", per_shard=4)
    return folder


def of(folder: Path, text: str | None = "t5", vae: str | None = "vae", **settings) -> Encoders:
    if text:
        settings = {"n_tokens": 20} | settings
    return Encoders.at(vae and folder / vae, text and folder / text, (32, 32), "cpu", **settings)


def encode_whole(folder: Path) -> Path:
    """The three shards encoded by one process that nobody disturbed."""
    out = folder / "whole"
    report = encode_shards(folder / "shards", out, of(folder), batch=3)
    assert (report.shards, report.encoded, report.finished, report.samples, report.bad) == (3, 3, 0, 10, {})
    assert report.complete
    return out


def encode_again(folder: Path, out: Path, **settings) -> EncodeReport:
    return encode_shards(folder / "shards", out, of(folder), batch=3, **settings)


def tree(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def array(source: ShardSource, i: int, kind: str) -> np.ndarray:
    return np.load(io.BytesIO(source.member(i, kind) or b""), allow_pickle=False)


def opened(config: Config, path: Path) -> ShardSource:
    """The data of a run, checked as a run checks them."""
    source = open_source(path)
    assert isinstance(source, ShardSource)
    check_manifest(config, source.index.encoders, source.index.members, str(path))
    return source
