"""Predicted times against hand-made rooflines: ledgers, devices and measured tables are given, no clock is read."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longskip.errors import ConfigError
from longskip.kernels.formulas import OpCost
from longskip.models.presets import preset
from longskip.profiling import step_time as module
from longskip.profiling.efficiency import ASSUMED, Efficiencies, Measured, distance, ideal
from longskip.profiling.flop_ledger import FlopLedger, Row, flop_ledger, loss_rows, optimizer_row
from longskip.profiling.hardware import Device, find, find_network, row
from longskip.profiling.step_time import (
    GUESSES,
    HOST_LINK,
    LAUNCH,
    MESSAGE,
    TERMS,
    WIRE,
    HostWork,
    step_time,
)

# 1 TFLOP/s in bf16, 0.5 in float32, 1 GB/s, a link of 10 GB/s.
DEVICE = row(
    "made up", "made up", short="mine", teraflops={"fp32": 0.5, "bf16": 1}, gigabytes=1, gb_per_second=1, source="no sheet",
    link=("wire", 10),
)  # fmt: skip


def ledger(*rows: Row, batch: int = 1) -> FlopLedger:
    return FlopLedger(rows, batch)


def one(op: str = "linear", units: int = 1, **costs: Any) -> Row:
    part = costs.pop("part", "model")
    names = tuple(f"blocks.{index}" for index in range(units))
    return Row(units=names, name=op, op=op, part=part, sizes={"rows": 1}, **costs)


def at_full_speed(*rows: Row, overhead: float = 0.0) -> Efficiencies:
    """A table in which every row's op takes its ideal time."""
    entries = []
    for item in rows:
        for direction, cost in (("forward", item.forward), ("backward", item.backward + OpCost(item.repeated_macs))):
            if cost != OpCost():
                best = ideal(cost, DEVICE, "bf16").seconds
                sizes, work = dict(item.sizes), (cost.macs, cost.elementwise, cost.bytes)
                entries.append(Measured(item.op, direction, sizes, *work, best, best))  # type: ignore[arg-type]
    beside = {"cpu": overhead, "wall": overhead}
    return Efficiencies("made up", "bf16", tuple(entries), {"forward": beside, "backward": beside})


def test_the_roofline_by_hand() -> None:
    # 3e9 multiply-adds: 6 ms of products; 1e9 elementwise: 2 ms at the float32 rate; 1e6 bytes: 1 ms.
    products = one(forward=OpCost(3 * 10**9, 10**9, 10**6))
    # 2e6 elementwise: 4 µs; 5e6 bytes: 5 ms.
    values = one("layer_norm", forward=OpCost(0, 2 * 10**6, 5 * 10**6))
    found = step_time(ledger(products, values), DEVICE, measured=at_full_speed(products, values))
    first, second = found.ops
    assert (first.seconds, first.compute, first.memory) == pytest.approx((8e-3, 8e-3, 1e-3))
    assert (second.seconds, second.compute, second.memory) == pytest.approx((5e-3, 4e-6, 5e-3))
    assert (first.binds, second.binds, found.binds) == ("compute", "memory", "compute")
    assert found.by_term == pytest.approx({"compute": 8e-3, "memory": 5e-3, "launch": 0, "network": 0, "host": 0})
    assert found.seconds == pytest.approx(13e-3) and found.measured_share == 1 and not found.assumptions
    assert found.certain and (found.slowest, found.fastest) == (found.seconds, found.seconds)


def test_assumed_efficiencies_stretch_each_term_and_are_named() -> None:
    row_ = one(forward=OpCost(3 * 10**9, 0, 10**6), backward=OpCost(6 * 10**9, 0, 10**6))
    found = step_time(ledger(row_), DEVICE)
    rule = ASSUMED["products"]
    assert found.ops[0].compute == pytest.approx(6e-3 / rule.compute)
    assert found.ops[0].memory == pytest.approx(1e-3 / rule.memory)
    assert found.by_phase["forward"] == pytest.approx(6e-3 / rule.compute + LAUNCH)
    assert found.by_phase["backward"] == pytest.approx(12e-3 / rule.compute + 2 * LAUNCH)
    assert found.measured_share == 0
    assert any("products: 70%" in line for line in found.assumptions)
    assert any("4 µs (2 to 6) between two kernels" in line for line in found.assumptions)
    assert found.ops[0].origin == "assumed: products"


