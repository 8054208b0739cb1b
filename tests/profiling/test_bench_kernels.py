"""``bench kernels`` and its pages: the figures are those of the work, a wrong kernel gets none, tables are read back."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from longskip import kernels
from longskip.errors import BackendError, LongskipError
from longskip.kernels import backends, tables
from longskip.profiling import bench, bench_packed, bench_render, bench_timing, bench_tuning
from longskip.profiling.bench_packed import PADDED
from longskip.profiling.bench_providers import Provider, by_backend, flash_attn, xformers
from longskip.profiling.kernel_cases import CASES, SWEEP, TOKENS, KernelCase

CPU = torch.device("cpu")
LIMITS = {"matmul_tflops": 1.0, "copy_gbps": 10.0}
TINY = KernelCase(
    "skip_linear", "tiny", "width", 8, {"x": (2, 3, 8), "skip": (2, 3, 8), "weight": (8, 16), "bias": (8,)}
)


def rows(provider: Provider, case: KernelCase = TINY) -> list[dict[str, Any]]:
    return bench.bench_case(case, [provider], CPU, torch.float32, LIMITS, 3, lambda line: None)


def test_rates_are_declared_work_over_measured_time() -> None:
    found = {row["mode"]: row for row in rows(Provider("torch", "x", by_backend("torch")))}
    assert set(found) == {"forward", "backward", "both"}
    forward = 2 * 6 * 16 * 8
    assert [found[mode]["flops"] for mode in ("forward", "backward", "both")] == [forward, 2 * forward, 3 * forward]
    for row in found.values():
        assert row["tflops"] == pytest.approx(row["flops"] / row["ms"]["median"] / 1e9)
        assert row["gbps"] == pytest.approx(row["bytes"] / row["ms"]["median"] / 1e6)
        assert row["copy_share"] == pytest.approx(row["gbps"] / 10)
        assert row["ms"]["p20"] <= row["ms"]["median"] <= row["ms"]["p80"]


@pytest.mark.parametrize("where", ["output", "gradient"])
def test_a_wrong_kernel_gets_no_time(where: str) -> None:
    def make(case: KernelCase) -> Any:
        def call(leaves: Any, extra: Any) -> tuple[torch.Tensor, ...]:
            (out,) = case.call(leaves, extra)
            if where == "output":
                return (out * (1 + 1e-4),)
            return (out + (leaves["x"] - leaves["x"].detach()).sum() * 1e-3,)

        return call

    (row,) = rows(Provider("wrong", "x", make))
    assert "ms" not in row
    assert row["failed"].startswith("out0: error" if where == "output" else "dx: error")


def test_a_provider_that_fails_is_named_and_the_others_go_on() -> None:
    def make(case: KernelCase) -> Any:
        def call(leaves: Any, extra: Any) -> tuple[torch.Tensor, ...]:
            raise RuntimeError("no such device function")

        return call

    found = bench.bench_case(
        TINY, [Provider("broken", "x", make), Provider("torch", "x", by_backend("torch"))],
        CPU, torch.float32, LIMITS, 2, lambda line: None,
    )  # fmt: skip
    assert found[0]["failed"] == "RuntimeError: no such device function"
    assert {row["provider"] for row in found[1:]} == {"torch"}


def test_times_are_of_the_work_and_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only the work moves forward."""
    now, order = [0.0], []
    monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: now[0])

    def work(name: str, *milliseconds: float) -> Any:
        lasts = itertools.chain((0.0, 0.0), milliseconds)  # twice to warm up

        def run() -> None:
            order.append(name)
            now[0] += next(lasts) / 1000

        return run

    found = bench_timing.interleaved({"a": work("a", 5, 1, 2, 3, 4), "b": work("b", 7, 7, 7, 7, 7)}, CPU, 5)
    assert order[4:] == ["a", "b"] * 5
    assert found["a"] == pytest.approx({"median": 3.0, "p20": 1.8, "p80": 4.2})
    assert found["b"] == pytest.approx(dict.fromkeys(("median", "p20", "p80"), 7.0))


