"""Tables, laws, hostfiles and run folders that somebody else wrote: read, or refused with a LongskipError."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from longskip.engine.quarantine import read_list
from longskip.engine.runs import RunFolder, find_run
from longskip.launcher.hosts import read_hostfile
from longskip.profiling import ledger
from longskip.profiling.fitdata import params_of, read_csv, read_runs, units_warning
from longskip.profiling.hardware_file import read as read_hardware
from longskip.profiling.laws import load_law
from longskip.profiling.reportdata import bad_sample_reasons, bad_sample_rows
from longskip.profiling.runlog import RunLog
from tests.trust.fuzzing import CASES, altered, damaged, fuzz, values
from tests.trust.sandbox import Sandbox

LINE = {
    "attempt": 1, "from_step": 0, "step": 10, "images": 80, "image_tokens": 1280, "tokens": 2720, "seconds": 1.5,
    "data_wait_seconds": 0.1, "model_flops": 10**12, "hardware_flops": 10**12, "six_nd": 2720 * 6 * 1000, "mfu": 0.4,
    "hfu": 0.4, "loss": 1.25, "devices": 2, "device_name": "cpu", "communication_seconds": None,
}  # fmt: skip
METRIC = {
    "step": 10,
    "attempt": 1,
    "time": 1.0,
    "loss/global_avg": 1.5,
    "memory/per_rank(GiB)": [0.5, 0.5],
    "mfu(%)": 40.0,
}
INCIDENT = {"time": 1.0, "attempt": 1, "step": 3, "kind": "error", "detail": "x"}
BAD = {"key": "a", "sample": 1, "reason": "image_decode", "detail": "x", "step": 2}
RUN = {"name": "r", "status": "done", "params": 1000, "data": {"samples": 3, "fingerprint": "f"}}
FILES = {
    "ledger.jsonl": [{"attempt": 1, "resumed_from": 0}, LINE, LINE | {"from_step": 10, "step": 20}],
    "metrics.jsonl": [METRIC, METRIC | {"step": 20}],
    "incidents.jsonl": [INCIDENT],
    "bad_samples.jsonl": [BAD],
}


def run_folder(folder: Path, case: dict[str, bytes]) -> None:
    """All that the reports, budgets and fits read of a run."""
    run = folder / "run"
    (run / "eval").mkdir(parents=True, exist_ok=True)
    (run / "samples" / "step-00000010").mkdir(parents=True, exist_ok=True)
    (run / "samples" / "step-00000010" / "grid.png").write_bytes(b"")
    for name in ("config.yaml", "run.json", *FILES, "eval/step-10.json", "samples/step-00000010/prompts.json"):
        (run / name).unlink(missing_ok=True)
        if name in case:
            (run / name).write_bytes(case[name])
    log = RunLog.open(run)
    found = ledger.read(run / "ledger.jsonl")
    ledger.sums(found.entries)
    for name in ("info", "name", "status", "environment", "metrics", "device_name", "evaluations", "samples", "incidents",
                 "bad_samples", "sums"):  # fmt: skip
        getattr(log, name)
    log.series("loss/global_avg")
    bad_sample_rows(log)
    bad_sample_reasons(log)
    try:
        read_list(run / "bad_samples.jsonl")
    finally:
        _ = log.config
        for read in (
            lambda: params_of(log),
            lambda: read_runs([log], [None]),
            lambda: RunFolder(run).summary(),
            lambda: find_run(run),
        ):
            attempt(read)


def attempt(read: Any) -> None:
    from longskip.errors import LongskipError

    try:
        read()
    except LongskipError:
        return


def csv_file(folder: Path, data: bytes) -> None:
    (folder / "points.csv").write_bytes(data)
    points = read_csv(folder / "points.csv")
    for point in points:
        assert all(0 < getattr(point, name) < float("inf") for name in ("flops", "params", "tokens", "loss"))
    units_warning(points)
    units_warning(read_csv(folder / "points.csv", "6nd"))


def by_path(name: str, read: Any) -> Any:
    def target(folder: Path, data: bytes) -> None:
        (folder / name).write_bytes(data)
        read(folder / name)

    return target


CSV = b"flops,params,tokens,loss\n1e18,1e6,1e9,3.5\n2e18,2e6,2e9,3.1\n"
HARDWARE = {
    "devices": [
        {
            "name": "A",
            "short": "a",
            "driver_names": ["NVIDIA A"],
            "teraflops": {"fp32": 91.1, "bf16": 364.2},
            "memory_gb": 48,
            "memory_mib": 46068,
            "bandwidth_gb_s": 960,
            "watts": 300,
            "link_gb_s": 32,
            "link_name": "PCIe",
            "source": "s",
        }
    ],
    "networks": [{"name": "n", "gigabits": 200, "per": "gpu", "source": "s"}],
}
LAWS = [
    {"form": "power", "params": {"coefficient": 0.1, "exponent": 0.5}, "data": {"coefficient": 1.0, "exponent": 0.5},
     "loss": {"coefficient": 5.0, "exponent": -0.1}, "budgets": [1e18, 1e21], "name": "x", "tokens": "all"},
    {"form": "parametric", "E": 1.0, "A": 400.0, "alpha": 0.34, "B": 410.0, "beta": 0.28},
]  # fmt: skip
HOSTS = b"# nodes\nnode-1 slots=8\nnode-2.example.org slots=8\n10.0.0.7 slots=8\n"


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    targets = {
        "run": run_folder,
        "csv": csv_file,
        "hardware": by_path("hardware.yaml", read_hardware),
        "law.json": by_path("law.json", load_law),
        "law.yaml": by_path("law.yaml", load_law),
        "hosts": by_path("hostfile", read_hostfile),
        "list": by_path("list", read_list),
    }
    warm = {"run": sound(), "csv": CSV, "hardware": yaml.safe_dump(HARDWARE).encode(), "hosts": HOSTS}
    with Sandbox(tmp_path_factory.mktemp("records"), targets, warm) as made:
        yield made


def lines(rows: list[Any]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def sound() -> dict[str, bytes]:
    return {name: lines(rows) for name, rows in FILES.items()} | {
        "run.json": json.dumps(RUN).encode(),
        "config.yaml": b"train: {steps: 20}\n",
        "eval/step-10.json": b'{"step": 10, "judge": {"examples": "x.png"}}',
        "samples/step-00000010/prompts.json": b'{"prompts": ["a"], "files": ["000.png"], "seed": 1}',
    }


DEEP = [
    b"[" * 100_000,
    b'{"step": ' + b"[" * 100_000,
    b'{"step": ' + b"9" * 5000 + b"}",
    b'{"step": 1e999, "loss": NaN}',
    b"\x00" * 100,
]


def test_the_sound_ones_are_read(sandbox: Sandbox) -> None:
    assert sandbox.run("run", sound()).kind == "fine"
    assert sandbox.run("csv", CSV).kind == "fine"
    assert sandbox.run("hosts", HOSTS).kind == "fine"
    assert sandbox.run("hardware", yaml.safe_dump(HARDWARE).encode()).kind == "fine"
    for law in LAWS:
        assert sandbox.run("law.json", json.dumps(law).encode()).kind == "fine"


@pytest.mark.parametrize("cases", CASES)
@pytest.mark.parametrize("name", sorted(sound()))
def test_files_of_a_run(sandbox: Sandbox, name: str, cases: int) -> None:
    whole = sound()[name]
    strategy = damaged(whole) | st.binary(max_size=40) | st.sampled_from(DEEP)
    if name in FILES:
        strategy |= altered(FILES[name]).map(lambda rows: lines(rows) if isinstance(rows, list) else lines([rows]))
    elif name.endswith(".json"):
        strategy |= altered(json.loads(whole)).map(lambda body: json.dumps(body).encode())
    fuzz(cases // 2, strategy, lambda data: sandbox.run("run", sound() | {name: data}))


def test_names_that_no_file_system_takes(sandbox: Sandbox) -> None:
    for file in ("x" * 70_000, "a\0b", "../" * 3000):
        told = json.dumps({"prompts": ["a"], "files": [file]}).encode()
        assert sandbox.run("run", sound() | {"samples/step-00000010/prompts.json": told}).kind == "fine"


def test_a_bomb_in_the_configuration_of_a_run(sandbox: Sandbox) -> None:
    bomb = "a: &a [x, x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
    )
    for text in (bomb, "a: !!python/object/apply:os.system [id]", "[" * 100_000):
        assert sandbox.run("run", sound() | {"config.yaml": text.encode()}).kind == "refused"


@pytest.mark.parametrize("cases", CASES)
def test_tables_for_fits(sandbox: Sandbox, cases: int) -> None:
    cells = st.sampled_from(
        [
            "1e18",
            "0",
            "-1",
            "nan",
            "inf",
            "1e-320",
            "1e308",
            "1_000",
            "1,5",
            '"',
            "",
            "x",
            "9" * 400,
            "é",
            "\x00",
            " 3 ",
        ]
    )
    rows = st.lists(st.lists(cells, max_size=5).map(",".join), max_size=4).map("\n".join)
    texts = rows.map(lambda text: b"flops,params,tokens,loss\n" + text.encode())
    fuzz(cases, damaged(CSV) | texts | st.binary(max_size=40), lambda data: sandbox.run("csv", data))
    for odd in (b"flops,params,tokens,loss\n" + b"1," * 200_000, b'flops,params,tokens,loss\n"' + b"1" * 200_000,
                b"flops,params,tokens,loss\n1,1e-200,1e-200,1\n", b"flops,params,tokens,loss\n1,1e200,1e200,1\n"):  # fmt: skip
        sandbox.run("csv", odd)


@pytest.mark.parametrize("cases", CASES)
def test_hardware_of_ones_own(sandbox: Sandbox, cases: int) -> None:
    def check(tree: Any) -> None:
        text = (
            tree
            if isinstance(tree, bytes)
            else yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
        )
        sandbox.run("hardware", text)

    fuzz(cases, altered(HARDWARE) | damaged(yaml.safe_dump(HARDWARE).encode()), check)


@pytest.mark.parametrize("cases", CASES)
def test_laws_of_ones_own(sandbox: Sandbox, cases: int) -> None:
    def check(case: Any) -> None:
        name, body = case
        text = body if isinstance(body, bytes) else json.dumps(body).encode()  # JSON is YAML
        sandbox.run(name, text)

    trees = st.one_of([altered(law) for law in LAWS]) | values | st.sampled_from(DEEP)
    fuzz(
        cases,
        st.tuples(st.sampled_from(["law.json", "law.yaml"]), trees | damaged(json.dumps(LAWS[0]).encode())),
        check,
    )


@pytest.mark.parametrize("cases", CASES)
def test_hostfiles(sandbox: Sandbox, cases: int) -> None:
    parts = st.sampled_from(
        [
            "node-1",
            "-oProxyCommand=touch x",
            "a;id",
            "$(id)",
            "`id`",
            "a b",
            "..",
            "[a,b]",
            "^f",
            "user@h",
            "h:22",
            "slots=8",
            "slots=-1",
            "slots=" + "9" * 5000,
            "slots=0x8",
            "\x00",
            "é",
            "#",
            "\n",
            " ",
            "\r",
            "\t",
        ]
    )
    fuzz(
        cases,
        damaged(HOSTS)
        | st.lists(parts, max_size=8).map(lambda words: " ".join(words).encode())
        | st.binary(max_size=30),
        lambda data: sandbox.run("hosts", data),
    )


@pytest.mark.parametrize("cases", CASES)
def test_lists_of_quarantine(sandbox: Sandbox, cases: int) -> None:
    whole = lines([BAD, BAD | {"key": "b"}]) + b"c\nd\n"
    fuzz(cases, damaged(whole) | altered([BAD]).map(lambda rows: lines(rows if isinstance(rows, list) else [rows])),
         lambda data: sandbox.run("list", data))  # fmt: skip
    for deep in DEEP:
        sandbox.run("list", deep + b"\n")
