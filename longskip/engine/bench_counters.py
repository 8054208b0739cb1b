"""``longskip bench counters``: every FLOP counter that is installed, asked for the same U-ViT, beside the closed form.

The counters run in processes of their own, one after the other, since several of them replace functions of torch; after
a failure the next figure is asked for in a fresh process. Figures do not depend on time, so nothing is repeated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longskip.engine.bench_common import about, page, table
from longskip.engine.bench_rivals import PlainUViT, check
from longskip.errors import ConfigError, did_you_mean
from longskip.models.presets import preset as preset_of
from longskip.models.specs import UViTSpec
from longskip.profiling.rival_counters import COUNTERS, Case, Counter, exact_flops, inputs_of, uvit_case, version

DEVICES = ("cpu", "meta")
TIME_LIMIT = 120.0  # seconds that one figure is waited for
INTERPRETED = 10**9  # FLOPs of a forward pass up to which Triton's kernels are asked for where there is no GPU
WORDS = 8  # of the plain model's table, whose size costs no contraction

VARIANTS = {
    "longskip": "longskip's module",
    "switches": "longskip's module with adaLN, qk-norm and a time MLP",
    "plain": "the same model of torch's own modules",
}


@dataclass(frozen=True)
class Task:
    """A figure to ask for: ``counter`` by name, of a preset's ``variant`` on a device."""

    counter: str
    preset: str
    variant: str
    device: str


class _Words(nn.Module):
    """The plain model, called by the names that our inputs have."""

    def __init__(self, spec: UViTSpec) -> None:
        super().__init__()
        self.model = PlainUViT(spec, WORDS)

    def forward(self, latents: Tensor, time: Tensor, condition: Tensor) -> Tensor:
        """Latents (B, C, H, W), time (B,), word ids (B, n_txt)."""
        out: Tensor = self.model(latents, time, condition)
        return out


def spec_of(preset: str, variant: str) -> UViTSpec:
    """The preset's shape, with every switch on for the variant ``switches``."""
    return preset_of(preset, **({"adaln": True, "qk_norm": True, "time_mlp": True} if variant == "switches" else {}))


def case_of(preset: str, variant: str, device: str) -> Case:
    """The variant's model on the device, and one picture's inputs."""
    spec = spec_of(preset, variant)
    if variant != "plain":
        return uvit_case(spec, device)
    with torch.device(device):
        inputs = inputs_of(spec, device) | {"condition": torch.zeros(1, spec.n_txt, dtype=torch.int64)}
        return Case(_Words(spec), inputs)


def exact_of(preset: str, variant: str) -> dict[str, int]:
    """Closed form of the forward pass and of the step. The plain model's word vectors are trained along."""
    return exact_flops(spec_of(preset, variant), trained_text=variant == "plain")


