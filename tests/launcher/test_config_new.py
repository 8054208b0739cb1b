"""``longskip config new``: what it writes trains as it stands, on the ranks that its own header names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longskip.engine.configio import dump_yaml, load_config
from longskip.engine.data.shapes import write_shapes
from longskip.engine.data.sources import open_source
from longskip.engine.data.tokens import Vocabulary
from longskip.engine.opening import described
from longskip.engine.vocabulary import save_vocabulary
from longskip.launcher.cli import main


def new(*options: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["config", "new", *options])
    return int(ended.value.code or 0)


def main_done(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert not ended.value.code


def test_a_run_of_one_rank_goes_on_over_two_and_four(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the file's header says: first alone, then launched; the micro-batch that the run began with is kept."""
    monkeypatch.chdir(tmp_path)
    assert new("--out", "mine.yaml") == 0
    text = Path("mine.yaml").read_text()
    assert "longskip train mine.yaml" in text and "longskip launch --local 2 -- train mine.yaml" in text
    for overrides in ([], ["train.batch_size=16"], ["train.batch_size=64"]):
        config = load_config(Path("mine.yaml"), overrides)
        kept = config.batch(1).micro
        for world in (2, 4) if config.train.batch_size > 16 else (2,):
            batch = config.batch(world, kept)
            assert (batch.micro, batch.total) == (kept, config.train.batch_size)


def test_a_dry_run_says_what_is_known_of_bad_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is read for it: the limit before the first start, and then what earlier starts have met."""
    monkeypatch.chdir(tmp_path)
    write_shapes("data/shapes", 40)
    assert new("--out", "mine.yaml", "--preset", "uvit-tiny") == 0
    run = Path("runs/mine")
    run.mkdir(parents=True)
    save_vocabulary(run / "vocabulary.json", Vocabulary(["red"]))
    (run / "bad_samples.jsonl").write_text("".join(f'{{"key": "{n:09d}", "sample": {n}}}\n' for n in (3, 8, 9)))
    for there, said in (
        (False, "more than 5% (data.max_bad_share)"),
        (True, "3 of 40 samples are bad (met in earlier"),
    ):
        if there:
            (run / "config.yaml").write_text(dump_yaml(load_config(Path("mine.yaml"))))
            (run / "run.json").write_text(json.dumps({"data": described(open_source("data/shapes"))}))
        capsys.readouterr()
        main_done("train", "mine.yaml", "--dry-run")
        told = " ".join(capsys.readouterr().out.split())
        assert f"bad samples {said if there else 'not looked for; ' + said}" in told
        assert ("a run would stop" in told) == there


def test_a_preset_for_latents_is_refused_with_a_way_to_train_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert new("--preset", "uvit-0.3b") == 2
    said = capsys.readouterr().err
    assert "latents of 4 channels" in said and "encoders.vae.path" in said and "this version" not in said
    recipe = Path(__file__).parents[2] / "configs" / "t2i-256.yaml"
    (tmp_path / "mine.yaml").write_text(f"extends: {recipe}\n")  # the way that it names
    config = load_config(tmp_path / "mine.yaml", ["model.preset=uvit-0.3b", "data.path=there", "encoders.vae.path=vae"])
    assert config.encoders.vae.kind == "vae" and config.backbone().channels == 4
    assert new("--preset", "uvit-0.3b", "--resolution", "64") == 0
    assert new("--preset", "uvit-h2-imagenet256", "--out", "classes.yaml") == 2
    assert "takes classes" in capsys.readouterr().err
