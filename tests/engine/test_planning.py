"""The planner: what it takes from the closed forms, what it chooses, and what it refuses."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from longskip.engine import fitting, planning
from longskip.engine.config import Config, divisors
from longskip.engine.configio import validate
from longskip.engine.fitting import MARGIN
from longskip.engine.planning import Cluster, Option, pareto, plan
from longskip.errors import ConfigError
from longskip.launcher.cli import main
from longskip.models.presets import preset
from longskip.profiling.hardware import find, find_network

VAE = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 8, 16, 16], "layers_per_block": 1,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
}  # fmt: skip
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


def host_seconds(found: Option) -> float:
    return found.step.by_phase["host"]


def test_what_is_put_off_to_the_host_takes_time() -> None:
    """By hand: 64 GB/s at 50%, 25 GB/s of host memory; bf16 weights and gradients of 2 bytes, AdamW's 38 bytes a value
    (p, g, m, v read, p, m, v written, the average both, 4 each; 2 of a copy)."""
    small = {"batch_size": 64}
    here = plan(config(train=small), cluster())
    states, weights, average = (
        plan(config(train=small, **group), cluster())
        for group in (
            {"deepspeed": {"offload_optimizer": "cpu"}}, {"deepspeed": {"offload_param": "cpu"}},
            {"engine": {"ema_device": "cpu"}},
        )
    )  # fmt: skip
    owned, link, memory = -(-here.n_parameters // 16), 32e9, 25e9
    assert all(host_seconds(o) == 0 for o in here.options)
    for found in states.options:
        passed = 2 * owned * 2 * found.accumulation
        assert host_seconds(found) == pytest.approx(passed / link + 38 * owned / memory)
        assert found.step.by_phase["optimizer"] == 0
    for found in weights.options:
        assert host_seconds(found) == pytest.approx(2 * owned * (2 * found.accumulation + 1) / link)
    for found in average.options:
        of = owned if found.stage else here.n_parameters
        assert host_seconds(found) == pytest.approx(4 * of / link + 12 * of / memory)
    same = {(o.stage, o.micro, o.checkpointing): o for o in here.options}
    for found in average.options:
        before = same[found.stage, found.micro, found.checkpointing]
        assert 0 < found.step.by_phase["optimizer"] < before.step.by_phase["optimizer"]  # the average is not read there
        assert found.step.seconds > before.step.seconds
    assert any(line.startswith("host memory: ") for line in average.options[0].step.assumptions)
    itself = plan(config(train=small, engine={"ema_device": "cpu"}), cluster(8, measured=True))
    assert all(host_seconds(o) == 0 for o in itself.options)


def test_host_memory_of_a_node_is_held_against_what_it_needs() -> None:
    away = config(deepspeed={"offload_optimizer": "cpu"}, train={"batch_size": 128})
    free = plan(away, cluster(16))
    one = free.options[0]
    assert free.cluster.host_memory is None and free.cluster.host_bytes(one.memory) == 8 * one.memory.host
    enough = 8 * max(o.memory.host for o in free.options) / MARGIN / fitting.GIB
    roomy, tight = (plan(away, Cluster.of(H200, 16, None, NDR, gib)) for gib in (1.001 * enough, 0.5 * enough))
    assert [o.fits for o in roomy.options] == [o.fits for o in free.options]
    assert tight.best is None and not any(o.fits for o in tight.options)
    scarce = plan(away, Cluster.of(H200, 16, None, NDR, 0.3 * enough))
    assert scarce.enough is not None and scarce.enough > 32
    frugal = away.model_copy(update={"engine": away.engine.model_copy(update={"checkpointing": 1})})
    for world, fits in ((scarce.enough, True), (scarce.enough // 2, False)):
        needed = fitting.memory(frugal, 3, world=world, micro=1, n_parameters=free.n_parameters)
        assert (8 * needed.host <= MARGIN * 0.3 * enough * fitting.GIB) == fits
    tree = planning.as_json(roomy)
    assert tree["host_memory_bytes_per_node"] == round(1.001 * enough * fitting.GIB)
    assert tree["chosen"]["host_bytes_per_node"] == 8 * tree["chosen"]["host_bytes"]
    for gib in (0.0, -1.0, float("nan"), float("inf"), 1e9):
        with pytest.raises(ConfigError, match="--host-memory"):
            Cluster.of(H200, 16, None, NDR, gib)


def test_of_equally_fast_ways_the_one_with_the_least_memory_is_taken() -> None:
    """8 GPUs a node on one slow port: the network decides alone, whatever is computed again."""
    slow = Cluster.of(find("a100-80gb"), 64, None, find_network("100gbe"))
    found = plan(config(model={"preset": "uvit-8b"}, train={"batch_size": 2048}), slow)
    best = found.best
    assert best is not None and best.step.binds == "network" and best is pareto(found.options)[0]
    ties = [o for o in found.options if o.fits and abs(o.step.seconds / best.step.seconds - 1) < 1e-9]
    assert len(ties) > 1 and best.memory.device == min(o.memory.device for o in ties)


def test_the_ends_hold_the_value_and_follow_the_steps_ends() -> None:
    found = plan(config(train={"batch_size": 32}), cluster())
    best = found.best
    assert best is not None and best.step.fastest < best.step.seconds < best.step.slowest
    ends = found.ends(best)
    values = {
        "cost": found.cost(best), "device_hours": found.device_hours(best), "kilowatt_hours": found.kilowatt_hours(best),
        "mfu": best.step.mfu, "hfu": best.step.hfu, "images_per_second": best.step.images_per_second,
        "seconds_per_step": best.step.seconds, "days": found.seconds(best) / 86400,
    }  # fmt: skip
    assert set(ends) == set(values)
    slower, faster = best.step.slowest / best.step.seconds, best.step.fastest / best.step.seconds
    for name, value in values.items():
        grows = name not in ("mfu", "hfu", "images_per_second")
        by_hand = (faster, slower) if grows else (1 / slower, 1 / faster)
        assert ends[name] == pytest.approx(tuple(value * each for each in by_hand)), name  # type: ignore[operator]
    chosen = planning.as_json(found)["chosen"]
    assert chosen["low"]["cost"] < chosen["cost"] < chosen["high"]["cost"]
    free = plan(config(budget={"price_per_device_hour": None}, train={"batch_size": 16}), cluster(watts=None))
    assert not {"cost", "kilowatt_hours"} & set(free.ends(free.options[0]))


@pytest.mark.parametrize("price", [float("inf"), float("nan"), 1e300, -1.0])
def test_a_price_beyond_all_bounds_is_refused(price: float) -> None:
    with pytest.raises(ConfigError, match="a price of"):
        plan(config(), cluster(), price_per_hour=price)


@pytest.mark.parametrize("group", [{"steps": 10**29}, {"batch_size": 10**30}, {"steps": 10**12 + 1}])
def test_numbers_that_nobody_trains_are_refused(group: dict[str, int]) -> None:
    with pytest.raises(
        ConfigError, match=r"train\.(steps|batch_size): .*less than or equal to 2147483647 \(got 10+1?\)"
    ):
        plan(config(train=group), cluster())
    assert plan(config(train={"steps": 2**31 - 1, "batch_size": 16}), cluster()).steps == 2**31 - 1


def test_what_could_still_be_put_off_is_what_is_not_set() -> None:
    def ways(**groups: Any) -> tuple[str, ...]:
        return planning._more_to_host(config(**groups))

    everything = ("engine.ema_device=cpu", "deepspeed.offload_optimizer=cpu", "deepspeed.offload_param=cpu")
    assert ways() == everything
    assert ways(engine={"ema_device": "cpu"}) == everything[1:]
    assert ways(deepspeed={"offload_optimizer": "cpu", "offload_param": "cpu"}) == ()
    assert ways(deepspeed={"zero_stage": 0}) == everything[:1]


def test_the_largest_configuration_fits_one_gpu_as_its_file_says() -> None:
    from longskip.engine.configio import load_config

    path = Path(__file__).resolve().parents[2] / "configs" / "uvit-8b.yaml"
    assert "One 139 GiB GPU holds" in path.read_text("utf-8")
    found = plan(load_config(path, ["train.batch_size=8"]), Cluster.of(H200, 1, None, NDR))
    assert found.best is not None and found.best.memory.device > 120 * fitting.GIB


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
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"COLUMNS": "1000"},
    )


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prose flows to the terminal's width; the texts are looked for in lines that hold them whole."""
    monkeypatch.setenv("COLUMNS", "1000")


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command in this process."""
    with pytest.raises(SystemExit) as left:
        main(["plan", *arguments])
    caught = capsys.readouterr()
    return int(str(left.value.code)), caught.out, caught.err


def test_the_command_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    done = run("plan", "configs/uvit-8b.yaml", "--gpus", "64", "--price", "3")
    assert done.returncode == 0, done.stderr
    assert "fits (the fastest that fits): ZeRO-3" in done.stdout and " USD (" in done.stdout
    assert "GiB a node; whether a node has it is not checked (--host-memory GIB)" in done.stdout
    assert "deepspeed.zero_stage=3 train.micro_batch=" in done.stdout and "Assumed:" in done.stdout
    code, small, _ = said(capsys, "configs/uvit-8b.yaml", "--gpus", "1", "--gpu", "rtx4090", "train.batch_size=64")
    assert code == 0 and "does not fit" in small and "such GPUs would do" in small
    assert "What the times rest on:" in small and "host memory: " in small
    assert "deepspeed.offload_optimizer=cpu" in small and "ema_device" not in small  # set already
    for arguments, says in (
        (["--gpu", "h20"], "did you mean 'h200'?"),
        (["--gpus", "7"], "does not divide over 7 GPUs"),
        (["--gpus", "16", "--network", "ndx"], "did you mean 'ndr'?"),
        (["--gpus", "-1"], "--gpus -1 is outside"),
    ):
        code, _, error = said(capsys, "configs/uvit-8b.yaml", *arguments)
        assert code == 2 and says in error, error


def test_the_command_says_what_it_assumed_and_keeps_small_figures(capsys: pytest.CaptureFixture[str]) -> None:
    code, tiny, error = said(capsys, "configs/shapes-two.yaml", "--gpu", "rtx4090")
    assert code == 0, error
    assert "8 × RTX 4090 (assumed: --gpus)" in tiny and "bound by kernel starts" in tiny
    assert ", kernel starts " in tiny and "launch" not in tiny and "dispatch" not in tiny
    assert " 0 GPU-hours" not in tiny and " 0 kWh" not in tiny and "e-" not in tiny
    _, asked, _ = said(capsys, "configs/shapes-two.yaml", "--gpus", "1", "--gpu", "rtx4090", "--json", "--price", "2")
    tree = json.loads(asked, parse_constant=pytest.fail)
    assert tree["chosen"]["low"]["cost"] < tree["chosen"]["cost"] < tree["chosen"]["high"]["cost"] < 1
    code, out, error = said(capsys, "configs/shapes-two.yaml", "--price", "inf", "--json")
    assert code == 2 and "a price of inf" in error and not out
    _, lacking, _ = said(
        capsys, "configs/uvit-8b.yaml", "--gpus", "2", "--gpu", "a100-40gb", "--host-memory", "100", "train.batch_size=8",
        "deepspeed.offload_optimizer=cpu",
    )  # fmt: skip
    assert "does not fit" in lacking and "of the 90.0 GiB that may be used (90% of 100.0 GiB)" in lacking


def test_a_measured_machines_times_are_called_processor_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "devices: [{name: mine, short: mine, teraflops: {fp32: 0.1}, memory_gb: 8, bandwidth_gb_s: 20, measured: true, "
        "source: a test}]\n"
    )
    code, out, error = said(capsys, "configs/shapes-two.yaml", "--gpus", "1", "--gpu", "mine", "--hardware", str(path))
    assert code == 0 and "processor time, not the wall clock's" in out, error


def test_this_machine_is_one_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "devices: [{name: mine, short: mine, teraflops: {fp32: 0.1}, memory_gb: 8, bandwidth_gb_s: 20, measured: true, "
        "source: a test}]\n"
    )
    mine = ("configs/shapes-two.yaml", "--gpu", "mine", "--hardware", str(path))
    code, out, error = said(capsys, *mine)
    assert code == 0 and "on 1 × mine\n" in out, error  # and nothing that was assumed
    code, _, error = said(capsys, *mine, "--gpus", "8")
    assert code == 2 and "8 of it have no link" in error and "cure: --gpus 1" in error


def test_a_narrow_terminal_holds_a_plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what is to be copied."""
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (
        ("configs/shapes-two.yaml", "--gpus", "16", "--gpu", "rtx4090", "--price-per-hour", "3"),
        ("configs/uvit-8b.yaml", "--gpus", "1", "--gpu", "rtx4090", "train.batch_size=64"),
    ):
        code, out, error = said(capsys, *arguments)
        long = [line for line in out.splitlines() if len(line) > 80 and ".zero_stage=" not in line]
        assert code == 0 and not long, (error, long)


