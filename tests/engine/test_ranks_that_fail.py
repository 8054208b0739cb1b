"""Whatever goes wrong at a start, every rank says what it is and ends, and nothing of the start stays."""

from __future__ import annotations

import socket
import sys
import time
from pathlib import Path

import pytest
import torch

from longskip.engine import prepare
from longskip.engine.config import DiffusionGroup, EvalGroup
from longskip.engine.distributed import _not_met, join
from longskip.engine.drawing import Drawing
from longskip.engine.fitting import Free
from longskip.engine.ports import free_port
from longskip.engine.prepare import on_main
from longskip.engine.samplers import SAMPLERS, resolve_sampler
from longskip.errors import ConfigError, LongskipError
from tests.ranks import run_ranks, small_config, train_ranks


def told(run: Path, path: Path) -> int:
    """What each rank raises; every rank goes on to the end."""
    world = join(1)

    def fail() -> None:
        raise ZeroDivisionError("of one rank alone")

    try:
        on_main(world, fail)
    except Exception as error:
        (path / str(world.rank)).write_text(f"{type(error).__name__}: {error}")
        return 0
    return 1


def test_an_error_that_is_not_ours_reaches_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(2, told, tmp_path / "run", tmp_path) == [0, 0]
    assert (tmp_path / "0").read_text() == "ZeroDivisionError: of one rank alone"
    assert (tmp_path / "1").read_text() == (
        "LongskipError: the first rank cannot go on: ZeroDivisionError: of one rank alone"
    )


def test_nothing_is_left_of_a_start_that_an_unknown_error_ends(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a library's fault")

    monkeypatch.setattr(prepare, "_find_start", broken)  # after the vocabulary is written
    assert train_ranks(2, small_config(shapes), tmp_path / "run") == [99, 1]
    assert not (tmp_path / "run").exists()
    said = capfd.readouterr()
    assert "rank 1: LongskipError: the first rank cannot go on: KeyError" in said.out
    assert "Connection closed" not in said.out + said.err


# --- diffusers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "name"), [(o, n) for o, names in SAMPLERS.items() for n in ("auto", *names)])
def test_a_sampler_of_diffusers_is_refused_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, objective: str, name: str
) -> None:
    chosen = resolve_sampler(name, objective)
    monkeypatch.setitem(sys.modules, "diffusers", None)  # what an import of it finds
    settings = DiffusionGroup(objective=objective)  # type: ignore[arg-type]
    how = {"sampler": name, "steps": None, "guidance": None, "seed": 0}
    if chosen in ("euler", "heun"):
        assert Drawing.of(EvalGroup(), settings, **how).sampler == chosen  # type: ignore[arg-type]
        return
    with pytest.raises(ConfigError, match=r"diffusers is not installed(.|\n)*longskip\[hub\]"):
        Drawing.of(EvalGroup(), settings, **how)  # type: ignore[arg-type]


def test_a_run_that_draws_with_diffusers_is_refused_before_its_first_step(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)  # the ranks are forked
    config = small_config(shapes, diffusion={"objective": "ddpm"}, logging={"samples_every": 10})
    assert train_ranks(2, config, tmp_path / "run") == [2, 2]
    said = capfd.readouterr()
    assert said.out.count("ConfigError: diffusers is not installed") == 2 and "longskip[hub]" in said.out
    assert "Connection closed" not in said.out + said.err
    assert not (tmp_path / "run").exists()


# --- memory -----------------------------------------------------------------------------------------------------------


def test_offload_that_the_host_cannot_hold_is_refused(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The device has room, the host has almost nothing left."""
    monkeypatch.setattr(prepare, "_free_memory", lambda world: Free(1 << 40, 1 << 10))
    config = small_config(shapes, deepspeed={"offload_optimizer": "cpu"})
    assert train_ranks(1, config, tmp_path / "run") == [2]
    assert "ConfigError: host memory would have to hold" in capfd.readouterr().out
    assert not (tmp_path / "run").exists()


# --- rendezvous -------------------------------------------------------------------------------------------------------


def alone(path: Path) -> int:
    begin = time.monotonic()
    try:
        join(1.5 / 60)
    except LongskipError as error:
        path.write_text(f"{time.monotonic() - begin:.1f} {type(error).__name__}: {error}")
        return 0
    return 1


@pytest.mark.parametrize(("rank", "said"), [(1, "rank 0 did not answer"), (0, "not all of the others came")])
def test_a_rank_that_is_alone_says_for_whom_it_waited(
    tmp_path: Path, rank: int, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    names = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    names["MASTER_PORT"] = port = str(free_port())
    assert run_ranks(1, alone, tmp_path / "said", environment=names) == [0]
    waited, _, message = (tmp_path / "said").read_text().partition(" ")
    assert float(waited) < 30
    assert message.startswith(
        f"RendezvousError: rank {rank} of 2 waited up to 0.025 minutes at 127.0.0.1:{port}: {said}"
    )
    for word in ("MASTER_ADDR", "MASTER_PORT", "launch.timeout_minutes", "start rank 0" if rank else "start all ranks"):
        assert word in message
    assert float(waited) > 1.5 / 2
    assert "frame #" not in message + capfd.readouterr().err  # of torch's C++


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        names = {"WORLD_SIZE": "2", "MASTER_PORT": port}
        assert run_ranks(1, alone, tmp_path / "said", environment=names) == [0]
    message = (tmp_path / "said").read_text()
    assert (
        f"RendezvousError: rank 0 cannot listen at 127.0.0.1:{port} (" in message and "another MASTER_PORT" in message
    )


def test_what_torch_adds_to_its_first_line_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node-7")
    monkeypatch.setenv("MASTER_PORT", "29500")
    error = _not_met(3, 8, 30, torch.distributed.DistStoreError("timed out\nException raised from a.cpp:1\nframe #0"))
    assert error.message == "rank 3 of 8 waited up to 30 minutes at node-7:29500: rank 0 did not answer (timed out)"
