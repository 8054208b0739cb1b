"""What the compiler makes of every kernel, on a machine without a GPU: registers, spills, shared memory, instructions.

Every public op is called on meta tensors inside ``kernels.jit.captured``, which collects the launches with the arguments
and constants that a device would get; Triton's own binder then specialises them as the just-in-time compiler would, and
Triton and ptxas compile them for sm_80, sm_90 and sm_100. Needs a process in which kernels are not interpreted.

    python -m longskip.profiling.static                        a covering set
    python -m longskip.profiling.static --all --out FILE.json  every configuration
"""

from __future__ import annotations

import argparse
import ast
import collections
import hashlib
import importlib
import inspect
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from longskip import kernels
from longskip.errors import BackendError
from longskip.kernels import backends, jit, tables
from longskip.profiling.kernel_cases import CASES, COMPILED, SWEEP, KernelCase

SPILL_LIMIT = 0  # bytes of stack per thread
RARE_SPILL_LIMIT = 40  # of the forms of attention that are compiled and not benched
# Families whose kernels multiply matrices: each must reach the tensor cores by the target's own instructions.
MATRIX_FAMILIES = ("attention", "mlp", "skip_linear")
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


@dataclass(frozen=True)
class Compiled:
    """One kernel compiled for one target. ``spill_bytes`` is the stack per thread; instructions are counted in SASS.

    ``default``: what is taken before anything was measured; others only a table may name. ``error``: why it does not
    compile, then the figures are 0.
    """

    kernel: str
    source: str  # hash of the kernel's source and of what it calls
    target: int
    constants: Mapping[str, Any]
    signature: str
    aligned: bool
    default: bool
    case: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    tensor_cores: int = 0  # PTX instructions of the target's own matrix kind
    instructions: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None


@dataclass(frozen=True)
class Job:
    """A launch to compile, and where it came from."""

    launch: jit.Launch
    target: int
    case: str
    default: bool
    aligned: bool = True


def source_hash(kernel: Any) -> str:
    """SHA-256 (16 digits) of a kernel's source and of all jitted functions that it calls, whatever lines they stand on."""
    return hashlib.sha256("\n".join(sorted(_sources(kernel.fn, set()))).encode()).hexdigest()[:16]


def _sources(function: Callable[..., Any], seen: set[str]) -> set[str]:
    source = textwrap.dedent(inspect.getsource(function))
    if source in seen:
        return seen
    seen.add(source)
    for node in ast.walk(ast.parse(source)):
        called = function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
        inner = getattr(called, "fn", None)
        if inner is not None and inner.__module__.startswith("longskip."):
            _sources(inner, seen)
    return seen


def launches(case: KernelCase, target: int, dtype: torch.dtype = torch.bfloat16) -> list[jit.Launch]:
    """What one call of the case, forward and backward, launches on ``target``."""
    _load()
    with jit.captured(jit.TARGETS[target]) as found, kernels.use("triton", case.op):
        leaves, extra = case.tensors(torch.device("meta"), dtype)
        outputs = case.call(leaves, extra)
        torch.autograd.grad(outputs, list(leaves.values()), [torch.empty_like(o) for o in outputs], allow_unused=True)
    return list(found)


def adamw_launches(target: int) -> list[jit.Launch]:
    """The optimizer's launch, with its average and its copy."""
    _load()
    lists = [[torch.empty(1 << 24, device="meta")] for _ in range(5)]
    low = [torch.empty(1 << 24, device="meta", dtype=torch.bfloat16)]
    with jit.captured(jit.TARGETS[target]) as found, kernels.use("triton", "adamw"):
        kernels.adamw(
            *lists[:4], lr=1e-4, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.03, step=7,
            grad_scale=torch.empty((), device="meta"), emas=lists[4], ema_decay=0.999, copies=low,
        )  # fmt: skip
    return list(found)


Forced = Mapping[str, Mapping[str, Any]]


