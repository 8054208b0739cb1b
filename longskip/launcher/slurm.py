"""A Slurm job as a script for sbatch: one task a node, each a supervisor (no torch).

The script is bash, so every value in it is quoted; in the ``#SBATCH`` lines above, which Slurm reads itself, stand numbers
and names of a strict form only. A job that was asked to save (before its time limit, or by ``scancel --signal``) stands in
the queue again and goes on from there.
"""

from __future__ import annotations

import re
import shlex

from longskip.engine.config import Config
from longskip.launcher.launching import ENDED, STOP
from longskip.launcher.rendering import HERE, MODULE, Rendered, Request, environment_of, supervise_words

SCRIPT, AGAIN = "run.sbatch", "node.sh"
# The store's address is not known before the job runs: this stands for it while the rest is quoted.
_STORE, _NODE = "@STORE@", "@NODE@"
FAREWELL_SECONDS = 20
_HIGHEST_PORT = 65534


def render_slurm(config: Config, request: Request) -> Rendered:
    """The script, and the command that submits it; a run's folder name may hold what a job's name may not."""
    slurm, cluster = config.launch.slurm, request.cluster
    notes = [f"{cluster.world} rank(s) on {cluster.nodes} node(s), {cluster.ranks_per_node} each"]
    if slurm.cpus is None:
        notes.append("launch.slurm.cpus is not set: a node gives the job as many cores as Slurm likes, maybe one")
    if slurm.time is None:
        notes.append("launch.slurm.time is not set: the partition's limit holds")
    if slurm.requeue:
        notes.append(f"{slurm.signal_seconds} s before the limit the run is saved; the job is queued again and goes on")
    log = f"{request.kept}/slurm-%j.log".replace("%", "%%").replace("%%j.log", "%j.log")
    submit = ("sbatch", "--parsable", f"--chdir={request.folder}", f"--output={log}", f"{request.kept}/{SCRIPT}")
    files = {SCRIPT: script(config, request)}
    if request.elastic:
        files[AGAIN] = again(config, request)
        notes.append(
            f"a node that was lost comes back by: {_step('JOB', 'NAME', config)} bash {request.kept}/{AGAIN} I"
        )
    return Rendered(files=files, command=submit, notes=tuple(notes))


def again(config: Config, request: Request) -> str:
    """With --elastic: what starts the supervisor of node ``$1`` of the job again, inside its allocation or outside."""
    words = supervise_words(request, node=_NODE, store=_STORE)
    store = f'"$(cat -- {shlex.quote(f"{request.kept}/store")})"'
    shown = {_NODE: '"$1"', _STORE: store}
    called = " ".join(shown.get(word) or shlex.quote(word) for word in (request.python, "-m", MODULE, *words))
    return "\n".join(
        [
            "#!/bin/bash",
            f"# A node of a job that was lost and is back: {_step('JOB', 'NAME', config)} bash THIS I",
            "# Where Slurm has taken it out of the job: sbatch --nodes=1 --nodelist=NAME … THIS I",
            "",
            "set -uo pipefail",
            *_prepared(config, request),
            f"exec {called}",
            "",
        ]
    )


def _step(job: str, name: str, config: Config) -> str:
    cpus = f" --cpus-per-task={config.launch.slurm.cpus}" if config.launch.slurm.cpus else ""
    return f"srun --jobid={job} --overlap --nodes=1 --ntasks=1{cpus} --nodelist={name}"


def _prepared(config: Config, request: Request) -> list[str]:
    """The folder, the variables and the user's own lines, before anything is started."""
    return [
        f"cd -- {shlex.quote(request.folder)} || exit 2",
        *(f"export {name}={shlex.quote(value)}" for name, value in environment_of(config, request).items()),
        f"export {HERE}={shlex.quote(request.kept)}",
        *([f"source -- {shlex.quote(request.setup)} || exit 2"] if request.setup else []),
    ]


