"""From a configuration to its data: sources at paths and URLs, mixes, aspect buckets, and the plan over them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from longskip.engine.config import Config
from longskip.engine.data.buckets import Assignment, assign, resolve_buckets, stored_sizes
from longskip.engine.data.captions import check_fields
from longskip.engine.data.mix import MixedSource
from longskip.engine.data.plan import Plan
from longskip.engine.data.remote import open_remote
from longskip.engine.data.sources import ShardSource, SizedSource, open_source
from longskip.engine.data.streams import plan_of
from longskip.engine.data.transport import is_url
from longskip.engine.quarantine import read_list
from longskip.errors import ConfigError


def open_data(config: Config, path: str, *, check: bool = True) -> SizedSource:
    """The data at ``path`` for a run of ``config``: shards at a path or URL, or a folder of pictures.

    ``check``: whether features and encoders are compared, which hashes the encoders' weights; one rank's doing is enough.

    Raises EncoderError for features of other encoders and for data that need an encoder that is not there, and what
    opening data raises.
    """
    data = config.data
    source: SizedSource
    if is_url(path):
        source = open_remote(
            path,
            transport=data.remote,
            cache=data.cache,
            cache_gib=data.cache_gib,
            window_shards=data.window_shards,
            seed=config.train.seed,
            on_damage=data.on_damage,
            fields=data.captions,
        )
    else:
        source = open_source(path, on_damage=data.on_damage, fields=data.captions)
    stored = source.features
    if data.captions and config.encoders.text.frozen and stored is not None and stored.text is not None:
        raise ConfigError(
            f"{path} holds text features of its own captions; data.captions {dict(data.captions)} would draw others",
            cure="leave data.captions out, or encode on the way: shards without text features and encoders.text.path",
        )
    check_fields(data.captions, source.caption_fields() if data.captions else set())
    if check:
        index = source.index if isinstance(source, ShardSource) else None
        members = index.members if index else {"image": len(source)}
        from longskip.engine.encoders import check_manifest  # torch

        check_manifest(config, index.encoders if index else {}, members, path)
    return source


def open_training(config: Config, *, check: bool = True) -> SizedSource:
    """What a run trains on: ``data.path``, or the ``data.mix`` of several. ConfigError where neither is set."""
    if config.data.mix:
        members = [open_data(config, each.path, check=check) for each in config.data.mix]
        return MixedSource(members, [each.weight for each in config.data.mix], [each.path for each in config.data.mix])
    if not config.data.path:
        raise ConfigError("data.path is not set", cure="name a folder of shards, or of pictures with captions")
    return open_data(config, config.data.path, check=check)


def described(source: SizedSource) -> dict[str, Any]:
    """What run.json says of the data: the number of samples and the fingerprint."""
    return {"samples": len(source), "fingerprint": source.fingerprint()}


def told_of_bad(config: Config, bad: int, samples: int, where: str = "") -> str:
    """``bad`` of ``samples`` as a share, and what ``data.max_bad_share`` says of it, in a sentence without its full stop.

    Over many epochs a run meets bad samples in their share of the data; those of data.quarantine do not count.
    """
    limit, share = config.data.max_bad_share, bad / samples if samples else 0.0
    told = f"{bad:,} of {samples:,} samples are bad{where}, {100 * share:.3g}%"
    if share <= limit:
        return f"{told}; data.max_bad_share allows {100 * limit:.3g}%" if bad else told
    return (
        f"{told}, above data.max_bad_share {limit:g} ({100 * limit:.3g}%): a run would stop. Repair them, pass them over "
        "(longskip data lint DATA --quarantine FILE, then data.quarantine=FILE) or raise the share"
    )


def bad_so_far(config: Config, run: Path | None, samples: int) -> str:
    """What is known of bad samples before any is read: those that ``run`` has listed in earlier starts."""
    numbers: set[int] = set()
    if run is not None and (run / "bad_samples.jsonl").is_file():
        known = {key for key, _ in read_list(Path(config.data.quarantine))} if config.data.quarantine else set()
        with suppress(ConfigError):  # a list that a person has changed
            listed = read_list(run / "bad_samples.jsonl")
            numbers = {number for key, number in listed if number is not None and key not in known}
    if numbers:
        return told_of_bad(config, len(numbers), samples, " (met in earlier starts)")
    return (
        f"not looked for; more than {100 * config.data.max_bad_share:.3g}% (data.max_bad_share) stop a run: longskip data "
        "lint counts them"
    )


def draws_of(config: Config) -> dict[str, Any]:
    """What is drawn for a sample in training, and never in validation: settings of an Assembler."""
    return {"caption_dropout": config.diffusion.caption_dropout, "flip": config.data.flip, "crop": config.data.crop}


def data_name(config: Config) -> str:
    """The data, for messages."""
    return config.data.path or " + ".join(f"{each.path} ({each.weight:g})" for each in config.data.mix)


def sort_into_buckets(config: Config, source: SizedSource, batch: int) -> Assignment | None:
    """The aspect bucket of every sample; None where ``data.buckets`` is off. Reads all tables.

    Stored latents have the sizes that they were encoded in; pictures go to the nearest of the buckets named.
    """
    if config.data.buckets == "off":
        return None
    stored = source.features
    if config.encoders.vae.kind == "vae" and stored is not None and stored.latent is not None:
        return assign(source, stored_sizes(source, config.factor), batch, factor=config.factor)
    multiple = config.backbone().patch * config.factor
    return assign(source, resolve_buckets(config.data.buckets, config.resolution, multiple), batch)


def plan_for(config: Config, source: SizedSource, batch: int, assignment: Assignment | None) -> Plan:
    """The order of the samples in global batches of ``batch``."""
    window = config.data.window_shards if config.data.shuffle == "window" else None
    return plan_of(source, batch, config.train.seed, assignment=assignment, window_shards=window)