def jobs(cases: Sequence[KernelCase | None], targets: Sequence[int], *, every_configuration: bool) -> list[Job]:
    """Distinct compilations, the optimizer's for the case None: what each case takes by default, per target.

    With ``every_configuration`` also all constants that a table may name (but for the ``COMPILED`` cases), and each kernel
    once as if no pointer were aligned; without, one more form of the matrix products, whose default is the library's.
    """
    defaults = {case.id for case in COMPILED} - {case.id for case in (*CASES, *SWEEP)}
    found: dict[tuple[Any, ...], Job] = {}
    for target in targets:
        seen: set[str] = set()
        for case in cases:
            name = case.id if case else "adamw"
            choices = _own_products(case) if not every_configuration else () if name in defaults else _every(case)
            for forced in ({}, *choices):
                with tables.forced(forced):
                    launched = launches(case, target) if case else adamw_launches(target)
                for launch in launched:
                    kernel = launch.kernel.__name__
                    alignments = (True, False) if every_configuration and kernel not in seen else (True,)
                    seen.add(kernel)
                    for aligned in alignments:
                        constants = repr(sorted(launch.constants.items()))
                        key = (kernel, target, _specialised(launch), constants, aligned)
                        found.setdefault(key, Job(launch, target, name, not forced, aligned))
    return list(found.values())


def choices_of(case: KernelCase | None) -> dict[str, Sequence[Mapping[str, Any]]]:
    """Configuration name -> choices, of the family of a case."""
    family = backends.family_of(case.op if case else "adamw")
    return {
        name: found for module in modules_of(family) for name, found in getattr(module, "CONFIGURATIONS", {}).items()
    }


def _every(case: KernelCase | None) -> Iterator[Forced]:
    for name, choices in choices_of(case).items():
        for constants in choices:
            yield {name: constants}


def _own_products(case: KernelCase | None) -> Iterator[Forced]:
    """The first configuration of every product that is ours and not the library's."""
    first = {
        name: next((constants for constants in choices if constants.get("gemm") == "triton"), None)
        for name, choices in choices_of(case).items()
    }
    ours = {name: constants for name, constants in first.items() if constants is not None}
    if ours:
        yield ours


def modules_of(family: str) -> list[Any]:
    """The files that hold a family's Triton kernels: its own, and those that it takes modules or functions from."""
    found: dict[str, Any] = {}

    def look(module: Any) -> None:
        if module.__name__ not in found:
            found[module.__name__] = module
            for value in vars(module).values():
                home = value if inspect.ismodule(value) else inspect.getmodule(getattr(value, "fn", value))
                name = getattr(home, "__name__", "")
                if name.startswith("longskip.kernels.") and name.endswith("_triton"):
                    look(home)

    look(importlib.import_module(f"longskip.kernels.{family}_triton"))
    return list(found.values())


def _specialised(launch: jit.Launch) -> str:
    """Arguments as the binder tells them apart: dtypes, and integers by 1, multiple of 16 or neither."""
    parts = []
    for value in launch.arguments:
        if isinstance(value, torch.Tensor):
            parts.append(f"*{value.dtype}".removeprefix("*torch."))
        elif isinstance(value, bool) or not isinstance(value, int):
            parts.append(type(value).__name__ if not isinstance(value, bool) else str(value))
        else:
            parts.append(
                ("1" if value == 1 else "16k" if value % 16 == 0 else "int") + ("L" if abs(value) >= 1 << 31 else "")
            )
    return " ".join(parts)


