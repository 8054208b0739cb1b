"""``longskip train --dry-run``: what it says, in what order, and that it refuses what a start would refuse."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from longskip.engine import partition
from longskip.engine.config import Config
from longskip.engine.costs import few_image_tokens
from longskip.engine.data.encode import encode_shards
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.encoders import Encoders
from longskip.engine.opening import described, open_training
from longskip.engine.runs import RunFolder
from longskip.engine.vocabulary import save_vocabulary
from longskip.errors import DataError, EncoderError, LongskipError, RunMismatchError, ShardError
from longskip.launcher.dry_run import show
from tests.ranks import small_config
from tests.tiny_encoders import tiny_clip_text, tiny_vae

WIDTH = 32


def shown(
    capsys: pytest.CaptureFixture[str], config: Config, run: Path, ranks: int | None = None, *, verbose: bool = False
) -> list[str]:
    show(config, run, ranks, verbose=verbose)
    return capsys.readouterr().out.splitlines()


def short(capsys: pytest.CaptureFixture[str], config: Config, run: Path, ranks: int | None = None) -> list[str]:
    """What is printed without ``verbose``: a summary, no more."""
    lines = shown(capsys, config, run, ranks)
    assert lines[0].startswith("run folder") and "--verbose" in lines[-1]
    long = [each for each in lines if len(each) > 80 and not each.startswith(("run folder", "data "))]
    assert not long
    return lines


def line(lines: list[str], start: str) -> str:
    (found,) = [each for each in lines if each.startswith(start)]
    return found


def test_the_summary_comes_last(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After the configuration, DeepSpeed's JSON and thousands of shards."""
    config = small_config(shapes)
    for ranks, worlds in ((None, ["1", "2", "4", "8"]), (2, ["2"])):
        lines = shown(capsys, config, tmp_path / "run", ranks, verbose=True)
        begin = lines.index(line(lines, "run folder"))
        assert begin > lines.index("} ") > lines.index("model:")
        if ranks:
            assert max(i for i, each in enumerate(lines) if each.startswith("  backbone.")) < begin
        summary = lines[begin:]
        assert [each.split()[0] for each in summary if "rank(s)" in each and "batch 8" in each] == worlds
        few = short(capsys, config, tmp_path / "run", ranks)
        assert few[:9] == summary[:9] and len(few) <= 24
        assert "MiB a rank" in " ".join(summary[-5:]) and "0.00 GiB" not in "\n".join(summary)
        assert line(summary, "data ").endswith(f"300 samples in {shapes / 'train'}: pictures and captions")
    assert not (tmp_path / "run").exists()
    three = small_config(shapes, train={"batch_size": 6, "micro_batch": 2, "accumulation": 1})
    assert any(each.startswith("  3 rank(s)") for each in shown(capsys, three, tmp_path / "run"))


def test_gib_of_a_large_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = small_config(tmp_path, model={"preset": "uvit-0.3b", "resolution": 256}, encoders={"vae": {"kind": "vae"}})
    last = " ".join(" ".join(shown(capsys, config, tmp_path / "run", 1)[-5:]).split())
    assert "GiB a rank" in last and "gathered" in last and "MiB, activations" in last


@pytest.mark.parametrize(("dtype", "weight", "states"), [("fp32", 4, 12), ("bf16", 2, 16)])
def test_the_bytes_of_all_shards_add_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str, weight: int, states: int
) -> None:
    """Every line of every rank, its sum, and all ranks' sum; one line by hand."""
    config = small_config(tmp_path, train={"dtype": dtype}, encoders={"text": {"vocabulary": 400}})
    lines = shown(capsys, config, tmp_path / "run", 2, verbose=True)
    each = weight + states
    begin = lines.index(f"shards of 2 ranks; bytes: {weight} of weight + {states} of fp32 states per element")
    # The embedding's weights are 64 × 192 for patches and 64 × 64 for text, together 16,384; rank 0 has half of them.
    by_hand = {"fp32": "131,072", "bf16": "147,456"}[dtype]
    assert lines[begin + 2] == f"  backbone.embed.patch.weight  64×192  [0 : 8,192]  {by_hand} bytes"
    totals: list[list[int]] = []
    found: dict[int, list[tuple[str, int]]] = {}
    for text in lines[begin + 1 : lines.index("", begin)]:
        if text.startswith("rank "):
            totals.append([int(n) for n in re.findall(r"\d+", text.replace(",", ""))[1:]])
        else:
            found.setdefault(len(totals) - 1, []).append((text.split()[0], int(text.split()[-2].replace(",", ""))))
    for rank, (elements, bytes_, slices) in enumerate(totals):
        mine = [shard for shard in partition.shards(config, 400, 2) if shard.rank == rank]
        assert found[rank] == [(shard.name, shard.numel * each) for shard in mine]
        assert (elements, slices) == (sum(shard.numel for shard in mine), len(mine))
        assert bytes_ == elements * each == sum(size for _, size in found[rank])
    text_encoder = config.text_encoder(400)
    assert text_encoder is not None
    n_parameters = config.backbone().param_counts().total + text_encoder.param_counts().total
    assert sum(bytes_ for _, bytes_, _ in totals) == n_parameters * each