def test_every_case_names_what_its_op_takes() -> None:
    for case in CASES:
        leaves, extra = case.tensors(torch.device("meta"), torch.float32)
        with kernels.use("torch"):
            outputs = case.call(leaves, extra)
        torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(o) for o in outputs], allow_unused=True)
        small = case.smaller(1)
        if case.lengths:
            assert small.inputs["q"][0] == sum(small.lengths) and small.lengths == case.lengths[:3], case.id
        else:
            assert all(shape[0] == 1 for name, shape in small.inputs.items() if len(shape) > 2), case.id
    assert {case.op for case in CASES} == set(backends._FAMILY_OF) - {"adamw"}
    assert len({case.id for case in (*CASES, *SWEEP)}) == len(CASES) + len(SWEEP)


def test_packed_samples_have_different_lengths_in_their_ranges() -> None:
    for case in CASES:
        if case.op == "attention_varlen":
            _, extra = case.tensors(torch.device("meta"), torch.float32)
            assert extra["cu_seqlens"].diff().tolist() == list(case.lengths)
            assert len(set(case.lengths)) > len(case.lengths) // 2 and max(case.lengths) == case.x
    (short,) = (case.lengths for case in CASES if case.id == "attention_varlen-captions334-Dh64-H16-S64")
    assert all(1 + 256 + 8 <= length <= 1 + 256 + 77 for length in short)


def test_the_sweep_is_a_line_of_tokens_at_one_amount_of_work() -> None:
    line = [case for case in (*CASES, *SWEEP) if case.series == SWEEP[0].series]
    assert sorted(case.x for case in line) == list(TOKENS)
    for case in line:
        batch, tokens, _, heads, head_dim = case.inputs["q"]
        assert (heads, head_dim) == (16, 64) and abs(batch * tokens - 16384) <= tokens / 2
    assert bench.chosen_cases(["attention"], ["T512"], sweep=True) and SWEEP[-1] not in bench.chosen_cases([], [])
    with pytest.raises(BackendError, match="no case of that name"):
        bench.chosen_cases(["attention"], ["T512"], sweep=False)


PACKED = KernelCase("attention_varlen", "tiny", "tokens", 64, {"q": (126, 3, 2, 32)}, lengths=(37, 5, 64, 20))


@pytest.mark.parametrize(
    "rival", [Provider("padded", "x", bench_packed.padded, layout=PADDED), Provider("nested", "x", bench_packed.nested)],
    ids=lambda rival: rival.name,
)  # fmt: skip
def test_rivals_of_packed_attention_compute_the_same(rival: Provider) -> None:
    found = rows(rival, PACKED)
    assert [row.get("failed") for row in found] == [None] * 3
    pairs = sum(length**2 for length in PACKED.lengths)
    assert [row["flops"] for row in found] == [4 * 2 * 32 * pairs, 8 * 2 * 32 * pairs, 12 * 2 * 32 * pairs]
    assert isinstance(rival.make(TINY), str)


def test_a_padded_rival_that_attends_to_padding_gets_no_time() -> None:
    def make(case: KernelCase) -> Any:
        def call(leaves: Any, extra: Any) -> tuple[torch.Tensor, ...]:
            q, k, v = (t.transpose(1, 2) for t in leaves["q"].unbind(2))
            return (torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2),)

        return call

    (row,) = rows(Provider("padded", "x", make, layout=PADDED), PACKED)
    assert "ms" not in row and row["failed"].startswith("out0: error")


def test_torchs_call_with_offsets_takes_the_case() -> None:
    leaves, extra = PACKED.tensors(torch.device("meta"), torch.bfloat16)
    call = bench_packed.by_offsets(PACKED)
    assert not isinstance(call, str)
    (out,) = call(leaves, extra)
    (grad,) = torch.autograd.grad(out, leaves["q"], torch.empty_like(out))
    assert out.shape == (126, 2, 32) and grad.shape == leaves["q"].shape