def test_attentions_assumptions_go_by_head_dim_and_direction() -> None:
    def efficiency(head_dim: int) -> list[float]:
        row_ = replace(
            one("attention", forward=OpCost(10**12, 0, 1), backward=OpCost(10**12, 0, 1)), sizes={"head_dim": head_dim}
        )
        return [2 / op.compute for op in step_time(ledger(row_), DEVICE, launch=0).ops]

    assert efficiency(64) == pytest.approx([0.40, 0.35]) and efficiency(128) == pytest.approx([0.55, 0.45])


def test_repeated_products_and_recomputation_take_time() -> None:
    row_ = one(
        "attention", forward=OpCost(10**9, 0, 1), backward=OpCost(2 * 10**9, 0, 1), repeated_macs=5 * 10**8,
        recomputed=OpCost(5 * 10**8, 0, 1),
    )  # fmt: skip
    found = step_time(ledger(row_), DEVICE, measured=at_full_speed(row_))
    phases = {name: seconds for name, seconds in found.by_phase.items() if seconds}
    assert phases == pytest.approx({"forward": 2e-3, "recompute": 1e-3, "backward": 5e-3})
    assert found.hardware_flops == 2 * 4 * 10**9 and found.model_flops == 6 * 10**9


def test_accumulation_repeats_the_passes_and_not_the_optimizer() -> None:
    row_ = one(units=3, forward=OpCost(3 * 10**9, 0, 3))
    step = one("adamw", forward=OpCost(0, 0, 4 * 10**6), part="optimizer")
    table = at_full_speed(replace(row_, units=("blocks.0",), forward=OpCost(10**9, 0, 1)), step, overhead=1e-4)
    found = step_time(ledger(row_, step, batch=5), DEVICE, measured=table, accumulation=4)
    assert found.by_phase["forward"] == pytest.approx(4 * 3 * (2e-3 + 1e-4))
    assert found.by_phase["optimizer"] == pytest.approx(4e-3 + 1e-4)
    assert [op.calls for op in found.ops] == [12, 1]
    assert found.by_term["launch"] == pytest.approx(13e-4)
    assert found.images == 20 and found.model_flops == 4 * 18 * 10**9
    assert found.images_per_second == pytest.approx(20 / found.seconds)


def test_launches_bind_where_ops_are_small() -> None:
    row_ = one("add", units=100, forward=OpCost(0, 100, 1200))
    found = step_time(ledger(row_), DEVICE, dispatch=0)
    assert found.binds == "launch" and found.ops[0].binds == "launch"
    assert found.by_term["launch"] == pytest.approx(100 * LAUNCH)
    assert step_time(ledger(row_), DEVICE, launch=0, dispatch=0).binds == "memory"


def test_no_step_is_shorter_than_the_host_takes_to_start_it() -> None:
    """100 calls forward and 100 backward of nearly nothing: what the host needs for them is the step."""
    row_ = one("add", units=100, forward=OpCost(0, 100, 1200), backward=OpCost(0, 100, 1200))
    found = step_time(ledger(row_), DEVICE, launch=0, accumulation=3)
    by_hand = GUESSES["engine"].likely + 600 * GUESSES["dispatch"].likely
    assert found.seconds == pytest.approx(by_hand) and found.binds == "launch"
    assert found.by_phase["dispatch"] == pytest.approx(by_hand - found.by_phase["forward"] - found.by_phase["backward"])
    assert any("the host takes 25 µs (10 to 45)" in line for line in found.assumptions)
    beside = step_time(ledger(row_), DEVICE, launch=0, accumulation=3, host=HostWork(0, 25e9))
    assert beside.seconds == pytest.approx(by_hand + 1)  # the host does one after the other
    asked = step_time(ledger(row_), DEVICE, launch=0, dispatch=1e-3)
    assert asked.seconds == pytest.approx(0.2) and not any("the host takes" in line for line in asked.assumptions)
    large = one(forward=OpCost(10**12, 0, 1))
    busy = step_time(ledger(large), DEVICE)
    assert busy.by_phase["dispatch"] == 0 and not any("the host takes" in line for line in busy.assumptions)
    itself = step_time(ledger(row_), replace(DEVICE, measured=True), launch=0)
    assert itself.by_phase["dispatch"] == 0 and any("processor time" in line for line in itself.assumptions)


