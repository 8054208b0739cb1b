"""``longskip launch``, ``supervise`` and ``status``: the same run started anywhere, and what runs are at."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from longskip.errors import EXIT_USAGE, ConfigError, LongskipError, did_you_mean

if TYPE_CHECKING:
    from longskip.engine.config import Config
    from longskip.launcher.rendering import Rendered, Request

TAKES_THE_REST = {"allow_extra_args": True, "ignore_unknown_options": True}
_PREFLIGHT = "see before the first step that every node can do its part; of one node in a fraction of a second"


def launch(
    context: typer.Context,
    local: Annotated[
        int | None, typer.Option("--local", metavar="N", help="ranks on this machine; 2 by default")
    ] = None,
    on: Annotated[
        str | None,
        typer.Option("--on", metavar="WHERE", help="local, hosts, slurm or kubernetes; hosts with --hostfile"),
    ] = None,
    via: Annotated[
        str | None,
        typer.Option(metavar="HOW", help="deepspeed (hosts), torchrun (hosts, local), srun (slurm); the first fits"),
    ] = None,
    hostfile: Annotated[Path | None, typer.Option(metavar="F", help="lines `NAME slots=N`, a rank a slot")] = None,
    nodes: Annotated[int | None, typer.Option(metavar="N", help="without a hostfile: how many")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(metavar="N", help="ranks of each node")] = None,
    launcher: Annotated[str, typer.Option(help="deepspeed's way to hosts: pdsh, openmpi or slurm")] = "pdsh",
    launcher_arg: Annotated[
        list[str] | None, typer.Option(metavar="ARG", help="one more argument for pdsh, mpirun or srun; again for more")
    ] = None,
    ssh: Annotated[bool, typer.Option("--ssh/--no-ssh", help="--no-ssh: start every node by itself")] = True,
    node_rank: Annotated[
        int | None, typer.Option(metavar="I", help="without ssh: start node I, which is this one")
    ] = None,
    master: Annotated[
        str | None, typer.Option(metavar="HOST", help="the first node's address; the hostfile's first")
    ] = None,
    setup: Annotated[
        Path | None, typer.Option(metavar="F", help="slurm: a shell file that the job reads first")
    ] = None,
    elastic: Annotated[
        bool, typer.Option("--elastic", help="go on with the nodes that are left, and with those that return")
    ] = False,
    min_nodes: Annotated[int, typer.Option(metavar="M", help="with --elastic: fewer end the run")] = 1,
    preflight: Annotated[bool | None, typer.Option("--preflight/--no-preflight", help=_PREFLIGHT)] = None,
    preflight_only: Annotated[bool, typer.Option("--preflight-only", help="that, and stop")] = False,
    submit: Annotated[
        bool, typer.Option("--submit", help="hand the job to sbatch or kubectl; else it is only written")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="show all that would be written and run, and stop")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="with --dry-run: DeepSpeed's JSON too")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="with --dry-run, --submit or a preflight of this machine: one JSON object")
    ] = False,
) -> None:
    """Start a run anywhere: on this machine, hosts, Slurm or Kubernetes.

    \b
    longskip launch --local 2 -- train CONFIG
    longskip launch --hostfile F -- train CONFIG
    longskip launch --hostfile F --no-ssh --node-rank I -- train CONFIG
    longskip launch --on slurm --nodes 4 --gpus-per-node 8 --submit -- …

    One supervisor on each node starts its ranks, and again when they die, from
    the last commit. After any end the same launch goes on. RUN/launch/ keeps
    what was rendered.

    Exit codes: 0 done, 1 failed, 2 configuration, 75 saved (start again).
    """
    from longskip.engine import signals
    from longskip.launcher import launching
    from longskip.launcher.rendering import render

    asked = {
        "local": local, "on": on, "via": via, "hostfile": hostfile, "nodes": nodes, "ranks": gpus_per_node,
        "launcher": launcher, "launcher_args": launcher_arg or [], "ssh": ssh, "node": node_rank, "master": master,
        "setup": setup, "elastic": elastic, "as_json": as_json and preflight_only, "min_nodes": min_nodes,
        "preflight": "only" if preflight_only else {None: None, True: "yes", False: "no"}[preflight],
    }  # fmt: skip
    config, request = _request(context.args, asked)
    rendered = render(config, request)
    if dry_run:
        _show(config, request, rendered, as_json=as_json, verbose=verbose)
        return
    scheduled = request.on in ("slurm", "kubernetes")
    if submit and not scheduled:
        raise ConfigError("--submit is for --on slurm and --on kubernetes", cure="leave it out: the launch itself runs")
    if submit:
        said = launching.submit(rendered, request)
        told = {"job": said, "files": [f"{request.kept}/{name}" for name in rendered.files]}
        print(json.dumps(told) if as_json else f"{said}\nfiles     {request.kept}")
        return
    if scheduled or (not rendered.command and rendered.per_node):
        launching.keep(rendered, request)
        _print_commands(request, rendered)
        if scheduled:
            print("not submitted: run that, or launch again with --submit")
        return
    run = launching.run_of(config, request.train[0])
    code = EXIT_USAGE
    try:
        code = _here(request, rendered, as_json) if request.via == "none" else launching.start(rendered, request)
    except LongskipError as error:
        code = error.exit_code
        raise
    finally:
        if code == EXIT_USAGE or preflight_only:
            launching.sweep(run)
    signals.ignore()
    raise typer.Exit(code)


def supervise(
    context: typer.Context,
    nodes: Annotated[int, typer.Option(min=1, metavar="N", help="nodes of the launch")] = 1,
    node: Annotated[
        str, typer.Option(metavar="I|auto", help="which one this is; auto: what its launcher says")
    ] = "auto",
    ranks: Annotated[int, typer.Option(min=1, metavar="G", help="ranks of this node")] = 1,
    store: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="where node 0 serves the supervisors' store")
    ] = "127.0.0.1:0",
    bind: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="the address that node 0 serves it at; the store's")
    ] = None,
    elastic: Annotated[bool, typer.Option("--elastic", help="go on with the nodes that are there")] = False,
    min_nodes: Annotated[int, typer.Option(min=1, metavar="M", help="with --elastic: fewer end the run")] = 1,
    preflight: Annotated[
        bool, typer.Option("--preflight/--no-preflight", help="look at every node before the first step")
    ] = True,
    preflight_only: Annotated[bool, typer.Option("--preflight-only", help="that, and stop")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="node 0 prints the preflight as one JSON object")] = False,
    packed: Annotated[
        str | None, typer.Option(metavar="WORD", help="all of these in one word that no shell reads")
    ] = None,
) -> None:
    """One node's supervisor, as `longskip launch` starts it: it starts the node's ranks, and again when they die.

    Exit codes: 0 done, 1 failed, 2 configuration, 75 saved on a signal (start again).
    """
    if packed is not None:
        _unpacked(packed)
        return
    from longskip.engine import signals
    from longskip.launcher import asking
    from longskip.launcher.launching import node_of
    from longskip.launcher.supervisor import Supervision
    from longskip.launcher.supervisor import supervise as run_supervisor

    if not context.args or context.args[0] != "train":
        raise ConfigError("supervise starts ranks of train only", cure="longskip launch --local 2 -- train CONFIG")
    if node != "auto" and not (node.isascii() and node.isdigit()):
        raise ConfigError(f"--node {node!r} is neither a number nor auto")
    own = node_of(os.environ) if node == "auto" else int(node)
    if own >= nodes:
        raise ConfigError(
            f"node {own} of {nodes}: they are 0 … {nodes - 1}", cure="one supervisor a node: one slot, one task"
        )
    what = Supervision(
        nodes=nodes, node=own, ranks=ranks, store=store, bind=bind, elastic=elastic, min_nodes=min_nodes,
        preflight="only" if preflight_only else "yes" if preflight else "no", arguments=tuple(context.args),
        as_json=as_json,
    )  # fmt: skip
    outside = dict(os.environ)
    asking.clear(os.environ)
    with asking.told_from_outside(outside, own) as ended:
        try:
            code = run_supervisor(what)
        except LongskipError as error:
            ended.append(error.exit_code)
            raise
        ended.append(code)
    signals.ignore()
    raise typer.Exit(code)


def _unpacked(word: str) -> None:
    """Be the supervisor that ``word`` describes: its folder, its variables, its arguments."""
    from longskip.launcher.rendering import unpack

    words, folder, environment = unpack(word)
    try:
        os.chdir(folder)
    except OSError as error:
        raise ConfigError(
            f"{folder} is not on this node: {error}", cure="the same folder on all nodes (a shared file system)"
        ) from None
    os.environ.update(environment)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings=TAKES_THE_REST)(supervise)
    app(list(words[1:]), standalone_mode=True)


def _request(arguments: list[str], asked: dict[str, Any]) -> tuple[Config, Request]:
    """The configuration and what is to be launched; raises ConfigError for what does not go together."""
    from longskip.engine.configio import load_config
    from longskip.launcher import launching
    from longskip.launcher.hosts import check_host, cluster, read_hostfile
    from longskip.launcher.rendering import LOOPBACK, WAYS, Request, passed_on

    if not arguments or arguments[0] != "train" or len(arguments) < 2:
        raise ConfigError("launch starts ranks of train only", cure="longskip launch --local 2 -- train CONFIG")
    words = tuple(arguments[1:])
    if (option := next((word for word in words if word.startswith("-")), None)) is not None:
        raise ConfigError(
            f"{option} stands behind train, where only CONFIG and overrides (group.key=value) belong",
            cure=f"options of launch stand before --: longskip launch {option} -- train CONFIG",
        )
    several = asked["hostfile"] is not None or (asked["nodes"] or 1) > 1
    on = asked["on"] or ("hosts" if several else "local")
    _known("--on", on, WAYS)
    via = asked["via"] or WAYS[cast("Any", on)][0]
    _known("--via", via, ("deepspeed", "torchrun", "srun", "none"))
    _known("--launcher", asked["launcher"], ("pdsh", "openmpi", "slurm"))
    if asked["local"] is not None and (on != "local" or asked["ranks"] or several):
        raise ConfigError(
            "--local N is for ranks on this machine alone", cure="--nodes N --gpus-per-node G, or --hostfile F"
        )
    if asked["hostfile"] is not None:
        if asked["nodes"] or asked["ranks"]:
            raise ConfigError("--hostfile says nodes and ranks", cure="leave --nodes and --gpus-per-node out")
        if on != "hosts":
            raise ConfigError(f"--hostfile is for --on hosts, not {on}")
        machines = read_hostfile(asked["hostfile"])
    elif on == "local":
        machines = cluster(
            1, 2 if asked["local"] is None and not asked["ranks"] else asked["local"] or asked["ranks"] or 0
        )
    else:
        if asked["nodes"] is None or asked["ranks"] is None:
            raise ConfigError(f"--on {on} needs --nodes and --gpus-per-node", cure="--nodes 2 --gpus-per-node 8")
        machines = cluster(asked["nodes"], asked["ranks"])
    if asked["node"] is not None and (on != "hosts" or (asked["ssh"] and via == "deepspeed")):
        raise ConfigError("--node-rank is for nodes that are started by themselves", cure="--no-ssh, or --via torchrun")
    if asked["setup"] is not None and on != "slurm":
        raise ConfigError("--setup is for --on slurm", cure="source it in the shell that you launch from")
    config = load_config(Path(words[0]), words[1:])
    run = launching.run_of(config, words[0])
    master = check_host(asked["master"]) if asked["master"] else machines.hosts[0] if machines.hosts else LOOPBACK
    if on == "hosts" and machines.nodes > 1 and not machines.hosts and not asked["master"]:
        raise ConfigError("--on hosts needs the first node's address", cure="--master HOST, or --hostfile F")
    return config, Request(
        on=cast("Literal['local', 'hosts', 'slurm', 'kubernetes']", on), via=cast("Any", via), cluster=machines,
        train=words, run=str(run), folder=str(Path.cwd()), python=sys.executable, runner=cast("Any", asked["launcher"]),
        ssh=asked["ssh"], node=asked["node"], master=master, environment=passed_on(os.environ), elastic=asked["elastic"],
        min_nodes=asked["min_nodes"], preflight=asked["preflight"] or "yes",
        launcher_args=tuple(asked["launcher_args"]), setup=None if asked["setup"] is None else str(asked["setup"].absolute()),
        kept_micro=launching.kept_micro(config, run), as_json=asked["as_json"],
    )  # fmt: skip


def _known(option: str, value: str, known: Any) -> None:
    if value not in known:
        raise ConfigError(f"{option} {value!r} is not known", cure=did_you_mean(value, known))


def _here(request: Request, rendered: Rendered, as_json: bool) -> int:
    """A supervisor in this process."""
    from longskip.launcher import asking, launching
    from longskip.launcher.supervisor import Supervision, supervise

    launching.keep(rendered, request)
    asking.clear(os.environ)
    os.environ.update(rendered.environment)
    return supervise(
        Supervision(
            nodes=1, node=0, ranks=request.cluster.ranks_per_node, store="127.0.0.1:0", bind=None,
            elastic=request.elastic, min_nodes=1, preflight=request.preflight, arguments=("train", *request.train),
            as_json=as_json,
        )
    )  # fmt: skip


def _print_commands(request: Request, rendered: Rendered) -> None:
    """What the user has to run: the scheduler's command, or one on every node."""
    from longskip.launcher.launching import command_line

    for name in rendered.files:
        print(f"file      {request.kept}/{name}")
    for note in rendered.notes:
        print(f"          {note}")
    if rendered.command:
        print(f"run       {command_line(rendered.command)}")
    for node, command in enumerate(rendered.per_node):
        print(f"node {node:<4} {command_line(command)}")