def test_flash_attn_and_xformers_are_handed_what_packed_attention_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the packages' signatures, which compute by our definition."""

    def flash(qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int) -> torch.Tensor:
        assert cu_seqlens.dtype == torch.int32 and max_seqlen == max(cu_seqlens.diff().tolist())
        return kernels.attention_varlen(qkv, cu_seqlens=cu_seqlens)

    class Blocks:
        @staticmethod
        def from_seqlens(lengths: Any, *, device: torch.device) -> torch.Tensor:
            return torch.tensor((0, *lengths), device=device).cumsum(0)

    def efficient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, attn_bias: torch.Tensor) -> torch.Tensor:
        return kernels.attention_varlen(q[0], k[0], v[0], cu_seqlens=attn_bias)[None]

    stand_ins = {
        "flash_attn": {"flash_attn_varlen_qkvpacked_func": flash},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": efficient},
        "xformers.ops.fmha": {},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalMask": Blocks},
    }
    for name, members in stand_ins.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    for make in (flash_attn, xformers):
        found = rows(Provider(make.__name__, "x", make), PACKED)
        assert [row.get("failed") for row in found] == [None] * 3


def test_the_bucket_that_is_written_for_packed_attention_is_the_one_that_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = sys.modules["longskip.kernels.attention"]
    resolve, asked = module.resolve, []
    monkeypatch.setattr(module, "resolve", lambda *found: asked.append(found[3]) or resolve(*found))
    PACKED.call(*PACKED.tensors(CPU, torch.float32))
    found = [
        {"op": "attention_varlen", "case": "tiny", "mode": "both", "provider": name, "ms": {"median": ms}}
        for name, ms in (("triton", 1.0), ("torch", 2.0))
    ]
    table = bench_tuning.fastest(found, [PACKED], torch.float32)
    where = "float32 queries=32 keys=32 heads=2 head_dim=32"  # 126 tokens in 4 sequences
    assert tables.bucket(torch.float32, asked[0]) == where
    assert table["attention_varlen"] == {where: {"backend": "triton", "milliseconds": {"triton": 1.0, "torch": 2.0}}}


def test_the_command_writes_json_and_csv_and_the_pages_are_made_of_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "longskip.profiling.bench", "--op", "adaln", "--shapes", "h1024", "--repeats", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path / "k")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "no claim about speed" in done.stderr
    result = json.loads((tmp_path / "k.json").read_text())
    assert result["claim"] is torch.cuda.is_available()
    with (tmp_path / "k.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["kernel_operation_mode"] for line in lines} == {"forward", "backward", "full"}
    assert [float(line["y_value_50"]) for line in lines if line["metric_name"] == "speed"] == [
        row["ms"]["median"] for row in result["rows"] if "ms" in row
    ]
    written = bench_render.render(tmp_path / "k.json")
    assert {path.name for path in written} == {"roofline.png", "adaln.png", "index.html"}
    page = written[-1].read_text()
    assert "claim nothing about speed" in page and page.count("data:image/png;base64,") == 2


def measured(provider: str, x: int, ms: float, **changes: Any) -> dict[str, Any]:
    row = {
        "op": "attention", "case": f"T{x}", "x_name": "tokens", "x": x, "series": "16 heads", "sweep": True, "dtype": "bfloat16",
        "provider": provider, "version": "1", "ours": provider == "triton", "mode": "forward", "flops": 4 * x,
        "bytes": x, "gbps": 1.0, "copy_share": 0.1, "tflops": 1.0, "matmul_share": 0.25, "error_share": 0.5,
        "ms": {"median": ms, "p20": 0.9 * ms, "p80": 1.2 * ms},
    }  # fmt: skip
    return row | changes


def test_three_sizes_of_a_series_make_a_line_of_their_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    drawn: dict[str, Figure] = {}
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: drawn.update({Path(path).name: self}) or save(self, path))
    sizes = {512: 2.0, 128: 0.5, 2048: 8.0}  # in whatever order they were measured
    rows = [
        measured(name, x, ms * factor, matmul_share=0.25 / factor)
        for name, factor in (("triton", 1), ("torch", 3))
        for x, ms in sizes.items()
    ]
    rows += [measured("triton", x, 1.0, series="two sizes only") for x in (128, 256)]
    rows += [measured("torch", 334, 1.0, op="mlp", case="one", series="", sweep=False)]
    result = {
        "command": "c", "commit": "x", "date": "d", "device": "D", "versions": {}, "missing": {}, "claim": True,
        "dtype": "bfloat16", "repeats": 3, "ceilings": {"matmul_tflops": 4.0, "copy_gbps": 10.0}, "rows": rows,
    }  # fmt: skip
    (tmp_path / "k.json").write_text(json.dumps(result))
    written = [path.name for path in bench_render.render(tmp_path / "k.json")]
    assert written == ["roofline.png", "attention-lines.png", "mlp.png", "index.html"]
    (panel,) = drawn["attention-lines.png"].axes
    assert (panel.get_xscale(), panel.get_yscale(), panel.get_xlabel()) == ("log", "log", "tokens")
    lines = {line.get_label(): [list(map(float, values)) for values in line.get_data()] for line in panel.get_lines()}
    assert lines == {
        "at this run's ceiling": [[128, 512, 2048], [0.125, 0.5, 2.0]],  # ours ran at a quarter of it
        "triton": [[128, 512, 2048], [0.5, 2.0, 8.0]],
        "torch": [[128, 512, 2048], [1.5, 6.0, 24.0]],
    }