def bench_counters(
    presets: Sequence[str] = ("uvit-tiny",),
    devices: Sequence[str] = DEVICES,
    *,
    only: Sequence[str] = (),
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Ask every installed counter (or the packages named in ``only``) about every preset; the result as JSON values.

    A preset is counted in up to three writings (``VARIANTS``), "plain" where that module can express it. ``progress``
    is told a line per figure. Raises ConfigError for a device that is not of ``DEVICES``, SpecError for an unknown preset.
    """
    for device in devices:
        if device not in DEVICES:
            raise ConfigError(f"counters run on cpu and meta, not on {device!r}", cure="--device cpu, or --device meta")
    packages = list(dict.fromkeys(counter.package for counter in COUNTERS))
    for name in only:
        if name not in packages:
            raise ConfigError(f"no counter of the package {name!r} is known", cure=did_you_mean(name, packages))
    counters = [counter for counter in COUNTERS if not only or counter.package in only]
    versions = {package: version(package) for package in packages if not only or package in only}
    present = [counter for counter in counters if versions[counter.package] is not None]
    models = [(name, variant) for name in presets for variant in VARIANTS if _exists(name, variant)]
    tasks = [
        Task(counter.name, name, variant, device)
        for counter in present
        for name, variant in models
        for device in devices
        if counter.kernels == "torch" or variant != "plain"
    ]
    load = os.getloadavg()
    slow = {task for task in tasks if _too_slow(task)}
    rows = [row(task, None, "not asked: too large for Triton's interpreter, and here is no GPU") for task in slow]
    rows += [one for group in _grouped(task for task in tasks if task not in slow) for one in _asked(group, progress)]
    options = {"preset": " --preset ".join(presets), "device": " --device ".join(devices)}
    options |= {"package": " --package ".join(only)} if only else {}
    return about("counters", options, load, "torch") | {
        "counters": [_stated(counter) | {"version": versions[counter.package]} for counter in present],
        "not_installed": [package for package, found in versions.items() if found is None],
        "models": [
            {"preset": name, "variant": variant, "exact_flops": exact_of(name, variant)} for name, variant in models
        ],
        "devices": list(devices),
        "rows": rows,
    }


def _exists(preset: str, variant: str) -> bool:
    try:
        spec = spec_of(preset, variant)
        if variant == "plain":
            check(spec)
    except ConfigError:
        if variant == "plain":
            return False
        raise
    return True


def _stated(counter: Counter) -> dict[str, Any]:
    names = ("name", "package", "called", "unit", "of", "kernels")
    return {name: getattr(counter, name) for name in names}


_BY_NAME = {counter.name: counter for counter in COUNTERS}


def row(task: Task, figure: float | None, error: str | None = None) -> dict[str, Any]:
    """A line of the result: the counter's figure, the same in FLOPs, and its distance from the closed form in percent."""
    counter = _BY_NAME[task.counter]
    exact = exact_of(task.preset, task.variant)[counter.of]
    flops = None if figure is None else counter.to_flops(figure)
    percent = None if flops is None else 100 * (flops - exact) / exact
    return asdict(task) | {"figure": figure, "flops": flops, "exact": exact, "error_percent": percent, "failed": error}


def _too_slow(task: Task) -> bool:
    interpreted = _BY_NAME[task.counter].kernels == "triton" and not torch.cuda.is_available()
    return interpreted and exact_of(task.preset, task.variant)["forward"] > INTERPRETED


# -- processes ---------------------------------------------------------------------------------------------------------


def _grouped(tasks: Iterable[Task]) -> list[list[Task]]:
    """Tasks that may share a process while nothing fails: those of one package, interpreted or not."""
    groups: dict[tuple[str, str], list[Task]] = {}
    for task in tasks:
        counter = _BY_NAME[task.counter]
        groups.setdefault((counter.package, counter.kernels), []).append(task)
    return list(groups.values())


def _asked(tasks: Sequence[Task], progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """The tasks' rows, from as many processes as failures make needed."""
    rows: list[dict[str, Any]] = []
    while len(rows) < len(tasks):
        found, why = _process(tasks[len(rows) :])
        if why is not None:  # of the task that it did not come back from
            found.append(row(tasks[len(rows) + len(found)], None, why))
        for one in found:
            said = one["failed"] or distance(one)
            progress(f"{one['counter']}, {one['preset']} ({one['variant']}) on {one['device']}: {said}")
        rows += found
    return rows


def _process(tasks: Sequence[Task]) -> tuple[list[dict[str, Any]], str | None]:
    """Rows from one fresh process, up to its first failure, and why there is none of the next task, if so."""
    with tempfile.TemporaryDirectory(prefix="longskip-bench-") as folder:
        asked, answers, log = (Path(folder) / name for name in ("tasks.json", "rows.jsonl", "log"))
        asked.write_text(json.dumps([asdict(task) for task in tasks]), "utf-8")
        answers.touch()
        environment = dict(os.environ)
        if _BY_NAME[tasks[0].counter].kernels == "triton" and not torch.cuda.is_available():
            environment["TRITON_INTERPRET"] = "1"
        if not torch.cuda.is_available():
            environment.setdefault("DS_ACCELERATOR", "cpu")
        command = [sys.executable, "-m", "longskip.engine.bench_counters", str(asked), str(answers)]
        with log.open("w") as stream:
            process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
            code = _waited(process, answers)
        rows = [json.loads(line) for line in answers.read_text("utf-8").splitlines()]
        if len(rows) == len(tasks) or (rows and rows[-1]["failed"]):
            return rows, None
        if code is None:
            return rows, f"not done after {TIME_LIMIT:.0f} s"
        said = log.read_text("utf-8", errors="replace").strip().splitlines()
        return rows, f"the process ended with {code}" + (f": {said[-1]}" if said else "")


def _waited(process: subprocess.Popen[bytes], answers: Path) -> int | None:
    """The exit code; None for a process that was killed since no answer came for TIME_LIMIT seconds."""
    size, since = 0, time.monotonic()
    try:
        while (code := process.poll()) is None:
            if (now := answers.stat().st_size) != size:
                size, since = now, time.monotonic()
            if time.monotonic() - since > TIME_LIMIT:
                return None
            time.sleep(0.05)
        return code
    finally:
        process.kill()
        process.wait()


def _answer(asked: Path, answers: Path) -> None:
    """In the process: a row for each task, up to the first failure, which may have left torch changed."""
    torch.manual_seed(0)
    with answers.open("a", encoding="utf-8") as stream:
        for given in json.loads(asked.read_text("utf-8")):
            task = Task(**given)
            figure, why = None, None
            try:
                figure = _BY_NAME[task.counter].count(case_of(task.preset, task.variant, task.device))
            except Exception as error:  # whatever a counter of others raises is its row
                lines = str(error).strip().splitlines() or [""]
                why = f"{type(error).__name__}: {lines[0]}"
            print(json.dumps(row(task, figure, why)), file=stream, flush=True)
            if why is not None:
                return


# -- the page ----------------------------------------------------------------------------------------------------------


def cells(result: Mapping[str, Any], model: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of one model's table: a line per counter, its figure and error on every device."""
    devices = result["devices"]
    found = {(one["counter"], one["preset"], one["variant"], one["device"]): one for one in result["rows"]}
    rows = []
    for counter in result["counters"]:
        key = (counter["name"], model["preset"], model["variant"])
        if (*key, devices[0]) not in found:
            continue
        line = [counter["name"], counter["version"], f"{counter['unit']}, {counter['of']}"]
        for device in devices:
            one = found[(*key, device)]
            if one["failed"]:
                line += [_cut(one["failed"]), ""]
            else:
                line += [f"{one['figure']:,} {counter['called']}", distance(one)]
        rows.append(line)
    titles = ["counter", "version", "its figure is"]
    for device in devices:
        titles += [f"says on {device}", "error"]
    return titles, rows


def distance(row: Mapping[str, Any]) -> str:
    """The error as text; 0 is said of equal integers alone."""
    if row["flops"] == row["exact"]:
        return "0"
    percent = row["error_percent"]
    return f"{percent:+.2f}%" if abs(percent) >= 0.01 else f"{percent:+.1g}%"


def title_of(model: Mapping[str, Any]) -> str:
    exact = model["exact_flops"]
    return (
        f"{model['preset']}, {VARIANTS[model['variant']]}: {exact['forward']:,} FLOPs forward, "
        f"{exact['step']:,} forward and backward"
    )


def to_markdown(result: Mapping[str, Any]) -> str:
    """The result as a page to read."""
    lines = [
        *page("FLOP counters beside the closed form", result, "one picture, float32"),
        "",
        "Every counter is asked in its own way for the same model and inputs. Its figure is turned into FLOPs by 2 per",
        "multiply-add and compared with the closed form: the contractions of the forward pass, or of forward and backward",
        "(the gradients that something needs, nothing repeated). DeepSpeed's and calflops's flops hold elementwise work too,",
        "which the closed form keeps apart. What a counter cannot count is shown with its message.",
    ]
    if result["not_installed"]:
        lines += ["", f"Not installed: {', '.join(result['not_installed'])}."]
    for model in result["models"]:
        titles, rows = cells(result, model)
        lines += ["", f"## {title_of(model)}", "", *table(titles, rows)]
    return "\n".join([*lines, ""])


def _cut(text: str, length: int = 90) -> str:
    text = text.replace("|", "/")
    return text if len(text) <= length else f"{text[: length - 1]}…"


if __name__ == "__main__":
    _answer(Path(sys.argv[1]), Path(sys.argv[2]))
