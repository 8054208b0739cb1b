"""``longskip bench data``: the reader beside webdataset's default and tuned pipelines, over the same shards in one run.

Contenders take turns in fresh processes (A B C … A B C …) that hand out the same collated batches. Before a ratio is
printed, one epoch of every contender is compared key by key with the bytes that were stored.
"""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from longskip.engine import bench_pipelines
from longskip.engine.bench_common import VERDICTS, about, page, shown, spread, table
from longskip.engine.bench_pipelines import BATCH, LATENT_SHAPE, STORED_SIDE, TEXT_SHAPE, Contender, Kind
from longskip.engine.data.crc import CRC32_BY
from longskip.engine.data.features import LATENT, MASK, TEXT
from longskip.engine.data.pack import write_shards
from longskip.errors import ConfigError, LongskipError

SHARDS = 8
SECONDS = 1.0  # the shortest measurement
PICTURES = 8  # one picture for so many feature samples
RESUMES = 5
TIME_LIMIT = 300.0  # seconds that one process is waited for
COARSE_DIFFERENCE = (
    0.02  # of the means of blocks, of the range [-1, 1]: between a JPEG at half size and one shrunk to it
)

TARGETS: dict[tuple[str, str], float] = {
    ("features", "default"): 25.0,
    ("features", "tuned"): 12.0,
    ("jpeg", "tuned"): 1.0,
}
RESUME_MS = 50.0
FLOORS = (1, 2)  # processes
FLOOR = (
    "Floor: the same bytes by one system call a sample into memory that is used again, and their crc32; no header is "
    "looked at, no batch made. On the right the share of it that longskip reaches."
)


def contenders(workers: int) -> tuple[Contender, ...]:
    """Ours in ``workers`` processes, and webdataset's pipelines; tuned both with two workers and with none."""
    return (
        Contender("longskip", "longskip", bench_pipelines.ours, workers),
        Contender("longskip-draws", "longskip, with times and noise", bench_pipelines.ours_with_draws, workers),
        Contender("default", "webdataset, default", bench_pipelines.default, 2),
        Contender("tuned-2", "webdataset, tuned", bench_pipelines.tuned, 2),
        Contender("tuned-0", "webdataset, tuned", bench_pipelines.tuned, 0),
    )