def test_rendering_refuses_what_is_no_result(tmp_path: Path) -> None:
    with pytest.raises(LongskipError, match="does not exist"):
        bench_render.render(tmp_path / "none.json")
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(LongskipError, match="holds no measurements of kernels"):
        bench_render.render(tmp_path / "x.json")


def test_verdicts_compare_with_the_best_other_and_say_when_spreads_overlap() -> None:
    def row(provider: str, ours: bool, median: float, width: float) -> dict[str, Any]:
        ms = {"median": median, "p20": median - width, "p80": median + width}
        return {"op": "mlp", "case": "c", "mode": "both", "provider": provider, "ours": ours, "ms": ms}

    found = bench_render.verdicts(
        [row("auto", True, 0.8, 0), row("triton", True, 1.0, 0.1), row("a", False, 2.0, 0.1), row("b", False, 3, 0)]
    )
    assert [(v["ratio"], v["best"]["provider"], v["clear"]) for v in found] == [(2.0, "a", True)]
    assert not bench_render.verdicts([row("triton", True, 1.0, 0.3), row("a", False, 1.2, 0.3)])[0]["clear"]


def test_a_share_that_cannot_be_is_doubted() -> None:
    row = {"op": "norm", "case": "c", "mode": "forward", "provider": "torch", "gbps": 50.0}
    row |= {"ms": {"median": 1.0, "p20": 0.9, "p80": 1.1}}
    lines = [bench._line({**row, "copy_share": share}) for share in (1.05, 7.83)]
    assert lines[0].endswith("105% of this run's ceiling")
    assert "783% of this run's ceiling (more than there is: caches" in lines[1]


def test_bad_options_are_named() -> None:
    with pytest.raises(BackendError, match="--op 'adalm'; known: adaln, adamw"):
        bench.main(["--op", "adalm"])
    with pytest.raises(BackendError, match="no case of that name; known: h1024"):
        bench.main(["--op", "adaln", "--shapes", "1h"])


# -- tables ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    kernels.choices("cpu")  # every op's file is loaded
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "PACKAGE_FOLDER", tmp_path / "package")
    tables.of_device.cache_clear()
    yield tmp_path / "package", tables.user_folder()  # type: ignore[misc]
    tables.of_device.cache_clear()


def test_tables_are_merged_the_users_before_the_packages(folders: tuple[Path, Path]) -> None:
    package, user = folders
    device = {"device": "interpreter", "versions": {}}
    tables.save({**device, "configurations": {"k": {"a": {"BLOCK": 1}, "b": {"BLOCK": 2}}}}, package)
    assert tables.best_configuration(CPU, "k", "a") == {"BLOCK": 1}
    tables.save({**device, "configurations": {"k": {"a": {"BLOCK": 8}}}}, user)
    assert tables.best_configuration(CPU, "k", "a") == {"BLOCK": 8}
    assert tables.best_configuration(CPU, "k", "b") == {"BLOCK": 2}
    assert tables.best_configuration(CPU, "k", "c") is None
    with tables.chosen({"k": {"c": {"BLOCK": 3}}}), tables.recorded() as asked:
        assert tables.best_configuration(CPU, "k", "c") == {"BLOCK": 3}
        with tables.forced({"k": {"BLOCK": 4}}):
            assert tables.best_configuration(CPU, "k", "c") == {"BLOCK": 4}
    assert asked == [("k", "c"), ("k", "c")]
    assert tables.best_configuration(CPU, "k", "c") is None


