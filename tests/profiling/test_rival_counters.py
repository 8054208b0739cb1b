"""Counters of others beside the closed form: what each leaves out is known to the integer, and ours leave out nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from longskip import kernels
from longskip.engine import bench_counters
from longskip.engine.bench_counters import Task, case_of, cells, distance, exact_of, row, spec_of, to_markdown
from longskip.engine.bench_rivals import PlainUViT
from longskip.errors import ConfigError, SpecError
from longskip.launcher.cli import app
from longskip.models.specs import UViTSpec
from longskip.profiling.rival_counters import COUNTERS, Counter, exact_flops, uvit_case, version
from tests.figures import figure

BY_NAME = {counter.name: counter for counter in COUNTERS}
VARIANTS = tuple(bench_counters.VARIANTS)
LABELS = UViTSpec(24, 2, 2, channels=3, latent_size=(8, 6), n_classes=4, conv=False)
NOTHING = UViTSpec(24, 2, 2, channels=3, latent_size=(8, 6))


def attention_flops(variant: str) -> int:
    return 2 * spec_of("uvit-tiny", variant).flops().macs_by_op["attention"]


def biased(variant: str) -> int:
    """Multiply-adds of the linears with a bias in the plain model: all but q, k, v."""
    macs = spec_of("uvit-tiny", variant).flops().macs_by_op
    return sum(count for op, count in macs.items() if op not in ("qkv", "attention", "conv"))


def asked(name: str, variant: str, device: str) -> tuple[float, int]:
    """A counter's figure for uvit-tiny, in FLOPs, and the closed form of what it covers."""
    counter = BY_NAME[name]
    return counter.to_flops(counter.count(case_of("uvit-tiny", variant, device))), exact_of("uvit-tiny", variant)[
        counter.of
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_ours_are_exact(variant: str, device: str) -> None:
    for name in ("longskip, dispatch count", "longskip, dispatch count, step"):
        figure_, exact = asked(name, variant, device)
        assert figure_ == exact and isinstance(figure_, int)


@pytest.mark.parametrize("spec", [LABELS, NOTHING], ids=["labels", "no condition"])
def test_models_without_texts(spec: UViTSpec) -> None:
    case, exact = uvit_case(spec, "meta", batch=3), exact_flops(spec, batch=3)
    assert exact["forward"] == spec.flops(3).flops and exact["step"] > 2 * exact["forward"]
    assert BY_NAME["longskip, dispatch count"].count(case) == exact["forward"]
    assert BY_NAME["longskip, dispatch count, step"].count(case) == exact["step"]
    assert BY_NAME["fvcore with our handles"].count(uvit_case(spec, "cpu", batch=3)) * 2 == exact["forward"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_torchs_counter_misses_attention_on_a_cpu(variant: str) -> None:
    attention = attention_flops(variant)
    for part, passes in (("", 1), (", step", 3)):
        by_math, exact = asked(f"FlopCounterMode{part}, math attention", variant, "cpu")
        assert by_math == exact
        found, _ = asked(f"FlopCounterMode{part}", variant, "cpu")
        assert found in (exact, exact - passes * attention)  # torch 2.13: the latter


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", VARIANTS)
def test_fvcore_is_exact_with_our_handles_and_not_without(variant: str) -> None:
    """Without them it lacks attention, and has 5 operations for each element of a LayerNorm with weights, 4 without."""
    found, exact = asked("fvcore with our handles", variant, "cpu")
    assert found == exact
    spec = spec_of("uvit-tiny", variant)
    norms = (2 * spec.n_blocks + 1) * spec.n_tokens * spec.width
    plain, _ = asked("fvcore", variant, "cpu")
    each = 4 if variant == "switches" else 5  # adaLN's norms have no weights
    assert plain == exact - attention_flops(variant) + 2 * each * norms


@pytest.mark.filterwarnings("ignore")
def test_fvcore_is_exact_on_our_own_kernels() -> None:
    """A whole model served by the custom ops, which fvcore knows by our handles alone."""
    found, exact = asked("fvcore with our handles, Triton kernels", "switches", "cpu")
    assert found == exact
    without, _ = asked("fvcore, Triton kernels", "switches", "cpu")
    assert without < exact / 2


def test_figures_become_flops_by_two_per_multiply_add() -> None:
    seen: list[dict[str, str]] = []

    def ask(case: Any) -> float:
        seen.append({op: backend for op, (backend, _) in kernels.choices("cpu").items()})
        return 12.0

    case = uvit_case(NOTHING, "meta")
    for unit, flops in (("MACs", 24), ("FLOPs", 12)):
        counter = Counter("name", "torch", "flops", unit, "forward", ask)  # type: ignore[arg-type]
        found = counter.count(case)
        assert found == 12 and isinstance(found, int) and counter.to_flops(found) == flops
    assert seen[0]["attention"] == "torch"


def test_a_row_holds_figure_and_distance() -> None:
    exact = exact_of("uvit-tiny", "longskip")
    task = Task("fvcore", "uvit-tiny", "longskip", "cpu")
    right = row(task, exact["forward"] // 2)
    assert (
        right["flops"] == exact["forward"] == right["exact"] and right["error_percent"] == 0 and distance(right) == "0"
    )
    assert distance(row(task, exact["forward"] // 4)) == "-50.00%"
    assert distance(row(task, exact["forward"] // 2 + 1)) == f"{200 / exact['forward']:+.1g}%" != "0"
    step = row(Task("FlopCounterMode, step", "uvit-tiny", "plain", "cpu"), exact["step"])
    assert step["exact"] > exact["step"]  # the plain model's word vectors are trained along
    failed = row(task, None, "ValueError: no")
    assert failed["failed"] == "ValueError: no" and failed["flops"] is None and failed["error_percent"] is None


def test_the_plain_model_is_the_same_model() -> None:
    spec = spec_of("uvit-tiny", "plain")
    held = sum(p.numel() for name, p in PlainUViT(spec, 8).named_parameters() if not name.startswith("text."))
    assert held == spec.param_counts().total == sum(p.numel() for p in uvit_case(spec, "meta").model.parameters())
    assert not bench_counters._exists("uvit-s2-cifar10", "plain") and bench_counters._exists(
        "uvit-s2-cifar10", "longskip"
    )


def test_what_follows_a_failure_has_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failure is a row; a process that ends without one fails the task it was at; the others are asked again."""
    names = ("fvcore", "thop", "torchinfo", "ptflops", "torch_flops")
    tasks = [Task(name, "uvit-tiny", "longskip", "meta") for name in names]
    calls: list[list[str]] = []

    def process(left: Sequence[Task]) -> tuple[list[dict[str, Any]], str | None]:
        calls.append([task.counter for task in left])
        if len(calls) == 1:
            return [row(left[0], 7), row(left[1], None, "ValueError: no")], None
        died = "the process ended with -11" if len(calls) == 2 else None
        return [row(left[0], 9)], died

    monkeypatch.setattr(bench_counters, "_process", process)
    said: list[str] = []
    rows = bench_counters._asked(tasks, said.append)
    assert calls == [list(names), list(names[2:]), list(names[4:])] and len(said) == 5
    assert [one["counter"] for one in rows] == list(names)
    assert [one["failed"] for one in rows] == [None, "ValueError: no", None, "the process ended with -11", None]


def test_the_command_counts_in_another_process(tmp_path: Path) -> None:
    out = tmp_path / "made" / "counters.json"
    arguments = ["bench", "counters", "--device", "meta", "--package", "longskip", "--out", str(out)]
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert result == json.loads(out.read_text("utf-8"))
    assert len(result["rows"]) == 2 * len(VARIANTS) and all(one["error_percent"] == 0 for one in result["rows"])
    assert out.with_suffix(".md").read_text("utf-8") == to_markdown(result)
    exact = exact_of("uvit-tiny", "switches")
    assert result["models"][1]["exact_flops"] == exact
    titles, rows = cells(result, result["models"][1])
    assert titles == ["counter", "version", "its figure is", "says on meta", "error"]
    assert [line[2:] for line in rows] == [
        ["FLOPs, forward", f"{exact['forward']:,} flops", "0"],
        ["FLOPs, step", f"{exact['step']:,} flops", "0"],
    ]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"presets": ["uvit-tny"]}, SpecError, "did you mean 'uvit-tiny'"),
        ({"devices": ["cuda"]}, ConfigError, "not on 'cuda'"),
        ({"only": ["torchinf"]}, ConfigError, "did you mean 'torchinfo'"),
        ({"only": ["zzz"]}, ConfigError, "known: calflops, deepspeed, fvcore, longskip"),
    ],
)
def test_what_cannot_be_asked_for(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bench_counters.bench_counters(**arguments)


def test_packages_that_are_missing_are_named() -> None:
    assert version("torch") == torch.__version__ and version("a_counter_that_nobody_wrote") is None


@pytest.mark.slow
def test_deepspeed_and_a_crash_in_processes_of_their_own() -> None:
    """fvcore cannot trace on meta; what comes after it is counted all the same. DeepSpeed's profiler is right on a CPU and
    counts linears with a bias twice on meta."""
    linear = F.linear
    crash = [Task("fvcore", "uvit-tiny", "plain", device) for device in ("meta", "cpu")]
    failed, counted = bench_counters._asked(crash, lambda line: None)
    assert failed["failed"] and failed["flops"] is None
    assert counted["failed"] is None and counted["flops"] < counted["exact"]
    tasks = [Task("DeepSpeed profiler, MACs", "uvit-tiny", "plain", device) for device in ("cpu", "meta")]
    cpu, meta = bench_counters._asked(tasks, lambda line: None)
    assert cpu["flops"] == cpu["exact"] and F.linear is linear
    assert meta["figure"] in (cpu["figure"], cpu["figure"] + biased("plain"))  # deepspeed 0.19.8: the latter
    figure(f"DeepSpeed's profiler on meta: {distance(meta)}; fvcore on meta: {failed['failed']}")


@pytest.mark.slow
def test_a_large_model_is_not_interpreted_and_a_hung_counter_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    task = Task("fvcore, Triton kernels", "uvit-s2-coco", "longskip", "cpu")
    assert bench_counters._too_slow(task) is not torch.cuda.is_available()
    assert not bench_counters._too_slow(Task("fvcore", "uvit-8b", "longskip", "cpu"))
    monkeypatch.setattr(bench_counters, "TIME_LIMIT", 0.5)  # not even torch is imported by then
    (given_up,) = bench_counters._asked([Task("thop", "uvit-tiny", "plain", "cpu")], lambda line: None)
    assert given_up["failed"] == "not done after 0 s"