def bench_data(
    kinds: Sequence[Kind] = ("features", "jpeg"),
    *,
    samples: int = 4096,
    repeats: int = 5,
    workers: int = 2,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Builds shards in a temporary folder and measures every contender ``repeats`` times; the result as JSON values.

    ``samples`` are those of the feature shards; there is a picture for every eighth of them. Raises ``ConfigError`` for
    fewer samples than the shards and batches need, ``LongskipError`` when a contender fails.
    """
    if samples < 2 * SHARDS * BATCH:
        raise ConfigError(f"--samples {samples}; at least {2 * SHARDS * BATCH} fill the shards and batches")
    if repeats < 1:
        raise ConfigError(f"--repeats {repeats}; at least 1")
    samples -= samples % (PICTURES * BATCH)
    options = {"kind": kinds[0] if len(kinds) == 1 else "both", "samples": samples, "repeats": repeats}
    options["workers"] = workers
    load, found = os.getloadavg(), {}
    with tempfile.TemporaryDirectory(prefix="longskip-bench-") as place:
        for kind in kinds:
            folder = Path(place) / kind
            begin = time.monotonic()
            count = samples if kind == "features" else samples // PICTURES
            made = make_shards(folder, kind, count)
            progress(f"{kind}: {count} samples in {SHARDS} shards, {time.monotonic() - begin:.0f} s")
            found[kind] = _of_kind(kind, folder, made, count, repeats, workers, progress)
    return about("data", options, load, "torch", "webdataset", "numpy") | {
        "crc32_by": CRC32_BY,
        "batch": BATCH,
        "repeats": repeats,
        "kinds": found,
    }


def _of_kind(
    kind: Kind,
    folder: Path,
    made: Mapping[str, str],
    count: int,
    repeats: int,
    workers: int,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    entries = contenders(workers)
    gate = {}
    for contender in entries:
        gate[contender.name] = in_process(bench_pipelines.contents, contender, folder, kind)
        progress(f"{kind}: one epoch of {contender.title}, {contender.workers} workers, read for the comparison")
    agree = {name: agrees(kind, found, made, gate["longskip"]) for name, found in gate.items()}
    runs: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in entries}
    floors: dict[int, list[dict[str, float]]] = {processes: [] for processes in FLOORS}
    for repeat in range(repeats):
        for contender in entries:
            runs[contender.name].append(in_process(bench_pipelines.rates, contender, folder, kind, count, SECONDS))
            rate = runs[contender.name][-1]["samples_per_second"]
            progress(f"{kind} {repeat + 1}/{repeats}: {contender.title}, {contender.workers} workers: {rate:,.0f}/s")
        for processes in FLOORS if kind == "features" else ():
            floors[processes].append(in_process(bench_pipelines.floor, folder, processes, SECONDS))
    resumes = [
        in_process(bench_pipelines.resume, folder, kind, (1000 + i) * count + count // 2 + BATCH)
        for i in range(RESUMES)
    ]
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    return {
        "samples": count,
        "shards": SHARDS,
        "bytes_per_sample": size // count,
        "contenders": {
            contender.name: {
                "title": contender.title,
                "workers": contender.workers,
                "same_batches": agree[contender.name],
                **{key: spread([run[key] for run in runs[contender.name]]) for key in ("samples_per_second", "cpu_us")},
            }
            for contender in entries
        },
        "comparisons": comparisons(kind, runs, agree),
        "floors": [shares(processes, found, runs["longskip"]) for processes, found in floors.items() if found],
        "resume_ms": spread(resumes) | ({"asked": RESUME_MS} if kind == "features" else {}),
    }


# -- shards ------------------------------------------------------------------------------------------------------------


def make_shards(folder: Path, kind: Kind, count: int) -> dict[str, str]:
    """Writes ``count`` samples in ``SHARDS`` shards with their index, and reads the files once, so that they lie in the
    page cache as after an epoch; returns the SHA-256 of every sample's batch rows (features) or caption (pictures).
    """
    made: dict[str, str] = {}

    def samples() -> Iterator[Mapping[str, Any]]:
        for i in range(count):
            rng = np.random.default_rng(i)
            caption = f"picture {i} of " + " ".join(str(word) for word in rng.integers(0, 1000, 12))
            digest = hashlib.sha256(caption.encode())
            members: dict[str, Any] = {"txt": caption}
            if kind == "features":
                mask = (np.arange(TEXT_SHAPE[0]) < rng.integers(4, TEXT_SHAPE[0] + 1)).astype(np.uint8)
                latent = rng.standard_normal(LATENT_SHAPE, dtype=np.float32).astype(np.float16)
                text = rng.standard_normal(TEXT_SHAPE, dtype=np.float32).astype(np.float16)
                for name, array in ((LATENT, latent), (TEXT, text), (MASK, mask)):
                    members[name] = _npy(array)
                    digest.update(array.tobytes())
            else:
                members["jpg"] = _jpeg(rng)
            made[f"{i:09d}"] = digest.hexdigest()
            yield members

    write_shards(samples(), folder, per_shard=-(-count // SHARDS), max_bytes=1e12)
    for path in sorted(folder.iterdir()):
        with path.open("rb") as stream:
            if hasattr(os, "posix_fadvise"):  # what was just written lies there in other pieces than what was read
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            while stream.read(1 << 22):
                pass
    return made


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _jpeg(rng: np.random.Generator) -> bytes:
    """A picture of coarse to fine patches, about 126 KB like a photograph of this size."""

    def layer(cells: int) -> Image.Image:
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        return noise.resize((STORED_SIDE, STORED_SIDE), Image.Resampling.BICUBIC)

    picture = layer(4)
    for cells, share in ((24, 0.35), (128, 0.25), (256, 0.2)):
        picture = Image.blend(picture, layer(cells), share)
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=93)
    return stream.getvalue()


# -- measuring ---------------------------------------------------------------------------------------------------------


def in_process(act: Callable[..., Any], *arguments: Any) -> Any:
    """``act``'s result from a fresh process. Raises ``LongskipError`` where it failed or took too long.

    Forked, so that nothing is imported again; this process has no threads and has not used torch.
    """
    context: Any = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_act, args=(theirs, act, arguments))
    process.start()
    theirs.close()
    try:
        if not ours.poll(TIME_LIMIT):
            raise LongskipError(f"{act.__name__} of {arguments[0]} is not done after {TIME_LIMIT:.0f} s")
        result, failure = ours.recv()
    except EOFError:
        raise LongskipError(f"{act.__name__} of {arguments[0]} ended without a result") from None
    finally:
        process.join(timeout=10)
        process.kill()
        process.join()
        ours.close()
    if failure:
        raise LongskipError(f"{act.__name__} of {arguments[0]} failed\n{failure}")
    return result


def _act(connection: Any, act: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of webdataset's, about defaults that are set
    try:
        connection.send((act(*arguments), ""))
    except BaseException:
        connection.send((None, traceback.format_exc()))
    connection.close()


# -- figures -----------------------------------------------------------------------------------------------------------


def agrees(kind: Kind, found: Mapping[str, Any], made: Mapping[str, str], ours: Mapping[str, Any]) -> bool:
    """Whether an epoch had every sample once, with the stored bytes (features) or the pixels of our decoder (pictures:
    bit by bit, or nearly so where webdataset's own decoder was used)."""
    if found.keys() != made.keys():
        return False
    if kind == "features":
        return all(found[key]["sha256"] == made[key] for key in made)
    if all(found[key]["sha256"] == ours[key]["sha256"] for key in made):
        return True
    apart = [np.abs(np.subtract(found[key]["coarse"], ours[key]["coarse"])).max() for key in made]
    return bool(np.max(apart) <= COARSE_DIFFERENCE)


def comparisons(
    kind: Kind, runs: Mapping[str, Sequence[Mapping[str, float]]], agree: Mapping[str, bool]
) -> list[dict[str, Any]]:
    """Ours against the default pipeline and against the faster of the tuned ones, by wall clock and processor time.

    Ratios are of the same repeat; None where a contender's batches were not the right ones.
    """
    lines = []
    for figure, what in (("samples_per_second", "wall clock"), ("cpu_us", "processor time")):
        better = max if figure == "samples_per_second" else min
        tuned = better(
            (name for name in runs if name.startswith("tuned")),
            key=lambda name: float(np.median([run[figure] for run in runs[name]])),
        )
        for ours in ("longskip", "longskip-draws"):
            for rival, name in (("default", "default"), ("tuned", tuned)):
                asked = TARGETS.get((kind, rival)) if ours == "longskip" else None
                line: dict[str, Any] = {"ours": ours, "theirs": name, "by": what, "asked": asked, "ratio": None}
                if agree[ours] and agree[name]:
                    pairs = [(mine[figure], other[figure]) for mine, other in zip(runs[ours], runs[name], strict=True)]
                    line["ratio"] = spread([m / o if better is max else o / m for m, o in pairs])
                    if asked is not None:
                        line["met"] = line["ratio"]["median"] >= asked
                lines.append(line)
    return lines


def shares(
    processes: int, floors: Sequence[Mapping[str, float]], ours: Sequence[Mapping[str, float]]
) -> dict[str, Any]:
    """The floor in so many processes, and which share of it ours reached in the same repeat (1 is the floor itself)."""
    pairs = list(zip(ours, floors, strict=True))
    return {
        "processes": processes,
        **{key: spread([found[key] for found in floors]) for key in ("samples_per_second", "cpu_us")},
        "share_of_rate": spread([mine["samples_per_second"] / found["samples_per_second"] for mine, found in pairs]),
        "share_of_cpu": spread([found["cpu_us"] / mine["cpu_us"] for mine, found in pairs]),
    }


def to_markdown(result: Mapping[str, Any]) -> str:
    """The result as a page to read."""
    lines = [
        *page("The reader, beside webdataset's pipelines", result, f"crc32 by {result['crc32_by']}"),
        "",
        f"Samples per second in collated batches of {result['batch']}, and microseconds of processor time a sample, summed "
        f"over all processes: median (20th–80th percentile) of {result['repeats']} fresh processes of each contender, in "
        "turns. Batches are endless; the clocks start when shuffle buffers and queues have settled. All shards lie in the "
        "page cache, read in full before the first run. longskip shuffles fully and checks the crc32 of every member; "
        f"webdataset shuffles shards and a buffer of {bench_pipelines.SHUFFLE} samples. All hand out the same keys, "
        'captions and arrays; "with times and noise" also draws what training needs, which the others leave to the '
        "trainer. Where a pipeline's batches are not those that were stored, no ratio is given. Default: webdataset's "
        "decoders and collation, torch's DataLoader, 2 workers. Tuned: arrays straight from the members' bytes, JPEG "
        "decoded at half size, one stack a batch where it is read.",
    ]
    for kind, found in result["kinds"].items():
        what = (
            "latents 4x32x32 fp16, text features 77x768 fp16, masks"
            if kind == "features"
            else f"pictures of {STORED_SIDE} pixels, read at {bench_pipelines.SIDE}, float32"
        )
        lines += [
            "",
            f"## {kind}",
            "",
            f"{found['samples']:,} samples in {found['shards']} shards, {found['bytes_per_sample']:,} bytes each: {what}.",
            "",
        ]
        rows: list[tuple[Any, ...]] = []
        for figures in found["contenders"].values():
            rates = shown(figures["samples_per_second"], ",.0f"), shown(figures["cpu_us"], ",.1f")
            batches = "as stored" if figures["same_batches"] else "WRONG"
            rows.append((figures["title"], figures["workers"], *rates, batches))
        lines += [*table(("contender", "workers", "samples/s", "processor µs/sample", "batches"), rows), ""]
        rows = []
        for line in found["comparisons"]:
            asked = "" if line["asked"] is None else f"≥ {line['asked']:g}"
            ratio = "none: other batches" if line["ratio"] is None else shown(line["ratio"], ".2f")
            rows.append((line["ours"], line["theirs"], line["by"], asked, ratio, VERDICTS[line.get("met")]))
        lines += table(("ours", "against", "by", "asked", "ratio", ""), rows)
        rows = []
        for floor in found["floors"]:
            rates = shown(floor["samples_per_second"], ",.0f"), shown(floor["cpu_us"], ",.1f")
            rows.append(
                (floor["processes"], *rates, shown(floor["share_of_rate"], ".0%"), shown(floor["share_of_cpu"], ".0%"))
            )
        if rows:
            columns = (
                "processes",
                "samples/s",
                "processor µs/sample",
                "longskip, wall clock",
                "longskip, processor time",
            )
            lines += ["", FLOOR, "", *table(columns, rows)]
        resumed = found["resume_ms"]
        lines += [
            "",
            f"Resume (open {found['shards']} shards with their checks, seek into an epoch past 1,000, first batch with its "
            f"draws): {shown(resumed, '.1f')} ms"
            + (
                f"; asked ≤ {asked:g}: {VERDICTS[resumed['median'] <= asked]}."
                if (asked := resumed.get("asked"))
                else "."
            ),
        ]
    return "\n".join(lines) + "\n"
