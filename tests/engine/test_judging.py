"""Verdicts of ``evaluate``: the pictures that are asked for are the trained ones; figures, counts and sheets are right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from longskip.engine import judging
from longskip.engine.data.scenes import Scene, Thing, captions
from longskip.engine.data.shapes import draw
from longskip.engine.data.sources import open_source
from longskip.engine.drawing import Drawing
from longskip.engine.evaluate import evaluate
from longskip.engine.judging import judge_nearest, judge_shapes
from longskip.engine.opening import described
from longskip.engine.sample import load_run
from longskip.errors import RunMismatchError
from longskip.launcher.tables import print_evaluation
from tests.saved_runs import saved_run

HOW = Drawing("euler", 1, 1.0, 0)


def pictures(folder: Path, shapes: Path, count: int) -> Path:
    source = open_source(shapes / "train")
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03d}.png").write_bytes(source.read(i).image)
        (folder / f"{i:03d}.txt").write_text(f"number {i}" if i else "number 1")  # one caption stands twice
    return folder


def a_run(folder: Path, data: Path, **eval_: Any) -> Path:
    names = {"sample_steps": 1, "guidance": 1.0, "samples": 2}
    run = saved_run(folder, captions=["number 0123456789"], data={"path": str(data)}, eval=names | eval_)
    (run / "run.json").write_text(json.dumps({"name": "run", "data": described(open_source(data))}))
    return run


def test_fewer_pictures_than_asked_are_counted_as_they_are(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run", pictures(tmp_path / "mine", shapes, 8))
    result = evaluate(run, kind="nearest")  # 200 by default; 8 pictures, two of one caption
    assert result["count"] == result["nearest"]["count"] == 6 and result["nearest"]["among_all"] == 8
    assert "-nearest-6-seed-0-" in result["file"] and (run / "eval" / result["nearest"]["examples"]).is_file()
    print_evaluation(result)
    said = capsys.readouterr().out
    assert "6 pictures" in said and "200" not in said and result["file"] in said.replace("\n", "")


def test_the_nearest_is_found_among_those_asked_and_among_all(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drawn are the very training pictures, two of them exchanged."""
    run = a_run(tmp_path / "run", pictures(tmp_path / "mine", shapes, 8))
    loaded = load_run(run)
    training = judging.Training.of(loaded, 4, seed=3)
    assert len(training.asked) == 4 and all(training.texts.count(training.texts[i]) == 1 for i in training.asked)
    drawn = training.pictures[training.asked].copy()
    drawn[[0, 1]] = drawn[[1, 0]]
    monkeypatch.setattr(judging, "draw_prompts", lambda loaded, texts, how: drawn)
    found = judge_nearest(loaded, HOW, training, tmp_path / "sheet.png")
    assert (found["hits"], found["count"], found["share"], found["chance"]) == (2, 4, 0.5, 0.25)
    assert (found["share_among_all"], found["among_all"]) == (0.5, 8)


def test_other_data_than_the_trained_ones_are_refused_before_anything_is_drawn(shapes: Path, tmp_path: Path) -> None:
    data = pictures(tmp_path / "mine", shapes, 8)
    run = a_run(tmp_path / "run", data)
    evaluate(run, kind="nearest", count=2)
    before = set((run / "eval").iterdir())
    shutil.copy(data / "003.png", data / "900.png")
    (data / "900.txt").write_text("one more")
    with pytest.raises(RunMismatchError, match="9 samples now, 8 then") as caught:
        evaluate(run, kind="nearest", count=4)
    assert "bring the data back" in str(caught.value.cure) and set((run / "eval").iterdir()) == before


def test_the_sheet_says_what_was_read_amiss_and_cuts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest caption of a scene with everything misread stands whole below its picture."""
    config = saved_run(tmp_path / "run", eval={"judge_objects": 2})
    asked = Scene((Thing("yellow", "triangle", "small"), Thing("purple", "diamond", "small")), "right of")
    shown = draw(Scene((Thing("red", "square", "big"), Thing("green", "circle", "big")), "above"), 32)
    text = max(captions(asked), key=len)
    monkeypatch.setattr(judging, "judged_scenes", lambda config, count, seed, *, held_out: [(asked, text)] * count)
    monkeypatch.setattr(judging, "draw_prompts", lambda loaded, texts, how: np.stack([shown] * len(texts)))
    labels: list[str] = []
    real = judging.make_grid

    def grid(images: Any, captions: Any, **how: Any) -> Image.Image:
        labels.extend(captions)
        made = real(images, captions, **how)
        assert made.size == real(images, captions, **(how | {"lines": 99})).size  # no line was left out
        return made

    monkeypatch.setattr(judging, "make_grid", grid)
    found = judge_shapes(load_run(config), HOW, 2, tmp_path / "sheet.png")
    assert len(labels) == 2 and labels[0].startswith(f"✗ {text} (read ")
    for words in ("for yellow", "for purple", "for triangle", "big for small", "for right of"):
        assert words in labels[0]
    assert found["seen"]["full"] == 0 and len(found["refused"]) == 2