def script(config: Config, request: Request) -> str:
    """The text of the sbatch script."""
    slurm, cluster = config.launch.slurm, request.cluster
    words = supervise_words(request, node="auto", store=_STORE)
    # Inside an allocation of whole nodes a task is bound to one core unless it says how many it takes.
    cores = f"--cpus-per-task={slurm.cpus}" if slurm.cpus else "--cpu-bind=none"
    # A supervisor that ends says so to the others, which end as well; one that cannot hear is not waited for. With --elastic
    # it may come back.
    alone = ["--wait=0", "--no-kill"] if request.elastic else ["--wait=60"]
    srun = ["srun", f"--nodes={cluster.nodes}", f"--ntasks={cluster.nodes}", "--ntasks-per-node=1", cores,
            "--kill-on-bad-exit=0", *alone]  # fmt: skip
    command = [*srun, request.python, "-m", MODULE, *words]
    called = " ".join('"$first:$port"' if word == _STORE else shlex.quote(word) for word in command)
    ports = max(1, min(1000, (_HIGHEST_PORT - config.launch.port) // 2))
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(config, request)),
        "",
        "set -uo pipefail",
        *_prepared(config, request),
        "",
        "# The first node serves the supervisors' store, at a port of this job's own.",
        'hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || exit 2',
        "first=${hosts%%$'\\n'*}",
        f"port=$(({config.launch.port} + SLURM_JOB_ID % {ports} * 2))",
        *([f'printf "%s\\n" "$first:$port" > {shlex.quote(f"{request.kept}/store")}'] if request.elastic else []),
        f"ended={shlex.quote(f'{request.kept}/{ENDED}-0')}",
        f'rm -f -- "$ended" {shlex.quote(f"{request.kept}/{STOP}")}',
        "",
        "# A cancelled job waits for its ranks, which save, and is not queued again.",
        "cancelled=",
        "trap 'cancelled=yes' TERM",
        *(_elastic(called) if request.elastic else [called]),
        "code=$?",
        "# srun's own code is that of whichever node was lost: the first node's supervisor says how the run ended.",
        '[ -s "$ended" ] && code=$(cat -- "$ended")',
    ]
    if slurm.requeue:
        lines += [
            'if [ "$code" -eq 75 ] && [ -z "$cancelled" ]; then',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
        ]
    return "\n".join([*lines, 'exit "$code"', ""])


def _elastic(called: str) -> list[str]:
    """The step beside the script: Slurm may never tell of the end of a node that was lost."""
    return [
        f"{called} &",
        "step=$!",
        "# A node that was lost is not waited for: what is left some time after the first node's end is cut off.",
        'while kill -0 "$step" 2> /dev/null && [ ! -s "$ended" ]; do sleep 1; done',
        f'for _ in {{1..{FAREWELL_SECONDS}}}; do kill -0 "$step" 2> /dev/null || break; sleep 1; done',
        'kill -KILL "$step" 2> /dev/null',
        'wait "$step"',
    ]


def job_name(run: str) -> str:
    """A name for the queue: the run's, with `_` for what stands in no list of jobs."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", run.rpartition("/")[2]).lstrip("-.")[:64] or "longskip"


def _options(config: Config, request: Request) -> list[str]:
    slurm, cluster = config.launch.slurm, request.cluster
    kind = f"{slurm.gpu_type}:" if slurm.gpu_type else ""
    gpus = {
        "per-node": [f"--gpus-per-node={kind}{cluster.ranks_per_node}"],
        "gres": [f"--gres=gpu:{kind}{cluster.ranks_per_node}"],
        "none": [],
    }[slurm.gpus]
    asked = {"cpus-per-task": slurm.cpus, "mem": slurm.memory, "partition": slurm.partition, "account": slurm.account,
             "qos": slurm.qos, "time": slurm.time}  # fmt: skip
    return [
        f"--job-name={job_name(request.run)}",
        f"--nodes={cluster.nodes}",
        "--ntasks-per-node=1",
        *gpus,
        *(f"--{name}={value}" for name, value in asked.items() if value is not None),
        f"--signal=USR1@{slurm.signal_seconds}",
        "--requeue" if slurm.requeue else "--no-requeue",
        "--open-mode=append",
        *(["--no-kill"] if request.elastic else []),
        *slurm.extra,
    ]