def test_the_ends_are_the_assumptions_at_their_ends() -> None:
    row_ = one(forward=OpCost(10**11, 0, 1))
    found = step_time(ledger(row_), DEVICE, launch=0)
    assert (found.slowest, found.seconds, found.fastest) == pytest.approx((0.2 / 0.6, 0.2 / 0.7, 0.2 / 0.8))
    assert not found.certain
    for name, rule in ASSUMED.items():
        assert rule.slow[0] < rule.compute < rule.fast[0] <= 1 and rule.slow[1] < rule.memory < rule.fast[1] <= 1, name
    for name, guess in GUESSES.items():
        assert min(guess.slow, guess.fast) < guess.likely < max(guess.slow, guess.fast), name
    wire = step_time(ledger(PASSES), DEVICE, measured=at_full_speed(PASSES), world=4, collectives=[Sends("x", 0, 1e9)])
    took = 0.75e9 / 10e9
    assert (wire.slowest, wire.fastest) == pytest.approx((0.1 + took / 0.6, 0.1 + took / 0.9))


def test_what_is_put_off_to_the_host_takes_the_link_and_its_memory() -> None:
    row_ = one(forward=OpCost(10**11, 0, 1))
    step_ = one("adamw", forward=OpCost(0, 0, 10**9), part="optimizer")
    rows = ledger(row_, step_)
    device = replace(DEVICE, host_link=64 * 10**9)
    plain = step_time(rows, device, launch=0)
    link, memory = GUESSES["host link"].likely, GUESSES["host memory"].likely
    found = step_time(rows, device, launch=0, host=HostWork(64e9, 25e9))
    assert found.by_phase["host"] == found.by_term["host"] == pytest.approx(1 / link + 25e9 / memory)
    assert found.seconds == pytest.approx(plain.seconds + found.by_phase["host"]) and found.binds == "host"
    (line,) = [line for line in found.assumptions if line.startswith("host memory")]
    assert "59.6 GiB a rank and step" in line and "64 GB/s (" in line and "23.3 GiB are read or written" in line
    away = step_time(rows, device, launch=0, host=HostWork(64e9, 25e9, optimizer=True))
    assert away.by_phase["optimizer"] == 0 < found.by_phase["optimizer"]
    unknown = step_time(rows, DEVICE, launch=0, host=HostWork(HOST_LINK, 0))
    assert unknown.by_phase["host"] == pytest.approx(1 / link) and any(
        "assumed: PCIe" in x for x in unknown.assumptions
    )
    assert step_time(rows, device, launch=0, host=HostWork(0, 0)).by_phase["host"] == 0


# -- measured efficiencies ---------------------------------------------------------------------------------------------


def measured(seconds: float, cost: OpCost, sizes: dict[str, int], op: str = "linear") -> Measured:
    return Measured(op, "forward", sizes, cost.macs, cost.elementwise, cost.bytes, seconds, 10 * seconds)


def test_a_call_of_measured_sizes_takes_its_measured_time_by_either_clock() -> None:
    cost = OpCost(10**6, 10**3, 10**5)
    table = Efficiencies("made up", "bf16", (measured(0.25, cost, {"rows": 1}),))
    found = step_time(ledger(one(units=4, forward=4 * cost)), DEVICE, measured=table, launch=0)
    assert found.seconds == pytest.approx(1.0) and found.ops[0].origin == "measured"
    assert step_time(
        ledger(one(forward=cost)), DEVICE, measured=table, launch=0, clock="wall"
    ).seconds == pytest.approx(2.5)


def test_of_two_gradients_of_one_size_the_one_that_is_computed_counts() -> None:
    """A first layer has the sizes of another one, but no gradient towards its input."""
    both, weight = OpCost(2 * 10**6, 0, 10), OpCost(10**6, 0, 10)
    entries = tuple(
        Measured("linear", "backward", {"rows": 1}, cost.macs, 0, 10, seconds, seconds)
        for cost, seconds in ((both, 0.5), (weight, 0.1))
    )
    table = Efficiencies("made up", "bf16", entries)
    for cost, seconds in ((both, 0.5), (weight, 0.1)):
        found = step_time(ledger(one(forward=OpCost(1), backward=cost)), DEVICE, measured=table, launch=0)
        assert found.by_phase["backward"] == pytest.approx(seconds)