def _show(config: Config, request: Request, rendered: Rendered, *, as_json: bool, verbose: bool) -> None:
    from longskip.launcher.launching import deepspeed_json

    told = {**rendered.as_json(), "deepspeed": deepspeed_json(config, request), "kept": request.kept}
    if as_json:
        print(json.dumps(told, ensure_ascii=False))
        return
    from longskip.launcher.tables_launch import print_rendered

    print_rendered(rendered, told, verbose=verbose)


def status(
    runs: Annotated[list[str] | None, typer.Argument(metavar="RUN...", help="runs; all under runs/ by default")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON list, for machines")] = False,
) -> None:
    """What runs are at: step, time left, images/s, MFU, last commit, attempts, incidents, goodput."""
    from longskip.launcher.status import status_of
    from longskip.launcher.tables_launch import print_status

    found = [status_of(run) for run in _runs(runs or [])]
    if as_json:
        print(json.dumps([each.as_json() for each in found]))
    else:
        print_status(found)


def _runs(named: list[str]) -> list[str]:
    """The runs that were named, or all under ``runs/``, the newest last."""
    from longskip.engine.runs import RUNS

    if named:
        return named
    found = sorted(RUNS.glob("*/config.yaml"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"no run under {RUNS.absolute()}", cure="longskip status RUN, or go to where runs/ is")
    return [str(path.parent) for path in found]
