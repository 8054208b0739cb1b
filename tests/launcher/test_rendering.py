"""What a launch would run: pinned texts, and what must hold for all of them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.errors import ConfigError
from longskip.launcher.hosts import Cluster
from longskip.launcher.rendering import (
    BY_SSH,
    HERE,
    Request,
    environment_of,
    pack,
    passed_on,
    render,
    supervise_words,
    unpack,
)
from tests.launcher.requests import NASTY, asked, configured

KUBERNETES = {"image": "registry/longskip:1", "volumes": {"training": "/data"}, "folder": "/data"}
WAYS = [
    ("local", "none"), ("local", "deepspeed"), ("local", "torchrun"), ("hosts", "deepspeed"), ("hosts", "torchrun"),
    ("slurm", "srun"), ("kubernetes", "none"),
]  # fmt: skip


def requests() -> list[Request]:
    found = []
    for on, via in WAYS:
        alone = {"cluster": Cluster(1, 2), "master": "127.0.0.1"} if on == "local" else {}
        found.append(asked(on, via, **alone))
    return [
        *found,
        *(asked(runner=runner) for runner in ("openmpi", "slurm")),
        asked(ssh=False),
        asked(ssh=False, node=1),
    ]


def test_hosts_over_pdsh() -> None:
    rendered = render(configured(port=30000, ssh_port=2222), asked(elastic=True, min_nodes=1, preflight="only"))
    assert rendered.files == {"hostfile": "node-1 slots=1\nnode-2 slots=1\n"}
    *command, word = rendered.command
    assert command == [
        "/env/bin/python", "-m", "deepspeed.launcher.runner", "--hostfile", "/home/me/runs/run/launch/hostfile",
        "--master_addr", "node-1", "--master_port", "30001", "--no_local_rank", "--log_level=error", "--force_multi",
        "--no_ssh_check", "--launcher", "pdsh", "--ssh_port", "2222", "--module", "longskip.launcher", "supervise", "--packed",
    ]  # fmt: skip
    words, folder, environment = unpack(word)
    assert words == (
        "supervise", "--nodes", "2", "--node", "auto", "--ranks", "2", "--store", "node-1:30000", "--elastic", "--min-nodes",
        "1", "--preflight-only", "--", "train", "run.yaml", "optim.lr=1e-3",
    )  # fmt: skip
    assert folder == "/home/me"
    assert environment == {"OMP_NUM_THREADS": "4", HERE: "/home/me/runs/run/launch", BY_SSH: "1"}


def test_hosts_over_mpirun_and_srun() -> None:
    config = configured()
    mpirun = render(config, asked(runner="openmpi", launcher_args=("--mca", "btl_tcp_if_include", "a b"))).command
    given = next(word for word in mpirun if word.startswith("--launcher_args="))
    assert shlex.split(given.partition("=")[2]) == [
        "--bind-to", "none", "--map-by", "ppr:1:node", "--mca", "btl_tcp_if_include", "a b",
    ]  # fmt: skip
    for elastic in (False, True):
        command = render(config, asked(runner="slurm", elastic=elastic)).command
        given = next(word for word in command if word.startswith("--launcher_args="))
        assert ("--wait=0 --no-kill" in given) is elastic and "--kill-on-bad-exit=0" in given
    port = render(configured(ssh_port=2222), asked(runner="openmpi")).command
    assert "--ssh_port" not in port and any(word.endswith("--mca plm_rsh_args '-p 2222'") for word in port)
    assert BY_SSH not in unpack(mpirun[-1])[2]  # mpirun gives the others no standard input
    srun = render(config, asked(runner="slurm"))
    assert "--module" not in srun.command and "/home/me/runs/run/launch/supervise.py" in srun.command
    assert srun.files["supervise.py"] == "from longskip.launcher.cli import main\n\nmain()\n"


def test_nodes_that_are_started_by_themselves() -> None:
    config = configured()
    for request in (asked(ssh=False), asked(via="torchrun")):
        rendered = render(config, request)
        assert rendered.command == () and len(rendered.per_node) == 2
        for node, command in enumerate(rendered.per_node):
            option = "--node_rank" if request.via == "deepspeed" else "--node-rank"
            assert command[command.index(option) + 1] == str(node)
            one = Request(**{**vars(request), "node": node})
            assert render(config, one).command == command


def test_here() -> None:
    rendered = render(configured(environment={"NCCL_DEBUG": "INFO"}), asked("local", "none", cluster=Cluster(1, 8)))
    assert rendered.command == (
        "/env/bin/python", "-m", "longskip.launcher", "supervise", "--nodes", "1", "--node", "0", "--ranks", "8", "--store",
        "127.0.0.1:0", "--preflight", "--", "train", "run.yaml", "optim.lr=1e-3",
    )  # fmt: skip
    assert rendered.environment == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4"}


@pytest.mark.parametrize("request_", requests(), ids=lambda r: f"{r.on}-{r.via}-{r.runner}-{r.ssh}-{r.node}")
def test_pure_and_without_the_environment(request_: Request) -> None:
    config = configured(kubernetes=KUBERNETES)
    first = render(config, request_).as_json()
    with mock.patch.dict(os.environ, {"HF_TOKEN": "s3cret-A", "NCCL_DEBUG": "s3cret-B", "HOME": "/s3cret-C"}):
        again = render(config, request_).as_json()
    assert first == again and "s3cret" not in json.dumps(again)


SECRETS = {
    "HF_TOKEN": "s-1", "WANDB_API_KEY": "s-2", "NCCL_SECRET": "s-3", "LONGSKIP_PASSWORD": "s-4", "TORCH_CREDENTIALS": "s-5",
    "NCCL_PROXY": "http://me:s-6@host", "UCX_X": "a\ns-7", "HOME": "s-8", "CUDA_VISIBLE_DEVICES": "s-9",
    "LD_PRELOAD": "s-10", HERE: "s-11", "LONGSKIP_STORE": "s-12",
}  # fmt: skip


def test_what_is_passed_on_to_the_nodes() -> None:
    settings_of_libraries = {
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "3",
        "DS_ACCELERATOR": "cpu",
        "LONGSKIP_FAULT": "x",
    }
    assert passed_on(SECRETS | settings_of_libraries) == settings_of_libraries
    request = asked(environment=passed_on(SECRETS | settings_of_libraries))
    words = render(configured(), request).as_json()
    assert unpack(words["command"][-1])[2].keys() == {*settings_of_libraries, HERE, BY_SSH}
    assert environment_of(configured(environment={"OMP_NUM_THREADS": "9"}), request)["OMP_NUM_THREADS"] == "9"


@pytest.mark.parametrize(
    "environment", [{"HF_TOKEN": "x"}, {"NCCL_SECRET": "x"}, {"LD_PRELOAD": "/x.so"}, {"PYTHONPATH": "/x"}, {"PATH": "/x"},
                    {"NCCL_NET_PLUGIN": "/x.so"}, {"BASH_ENV": "/x"}, {"NCCL_X": "http://me:pw@h"}, {"OMP_X": "a\nb"},
                    {"a b": "x"}],
)  # fmt: skip
def test_variables_that_a_configuration_may_not_set(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as refused:
        configured(environment=environment)
    assert ":pw@" not in str(refused.value) and "'x'" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"on": "slurm", "via": "torchrun"}, "--via torchrun"),
        ({"on": "kubernetes", "via": "deepspeed"}, "--via deepspeed"),
        ({"on": "local", "via": "none"}, "one node"),
        ({"cluster": Cluster(2, 2)}, "names of the nodes"),
        ({"ssh": False, "node": 2}, "0 … 1"),
        ({"elastic": True, "min_nodes": 3}, "1 … 2"),
        ({"min_nodes": 2}, "without --elastic"),
        ({"ssh": False, "launcher_args": ("-x",)}, "--launcher-arg"),
        ({"elastic": True, "runner": "openmpi"}, "mpirun ends all nodes"),
        ({"train": ()}, "train only"),
        ({"train": ("-x.yaml",)}, "begins with '-'"),
        ({"train": ("run.yaml", "--ranks")}, "begins with '-'"),
        ({"train": ("run.yaml", "logging.api_key=x")}, "secret"),
        ({"train": ("run.yaml", "data.path=https://me:pw@host/x")}, "secret"),
        ({"cluster": Cluster(2, 3, ("a", "b"))}, "6 rank"),
        ({"folder": "/home/a\nb"}, "control character"),
        ({"python": "/my env/bin/python"}, "remote shell"),
        ({"python": "/env/$(x)/python"}, "remote shell"),
    ],
)  # fmt: skip
def test_what_is_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError) as refused:
        render(configured(), asked(**changes))
    assert word in str(refused.value) and ":pw@" not in str(refused.value)


def test_a_run_that_is_there_keeps_its_micro_batch() -> None:
    with pytest.raises(ConfigError, match="keeps"):
        render(configured(), asked(kept_micro=32))  # 64 = 32 × 2, not × 4
    render(configured(), asked(kept_micro=16))


TEXTS = st.one_of(st.sampled_from(NASTY), st.text(max_size=20).filter(lambda t: "\0" not in t and t.isprintable()))


@settings(max_examples=40, deadline=None)
@given(st.lists(TEXTS, max_size=3), TEXTS)
def test_a_packed_word_is_plain_and_says_what_was_packed(values: list[str], folder: str) -> None:
    words = ("supervise", "--", "train", *values)
    word = pack(words, folder, {"OMP_X": folder})
    assert set(word) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_=-") and word[0] != "-"
    assert unpack(word) == (words, folder, {"OMP_X": folder})


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=60))
def test_any_other_word_is_refused(word: str) -> None:
    with pytest.raises(ConfigError):
        unpack(word)


def test_words_that_are_json_of_another_kind_are_refused() -> None:
    import base64

    for told in ([], 3, {"arguments": "x", "folder": "", "environment": {}}, {"arguments": [1], "folder": "", "environment": {}},
                 {"arguments": [], "folder": None, "environment": {}}, {"arguments": [], "folder": "", "environment": []},
                 {"arguments": [], "folder": "", "environment": {"a": 1}}, {"arguments": []}):  # fmt: skip
        with pytest.raises(ConfigError):
            unpack(base64.urlsafe_b64encode(json.dumps(told).encode()).decode())


def test_no_command_is_read_by_deepspeed_or_torchrun_as_its_own_options() -> None:
    """Their parsers take what begins like an option of theirs, wherever it stands: ours reach the module as they are."""
    from deepspeed.launcher.runner import parse_args
    from torch.distributed.run import get_args_parser

    config = configured()
    for request in (asked(), asked(ssh=False, node=0), asked(runner="slurm"), asked(runner="openmpi")):
        command = render(config, request).command
        read = parse_args(list(command[3:]))
        assert read.user_args == list(
            command[command.index("supervise") :] if request.runner != "slurm" else command[-3:]
        )
        assert read.hostfile == "/home/me/runs/run/launch/hostfile" and read.node_rank == (0 if not request.ssh else -1)
    command = render(config, asked(via="torchrun", node=1)).command
    read = get_args_parser().parse_args(list(command[3:]))
    assert read.training_script == "longskip.launcher" and read.training_script_args == list(command[-3:])
    assert (read.node_rank, read.nnodes, read.nproc_per_node, read.max_restarts) == (1, "2", "1", 0)
    with pytest.raises((SystemExit, argparse.ArgumentError)):  # why the words are packed
        get_args_parser().parse_args([*command[3:-2], *supervise_words(asked(), node="auto", store="a:1")[1:]])


def test_what_pdsh_hands_to_a_remote_shell_is_the_words_alone(tmp_path: Path) -> None:
    """The line that DeepSpeed's own runner makes for pdsh, read by a shell: nothing of the user's is seen by it."""
    from deepspeed.launcher.multinode_runner import PDSHRunner
    from deepspeed.launcher.runner import parse_args

    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python"
    python.write_text(
        f"#!{sys.executable}\nimport json, sys\njson.dump(sys.argv[1:], open({str(tmp_path / 'got')!r}, 'w'))\n"
    )
    python.chmod(0o755)
    train = ("run.yaml", *(f"logging.prompts={value}" for value in NASTY))
    command = render(configured(), asked(train=train, folder="/home/m e;touch pwned")).command
    with mock.patch.object(sys, "executable", str(python)), mock.patch("os.path.abspath", return_value="/"):
        runner = PDSHRunner(parse_args(list(command[3:])), "e30=")
        line, _, _ = runner.get_cmd({}, {"node-1": [0], "node-2": [0]})
    assert line[:6] == ["pdsh", "-S", "-f", "1024", "-w", "node-1,node-2"]
    subprocess.run(["sh", "-c", " ".join(line[6:])], cwd=tmp_path, check=True, env={"PATH": os.environ["PATH"]})
    got = json.loads((tmp_path / "got").read_text())
    assert got[-3:-1] == ["supervise", "--packed"]
    assert unpack(got[-1])[0][-len(train) :] == train
    assert not [p for p in (*tmp_path.rglob("pwned"), Path("/pwned")) if p.exists()]