def test_of_two_shapes_of_one_cost_the_asked_one_counts() -> None:
    cost = OpCost(0, 10**6, 10**6)
    entries = tuple(measured(seconds, cost, {"rows": rows}) for rows, seconds in ((7, 0.5), (1, 0.1), (3, 0.7)))
    table = Efficiencies("made up", "bf16", entries)
    assert step_time(ledger(one(forward=cost)), DEVICE, measured=table, launch=0).seconds == pytest.approx(0.1)


def test_other_sizes_lie_on_the_line_of_the_two_nearest_and_say_how_far_they_are() -> None:
    """A fixed cost of 3 ms and half of the rate, measured at 1e9 and 16e9 products; a far third one says otherwise."""

    def took(n: float) -> float:
        return 3e-3 + 2 * n * 2e-3

    points = ((1, 2), (16, 3))
    entries = tuple(measured(took(n), OpCost(n * 10**9, 0, n), {"rows": rows}) for n, rows in points)
    entries += (measured(1e9, OpCost(10**14, 0, 10**5), {"rows": 4}),)
    table = Efficiencies("made up", "bf16", entries)
    for n, factor in ((4, "4.0"), (2, "2.0"), (64, "4.0")):
        found = step_time(ledger(one(forward=OpCost(n * 10**9, 0, n))), DEVICE, measured=table, launch=0)
        assert found.seconds == pytest.approx(took(n)) and found.measured_share == 1
        assert found.ops[0].origin == f"measured at other sizes, {factor}× apart"
    little = ledger(one(forward=OpCost(10**8, 0, 1)))
    small = step_time(little, DEVICE, measured=table, launch=0, dispatch=0)
    assert small.seconds == pytest.approx(took(1) / 10) and small.measured_share == 0  # the efficiency of the smallest
    assert any("10.0× apart, used as it is" in line for line in small.assumptions)
    alone = Efficiencies("made up", "bf16", entries[:1])
    found = step_time(ledger(one(forward=OpCost(4 * 10**9, 0, 4))), DEVICE, measured=alone, launch=0)
    assert found.seconds == pytest.approx(4 * took(1))


def test_a_line_that_falls_is_not_followed() -> None:
    """The larger call was measured the faster one: the nearest entry's efficiency stands."""
    entries = (measured(8e-3, OpCost(10**9, 0, 1), {"rows": 2}), measured(7e-3, OpCost(2 * 10**9, 0, 2), {"rows": 3}))
    table = Efficiencies("made up", "bf16", entries)
    found = step_time(ledger(one(forward=OpCost(8 * 10**9, 0, 8))), DEVICE, measured=table, launch=0)
    assert found.seconds == pytest.approx(4 * 7e-3)


def test_a_flat_line_does_not_promise_more_than_the_device_has() -> None:
    entries = (
        measured(8e-3, OpCost(10**9, 0, 1), {"rows": 2}),
        measured(8.001e-3, OpCost(2 * 10**9, 0, 2), {"rows": 3}),
    )
    table = Efficiencies("made up", "bf16", entries)
    found = step_time(ledger(one(forward=OpCost(10**12, 0, 8))), DEVICE, measured=table, launch=0)
    assert found.seconds == pytest.approx(2.0)  # the ideal time


def test_an_op_that_was_not_measured_is_assumed_beside_those_that_were() -> None:
    cost = OpCost(10**9, 0, 10)
    table = Efficiencies("made up", "bf16", (measured(4e-3, cost, {"rows": 1}),))
    found = step_time(ledger(one(forward=cost), one("mlp", forward=cost)), DEVICE, measured=table, launch=0)
    assert [op.origin for op in found.ops] == ["measured", "assumed: products"]
    assert found.measured_share == pytest.approx(4e-3 / (4e-3 + 2e-3 / 0.7))


@settings(max_examples=30, deadline=None)
@given(st.tuples(*[st.integers(0, 10**12)] * 3), st.tuples(*[st.integers(0, 10**12)] * 3))
def test_the_distance_of_two_costs_has_no_direction(a: tuple[int, int, int], b: tuple[int, int, int]) -> None:
    one_, other = OpCost(*a), OpCost(*b)
    assert distance(one_, one_) == 0
    assert distance(one_, other) == pytest.approx(distance(other, one_))
    assert distance(OpCost(3, 0, 8), OpCost(3, 0, 2)) == pytest.approx(math.log(4))
    assert distance(OpCost(3, 4, 8), OpCost(2, 1, 8)) == pytest.approx(math.log(2))


# -- communication -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sends:
    why: str
    count: int
    payload: float

    def wire_bytes(self, world: int) -> float:
        return self.payload * (world - 1) / world