def compile_job(job: Job) -> Compiled:
    """Compile one launch as the just-in-time compiler would on its target."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    begin = time.perf_counter()
    kernel, launch = job.launch.kernel, job.launch
    head = Compiled(
        kernel=kernel.__name__, source=source_hash(kernel), target=job.target, constants=dict(launch.constants),
        signature=_specialised(launch), aligned=job.aligned, default=job.default, case=job.case,
    )  # fmt: skip
    try:
        binary = _compile(job)
    except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
        return replace(head, error=f"{type(error).__name__}: {str(error).splitlines()[-1][:200]}")
    registers, stack = _resources(binary.asm["cubin"])
    return replace(
        head,
        registers=registers,
        spill_bytes=stack,
        shared_bytes=int(binary.metadata.shared),
        tensor_cores=len(re.findall(re.escape(TENSOR_CORES[job.target]), binary.asm["ptx"])),
        instructions=_instructions(binary.asm["cubin"]),
        seconds=round(time.perf_counter() - begin, 2),
    )


def _compile(job: Job) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.compiler import compile as triton_compile
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", job.target, 32)
    backend = make_backend(target)
    kernel, launch = job.launch.kernel, job.launch
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    keywords = {**launch.constants, "debug": False}
    bound, specialization, options = binder(*launch.arguments, **keywords)
    options, signature, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes if job.aligned else {})
    return triton_compile(source, target=target, options=options.__dict__)


def _tool(name: str) -> str:
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not path.is_file():
        raise BackendError(f"triton brings no {name} ({path})", cure="install triton's Linux wheel")
    return str(path)


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack bytes) per thread. Spills are on the stack; LOCAL is always 0."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_tool("cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise BackendError(f"cuobjdump reports no resources: {text[-200:]}")
    return int(found[1]), int(found[2])


# SASS mnemonics by what they do.
_KINDS = {
    "matrix": ("HMMA", "HGMMA", "UTCHMMA", "IMMA", "QGMMA", "WARPGROUP"),
    "global load": ("LDG", "LDGSTS", "UTMALDG", "UBLKCP"),
    "global store": ("STG", "UTMASTG", "RED", "ATOM", "ATOMG"),
    "shared": ("LDS", "STS", "LDSM", "STSM", "LDTM", "STTM"),
    "local": ("LDL", "STL"),
    "special": ("MUFU",),
    "float": ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "FMNMX", "HADD2", "HMUL2", "HFMA2", "F2FP", "FSEL"),
    "barrier": ("BAR", "SYNCS", "DEPBAR", "WARPSYNC"),
}
_KIND_OF = {mnemonic: kind for kind, names in _KINDS.items() for mnemonic in names}


def _instructions(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([_tool("nvdisasm"), "-c", file.name], capture_output=True, text=True, check=True).stdout
    counts: collections.Counter[str] = collections.Counter()
    for line in re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)", text):
        counts[_KIND_OF.get(line, "other")] += 1
    return dict(sorted(counts.items()))


def compile_all(
    found: Sequence[Job], *, processes: int = 2, progress: Callable[[str], None] | None = None
) -> list[Compiled]:
    """Every job, in ``processes`` processes; the longest wait is one compilation."""
    if jit.INTERPRETED:
        raise BackendError("kernels are interpreted in this process", cure="unset TRITON_INTERPRET to compile them")
    done: list[Compiled] = []
    global _JOBS
    _JOBS = list(found)
    # No multiprocessing.Pool: it ends its processes by SIGTERM, which they ignore where this one answers it.
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        for future in as_completed([pool.submit(_compile_at, index) for index in range(len(_JOBS))]):
            compiled = future.result()
            done.append(compiled)
            if progress is not None:
                progress(f"{len(done)}/{len(found)} {compiled.kernel} sm_{compiled.target} {compiled.seconds:.1f} s")
    return sorted(done, key=lambda c: (c.kernel, c.target, c.case, not c.aligned, repr(sorted(c.constants.items()))))


_JOBS: list[Job] = []


def _compile_at(index: int) -> Compiled:
    return compile_job(_JOBS[index])


def faults(compiled: Sequence[Compiled]) -> list[str]:
    """What breaks the limits of what is taken by default: spills, shared memory beyond the device's, matrix kernels
    without tensor cores, errors. A choice that only a table may name breaks nothing: tuning measures it or drops it."""
    found = []
    matrix = {c.kernel for c in compiled if _multiplies(c.kernel)}
    rare = {case.id for case in COMPILED} - {case.id for case in (*CASES, *SWEEP)}
    for c in compiled:
        if not (c.default and c.aligned):
            continue
        where = f"{c.kernel} on sm_{c.target} ({c.case}, {dict(c.constants)})"
        limit, spills = jit.TARGETS[c.target].shared_bytes, RARE_SPILL_LIMIT if c.case in rare else SPILL_LIMIT
        if c.error is not None:
            found.append(f"{where}: {c.error}")
        elif c.spill_bytes > spills:
            found.append(f"{where}: {c.spill_bytes} bytes of stack, allowed {spills}")
        elif c.shared_bytes > limit:
            found.append(f"{where}: {c.shared_bytes} bytes of shared memory, the device has {limit}")
        elif c.kernel in matrix and not c.tensor_cores:
            found.append(f"{where}: no {TENSOR_CORES[c.target]}")
    for kernel in sorted(matrix):
        for target in sorted({c.target for c in compiled if c.kernel == kernel}):
            of_kernel = [c for c in compiled if (c.kernel, c.target) == (kernel, target)]
            if not any(c.tensor_cores and not c.spill_bytes and c.error is None for c in of_kernel):
                found.append(f"{kernel} on sm_{target}: no choice without spills and with {TENSOR_CORES[target]}")
    return found


def _multiplies(kernel: str) -> bool:
    """Whether the kernel's source multiplies matrices."""
    for family in MATRIX_FAMILIES:
        for module in modules_of(family):
            if hasattr(module, kernel):
                return any("tl.dot" in source for source in _sources(getattr(module, kernel).fn, set()))
    return False