def test_a_damaged_table_is_an_error_that_names_it(folders: tuple[Path, Path]) -> None:
    package, _ = folders
    package.mkdir(parents=True)
    (package / "interpreter.json").write_text("{")
    with pytest.raises(BackendError, match=r"interpreter\.json is no table of measurements"):
        tables.best_configuration(CPU, "k", "a")


def test_auto_takes_what_was_measured_fastest_in_the_bucket(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The choice of a GPU, made here by a device that says it is one."""
    package, _ = folders
    monkeypatch.setattr(tables, "target_of", lambda device: backends.jit.TARGETS[90])
    monkeypatch.setattr(backends.jit, "unusable", lambda device: None)
    registry = {op: dict(found) for op, found in backends._REGISTRY.items()}
    sizes = {"batch": 60, "tokens": 334, "width": 1024, "itemsize": 2}
    where = tables.bucket(torch.bfloat16, sizes)
    assert where == "bfloat16 batch=64 tokens=512 width=1024"
    table = {
        "device": "NVIDIA H200",
        "backends": {"adaln": {where: {"backend": "triton", "milliseconds": {"triton": 1, "torch": 2}}}},
    }
    tables.save(table, package)
    try:
        backends.register("adaln", "triton")(lambda *a, **k: None)
        gpu = torch.device("cuda", 0)
        name, reason = backends._choose("adaln", gpu, torch.bfloat16, sizes)
        assert name == "triton" and "measured on NVIDIA H200" in reason and "triton 1 ms, torch 2 ms" in reason
        assert backends._choose("adaln", gpu, torch.bfloat16, {**sizes, "tokens": 513})[0] == "torch"
        backends.register("adaln", "triton", unfit=lambda dtype, sizes: "not today")(lambda *a, **k: None)
        assert backends._choose("adaln", gpu, torch.bfloat16, sizes)[0] == "torch"
    finally:
        backends._REGISTRY.update(registry)


def test_compiled_code_takes_what_was_settled_and_reads_no_table(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes are symbols there: a table that is looked up by size would make a graph per size."""
    package, _ = folders
    entries = {f"bfloat16 batch={n} tokens=512 width=1024": {"backend": "triton"} for n in (1, 2, 4)}
    entries["bfloat16 batch=8 tokens=512 width=1024"] = {"backend": "torch"}
    tables.save({"device": "NVIDIA H200", "backends": {"adaln": entries}}, package)
    monkeypatch.setattr(tables, "target_of", lambda device: backends.jit.TARGETS[90])
    monkeypatch.setattr(backends.jit, "unusable", lambda device: None)
    monkeypatch.setattr(backends, "_FIXED", {})
    registry = {op: dict(found) for op, found in backends._REGISTRY.items()}
    gpu = torch.device("cuda", 0)
    try:
        backends.register("adaln", "triton")(lambda *a, **k: None)
        backends.settle(gpu)
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        monkeypatch.setattr(tables, "best_backend", lambda *a: pytest.fail("a table was read"))
        monkeypatch.setattr(tables, "bucket", lambda *a: pytest.fail("sizes were looked at"))
        assert backends._choose("adaln", gpu, torch.bfloat16, {})[0] == "triton"
        assert backends._choose("layer_norm", gpu, torch.bfloat16, {})[0] == "torch"
    finally:
        backends._REGISTRY.update(registry)


def test_tuning_keeps_the_fastest_configuration_of_each_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_tuning, "choices_of", lambda case: {"_kernel": ({"MS": 3}, {"MS": 1}, {"MS": 2})})
    now = [0.0]
    monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: now[0])

    def works(case: KernelCase) -> Any:
        def work() -> None:
            chosen = tables.best_configuration(CPU, "_kernel", f"width={case.x}") or {"MS": 2}
            now[0] += chosen["MS"] / 1000

        return work

    found = bench_tuning.tune([TINY], works, CPU, 3, lambda line: None)
    assert found == {"_kernel": {"width=8": {"MS": 1}}}
