"""The planner: what it takes from the closed forms, what it chooses, and what it refuses."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from longskip.engine import fitting, planning
from longskip.engine.config import Config, divisors
from longskip.engine.configio import validate
from longskip.engine.fitting import MARGIN
from longskip.engine.planning import Cluster, Option, pareto, plan
from longskip.errors import ConfigError
from longskip.models.presets import preset
from longskip.profiling.hardware import find, find_network

H200, NDR = find("h200"), find_network("ndr")


def config(**groups: Any) -> Config:
    base: dict[str, Any] = {
        "model": {"preset": "uvit-2.3b"},
        "encoders": {"text": {"kind": "clip"}, "vae": {"kind": "vae"}},
        "train": {"batch_size": 256, "steps": 1000, "dtype": "bf16"},
        "budget": {"price_per_device_hour": 2.5, "currency": "EUR"},
    }
    for name, group in groups.items():
        base[name] = base.get(name, {}) | group
    return validate(base)


def cluster(devices: int = 16, nodes: int | None = None, **changes: Any) -> Cluster:
    return Cluster.of(replace(H200, **changes), devices, nodes, NDR)


def test_every_option_is_there_and_has_the_memory_of_its_settings() -> None:
    found = plan(config(), cluster())
    wanted = set(itertools.product((0, 1, 2, 3), divisors(16), (0, 1, 2)))
    assert {(o.stage, o.micro, o.checkpointing) for o in found.options} == wanted
    for option in found.options:
        assert option.accumulation * option.micro * 16 == 256
        each = config(engine={"checkpointing": option.checkpointing})
        needed = fitting.memory(each, option.stage, world=16, micro=option.micro, n_parameters=found.n_parameters)
        assert option.memory == needed
        assert option.fits == (needed.device <= MARGIN * H200.memory)
        assert option.step.images == 256
        assert option.step.model_flops * 16 * 1000 == found.model_flops


def test_sums_are_of_the_whole_run() -> None:
    spec, found = preset("uvit-2.3b"), plan(config(), cluster())
    assert found.n_parameters == spec.param_counts().total
    assert found.images == 256_000 and found.tokens == 256_000 * spec.n_tokens
    assert found.model_flops == 256_000 * spec.flops().model_flops
    assert found.six_nd == 6 * found.n_parameters * found.tokens
    best = found.best
    assert best is not None
    hours = 1000 * best.step.seconds * 16 / 3600
    assert found.device_hours(best) == pytest.approx(hours)
    assert found.cost(best) == pytest.approx(2.5 * hours) and found.currency == "EUR"
    assert found.kilowatt_hours(best) == pytest.approx(0.7 * hours)
    assert plan(config(), cluster(), price_per_hour=4.0).cost(best) == pytest.approx(4 * hours)
    assert plan(config(), cluster(watts=None)).kilowatt_hours(best) is None


def test_the_best_is_the_fastest_that_fits() -> None:
    small = cluster(memory=11 * 10**9)
    found = plan(config(), small)
    assert found.best is not None and found.best.fits
    assert any(not option.fits and option.step.seconds < found.best.step.seconds for option in found.options)
    assert all(o.step.seconds >= found.best.step.seconds for o in found.options if o.fits)


def test_pareto_by_brute_force() -> None:
    found = plan(config(), cluster(memory=40 * 10**9)).options

    def beats(a: Option, b: Option) -> bool:
        no_worse = a.memory.device <= b.memory.device and a.step.images_per_second >= b.step.images_per_second
        return no_worse and (a.memory.device, a.step.images_per_second) != (b.memory.device, b.step.images_per_second)

    fit = [o for o in found if o.fits]
    best = pareto(found)
    unbeaten = {(o.memory.device, o.step.images_per_second) for o in fit if not any(beats(a, o) for a in fit)}
    assert {(o.memory.device, o.step.images_per_second) for o in best} == unbeaten
    assert len(best) == len(unbeaten) > 2
    assert [o.step.images_per_second for o in best] == sorted((o.step.images_per_second for o in best), reverse=True)


def test_what_the_configuration_names_is_marked_and_chosen() -> None:
    given = config(train={"micro_batch": 4}, deepspeed={"zero_stage": 2}, engine={"checkpointing": 3})
    found = plan(given, cluster())
    assert found.given is not None
    assert (found.given.stage, found.given.micro, found.given.checkpointing) == (2, 4, 3)
    assert found.chosen is found.given and found.best is not found.given
    too_much = plan(given, cluster(memory=8 * 10**9))
    assert too_much.given is not None and not too_much.given.fits and too_much.chosen is too_much.best
    auto = plan(config(train={"micro_batch": 4}, deepspeed={"zero_stage": "auto"}), cluster(memory=24 * 10**9))
    assert auto.given is not None
    assert auto.given.stage == min(o.stage for o in auto.options if o.fits and o.micro == 4 and not o.checkpointing)
    assert plan(config(), cluster()).given is None


def test_more_devices_that_would_do() -> None:
    large = config(model={"preset": "uvit-8b"})
    found = plan(large, cluster(devices=1, memory=24 * 10**9))
    assert found.best is None and found.chosen is None and found.enough is not None
    frugal = config(model={"preset": "uvit-8b"}, engine={"checkpointing": 1})
    for world, fits in ((found.enough, True), (found.enough // 2, False)):
        needed = fitting.memory(frugal, 3, world=world, micro=1, n_parameters=found.n_parameters)
        assert (needed.device <= MARGIN * 24 * 10**9) == fits
    assert plan(large, cluster(devices=1, memory=10**9)).enough is None


def test_offloading_leaves_stages_out() -> None:
    of_states = plan(config(deepspeed={"offload_optimizer": "cpu"}), cluster())
    assert {o.stage for o in of_states.options} == {1, 2, 3}
    assert all(o.memory.host for o in of_states.options)
    of_both = plan(config(deepspeed={"offload_param": "cpu"}), cluster())
    assert {o.stage for o in of_both.options} == {3}


def test_nodes_and_their_network() -> None:
    one, two = cluster(8), cluster(16)
    assert (one.nodes, one.per_node, two.nodes, two.per_node) == (1, 8, 2, 8)
    assert cluster(16, nodes=4).per_node == 4
    slow = Cluster.of(H200, 16, 2, find_network("100gbe"))
    fast, crawling = plan(config(), two), plan(config(), slow)
    assert fast.best is not None and crawling.best is not None
    assert crawling.best.step.by_phase["communication"] > fast.best.step.by_phase["communication"]


@pytest.mark.parametrize(
    ("devices", "nodes", "says"),
    [(0, None, r"--gpus 0 is outside 1\.\."), (-3, None, "--gpus -3"), (10**9, None, "--gpus 1000000000"),
     (8, 0, "--nodes 0"), (8, 3, "8 GPUs do not spread evenly over 3 nodes")],
)  # fmt: skip
def test_impossible_clusters(devices: int, nodes: int | None, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        cluster(devices, nodes)


def test_a_batch_that_does_not_divide() -> None:
    with pytest.raises(ConfigError, match="batch_size 256 does not divide over 7 GPUs") as caught:
        plan(config(), cluster(7))
    assert "64, 128, 256 GPUs" in str(caught.value)
    with pytest.raises(ConfigError, match="does not divide"):
        plan(config(train={"micro_batch": 32}), cluster(16))


def test_json_holds_whole_numbers_and_every_option() -> None:
    found = plan(config(), cluster())
    tree = planning.as_json(found)
    assert tree["model_flops"] == found.model_flops and isinstance(tree["model_flops"], int)
    assert len(tree["options"]) == len(found.options)
    assert tree["chosen"]["memory_bytes"] == sum(tree["chosen"]["memory"].values())
    assert sum(tree["chosen"]["seconds_by_phase"].values()) == pytest.approx(tree["chosen"]["seconds_per_step"])
    assert tree["chosen"]["overrides"][0] == f"deepspeed.zero_stage={found.best.stage}"  # type: ignore[union-attr]
    assert tree["network"] == "ndr" and planning.as_json(plan(config(), cluster(8)))["network"] is None


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys\nfrom longskip.launcher.cli import main\n"
        "try:\n    main(sys.argv[1:])\nfinally:\n    assert 'torch' not in sys.modules\n"
    )
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)


def test_the_command_says_what_to_do() -> None:
    done = run("plan", "configs/uvit-8b.yaml", "--gpus", "64", "--price", "3")
    assert done.returncode == 0, done.stderr
    assert "fits (the fastest that fits): ZeRO-3" in done.stdout and "USD" in done.stdout
    assert "deepspeed.zero_stage=3 train.micro_batch=" in done.stdout and "Assumed:" in done.stdout
    small = run("plan", "configs/uvit-8b.yaml", "--gpus", "1", "--gpu", "rtx4090")
    assert small.returncode == 0 and "does not fit" in small.stdout and "such GPUs would do" in small.stdout
    for arguments, says in (
        (["--gpu", "h20"], "did you mean 'h200'?"),
        (["--gpus", "7"], "does not divide over 7 GPUs"),
        (["--gpus", "16", "--network", "ndx"], "did you mean 'ndr'?"),
        (["--gpus", "-1"], "--gpus -1 is outside"),
    ):
        failed = run("plan", "configs/uvit-8b.yaml", *arguments)
        assert failed.returncode == 2 and says in failed.stderr, failed.stderr