# 100 ms forward and backward.
PASSES = one(forward=OpCost(10**10, 0, 1), backward=OpCost(4 * 10**10, 0, 1))
GATHER = Sends("weights, forward pass, steady", 10, 8e8)
GRADIENTS = Sends("gradients", 5, 4e8)
NORM = Sends("gradient norm", 1, 0)


def step(world: int, *rows: Sends, **more: Any) -> Any:
    table = at_full_speed(PASSES)
    return step_time(ledger(PASSES), DEVICE, measured=table, world=world, collectives=rows, **more)


def test_collectives_in_a_node_take_the_link() -> None:
    found = step(4, GATHER, GRADIENTS, NORM, overlap=0)
    by_hand = [0.75 * 8e8 / (10e9 * WIRE) + 10 * MESSAGE, 0.75 * 4e8 / (10e9 * WIRE) + 5 * MESSAGE, MESSAGE]
    assert [part.seconds for part in found.communication] == pytest.approx(by_hand, rel=1e-6)
    assert found.by_term["network"] == found.by_phase["communication"] == pytest.approx(sum(by_hand), rel=1e-6)
    assert found.seconds == pytest.approx(0.1 + sum(by_hand), rel=1e-6)
    assert found.binds == "network" and found.images == 4


def test_gathers_and_gradients_hide_behind_the_passes_and_a_norm_does_not() -> None:
    half, all_of_it = step(4, GATHER, NORM, overlap=0.5), step(4, GATHER, NORM, overlap=1)
    wire = half.communication[0].seconds
    assert wire < 0.1
    assert half.communication[0].exposed == pytest.approx(wire / 2) and all_of_it.communication[0].exposed == 0
    assert all_of_it.communication[1].exposed == pytest.approx(MESSAGE, rel=1e-5)
    assert half.communication[0].seconds == wire == all_of_it.communication[0].seconds


def test_no_more_is_hidden_than_the_passes_last() -> None:
    found = step(4, Sends("gradients", 1, 1e11), overlap=1)
    assert found.communication[0].seconds - found.communication[0].exposed == pytest.approx(0.1)


def test_the_network_binds_where_the_passes_are_too_short_to_hide_what_they_could() -> None:
    """100 ms of products, and 150 ms of gradients of which all may be hidden: the step is the network's, however fast the
    products are, though what is left unhidden is shorter than they."""
    sent = Sends("gradients", 0, 0.15 * 10e9 * WIRE / 0.75)
    found = step(4, sent, overlap=1)
    assert found.seconds == pytest.approx(0.15) and found.by_term["network"] < found.by_term["compute"]
    assert found.binds == "network" and found.network_floor == pytest.approx(0.15)
    hidden = step(4, Sends("gradients", 0, sent.payload / 2), overlap=1)
    assert hidden.binds == "compute" and hidden.network_floor == 0
    off = step(4, sent, overlap=1, host=HostWork(0, 25e9))
    assert off.binds == "host"  # a second of it


def test_between_nodes_the_slower_of_link_and_all_ports_of_a_node_decides() -> None:
    def rate(world: int, gpus: int, name: str, device: Device = DEVICE) -> float:
        found = step_time(
            ledger(PASSES), device, measured=at_full_speed(PASSES), world=world, collectives=[Sends("x", 0, 1e9)],
            gpus_per_node=gpus, network=find_network(name), overlap=0,
        )  # fmt: skip
        return 1e9 * (world - 1) / world / found.communication[0].seconds / WIRE

    assert rate(16, 8, "ndr") == pytest.approx(10e9)  # eight ports of 50 GB/s: the link decides
    assert rate(16, 8, "100gbe", replace(DEVICE, link=10**12)) == pytest.approx(12.5e9)  # one port a node
    assert rate(16, 8, "hdr", replace(DEVICE, link=10**12)) == pytest.approx(8 * 25e9)
    assert rate(4, 1, "hdr", replace(DEVICE, link=None)) == pytest.approx(25e9)  # one GPU a node needs no link


def test_what_is_missing_for_communication_is_said() -> None:
    with pytest.raises(ConfigError, match=r"no link between the devices[\s\S]*--hardware"):
        step_time(ledger(PASSES), replace(DEVICE, link=None), world=2, collectives=[NORM])
    with pytest.raises(ConfigError, match=r"16 ranks of 8 a node[\s\S]*--network ndr"):
        step(16, NORM)
    assert step(1, NORM).communication == ()
    assert step(4).by_term["network"] == 0


