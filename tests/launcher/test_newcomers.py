"""What somebody meets who types the commands for the first time: help, exit codes, names of other trainers, pipes."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from longskip import errors
from longskip.engine import configio
from longskip.engine.config import Config
from longskip.engine.configio import load_config, parse_override, validate
from longskip.launcher.cli import _ORDER, app, main
from longskip.launcher.doctor import print_examination
from longskip.launcher.local import rank_environment

Typed = Callable[..., tuple[int, str, str]]


@pytest.fixture
def typed(in_tmp: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Typed:
    """Runs ``longskip …`` in an empty folder: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([*map(str, arguments)])
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return run


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("optim.learning_rate", "'optim.lr'"),  # by meaning
        ("learning-rate", "unknown key 'learning-rate'; did you mean 'optim.lr'?"),
        ("train.max_steps", "'train.steps'"),
        ("train.epochs", "'train.steps'"),
        ("batch", "'train.batch_size'"),
        ("train.per_device_batch_size", "'train.micro_batch'"),
        ("data.resolution", "'model.resolution'"),
        ("optim.max_grad_norm", "'optim.clip'"),
        ("train.warmup_steps", "'optim.warmup_steps'"),  # ours, in another group
        ("steps", "'train.steps'"),
        ("optim.lrr", "'optim.lr'"),  # by spelling
        ("encoders.text.withd", "'encoders.text.width'"),
        ("optim.xyz", "known here: lr, betas"),
    ],
)
def test_a_key_by_another_name(key: str, says: str) -> None:
    with pytest.raises(errors.ConfigError) as refused:
        validate(json.loads(json.dumps(_nested(key))))
    assert says in str(refused.value)


def _nested(key: str) -> dict[str, object]:
    tree: object = 1
    for part in reversed(key.split(".")):
        tree = {part: tree}
    assert isinstance(tree, dict)
    return tree


def test_every_suggested_name_is_a_setting() -> None:
    for meant in configio._CALLED_ELSEWHERE:
        *group, name = meant.split(".")
        assert name in configio._fields_at(group), meant
    theirs = " ".join(configio._CALLED_ELSEWHERE.values()).split()
    assert len(theirs) == len(set(theirs)) == len(configio._MEANT)


def test_a_folder_is_no_configuration(in_tmp: Path, typed: Typed) -> None:
    (in_tmp / "my pictures").mkdir()
    code, _, err = typed("train", "my pictures")
    assert code == 2 and "my pictures is a folder" in err and "config new --data 'my pictures'" in err, err
    (in_tmp / "runs" / "mine").mkdir(parents=True)
    (in_tmp / "runs" / "mine" / "config.yaml").write_text("{}\n")
    code, _, err = typed("train", "runs/mine")
    assert code == 2 and "it is a run" in err and "runs/mine/config.yaml" in err


def test_ranks_are_of_a_dry_run(in_tmp: Path, typed: Typed) -> None:
    (in_tmp / "run.yaml").write_text("train: {batch_size: 8}\n")
    code, _, err = typed("train", "run.yaml", "optim.lr=1e-4", "--ranks", "4")
    assert code == 2 and "longskip launch --local 4 -- train run.yaml optim.lr=1e-4" in err
    code, _, err = typed("train", "run.yaml", "--verbose")
    assert code == 2 and "--verbose is of --dry-run" in err
    assert typed("train", "run.yaml", "--dry-run", "--ranks", "4")[0] == 0


def test_help_is_in_a_beginners_order(typed: Typed) -> None:
    code, out, _ = typed("--help")
    commands = [found[1] for found in map(re.compile(r"│ ([a-z]+)  ").match, out.splitlines()) if found]
    assert code == 0 and commands == list(_ORDER) and commands[:4] == ["demo", "doctor", "config", "train"]
    assert set(commands) == {each.name or each.callback.__name__ for each in app.registered_commands} | {  # type: ignore[union-attr]
        str(group.name) for group in app.registered_groups
    }
    assert "Start here" in out and len(out.splitlines()) < 45
    for line in out.splitlines():  # every command in one line
        assert not line.startswith("│             "), line


@pytest.mark.parametrize("command", ["plan", "profile", "train", "budget report", "bench machine", "launch"])
def test_helps_prose_flows(typed: Typed, command: str) -> None:
    """No line of a paragraph ends where the next word would have had room, but those that are meant to."""
    code, out, _ = typed(*command.split(), "--help")
    lines = [line.strip() for line in out.split("╭")[0].split("Usage:")[1].splitlines()[2:]]
    assert code == 0
    for line, after in itertools.pairwise(lines):
        if line and after and not after.startswith("longskip launch"):
            assert len(line) + 1 + len(after.split()[0]) > 78, (line, after)


def test_json_is_called_what_it_is(typed: Typed) -> None:
    for command in ("presets", "doctor"):
        assert "one JSON list" in typed(command, "--help")[1]
    assert isinstance(json.loads(typed("presets", "--json")[1]), list)