def test_what_ranks_own_in_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The ranks with the fewest and the most, which the long list says one by one."""
    config = small_config(tmp_path, encoders={"text": {"vocabulary": 400}})
    lines = shown(capsys, config, tmp_path / "run", 2, verbose=True)
    ranks = [re.findall(r"\d+", each.replace(",", "")) for each in lines if re.match(r"rank \d", each)]
    elements, slices = ([int(rank[place]) for rank in ranks] for place in (1, 3))
    said = " ".join(" ".join(short(capsys, config, tmp_path / "run", 2)).partition("shards ")[2].split())
    for most, least, what in ((max(slices), min(slices), "slices"), (max(elements), min(elements), "elements")):
        assert (f"{most:,} {what}" if most == least else f"{least:,} to {most:,} {what}") in said
    assert "a rank, 4 + 12 bytes each" in said
    lower = small_config(tmp_path, deepspeed={"zero_stage": 1})
    assert "every rank has all weights" in line(shown(capsys, lower, tmp_path / "run", 2), "shards ")


@pytest.fixture(scope="module")
def features(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of 4x8x8 and CLIP features of 12 tokens."""
    root = tmp_path_factory.mktemp("features")
    vae, text = tiny_vae(root / "vae", 4, 4), tiny_clip_text(root / "clip", WIDTH, 12)
    encoders = Encoders.at(vae, text, (32, 32), "cpu", n_tokens=12, too_long="truncate")
    for part in ("train", "validation"):
        encode_shards(shapes / part, root / part, encoders, batch=64)
    return root


def of_features(data: Path, /, **groups: Any) -> Config:
    encoders: dict[str, Any] = {
        "vae": {"kind": "vae", "factor": 4},
        "text": {"kind": "clip", "width": WIDTH, "n_tokens": 12},
    }
    for part, settings in groups.pop("encoders", {}).items():
        encoders[part] |= settings
    return small_config(data, model={"patch": 2} | groups.pop("model", {}), encoders=encoders, **groups)


def test_features_are_looked_at(features: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, of_features(features), tmp_path / "run")
    assert line(lines, "data ").endswith("latents 4x8x8 float16 and text features 12x32 float16")
    refused: list[tuple[dict[str, Any], type[LongskipError], str]] = [
        ({"model": {"resolution": 64}}, EncoderError, r"(?s)resolution.*32.*64"),
        ({"encoders": {"vae": {"channels": 8}}}, EncoderError, r"channels 4, encoders\.vae\.channels is 8"),
        ({"encoders": {"vae": {"scale": 0.5}}}, EncoderError, r"scale"),
        ({"encoders": {"text": {"n_tokens": 16}}}, EncoderError, r"n_tokens 12, encoders\.text\.n_tokens is 16"),
        ({"encoders": {"text": {"kind": "t5"}}}, EncoderError, r"kind clip"),
        ({"data": {"flip": True}}, LongskipError, r"data hold latents, which are neither mirrored nor cut"),
        ({"train": {"batch_size": 512}}, DataError, r"300 samples"),
    ]
    for groups, kind, message in refused:
        with pytest.raises(kind, match=message):
            show(of_features(features, **groups), tmp_path / "run")
        assert not capsys.readouterr().out


def test_data_that_are_not_here(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan for another machine is shown all the same; what is here and broken is refused."""
    for data, said in (
        ({"path": "nowhere"}, "nowhere is not here"),
        ({"path": ""}, "data.path is not set"),
        ({"path": "https://x.org/s", "shuffle": "window", "remote": "fsspec"}, "https://x.org/s is streamed"),
        ({"validation": "nowhere"}, "nowhere is not here"),
        ({"path": "", "mix": [{"path": str(shapes / "train")}, {"path": "gone"}]}, "gone is not here"),
    ):
        assert said in line(shown(capsys, small_config(shapes, data=data), tmp_path / "run"), "data ")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "00000.tar").write_bytes(b"x" * 512)
    with pytest.raises(ShardError, match="longskip data index"):
        show(small_config(shapes, data={"path": str(tmp_path / "broken")}), tmp_path / "run")


def test_a_run_that_is_there_keeps_its_micro_batch_and_its_words(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = small_config(shapes), RunFolder(tmp_path / "run")
    data = described(open_training(config))
    run.write_identity(config, {}, {"micro_batch": 2, "data": data})
    save_vocabulary(run / "vocabulary.json", Vocabulary(("red", "blue")))
    lines = shown(capsys, config, run.path)
    assert "it would resume, with its micro-batch of 2" in line(lines, "run folder")
    assert "batch 8 = 2 micro × 2 accumulation × 2 rank(s)" in line(lines, "  2 rank(s)")
    assert not [each for each in lines if each.startswith("  8 rank(s)")]
    assert f"{(257 + 2) * 64:,} parameters" in line(lines, "text encoder")
    with pytest.raises(RunMismatchError, match=r"optim\.lr"):
        show(small_config(shapes, optim={"lr": 9e-9}), run.path)
    run.note(data=data | {"fingerprint": "another"})
    with pytest.raises(RunMismatchError, match="is not the data that"):
        show(config, run.path)


@pytest.mark.parametrize(
    ("model", "data", "tokens"),
    [
        ({"resolution": 8}, {}, 1),
        ({"resolution": [8, 24]}, {}, 3),
        ({"resolution": 16}, {}, None),
        ({"resolution": 16, "patch": 16}, {}, 1),
        ({"resolution": 32}, {"buckets": [[32, 32], [8, 16]]}, 2),
    ],
)
def test_pictures_of_few_tokens_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: dict[str, Any], data: dict[str, Any], tokens: int | None
) -> None:
    """uvit-tiny's patch is 8: a picture of 8×8 is one token."""
    config = small_config(tmp_path, model=model, data=data)
    said = few_image_tokens(config)
    assert (said is None) == (tokens is None)
    lines = shown(capsys, config, tmp_path / "run")
    assert [each for each in lines if each.startswith("few image tokens")] == ([said] if said else [])
    if said:
        assert f" {tokens} of patch" in said and "model.patch" in said
