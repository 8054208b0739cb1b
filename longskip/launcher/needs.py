"""What a run needs of its nodes: what a preflight holds their facts against (no torch, but for data workers' memory)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from longskip.engine import fitting
from longskip.engine.config import BatchPlan, Config
from longskip.engine.data.sources import OPEN_SHARDS, FolderSource, ShardSource
from longskip.engine.data.tokens import FIRST_WORD, Vocabulary
from longskip.engine.data.transport import is_url
from longskip.engine.fitting import Memory
from longskip.engine.runs import RunFolder
from longskip.engine.vocabulary import words_of
from longskip.errors import ConfigError, LongskipError
from longskip.profiling.hardware import find_network

BYTES_PER_PARAMETER = 16  # weights, EMA and Adam's two moments, all fp32
_OPEN_BESIDE = 128  # files that a rank has open beside shards, workers and peers: libraries, logs, checkpoints


@dataclass(frozen=True)
class Needs:
    """What the run needs, of all nodes alike.

    ``members``: the nodes that take part. ``ranks`` of a node, ``world`` of all that compute. ``checkpoint``: bytes of one,
    ``keep`` of them stay. ``memory``: the ZeRO stages that may be taken and what a rank needs at each. ``shared``: bytes of
    shared memory for a node's readers. ``open_files``: the most that a rank may have open. ``readers``: ranks × workers.
    ``network``: its name and the bytes/s that a rank has of it between nodes, where one is named. ``wrong``: what cannot be
    planned, and the cure.
    """

    members: tuple[int, ...]
    ranks: int
    world: int
    requirements: tuple[str, ...] = ()
    parameters: int = 0
    checkpoint: int = 0
    keep: int = 1
    memory: tuple[tuple[int, Memory], ...] = ()
    shared: int = 0
    open_files: int = 0
    readers: int = 0
    batch: str = ""
    network: tuple[str, float] | None = None
    wrong: tuple[tuple[str, str], ...] = ()

    @property
    def nodes(self) -> int:
        return len(self.members)


def needs_of(
    config: Config,
    run: Path,
    members: Sequence[int],
    ranks: int,
    *,
    elastic: bool = False,
) -> Needs:
    """What ``config`` needs of the nodes ``members`` with ``ranks`` ranks each; a user's mistakes are listed, not raised.

    ``elastic``: not all ranks need take part, as many do as divide the batch.
    """
    wrong: list[tuple[str, str]] = []
    world, parameters = len(members) * ranks, parameters_of(config, run)
    batch: BatchPlan | None = None
    memory: tuple[tuple[int, Memory], ...] = ()
    shared = 0
    try:
        kept = RunFolder(run).summary().get("micro_batch")
        batch = _batch(config, world, kept, elastic)
        memory = _memory(config, batch, parameters)
        shared = ranks * reader_bytes(config, batch)
    except LongskipError as error:
        wrong.append((error.message, error.cure or ""))
    return Needs(
        members=tuple(members),
        ranks=ranks,
        world=batch.world if batch else world,
        requirements=_requirements(),
        parameters=parameters,
        checkpoint=checkpoint_bytes(config, parameters, world),
        keep=config.checkpoint.keep_last,
        memory=memory,
        shared=shared,
        open_files=_open_files(config, world),
        readers=world * max(1, config.data.workers),
        batch=str(batch) if batch else "",
        network=_network(config, ranks),
        wrong=tuple(wrong),
    )


def _batch(config: Config, world: int, kept: int | None, elastic: bool) -> BatchPlan:
    """The batch over all ranks; with ``elastic`` over as many as divide it."""
    for ranks in range(world, 0, -1) if elastic else ():
        try:
            return config.batch(ranks, kept)
        except ConfigError:
            continue
    return config.batch(world, kept)


def parameters_of(config: Config, run: Path) -> int:
    """N of the run; of a new one with a word encoder the most that there may be, for its words are not counted yet."""
    try:
        words = len(words_of(run, config) or ())
    except (OSError, ValueError, KeyError, TypeError, LongskipError):
        words = config.encoders.text.vocabulary
    text = config.text_encoder(max(1, words))
    return config.backbone().param_counts().total + (text.param_counts().total if text else 0)


def checkpoint_bytes(config: Config, parameters: int, world: int) -> int:
    """Bytes of a checkpoint: 16 a parameter, and at the most what headers and manifest take beside them."""
    names = [spec.name for specs in config.backbone().parameters().values() for spec in specs]
    text = config.text_encoder(1)
    names += [spec.name for specs in (text.parameters() if text else {}).values() for spec in specs]
    slices = len(names) + 2 * world  # a rank's share begins and ends inside a tensor, of either group
    length = max(map(len, names))
    headers = 4 * slices * (length + 140)
    manifest = sum(len(name) + 140 for name in names) + (2 * world + 1) * 180 + (1 << 14)
    return BYTES_PER_PARAMETER * parameters + headers + manifest


def _memory(config: Config, batch: BatchPlan, parameters: int) -> tuple[tuple[int, Memory], ...]:
    asked = config.deepspeed.zero_stage
    stages = fitting.STAGES if asked == "auto" else (asked,)
    if asked == "auto" and config.deepspeed.offload_param == "cpu":
        stages = (3,)
    elif asked == "auto" and config.deepspeed.offload_optimizer == "cpu":
        stages = (1, 2, 3)
    return tuple(
        (stage, fitting.memory(config, stage, world=batch.world, micro=batch.micro, n_parameters=parameters))
        for stage in stages
    )


def _open_files(config: Config, world: int) -> int:
    """The most files and sockets of a rank: its open shards of every data set, a pair of pipes a worker, its peers twice."""
    sets = max(1, len(config.data.mix)) + bool(config.data.validation)
    return _OPEN_BESIDE + OPEN_SHARDS * sets + 4 * config.data.workers + 2 * world


def _network(config: Config, ranks: int) -> tuple[str, float] | None:
    """The named network and the bytes/s that each of a node's ranks has of it."""
    if config.launch.network is None:
        return None
    network = find_network(config.launch.network)
    return network.name, network.per_gpu(ranks)


def _requirements() -> tuple[str, ...]:
    """What longskip's own metadata requires; nothing where it was not installed."""
    try:
        return tuple(text for text in metadata.requires("longskip") or () if "extra ==" not in text)
    except metadata.PackageNotFoundError:
        return ()


def reader_bytes(config: Config, batch: BatchPlan) -> int:
    """Shared memory that a rank's data workers will ask for; 0 without workers and for data that are not here."""
    path = config.data.path or (config.data.mix[0].path if config.data.mix else "")
    if not config.data.workers or not path or is_url(path):
        return 0
    import torch

    from longskip.engine.data.reader import shared_bytes
    from longskip.engine.inputs import Inputs

    try:
        source = ShardSource(path, check=False) if (Path(path) / "index.json").is_file() else FolderSource(path)
    except LongskipError:
        return 0  # the data's own check tells of it
    words = Vocabulary.build((), FIRST_WORD) if config.encoders.text.kind == "words" else None
    assembler = Inputs(config, words, torch.device("cpu"), source).assembler(source)
    return shared_bytes(assembler, batch.micro, batch.accumulation, config.data.workers)
