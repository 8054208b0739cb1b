"""The step's benchmark: what it counts, what it refuses to compare, and its plain rival model; no time is asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from longskip.engine import bench_rivals, bench_step
from longskip.engine.bench_step import COMPARISONS, Comparison, to_markdown
from longskip.engine.build import build_model
from longskip.engine.configio import validate
from longskip.engine.partition import storages
from longskip.errors import ConfigError, LongskipError
from tests.figures import figure

SMALL = {"depth": 8, "width": 32, "batch": 4, "ranks": 2, "steps": 2, "repeats": 1}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return bench_step.bench_step(**SMALL)


def tensors(layout: str) -> int:
    """Stored tensors of the small model by the closed form (the vocabulary's size does not matter)."""
    config = validate(
        {"model": {"preset": "uvit-tiny", "depth": 8, "width": 32, "resolution": 32}, "engine": {"layout": layout}}
    )
    return len(list(storages(config, 100)))


def test_flat_layout_needs_a_quarter_of_the_collectives(result: dict[str, Any]) -> None:
    """An all-gather per stored tensor (all of them are small enough to stay gathered), and a few reductions."""
    found = {name: figures["collectives_by_kind"] for name, figures in result["contenders"].items()}
    assert result["model"]["tensors"] == tensors("named") == 9 * 11 + 4 * 2 + 5 + 6 + 1
    assert tensors("flat") == 9 * 2 + 2 + 2 + 1
    for name, layout in (("flat", "flat"), ("named", "named"), ("stock", "named")):
        assert found[name]["allgather_base"] == tensors(layout)
    total = {name: figures["collectives"] for name, figures in result["contenders"].items()}
    figure(f"collectives a step, {result['model']['tensors']} tensors, ZeRO-3, 2 ranks: {total}")
    assert total["flat"] <= 0.25 * total["named"]
    assert total["bare"] == 0


def test_all_contenders_train_alike(result: dict[str, Any]) -> None:
    for figures in result["contenders"].values():
        assert figures["losses_agree"] and figures["loss_difference"] <= 1e-5, figures
    assert {name: figures["ranks"] for name, figures in result["contenders"].items()} == {
        "flat": 2, "named": 2, "stock": 2, "single": 1, "bare": 1,
    }  # fmt: skip


def test_the_result_is_plain_json_with_what_a_reader_needs(result: dict[str, Any]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert result.keys() == {
        "command", "commit", "machine", "threads_per_rank", "load_average", "model", "data", "steps", "repeats",
        "tolerance", "contenders", "comparisons",
    }  # fmt: skip
    assert result["command"].startswith("longskip bench step --preset uvit-tiny --depth 8 --width 32")
    assert result["machine"]["versions"]["torch"] == torch.__version__ and result["machine"]["device"]
    for figures in result["contenders"].values():
        assert figures.keys() == {
            "title", "ranks", "collectives", "collectives_by_kind", "cpu_ms", "wall_ms", "loss_difference",
            "losses_agree",
        }  # fmt: skip
        for key in ("cpu_ms", "wall_ms"):
            assert 0 < figures[key]["p20"] <= figures[key]["median"] <= figures[key]["p80"]
    assert [line["what"] for line in result["comparisons"]] == [comparison.what for comparison in COMPARISONS]
    for line in result["comparisons"]:
        assert line.keys() == {"what", "asked", "ratio", "met"} and line["ratio"].keys() == {"median", "p20", "p80"}
    page = to_markdown(result)
    assert all(figures["title"] in page for figures in result["contenders"].values())


def test_percentiles_and_paired_ratios() -> None:
    """By hand: ratios are of the same repeat, rates are seconds of theirs over ours, collectives ours over theirs."""
    assert bench_step.spread([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3.0, "p20": 1.8, "p80": 4.2}
    runs = {
        "a": [{"cpu_ms": t, "collectives": 10} for t in (1.0, 2.0, 4.0)],
        "b": [{"cpu_ms": t, "collectives": 40} for t in (3.0, 4.0, 20.0)],
    }
    agreeing = {name: {"losses_agree": True} for name in runs}
    rate = bench_step._compare(Comparison("rate", "a", "b", "cpu_ms", 2.5), runs, agreeing)
    assert rate["ratio"]["median"] == 3.0 and rate["met"] is True  # of 3, 2, 5
    assert bench_step._compare(Comparison("rate", "a", "b", "cpu_ms", 3.5), runs, agreeing)["met"] is False
    fewer = bench_step._compare(Comparison("fewer", "a", "b", "collectives", 0.25), runs, agreeing)
    assert fewer["ratio"]["median"] == 0.25 and fewer["met"] is True


@pytest.mark.parametrize("loss", [1.0 + 2e-5, math.nan])
def test_no_ratio_without_equal_losses(result: dict[str, Any], loss: float) -> None:
    contender = bench_step.contenders(2)[0]
    run = {"cpu_ms": 1.0, "wall_ms": 1.0, "calls": {}, "collectives": 1, "losses": [1.0, loss]}
    figures = {
        "flat": bench_step._figures(contender, [run], [1.0, 1.0]),
        "named": bench_step._figures(contender, [run | {"losses": [1.0, 1.0]}], [1.0, 1.0]),
    }
    assert [figures[name]["losses_agree"] for name in ("flat", "named")] == [False, True]
    runs = {"flat": [run], "named": [run]}
    line = bench_step._compare(Comparison("rate", "flat", "named", "cpu_ms", 1.5), runs, figures)
    assert line["ratio"] is None and line["met"] is None
    page = to_markdown(result | {"contenders": figures, "comparisons": [line]})
    assert "NOT THE SAME" in page and "no ratio" in page


def test_the_plain_model_is_our_model() -> None:
    """Same initial values; outputs and every gradient in float64, where rounding cannot hide a difference."""
    config = validate({"model": {"preset": "uvit-tiny", "resolution": 32}, "train": {"seed": 5}})
    ours = build_model(config, 50, layout="named").materialize(5).double()
    plain = bench_rivals.PlainUViT(config.backbone(), 50)
    table = bench_rivals.declared(config, 50)
    bench_rivals.fill(config, plain, table)
    plain.double()
    torch.manual_seed(0)
    latents, time = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.rand(3)
    tokens = torch.randint(50, (3, 16))
    outputs = [ours(latents, time, tokens=tokens), plain(latents, time, tokens)]
    torch.testing.assert_close(outputs[0].double(), outputs[1], rtol=1e-6, atol=1e-7)  # ours ends in float32
    weight = torch.randn_like(latents)
    for out in outputs:
        (out * weight).sum().backward()
    mine = {name: parameter.grad for name, parameter, _, _ in ours.canonical()}
    for name, parameter in plain.named_parameters():
        canonical = name if name.startswith("text.") else f"backbone.{name}"
        torch.testing.assert_close(mine.pop(canonical), parameter.grad, rtol=1e-5, atol=1e-6)
    assert not mine


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="does not divide over 2 ranks"):
        bench_step.bench_step(batch=3, ranks=2)
    with pytest.raises(ConfigError, match="made for classes"):
        bench_step.bench_step("uvit-h2-imagenet256", depth=2, width=64)


def test_a_rank_that_fails_is_named_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("a broken contender")

    monkeypatch.setattr(bench_step, "measure", fail)
    with pytest.raises(LongskipError, match=r"bare torch loop.*rank 0 ended with 1[\s\S]*a broken contender"):
        bench_step.bench_step(**SMALL, only=("bare",))


def test_the_command(result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from longskip.launcher.cli import app

    asked: dict[str, Any] = {}

    def stand_in(preset: str, **options: Any) -> dict[str, Any]:
        asked.update(options, preset=preset)
        return result

    monkeypatch.setattr(bench_step, "bench_step", stand_in)
    out = tmp_path / "new" / "step"
    arguments = ["bench", "step", "--ranks", "4", "--repeats", "2", "--steps", "3", "--json", "--out", str(out)]
    shown = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert json.loads(shown.stdout) == result == json.loads(out.with_suffix(".json").read_text())
    assert out.with_suffix(".md").read_text() == to_markdown(result)
    assert (asked["ranks"], asked["repeats"], asked["steps"], asked["preset"]) == (4, 2, 3, "uvit-tiny")