def covering(cases: Sequence[KernelCase] = CASES) -> list[KernelCase]:
    """The first case of every op, and the longest of attention's, whose kernels are others: every kernel at least once."""
    first: dict[str, KernelCase] = {}
    longest: dict[str, KernelCase] = {}
    for case in cases:
        first.setdefault(case.op, case)
        if case.op in backends.FAMILIES["attention"] and case.x >= longest.get(case.op, case).x:
            longest[case.op] = case
    return list({case.id: case for case in (*first.values(), *longest.values())}.values())


def _load() -> None:
    for family in backends.FAMILIES:
        importlib.import_module(f"longskip.kernels.{family}")
        importlib.import_module(f"longskip.kernels.{family}_triton")


def table(compiled: Sequence[Compiled]) -> str:
    """Markdown: one line per kernel, target and configuration."""
    lines = [
        "| kernel | target | case | constants | registers | spills | shared | matrix | instructions |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in compiled:
        constants = " ".join(f"{name}={value}" for name, value in c.constants.items())
        lines.append(
            f"| {c.kernel}{'' if c.aligned else ' (unaligned)'} | sm_{c.target} | {c.case} | {constants}"
            f"{'' if c.default else ' (by table)'}{f' **{c.error}**' if c.error else ''} | {c.registers} "
            f"| {c.spill_bytes} | {c.shared_bytes:,} | {c.tensor_cores} | {sum(c.instructions.values()):,} |"
        )
    return "\n".join(lines) + "\n"


def page(compiled: Sequence[Compiled]) -> str:
    """The report to read: what is taken by default, and what the other choices come to."""
    by_table = [c for c in compiled if not c.default and c.aligned]
    spilling = [c for c in by_table if c.spill_bytes]
    loose = [c for c in compiled if not c.aligned]
    found = faults(compiled)
    targets = ", ".join(f"sm_{target}" for target in sorted({c.target for c in compiled}))
    spilled = [c for c in compiled if c.default and c.aligned and c.spill_bytes and c.error is None]
    return (
        "# Kernels as the compiler makes them\n\n"
        f"`make proofs`: {len(compiled):,} compilations for {targets}, "
        "no GPU needed; specialised as the just-in-time compiler would. All of them, with the mix of instructions and a hash "
        f"of every kernel's source, in kernels-static.json. Limits broken by what is taken by default: {len(found)}.\n\n"
        f"{SPILL_LIMIT} spilled bytes are allowed, {RARE_SPILL_LIMIT} in forms of attention that are compiled and not benched "
        f"(other head dims, masks, offsets): {len(spilled)} compilations of the default spill, at most "
        f"{max((c.spill_bytes for c in spilled), default=0)} bytes.\n\n"
        f"Choices that only a table of measurements may name: {len(by_table):,}, of which {len(spilling)} spill, at most "
        f"{max((c.spill_bytes for c in spilling), default=0)} bytes, and {sum(c.error is not None for c in by_table)} do not "
        f"compile. Every kernel once as if no pointer were aligned: {len(loose)}, of which "
        f"{sum(c.spill_bytes > 0 for c in loose)} spill, at most {max((c.spill_bytes for c in loose), default=0)} bytes.\n\n"
        "By default (registers and spilled bytes per thread, shared bytes per block, matrix instructions in PTX, "
        "instructions in SASS):\n\n" + table([c for c in compiled if c.default and c.aligned])
    )


_COLUMNS = (
    "kernel", "target", "case", "constants", "signature", "aligned", "default", "registers", "spill_bytes", "shared_bytes",
    "tensor_cores", "instructions", "error",
)  # fmt: skip


def report(compiled: Sequence[Compiled]) -> dict[str, Any]:
    """All as JSON values: ``rows`` hold ``columns``, their instructions the counts of ``instruction_kinds``."""
    import triton

    kinds = (*_KINDS, "other")
    rows = []
    for c in compiled:
        values = vars(c) | {
            "constants": " ".join(f"{name}={value}" for name, value in c.constants.items()),
            "instructions": [c.instructions.get(kind, 0) for kind in kinds],
        }
        rows.append([values[column] for column in _COLUMNS])
    return {
        "triton": triton.__version__,
        "sources": {c.kernel: c.source for c in compiled},
        "faults": faults(compiled),
        "instruction_kinds": kinds,
        "columns": _COLUMNS,
        "rows": rows,
    }


def rows_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A report's rows as dictionaries by column."""
    return [dict(zip(result["columns"], row, strict=True)) for row in result["rows"]]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile the kernels for devices that need not be there.")
    parser.add_argument("--all", action="store_true", help="every case and configuration, not a covering set")
    parser.add_argument("--op", action="append", default=[], help="only this op; may be repeated")
    parser.add_argument("--targets", default="80,90,100", help="compute capabilities, by commas")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write FILE.json and FILE.md")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    known = {case.op for case in CASES} | {"adamw"}
    for op in options.op:
        if op not in known:
            raise BackendError(f"--op {op!r}; known: {', '.join(sorted(known))}")
    chosen = [case for case in (*CASES, *SWEEP, *COMPILED) if not options.op or case.op in options.op]
    if not options.all:
        chosen = covering([case for case in chosen if case in CASES])
    cases: list[KernelCase | None] = [*chosen]
    if not options.op or "adamw" in options.op:
        cases.append(None)
    targets = [int(target) for target in options.targets.split(",")]
    found = jobs(cases, targets, every_configuration=options.all)
    compiled = compile_all(
        found, processes=options.processes, progress=lambda line: print(line, file=sys.stderr, flush=True)
    )
    result = report(compiled)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in result["rows"])
        head = json.dumps({**result, "rows": []})[:-3]
        options.out.with_suffix(".json").write_text(f"{head}[\n{lines}\n]}}\n")
        options.out.with_suffix(".md").write_text(page(compiled))
    print(json.dumps(result) if options.json else table(compiled))
    for fault in result["faults"]:
        print(fault, file=sys.stderr)
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
