"""What a launch would run, as texts and lists: a pure function of configuration and request (no torch).

Everything starts ``longskip supervise`` once on every node. A command is a list of arguments that no shell reads, with two
exceptions that their programs force: pdsh hands one line to a remote shell, so what it is given is one word of base64
(``pack``); sbatch takes a script (``slurm.py``), in which every value is quoted. Nothing is read here from the machine or
its environment: what is passed on stands in the request.
"""

from __future__ import annotations

import base64
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from longskip.engine.clusters import PASSED_ON
from longskip.engine.config import Config, leaves
from longskip.engine.secrets import holds_user, is_secret
from longskip.errors import ConfigError
from longskip.launcher.hosts import Cluster, hostfile

On = Literal["local", "hosts", "slurm", "kubernetes"]
Via = Literal["none", "deepspeed", "torchrun", "srun"]
Runner = Literal["pdsh", "openmpi", "slurm"]
Preflight = Literal["yes", "no", "only"]

# Where it runs → what may start it there, the usual one first.
WAYS: dict[On, tuple[Via, ...]] = {
    "local": ("none", "deepspeed", "torchrun"),
    "hosts": ("deepspeed", "torchrun"),
    "slurm": ("srun",),
    "kubernetes": ("none",),
}
MODULE = "longskip.launcher"
LOOPBACK = "127.0.0.1"

# The launch's own folder, RUN/launch: a supervisor reads there whether it shall stop, and writes how it ended.
HERE = "LONGSKIP_LAUNCH"
LAUNCHER = "LONGSKIP_LAUNCHER"  # the number of the launch's process, where that is on the supervisor's machine
BY_SSH = "LONGSKIP_BY_SSH"  # set where a supervisor's standard input is its connection to the launch
DEVICES = "LONGSKIP_DEVICES"  # CUDA_VISIBLE_DEVICES before DeepSpeed's launcher replaced it
_OF_ONE_PLACE = frozenset(
    {
        HERE,
        LAUNCHER,
        DEVICES,
        "LONGSKIP_STORE",
        "LONGSKIP_ATTEMPT",
        "LONGSKIP_PULSE",
        "LONGSKIP_STACKS",
        "LONGSKIP_SUPERVISOR",
    }
)
# What a remote shell reads as one plain word.
_PLAIN = re.compile(r"[A-Za-z0-9_./+-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class Request:
    """What to launch: ``train`` is CONFIG and its overrides, ``run`` the run's folder relative to ``folder``.

    ``master`` is the first node's address for the others, ``node`` the node whose command is wanted (no ssh, torchrun),
    ``environment`` what the ranks get beside ``launch.environment``. ``launcher_args`` are options of the user's for pdsh,
    mpirun or srun, ``setup`` a shell file of theirs that Slurm's script reads (neither is a setting: a configuration runs
    nothing). ``kept_micro`` is the micro-batch of a run that is there already. ``as_json``: of the preflight.
    """

    on: On
    via: Via
    cluster: Cluster
    train: tuple[str, ...]
    run: str
    folder: str
    python: str = "python3"
    runner: Runner = "pdsh"
    ssh: bool = True
    node: int | None = None
    master: str = LOOPBACK
    environment: Mapping[str, str] = field(default_factory=dict)
    elastic: bool = False
    min_nodes: int = 1
    preflight: Preflight = "yes"
    launcher_args: tuple[str, ...] = ()
    setup: str | None = None
    kept_micro: int | None = None
    as_json: bool = False

    @property
    def kept(self) -> str:
        """The folder for what is rendered, RUN/launch, as an absolute path."""
        return f"{self.folder.rstrip('/')}/{self.run}/launch"


@dataclass(frozen=True)
class Rendered:
    """``files``: name → text, to lie in RUN/launch/. ``command``: what this launch runs, with ``environment`` beside the
    caller's; empty where every node must be started by itself: then ``per_node`` holds a command for each.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    per_node: tuple[tuple[str, ...], ...] = ()

    def as_json(self) -> dict[str, Any]:
        return {
            "files": dict(self.files),
            "command": list(self.command),
            "environment": dict(self.environment),
            "notes": list(self.notes),
            "per_node": [list(command) for command in self.per_node],
        }


def render(config: Config, request: Request) -> Rendered:
    """Everything that the launch would write and run. Raises ConfigError for what cannot be, or would tell a secret."""
    _check(config, request)
    if request.on == "slurm":
        from longskip.launcher.slurm import render_slurm

        return render_slurm(config, request)
    if request.on == "kubernetes":
        from longskip.launcher.kubernetes import render_kubernetes

        return render_kubernetes(config, request)
    if request.via == "torchrun":
        return _torchrun(config, request)
    if request.via == "none":
        words = supervise_words(request, node="0", store=f"{LOOPBACK}:0")
        command = (request.python, "-m", MODULE, *words)
        return Rendered(command=command, environment=environment_of(config, request), notes=_notes(config, request))
    if request.on == "local" or not request.ssh:
        return _deepspeed_here(config, request)
    return _deepspeed_everywhere(config, request)


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """Of a process's variables those that ranks on other nodes get: libraries' settings without secrets."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if name.startswith(PASSED_ON)
        and name not in _OF_ONE_PLACE
        and not is_secret(name)
        and not holds_user(value)
        and not _CONTROL.search(value)
    }


