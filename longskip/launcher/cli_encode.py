"""``longskip data encode``: what is typed → encoders, ranks and buckets; progress on a terminal and in a log."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from longskip.errors import ConfigError, LongskipError
from longskip.launcher.progress import counting

LINE_SECONDS = 30.0

Size = tuple[int, int]


def encode(
    out: Annotated[Path, typer.Option(help="the folder for the feature shards")],
    shards: Annotated[
        str | None,
        typer.Argument(metavar="SHARDS", help="a folder of shards (or its URL), or of pictures with captions"),
    ] = None,
    vae: Annotated[Path | None, typer.Option(help="the folder of an AutoencoderKL (diffusers)")] = None,
    text: Annotated[Path | None, typer.Option(help="the folder of a T5 or CLIP with its tokenizer")] = None,
    text_kind: Annotated[str, typer.Option(help="auto, t5 or clip")] = "auto",
    resolution: Annotated[str, typer.Option(help="pixels: 256, or HxW")] = "256",
    buckets: Annotated[str, typer.Option(help="off, auto or HxW,HxW,…: pictures at the nearest aspect ratio")] = "off",
    patch: Annotated[int, typer.Option(min=1, help="the model's patch, for --buckets auto")] = 2,
    n_tokens: Annotated[int | None, typer.Option(min=1, help="tokens a caption; 77 for CLIP, 120 for T5")] = None,
    too_long: Annotated[str, typer.Option(help="captions past --n-tokens: error (left out) or truncate")] = "error",
    dtype: Annotated[str, typer.Option(help="of what is stored: fp16 or fp32")] = "fp16",
    compute: Annotated[str, typer.Option(help="what the encoders compute in: fp32 or bf16")] = "fp32",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda:N")] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="samples at a time")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="threads that read and decode")] = 4,
    per_shard: Annotated[int, typer.Option(min=1, help="samples a shard, of a folder of pictures")] = 10_000,
    keep_pictures: Annotated[bool, typer.Option("--keep-pictures", help="beside their latents")] = False,
    max_bad_share: Annotated[float, typer.Option(min=0, max=1, help="of samples that may be left out")] = 0.05,
    on_damage: Annotated[str, typer.Option(help="damaged bytes: stop, or skip (left out)")] = "stop",
    remote: Annotated[str, typer.Option(help="how SHARDS at a URL are fetched: none, fsspec or webdataset")] = "none",
    cache: Annotated[Path | None, typer.Option(help="where fetched shards lie; ~/.cache/longskip by default")] = None,
    cache_gib: Annotated[
        float, typer.Option(min=0, help="the most that fetched shards take: two for each process, or more")
    ] = 64.0,
    finish: Annotated[bool, typer.Option("--finish", help="only write the index of what the ranks encoded")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object, for machines")] = False,
) -> None:
    """Encode pictures into latents and captions into text features, once, for training to read.

    The same command resumes. With RANK and WORLD_SIZE set each rank encodes its share; they need not run together.
    """
    with _heard():
        if finish:
            _finish(out, max_bad_share, as_json)
            return
        if shards is None:
            raise ConfigError("SHARDS is missing", cure="longskip data encode SHARDS --out DIR --vae PATH --text PATH")
        to_encoders = {
            "text_kind": _one_of("--text-kind", text_kind, "auto", "t5", "clip"),
            "n_tokens": n_tokens,
            "too_long": _one_of("--too-long", too_long, "error", "truncate"),
        }
        to_work = {
            "dtype": _one_of("--dtype", dtype, "fp16", "fp32"),
            "on_damage": _one_of("--on-damage", on_damage, "stop", "skip"),
            "remote": _one_of("--remote", remote, "none", "fsspec", "webdataset"),
            "cache": cache,
            "cache_gib": cache_gib,
        }
        _one_of("--compute", compute, "fp32", "bf16")
        rank, world = _whole("RANK", 0), _whole("WORLD_SIZE", 1)
        size = parse_size(resolution)
        sizes = () if buckets in ("off", "auto") else tuple(parse_size(part) for part in buckets.split(","))

        import torch

        from longskip.engine.data.buckets import auto_buckets
        from longskip.engine.data.encode import encode_shards
        from longskip.engine.encoders import Encoders

        computing = torch.float32 if compute == "fp32" else torch.bfloat16
        encoders = Encoders.at(vae, text, size, _device(device), computing, **to_encoders)
        if buckets == "auto":
            sizes = auto_buckets(size, encoders.vae.factor * patch)
        with _progress(rank) as progress:
            done = encode_shards(
                shards,
                out,
                encoders,
                batch=batch,
                buckets=sizes,
                keep_pictures=keep_pictures,
                rank=rank,
                world=world,
                per_shard=per_shard,
                workers=workers,
                max_bad_share=max_bad_share,
                progress=progress,
                **to_work,
            )
        if as_json:
            print(json.dumps({"out": str(out), "rank": rank, "world": world, **done.to_json()}))
            return
        print(
            f"{done.samples:,} samples in {done.shards} shard(s): {done.encoded} encoded, {done.finished} there before"
        )
        for reason, count in done.bad.items():
            print(f"  left out, {reason}: {count:,}")
        if not done.complete:
            print(f"{out} is complete when the other ranks are done; the last one writes its index")
            return
        print(f"{out} is complete; train on it with")
        for line in _settings(out, encoders, size, sizes):
            print(f"  {line}")


@contextmanager
def _heard() -> Iterator[None]:
    """Lets every rank say its error: these join no process group, and each may fail in its own way."""
    rank = os.environ.get("RANK", "0")
    try:
        yield
    except LongskipError as error:
        if rank == "0":
            raise  # told by the command line
        print(f"longskip: [rank {rank}] {error}", file=sys.stderr, flush=True)
        raise typer.Exit(error.exit_code) from None


def _finish(out: Path, max_bad_share: float, as_json: bool) -> None:
    from longskip.engine.data.encoding import Encoding

    index = Encoding(out).finish(max_bad_share)
    if as_json:
        print(json.dumps({"out": str(out), "samples": index.total, "shards": len(index.shards), "complete": True}))
    else:
        print(f"{index.total:,} samples in {len(index.shards)} shard(s) at {out}: complete")


def _settings(out: Path, encoders: Any, size: Size, buckets: Sequence[Size]) -> Iterator[str]:
    """The configuration that these features ask for, as dotted overrides."""
    yield f"data.path={out}"
    if encoders.vae.kind == "vae":
        yield f"model.resolution={size[0] if size[0] == size[1] else json.dumps(list(size), separators=(',', ':'))}"
        if buckets:
            yield f"data.buckets={json.dumps([list(bucket) for bucket in buckets], separators=(',', ':'))}"
        for name in ("kind", "path", "channels", "factor", "scale", "shift"):
            yield f"encoders.vae.{name}={getattr(encoders.vae, name)}"
    if encoders.text.frozen:
        for name in ("kind", "path", "n_tokens", "width"):
            yield f"encoders.text.{name}={getattr(encoders.text, name)}"


def parse_size(text: str) -> Size:
    """``256`` or ``192x320`` (H x W) in pixels. Raises ``ConfigError`` for anything else."""
    sides = text.strip().lower().split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 6 and int(side) for side in sides):
        raise ConfigError(f"{text!r} is no size in pixels", cure="write 256 for a square, or HxW as in 192x320")
    return int(sides[0]), int(sides[-1])


def _one_of(name: str, value: str, *known: str) -> Any:
    if value not in known:
        raise ConfigError(f"{name} {value!r}", cure=f"one of {', '.join(known)}")
    return value


def _whole(name: str, default: int) -> int:
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise ConfigError(f"{name}={value!r} is no whole number", cure=f"unset {name}, or let a launcher set it")
    return int(value)


def _device(name: str) -> str:
    """``auto``: this rank's GPU where there is one, else the processor."""
    import torch

    if name == "auto":
        return f"cuda:{_whole('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    there = torch.cuda.device_count()
    if device is None or device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= there):
        raise ConfigError(f"--device {name!r}; {there} CUDA devices are here", cure="auto, cpu or cuda:N")
    return name


@contextmanager
def _progress(rank: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a line every half minute with the rate and the time left."""
    started = said = time.monotonic()
    bar: Callable[[int], None] | None = None
    first = 0

    def tell(done: int, total: int) -> None:
        nonlocal said, bar, first
        if bar is None:
            bar, first = stack.enter_context(counting("encoding", total)), done
        bar(done)
        now = time.monotonic()
        if sys.stderr.isatty() or now - said < LINE_SECONDS or done == first:
            return
        said, rate = now, (done - first) / (now - started)
        left = (total - done) / rate / 60
        print(f"rank {rank}: {done:,} of {total:,} samples, {rate:.1f}/s, {left:.0f} min left", file=sys.stderr)

    with ExitStack() as stack:
        yield tell
