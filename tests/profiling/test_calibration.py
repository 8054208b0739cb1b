"""Calibration by clocks that are told what to show: nothing here depends on how fast the machine is."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longskip.errors import BackendError, ConfigError
from longskip.models.calls import Call
from longskip.models.formulas import FORMULAS
from longskip.models.specs import UViTSpec
from longskip.profiling import calibration, efficiency, op_works
from longskip.profiling.calibration import SMALLEST, Calibration, Seconds, calls_of, ceilings, clock_of
from longskip.profiling.counting import count_flops
from longskip.profiling.efficiency import Efficiencies, Measured
from longskip.profiling.hardware import find, processor

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


class Faked:
    """A clock that only fake work moves: ``forward`` and ``backward`` hold the seconds of the next calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, forward: list[float], backward: list[float]) -> None:
        self.now = 0.0
        self.forward, self.backward = forward, backward
        self.calls = 0
        monkeypatch.setitem(op_works._MAKERS, "linear", self.maker)
        monkeypatch.setattr(calibration._Small, "build", classmethod(lambda cls, *_: self.small(cls)))
        self.small_forward: Callable[[], None] = lambda: None
        self.small_calls = [linear()]

    def read(self) -> Seconds:
        return Seconds(self.now, 2 * self.now)

    def maker(self, tensors: Any, sizes: Any) -> Callable[[], Tensor]:
        clock, x = self, tensors.x(3)

        class Work(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                clock.now += clock.forward[min(clock.calls, len(clock.forward) - 1)]
                return x * 2

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Tensor:
                clock.now += clock.backward[min(clock.calls, len(clock.backward) - 1)]
                clock.calls += 1
                return grads[0] * 2

        return lambda: Work.apply(x)  # type: ignore[no-any-return, no-untyped-call]

    def small(self, cls: Any) -> Any:
        def forward() -> Tensor:
            self.small_forward()
            return torch.zeros((), requires_grad=True) * 1

        return cls(forward, lambda: None, self.small_calls)


def linear(rows: int = 8, **more: Any) -> Call:
    return Call("x", "linear", {"rows": rows, "width": 4, "out": 2, "bias": 1}, {}, **more)


def test_seconds_are_the_medians_of_the_rounds_and_costs_the_declared_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two calls of warm-up, then one a round: a disturbed round does not count.
    clock = Faked(monkeypatch, [9, 9, 3, 100, 4], [9, 9, 50, 5, 7])
    found = Calibration([linear()], read=clock.read)
    for _ in range(3):
        found.round()
    table = found.result("here", {"commit": "abc"})
    forward, backward = table.entries
    assert (forward.cpu, forward.wall, backward.cpu, backward.wall) == (4, 8, 7, 14)
    assert (forward.op, forward.direction, backward.direction) == ("linear", "forward", "backward")
    sizes = linear().sizes
    assert forward.cost == FORMULAS["linear"].forward(**sizes)
    assert backward.cost == FORMULAS["linear"].backward(**sizes)  # type: ignore[misc]
    assert (table.device, table.dtype, table.about["commit"]) == ("here", "fp32", "abc")


def test_equal_calls_are_timed_once_and_a_missing_gradient_is_another_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Faked(monkeypatch, [1], [1])
    found = Calibration([linear(), linear(), linear(16)], read=clock.read)
    warm = clock.calls
    found.round()
    assert (warm, clock.calls) == (4, 6)
    entries = found.result("here").entries
    assert [(entry.sizes["rows"], entry.direction) for entry in entries] == [
        (8, "forward"), (8, "backward"), (16, "forward"), (16, "backward")
    ]  # fmt: skip


def test_short_work_is_repeated_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Faked(monkeypatch, [1e-4], [1e-4])  # 4e-4 s of wall time a call: five of them are 2 ms
    found = Calibration([linear()], read=clock.read)
    warm = clock.calls
    found.round()
    assert clock.calls - warm == 5
    assert found.result("here").entries[0].cpu == pytest.approx(1e-4)


def test_overhead_is_what_the_smallest_models_step_takes_beside_its_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Faked(monkeypatch, [1], [1])

    def forward() -> None:
        clock.now += 10

    clock.small_forward, clock.small_calls = forward, [linear(), linear(), linear(16)]
    found = Calibration([linear()], read=clock.read)
    found.round()
    overhead = found.result("here").overhead
    assert overhead["forward"] == {"cpu": pytest.approx((10 - 3) / 3), "wall": pytest.approx(2 * (10 - 3) / 3)}
    assert overhead["backward"] == {"cpu": 0.0, "wall": 0.0}  # the fake backward takes no time: never below 0
    notes = found.result("here").about["notes"]
    assert [note for note in notes if "overhead 0" in note] == [
        "backward: the smallest model's ops took longer by themselves than its step, overhead 0"
    ]
    assert {entry.sizes["rows"] for entry in found.result("here").entries} == {8}  # only what was asked for


def test_the_engines_start_is_no_part_of_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Faked(monkeypatch, [1], [5])
    plain = torch.autograd.grad

    def started(*args: Any, **kwargs: Any) -> Any:
        clock.now += 2
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", started)
    found = Calibration([linear()], read=clock.read)
    found.round()
    assert found.result("here").entries[1].cpu == 5


def started_by(clock: Faked, monkeypatch: pytest.MonkeyPatch, starts: list[float]) -> None:
    """Every backward, that of the bare view too, takes one of ``starts`` seconds more, the last of them for ever."""
    plain, left = torch.autograd.grad, iter(starts)

    def started(*args: Any, **kwargs: Any) -> Any:
        clock.now += next(left, starts[-1])
        return plain(*args, **kwargs)

    monkeypatch.setattr(torch.autograd, "grad", started)


def test_a_backward_that_drowns_in_the_engines_start_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Faked(monkeypatch, [1], [0.01])  # 1% of what is read: no floor stands in for it
    started_by(clock, monkeypatch, [2.0])
    found = Calibration([linear(), linear(16)], read=clock.read)
    found.round()
    table = found.result("here", {"commit": "abc"})
    assert [(entry.sizes["rows"], entry.direction) for entry in table.entries] == [(8, "forward"), (16, "forward")]
    lost = [note for note in table.about["notes"] if "left out" in note]
    assert len(lost) == 2 and lost[0].startswith("linear rows=8 width=4 out=2 bias=1 backward: not told from")
    assert table.about["commit"] == "abc"


def test_a_lost_backward_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Faked(monkeypatch, [1], [5])
    # Two calls of warm-up; then the start took long where it is subtracted, and not any more in the turns that follow.
    started_by(clock, monkeypatch, [0, 0, 0, 0, 6, 0, 0])
    found = Calibration([linear()], read=clock.read)
    warm = clock.calls
    found.round()
    assert clock.calls - warm == 2  # one more turn: the median of -1 and 5 is told
    assert found.result("here").entries[1].cpu == 2 and not any("left" in n for n in found.notes())


def test_the_optimizer_is_timed_on_the_tensors_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stepped = Faked(monkeypatch, [1], [1]), []

    def adamw(params: Any, grads: Any, exp_avgs: Any, exp_avg_sqs: Any, **settings: Any) -> None:
        clock.now += 6
        stepped.append([p.numel() for p in params])

    monkeypatch.setattr(calibration.kernels, "adamw", adamw)
    found = Calibration([], parameters=[7, 5], read=clock.read)
    found.round()
    (entry,) = found.result("here").entries
    assert (entry.op, entry.cpu, entry.wall, dict(entry.sizes)) == ("adamw", 6, 12, {"values": 12, "tensors": 2})
    assert entry.cost == FORMULAS["adamw"].forward(values=12) and stepped == [[7, 5]]


def test_processor_time_is_divided_by_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(time, "process_time", lambda: 8.0)
    monkeypatch.setattr(time, "perf_counter", lambda: 5.0)
    assert clock_of(CPU)() == Seconds(2.0, 5.0)


def test_ceilings_are_work_over_time_without_the_first_turn() -> None:
    spans = iter([100, 100, 2, 4, 2, 4, 50, 60])  # warm-up, then fp32 and copy in turns

    class Clock:
        now, open = 0.0, False

        def read(self) -> Seconds:
            if self.open:
                self.now += next(spans)
            self.open = not self.open
            return Seconds(self.now, 10 * self.now)

    found = ceilings(["fp32"], size=16, copied=1000, repeats=3, read=Clock().read)
    assert found.by_cpu == {"fp32": 2 * 16**3 / 2, "copy": 2 * 1000 / 4}
    assert found.by_wall == {"fp32": 2 * 16**3 / 20, "copy": 2 * 1000 / 40}


RICH = UViTSpec(
    width=32, depth=2, n_heads=2, patch=2, channels=3, latent_size=(8, 10), n_txt=3, text_width=5, n_classes=4,
    time_mlp=True, qk_norm=True, adaln=True,
)  # fmt: skip
EXTRA = [
    Call("swiglu", "swiglu", {"rows": 6, "width": 8, "hidden": 16, "out": 8}, {}),
    Call("rms", "rms_norm", {"rows": 6, "width": 8, "weight": 1, "residual": 1}, {}),
    Call("cross", "attention", {"batch": 2, "queries": 3, "keys": 20, "heads": 2, "head_dim": 8, "masked": 1}, {}),
    Call("gelu", "gelu", {"values": 12}, {}),
    Call(
        "first", "mlp", {"rows": 6, "width": 8, "hidden": 16, "out": 8, "bias1": 0, "bias2": 1}, {}, needs_input=False
    ),
    Call(
        "rotary", "qk_norm_rotary", {"q_rows": 12, "k_rows": 12, "head_dim": 8, "tokens": 6, "rms": 0, "rotate": 1}, {}
    ),
]


# With 16 keys or more, where torch's fused attention serves.
PLAIN = replace(SMALLEST, patch=2)
ONCE = {calibration._key(call): call for call in [*calls_of(PLAIN, 2), *calls_of(RICH, 2), *EXTRA]}


@pytest.mark.parametrize("call", ONCE.values(), ids=lambda call: f"{call.name}-{call.op}")
def test_what_is_timed_executes_what_is_declared(call: Call) -> None:
    """The products that reach torch's dispatcher, forward and backward, against the op's formula, to the integer."""
    work = op_works.work_of(call, CPU, torch.float32)
    outputs: list[Tensor] = []
    forward = count_flops(lambda: outputs.extend(work.run()))
    cost = op_works.cost_of(call, "forward", 4)
    assert cost is not None and forward.macs == cost.macs
    backward = op_works.cost_of(call, "backward", 4)
    if backward is None:
        assert not work.leaves
        return
    cotangents = [torch.ones_like(out) for out in outputs]
    counted = count_flops(lambda: torch.autograd.grad(outputs, work.leaves, cotangents, allow_unused=True))
    assert counted.macs == backward.macs
    assert len(work.leaves) >= 1 and any(leaf.requires_grad for leaf in work.leaves)


def test_every_op_with_a_formula_can_be_timed_but_those_without_a_call_in_a_model() -> None:
    assert set(FORMULAS) - set(op_works._MAKERS) == {"adamw", "attention_varlen"}


def test_a_real_round_measures_every_call_in_both_directions() -> None:
    found = Calibration(calls_of(SMALLEST, 1), parameters=[5, 16])
    found.round()
    table = found.result(processor())
    timed = {(entry.op, entry.direction) for entry in table.entries}
    assert {("mlp", "backward"), ("attention", "backward"), ("sinusoid", "forward"), ("adamw", "forward")} <= timed
    assert all(entry.cpu > 0 and entry.wall > 0 for entry in table.entries)
    assert ("sinusoid", "backward") not in timed and ("noising", "backward") not in timed


def test_bad_asking_is_refused() -> None:
    with pytest.raises(BackendError, match=r"op 'fft' cannot be calibrated[\s\S]*linear"):
        Calibration([Call("x", "fft", {}, {})])
    with pytest.raises(ConfigError, match=r"dtype 'int8'[\s\S]*bf16"):
        Calibration([], dtype="int8")
    with pytest.raises(ConfigError, match=r"dtype 'tf32'"):
        ceilings(["tf32"])
    with pytest.raises(ConfigError, match=r"nothing was measured"):
        Calibration([]).result("here")


# -- tables ------------------------------------------------------------------------------------------------------------


def entry(
    op: str = "linear", direction: Any = "forward", *, macs: int = 500, moved: int = 10, cpu: float = 2.0
) -> Measured:
    return Measured(op, direction, {"rows": macs}, macs, 0, moved, cpu, 2 * cpu)


def test_a_saved_table_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    overhead = {"forward": {"cpu": 1e-6, "wall": 2e-6}}
    table = Efficiencies("Some CPU (R)", "fp32", (entry(), entry("mlp", "backward")), overhead, {"commit": "abc"})
    path = table.save()
    assert path == tmp_path / "longskip" / "efficiency" / "some-cpu-r-fp32.json"
    assert efficiency.load(path) == table == efficiency.of_device("Some CPU (R)", "fp32")
    assert efficiency.of_device("Some CPU (R)", "bf16") is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no measured efficiencies"),
        ('{"device": "x"}', "holds no measured efficiencies"),
        ('{"device": "x", "dtype": "fp32", "entries": [{"op": "linear"}]}', "is damaged"),
        ('{"device": "x", "entries": []}', "is damaged.*dtype"),
    ],
)
def test_what_is_no_table_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        efficiency.load(path)
    with pytest.raises(ConfigError, match="cannot read"):
        efficiency.load(tmp_path / "nowhere.json")