def test_the_assumptions_of_communication_are_named_where_they_are_made() -> None:
    assert any("hidden behind" in line for line in step(4, GATHER).assumptions)
    assert not any("hidden behind" in line for line in step(4, GATHER, overlap=0.3).assumptions)
    assert any("slower of link and network" in line for line in step(4, NORM).assumptions)
    assert not step(1).assumptions


# -- whole models ------------------------------------------------------------------------------------------------------


def model(name: str = "uvit-0.3b", **more: Any) -> FlopLedger:
    spec = preset(name)
    more = {"batch": 16, "itemsize": 2, **more}
    values = spec.c_out * math.prod(spec.latent_size)
    optimizer = optimizer_row(spec.param_counts().total)
    return flop_ledger(spec, **more).with_rows((*loss_rows(values, more["batch"]), optimizer))


@pytest.mark.parametrize("short", ["a100-80gb", "h100", "h200", "b200", "mi300x", "rtx4090"])
def test_sums_agree_and_no_step_beats_its_own_floor(short: str) -> None:
    device, rows = find(short), model()
    found = step_time(rows, device, accumulation=2)
    assert sum(found.by_phase.values()) == pytest.approx(found.seconds) == pytest.approx(sum(found.by_term.values()))
    assert found.seconds > rows.hardware_flops * 2 / device.peak("bf16")
    assert found.mfu is not None and found.hfu is not None and 0.2 < found.mfu <= found.hfu < 0.7
    assert found.mfu == pytest.approx(rows.model_flops * 2 / found.seconds / device.peak("bf16"))
    assert found.to_json()["binds"] in TERMS


def test_checkpointing_costs_time_and_no_model_flops() -> None:
    plain, checkpointed = (step_time(model(checkpointing=k), find("h200")) for k in (0, 1))
    assert checkpointed.by_phase["recompute"] > 0 == plain.by_phase["recompute"]
    assert checkpointed.model_flops == plain.model_flops and checkpointed.mfu < plain.mfu  # type: ignore[operator]
    assert checkpointed.by_phase["forward"] == pytest.approx(plain.by_phase["forward"])


@settings(max_examples=20, deadline=None)
@given(st.floats(1, 20), st.floats(1, 20), st.integers(1, 4))
def test_a_faster_device_is_never_slower(rates: float, bandwidth: float, accumulation: int) -> None:
    base, rows = find("a100-80gb"), model("uvit-tiny", batch=4)
    faster = replace(
        base,
        peak_flops={dtype: round(rate * rates) for dtype, rate in base.peak_flops.items()},
        bandwidth=round(base.bandwidth * bandwidth),
    )
    before, after = (step_time(rows, device, accumulation=accumulation, dispatch=0) for device in (base, faster))
    assert after.seconds <= before.seconds * (1 + 1e-12)
    assert after.by_term["launch"] == pytest.approx(before.by_term["launch"])


def test_a_measured_device_has_no_mfu() -> None:
    assert step_time(ledger(PASSES), DEVICE).mfu is not None
    found = step_time(ledger(PASSES), replace(DEVICE, measured=True))
    assert found.mfu is None and found.hfu is None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"accumulation": 0}, "accumulation = 0"),
        ({"world": True}, "world = True"),
        ({"gpus_per_node": 1.5}, r"gpus_per_node = 1\.5"),
        ({"overlap": 1.01}, r"overlap = 1\.01"),
        ({"launch": -1e-6}, r"launch = -1e-06"),
        ({"launch": math.nan}, "launch = nan"),
        ({"dispatch": math.inf}, "dispatch = inf"),
        ({"dtype": "fp16"}, r"dtype 'fp16' has no peak"),
        ({"dtype": "fp32", "measured": at_full_speed(PASSES)}, r"measured in bf16, the step is in fp32"),
    ],
)
def test_impossible_questions_are_refused(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        step_time(ledger(PASSES), DEVICE, **more)


def test_an_empty_ledger_is_refused() -> None:
    with pytest.raises(ConfigError, match="no rows"):
        step_time(ledger(), DEVICE)


def test_predictions_come_without_torch() -> None:
    code = (
        "import sys, longskip.profiling.step_time, longskip.profiling.hardware_file\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'triton', 'deepspeed')))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert module.GPUS_PER_NODE == 8