def test_the_doctor_cuts_nothing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    path = "/usr/share/fonts/" + 5 * "a-long-folder/" + "Font.ttf"
    print_examination([{"what": "font", "version": "1", "usable": True, "required": False, "note": path}])
    out = capsys.readouterr().out
    assert path in "".join(out.split()) and max(map(len, out.splitlines())) <= 80


def test_one_rule_for_exit_codes(in_tmp: Path, typed: Typed) -> None:
    """2: what was asked for cannot be. The same mistake has the same code, whatever command meets it."""
    (in_tmp / "run.yaml").write_text("data: {path: nowhere}\ntrain: {batch_size: 8}\n")
    (in_tmp / "taken").mkdir()
    (in_tmp / "taken" / "index.json").write_text("{}")
    (in_tmp / "taken" / "a.txt").write_text("a")
    (in_tmp / "made.yaml").write_text("")
    (in_tmp / "empty").mkdir()
    for arguments in (
        ("data", "lint", "nowhere"), ("data", "show", "nowhere"), ("data", "pack", "nowhere", "o"),
        ("data", "lint", "empty"), ("data", "pack", "empty", "o"), ("data", "pack", "run.yaml", "o"),
        ("data", "make", "shapes", "--count", "2", "--out", "taken"), ("data", "pack", "empty", "empty"),
        ("config", "new", "--out", "made.yaml"), ("evaluate", "nowhere"), ("bench", "render", "nowhere.json"),
        ("data", "index", "nowhere"), ("data", "stats", "nowhere", "--network", "nowhere", "--out", "o.npz"),
    ):  # fmt: skip
        code, _, err = typed(*arguments)
        assert code == 2 and "Traceback" not in err, (arguments, code, err)
    trained = subprocess.run(
        [sys.executable, "-m", "longskip.launcher", "train", "run.yaml"],
        env=rank_environment(1),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert trained.returncode == 2 and "nowhere does not exist" in trained.stderr, trained.stderr
    assert not list(in_tmp.glob("runs/*"))


def test_what_cannot_be_is_not_tried_again() -> None:
    """Exit code 2 is what a supervisor ends on: such an error must say that it is final. Damage and networks may pass."""
    kinds = [
        kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LongskipError)
    ]
    assert all(kind.final for kind in kinds if kind.exit_code == errors.EXIT_USAGE)
    for kind in (
        errors.ShardError,
        errors.RemoteError,
        errors.DataError,
        errors.CheckpointError,
        errors.RunLockedError,
    ):
        assert kind.exit_code == errors.EXIT_FAILED and not kind.final
    for narrow, wide in ((errors.UnfitDataError, errors.DataError), (errors.NoCheckpointError, errors.CheckpointError)):
        assert issubclass(narrow, wide) and narrow.exit_code == errors.EXIT_USAGE


def test_a_reader_that_leaves_is_no_failure(in_tmp: Path) -> None:
    """More than a pipe holds, and one line of it read: the command ends as it would have, and says nothing of it."""
    (in_tmp / "run.yaml").write_text("train: {batch_size: 64}\n")
    for arguments, code in (
        (("train", "run.yaml", "--dry-run", "--verbose", "--ranks", "64"), 0),
        (("presets",), 0),
        (("plan", "run.yaml", "--gpu", "h20"), 2),
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "longskip.launcher", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=rank_environment(1),
        )
        assert process.stdout is not None and process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        said = process.stderr.read().decode()
        assert process.wait(60) == code and "Broken" not in said and "Traceback" not in said, (arguments, said)


def test_work_outlives_its_reader(in_tmp: Path) -> None:
    """What a command does after its reader has gone is done."""
    code = (
        "import os, sys, time\nfrom longskip.launcher.streams import outlive_readers\noutlive_readers()\n"
        "print('a', flush=True)\nsys.stdin.read()\n"
        "for stream in (sys.stdout, sys.stderr):\n    print('x' * 200_000, file=stream, flush=True)\n"
        "open('done', 'w').close()\nsys.exit(7)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"a\n"
    process.stdout.close()
    process.stderr.close()
    process.stdin.close()
    assert process.wait(60) == 7 and (in_tmp / "done").exists()


def test_a_file_stays_the_stream_that_it_is(in_tmp: Path) -> None:
    code = (
        "import sys\nfrom longskip.launcher.streams import outlive_readers\nbefore = sys.stdout\noutlive_readers()\n"
        "sys.exit(sys.stdout is not before)"
    )
    with (in_tmp / "out").open("w") as file:
        assert subprocess.run([sys.executable, "-c", code], stdout=file, check=False).returncode == 0


def test_overrides_and_files_are_refused_alike(in_tmp: Path) -> None:
    (in_tmp / "run.yaml").write_text("optim: {learning_rate: 1}\n")
    for act in (
        lambda: load_config(in_tmp / "run.yaml"),
        lambda: validate(parse_override("optim.learning_rate=1")),
        lambda: Config(optim={"learning_rate": 1}),  # type: ignore[arg-type]
    ):
        with pytest.raises((errors.ConfigError, ValueError)):
            act()