def test_a_time_of_zero_is_damage(tmp_path: Path) -> None:
    path = Efficiencies("x", "fp32", (entry(cpu=0.0),)).save(tmp_path)
    with pytest.raises(ConfigError, match=r"took 0\.0 seconds"):
        efficiency.load(path)


def test_the_table_of_bench_kernels_is_read_as_efficiencies(tmp_path: Path) -> None:
    def row(provider: str, ms: float, **more: Any) -> dict[str, Any]:
        head = {"op": "mlp", "case": "h1024", "mode": "forward", "provider": provider, "flops": 8 * 10**12, "bytes": 10}
        return head | {"ms": {"median": ms}} | more

    rows = [
        row("torch", 20.0),
        row("triton", 16.0),
        row("torch", 17.0),
        row("compile", 1.0),
        row("triton", 3.0, mode="both"),
    ]
    rows += [row("triton", 40.0, mode="backward"), {"op": "mlp", "provider": "triton", "mode": "both", "failed": "x"}]
    tree = {"device": "NVIDIA H200", "dtype": "bfloat16", "claim": True, "commit": "abc", "rows": rows}
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(tree))
    table = efficiency.load(path)
    assert (table.device, table.dtype, table.about) == ("NVIDIA H200", "bf16", {"commit": "abc"})
    assert [(e.direction, e.cpu) for e in table.entries] == [
        ("forward", 0.016),
        ("backward", 0.04),
    ]  # the faster of ours
    share = table.share("mlp", "forward", {}, table.entries[0].cost, find("h200"))
    assert share is not None and share.measured
    assert share.compute == pytest.approx(8e12 / 0.016 / 989.5e12)  # 500 of 989.5 TFLOP/s
    kept = efficiency.adopt(path, tmp_path / "cache")
    assert efficiency.of_device("H200", "bf16", kept.parent) == replace(table, device="H200")
    path.write_text(json.dumps(tree | {"device": "NVIDIA H20"}))
    with pytest.raises(ConfigError, match=r"'NVIDIA H20', which no row[\s\S]*hardware.yaml"):
        efficiency.adopt(path, tmp_path)
    path.write_text(json.dumps(tree | {"claim": False}))
    with pytest.raises(ConfigError, match="without a GPU"):
        efficiency.load(path)