def environment_of(config: Config, request: Request) -> dict[str, str]:
    """The variables that supervisors and ranks start with; the configuration's over the caller's."""
    return dict(sorted((dict(request.environment) | config.launch.environment).items()))


def supervise_words(request: Request, *, node: str, store: str) -> tuple[str, ...]:
    """``supervise --nodes … -- train CONFIG …``: the arguments that every way of launching gives to every node."""
    words = ["supervise", "--nodes", str(request.cluster.nodes), "--node", node]
    words += ["--ranks", str(request.cluster.ranks_per_node), "--store", store]
    if request.elastic:
        words += ["--elastic", "--min-nodes", str(request.min_nodes)]
    words += {"yes": ["--preflight"], "no": ["--no-preflight"], "only": ["--preflight-only"]}[request.preflight]
    words += ["--json"] if request.as_json else []
    return (*words, "--", "train", *request.train)


def pack(words: tuple[str, ...], folder: str, environment: Mapping[str, str]) -> str:
    """Arguments, folder and variables as one word that no shell changes."""
    told = {"arguments": list(words), "folder": folder, "environment": dict(environment)}
    return base64.urlsafe_b64encode(json.dumps(told, sort_keys=True).encode()).decode()


def unpack(word: str) -> tuple[tuple[str, ...], str, dict[str, str]]:
    """(arguments, folder, variables) of ``pack``; raises ConfigError for any other word."""
    try:
        told = json.loads(base64.b64decode(word.encode("ascii"), altchars=b"-_", validate=True))
        words, folder, environment = (told[key] for key in ("arguments", "folder", "environment"))
        texts = [*words, folder, *environment, *environment.values()]
        if not isinstance(words, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError("not texts")
    except (ValueError, TypeError, KeyError, AttributeError, UnicodeError):
        raise ConfigError(f"--packed {word[:40]!r} is no packed launch", cure="longskip launch makes them") from None
    return tuple(words), folder, environment


def _check(config: Config, request: Request) -> None:
    if request.via not in WAYS[request.on]:
        raise ConfigError(
            f"--via {request.via} does not go with --on {request.on}; {' or '.join(WAYS[request.on])} does",
            cure="torchrun and deepspeed are for --on hosts, without ssh too; on slurm srun starts the same supervisors"
            if request.on == "slurm"
            else "leave --via out",
        )
    if request.on == "local" and request.cluster.nodes != 1:
        raise ConfigError(
            f"--on local is one node, not {request.cluster.nodes}", cure="--on hosts, slurm or kubernetes"
        )
    if (
        request.on == "hosts"
        and len(request.cluster.hosts) != request.cluster.nodes
        and request.ssh
        and _by_ssh(request)
    ):
        raise ConfigError(
            "--on hosts needs the names of the nodes", cure="--hostfile F with a line `NAME slots=N` a node"
        )
    if request.node is not None and not 0 <= request.node < request.cluster.nodes:
        raise ConfigError(f"--node-rank {request.node} is not one of 0 … {request.cluster.nodes - 1}")
    if not 1 <= request.min_nodes <= request.cluster.nodes:
        raise ConfigError(f"--min-nodes {request.min_nodes} is not one of 1 … {request.cluster.nodes}")
    if request.min_nodes > 1 and not request.elastic:
        raise ConfigError(
            "--min-nodes has no effect: without --elastic all nodes are needed", cure="--elastic, or leave it out"
        )
    if request.elastic and request.runner == "openmpi" and _by_ssh(request):
        raise ConfigError(
            "--elastic does not go with --launcher openmpi: mpirun ends all nodes when it loses one",
            cure="--launcher pdsh or slurm, or --no-ssh",
        )
    if request.launcher_args and not _by_ssh(request):
        raise ConfigError(
            "--launcher-arg has no effect: it is for pdsh, mpirun and srun with --on hosts", cure="leave it out"
        )
    if not request.train:
        raise ConfigError("launch starts ranks of train only", cure="longskip launch --local 2 -- train CONFIG")
    for word in request.train:
        if word.startswith("-"):
            raise ConfigError(
                f"{word!r} begins with '-'; launch takes CONFIG and overrides after `train`",
                cure="a file of that name is ./-…; launch has --dry-run itself",
            )
    for word in request.train[1:]:
        key, _, value = word.partition("=")
        if any(is_secret(part) for part in key.split(".")) or holds_user(value):
            raise ConfigError(
                f"{key}: a secret would stand on a command line, where others of the machine can read it",
                cure="put it into the environment of the nodes, or into a file",
            )
    if not request.elastic:
        config.batch(request.cluster.world, request.kept_micro)
    for text in (request.folder, request.run):
        if _CONTROL.search(text):
            raise ConfigError(f"folder {text!r} holds a control character", cure="rename it")


def _by_ssh(request: Request) -> bool:
    return request.on == "hosts" and request.via == "deepspeed" and request.ssh


def _store(config: Config, request: Request) -> str:
    return f"{LOOPBACK}:0" if request.cluster.nodes == 1 else f"{request.master}:{config.launch.port}"


def _notes(config: Config, request: Request, *more: str) -> tuple[str, ...]:
    cluster = request.cluster
    ranks = f"{cluster.world} rank(s) on {cluster.nodes} node(s), {cluster.ranks_per_node} each"
    open_port = (
        f"ports {config.launch.port} and {config.launch.port + 1} of {request.master} must be open to the nodes, and to "
        "nobody else: whoever reaches them can disturb the run"
    )
    return (ranks, *((open_port,) if cluster.nodes > 1 and request.on == "hosts" else ()), *more)


def _packed(config: Config, request: Request) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(the module's arguments, notes). One word for all of them: pdsh's goes through a shell, and the options of deepspeed
    and torchrun take what begins like one of theirs wherever it stands (``--node`` is ``--node-rank`` to them)."""
    words = supervise_words(request, node="auto", store=_store(config, request))
    environment = environment_of(config, request)
    notes = (
        f"packed, since launchers and shells read plain words: {json.dumps(words, ensure_ascii=False)} in {request.folder}",
        f"every node gets these variables: {json.dumps(environment, ensure_ascii=False)}",
    )
    where = {HERE: request.kept, **({BY_SSH: "1"} if _by_ssh(request) and request.runner == "pdsh" else {})}
    return ("supervise", "--packed", pack(words, request.folder, {**environment, **where})), notes


def _torchrun(config: Config, request: Request) -> Rendered:
    """One process a node through torchrun, which needs no ssh: each node is started by itself."""
    nodes = request.cluster.nodes
    words, notes = _packed(config, request)
    commands = []
    for node in range(nodes):
        met: tuple[str, ...] = ("--standalone",)
        if nodes > 1:
            port = str(config.launch.port + 1)
            met = ("--node-rank", str(node), "--master-addr", request.master, "--master-port", port)
        run = (request.python, "-m", "torch.distributed.run", "--nnodes", str(nodes), "--nproc-per-node", "1", *met)
        commands.append((*run, "--max-restarts", "0", "-m", MODULE, *words))
    return _each_node(config, request, commands, notes)


def _deepspeed_here(config: Config, request: Request) -> Rendered:
    """DeepSpeed's launcher without ssh: each node is started by itself; one process a node."""
    nodes = request.cluster.nodes
    words, notes = _packed(config, request)
    commands = [
        (*_runner(config, request), "--no_ssh", "--node_rank", str(node), "--module", MODULE, *words)
        for node in range(nodes)
    ]
    names = request.cluster.hosts or tuple(f"node-{i}" for i in range(nodes))
    rendered = _each_node(config, request, commands, notes)
    return replace(rendered, files={"hostfile": hostfile(names, 1)}, environment=_QUIET)


def _each_node(config: Config, request: Request, commands: list[tuple[str, ...]], notes: tuple[str, ...]) -> Rendered:
    node = 0 if request.cluster.nodes == 1 else request.node
    by_hand = () if node is not None else ("run this launch with --node-rank I on every node, or these commands there",)
    return Rendered(
        command=() if node is None else commands[node],
        notes=_notes(config, request, *by_hand, *notes),
        per_node=tuple(commands) if request.cluster.nodes > 1 else (),
    )


# DeepSpeed's runner prints the variables of ~/.deepspeed_env and ./.deepspeed_env, and puts them on command lines; with a
# file that is none it reads neither.
_QUIET = {"DS_ENV_FILE": "/dev/null"}


def _runner(config: Config, request: Request) -> tuple[str, ...]:
    return (
        request.python, "-m", "deepspeed.launcher.runner", "--hostfile", f"{request.kept}/hostfile",
        "--master_addr", request.master, "--master_port", str(config.launch.port + 1),
        "--no_local_rank", "--log_level=error",
    )  # fmt: skip


def _deepspeed_everywhere(config: Config, request: Request) -> Rendered:
    """DeepSpeed's runner over pdsh, mpirun or srun: one process a node."""
    if request.runner == "pdsh" and not _PLAIN.fullmatch(request.python):
        raise ConfigError(
            f"python at {request.python!r}: pdsh hands this path to a remote shell, which would not take it as one word",
            cure="an environment in a folder of letters, digits, '.', '_' and '-'; or --no-ssh",
        )
    extra = {
        "pdsh": [],
        # A supervisor alone on its node must not be bound to one core, which all its ranks would share.
        "openmpi": ["--bind-to", "none", "--map-by", "ppr:1:node"],
        "slurm": [
            f"--nodes={request.cluster.nodes}",
            "--ntasks-per-node=1",
            "--cpu-bind=none",
            "--kill-on-bad-exit=0",
            *(["--wait=0", "--no-kill"] if request.elastic else []),
        ],
    }[request.runner]
    options = ["--force_multi", "--no_ssh_check", "--launcher", request.runner]
    if config.launch.ssh_port is not None and request.runner == "openmpi":
        extra += ["--mca", "plm_rsh_args", f"-p {config.launch.ssh_port}"]
    if arguments := [*extra, *request.launcher_args]:
        options.append(f"--launcher_args={shlex.join(arguments)}")  # the runner splits it by the same rules
    if config.launch.ssh_port is not None and request.runner == "pdsh":
        options += ["--ssh_port", str(config.launch.ssh_port)]
    files = {"hostfile": hostfile(request.cluster.hosts, 1)}
    target = ["--module", MODULE]
    if request.runner == "slurm":  # it knows no --module
        files["supervise.py"] = "from longskip.launcher.cli import main\n\nmain()\n"
        target = [f"{request.kept}/supervise.py"]
    words, notes = _packed(config, request)
    slots = f"hostfile: one slot a node, for its supervisor, which starts {request.cluster.ranks_per_node} rank(s)"
    back = ("a node that was lost comes back by this launch with --no-ssh --node-rank I, given there",)
    return Rendered(
        files=files,
        command=(*_runner(config, request), *options, *target, *words),
        environment=_QUIET,
        notes=_notes(config, request, slots, *(back if request.elastic else ()), *notes),
    )


def told_by(config: Config) -> list[str]:
    """Settings whose value would tell a name or password of a URL where the whole configuration is written down."""
    return [
        key for key, value in leaves(config.model_dump(mode="json")) if isinstance(value, str) and holds_user(value)
    ]