def test_a_plan_counts_encoders_where_it_is_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As its note says: with ``online`` they run in every step."""
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.json").write_text(json.dumps(VAE))
    (vae / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    mine = (
        "configs/uvit-0.3b.yaml",
        "--gpus",
        "8",
        "--json",
        "encoders.text={kind: words}",
        f"encoders.vae.path={vae}",
    )
    stored, asked, online = (
        json.loads(said(capsys, *mine, *words)[1]) for words in ((), ("--encoders", "stored"), ("--encoders", "online"))
    )
    assert stored["chosen"]["seconds_per_step"] == asked["chosen"]["seconds_per_step"]
    assert online["chosen"]["seconds_per_step"] > stored["chosen"]["seconds_per_step"]
    assert any("--encoders online" in note for note in stored["notes"]) and not any(
        "--encoders" in note for note in online["notes"]
    )


def test_the_chosen_way_stands_in_its_own_table(capsys: pytest.CaptureFixture[str]) -> None:
    """A way that others beat in memory and in speed, because the configuration names it."""
    arguments = ("train.batch_size=64", "train.micro_batch=1", "deepspeed.zero_stage=1", "engine.checkpointing=1")
    code, out, error = said(capsys, "configs/shapes-two.yaml", "--gpus", "8", "--gpu", "rtx4090", *arguments)
    assert code == 0 and "(as configured)" in out, error
    (line,) = [line for line in out.splitlines() if line.strip().startswith("* 1")]
    assert line.split()[2:5] == ["1", "8", "all"]


def test_figures_have_no_more_digits_than_they_are_worth() -> None:
    from longskip.launcher.cli_plan import _between, _gib, _round, _span

    shown = [_round(value, 2) for value in (21_955, 4.535, 0.00858, 9.96, 0, 1e-20, 99.6)]
    assert shown == ["22,000", "4.5", "0.0086", "10", "0", "1.0e-20", "100"]
    assert _round(999.6, 3) == "1,000" and _round(36.72, 3) == "36.7"
    assert (
        _between(7318.0, (6100.0, 8888.0), " h") == "7,300 h (6,100 to 8,900)"
        and _between(1.234, (1.234, 1.234), "%") == "1.23%"
    )
    assert _between(0.2043, (0.2041, 0.2048), " s") == "0.204 s"
    assert [_span(s) for s in (0.000858, 0.5, 61, 1000, 90_000, 1e6, 1e-6)] == [
        "0.858 ms", "0.500 s", "61.0 s", "16.7 min", "25.0 h", "11.6 d", "1.00 µs"
    ]  # fmt: skip
    assert _span(600, 540, 1200) == "10 min (9.0 to 20)"
    assert [_gib(n << 20) for n in (45, 163 << 10, 1309 << 10)] == ["45.0 MiB", "163.0 GiB", "1,309 GiB"]


def test_a_table_of_unknown_words_is_said() -> None:
    """Not counted yet: the most that it may be, and a note."""
    words = validate({"train": {"batch_size": 8}})
    found = plan(words, cluster(1))
    assert any("captions are not here" in note for note in found.notes)
    assert planning.as_json(found)["notes"] == list(found.notes)
    assert plan(config(), cluster()).notes == ("the data are not here: their features count as stored; --encoders online "
                                               "counts the encoders",)  # fmt: skip
