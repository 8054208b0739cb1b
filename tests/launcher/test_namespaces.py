"""Two nodes in two network namespaces, a supervisor and a rank on each, and a link that is cut (fault 18)."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from longskip.engine import checkpoint
from longskip.engine.configio import dump_yaml
from longskip.engine.opening import open_training, plan_for
from tests.engine.test_resume import assert_same_run
from tests.figures import figure
from tests.launcher import namespaces
from tests.launcher.namespaces import Nodes
from tests.launcher.supervised import Launched, gone
from tests.launcher.telling import samples_of
from tests.ranks import small_config, train_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not namespaces.usable(), reason="network namespaces need root and iproute2"),
]
NODE_TIMEOUT = 5
PORT = 29411


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with namespaces.two_nodes() as made:
        yield made


def supervisor(
    nodes: Nodes, node: int, run: Path, *overrides: str, elastic: bool = False, pause: float = 0.0
) -> Launched:
    words = ["2", str(node), "1", f"{nodes.addresses[0]}:{PORT}", "elastic" if elastic else "fixed", "run.yaml"]
    settings = [f"launch.node_timeout={NODE_TIMEOUT}", f"train.name={run.name}", *overrides]
    command = [*nodes.enter(node), sys.executable, "-m", "tests.launcher.telling", *words, *settings]
    return Launched(command, run, {"LONGSKIP_PAUSE": str(pause)})


def write_config(shapes: Path, steps: int, **groups: Any) -> Any:
    config = small_config(
        shapes, train={"steps": steps, "batch_size": 8, "micro_batch": 4}, logging={"every": 1}, **groups
    )
    Path("run.yaml").write_text(dump_yaml(config))
    return config


def test_fault_18_a_link_that_is_cut_ends_both_sides_with_one_commit(shapes: Path, in_tmp: Path, nodes: Nodes) -> None:
    config = write_config(shapes, 16, checkpoint={"every": 4})
    assert train_ranks(2, config, in_tmp / "straight") == [0, 0]
    run = in_tmp / "runs" / "run"
    with supervisor(nodes, 0, run, pause=0.4) as one, supervisor(nodes, 1, run, pause=0.4) as two:
        one.until(lambda: max(one.steps(), default=0) >= 6)
        ranks = [one.rank(0), two.rank(1)]
        connections = {c.laddr.ip for c in psutil.Process(one.process.pid).net_connections("tcp")}
        nodes.link(up=False)
        cut = time.monotonic()
        codes = (one.wait(), two.wait())
        seconds = time.monotonic() - cut
    assert codes == (1, 1)
    assert gone(ranks)
    assert connections <= {nodes.addresses[0]}
    figure(f"link cut, node time-out {NODE_TIMEOUT} s: both sides have ended after {seconds:.1f} s")
    assert seconds < NODE_TIMEOUT + 15  # five, where nobody else wants the processors
    assert "node_lost" in one.incidents() and "node 0 is out of reach" in two.text()
    found, complaints = checkpoint.newest(run / "checkpoints")
    assert found is not None and not complaints
    committed = checkpoint.read_state(found)["step"]
    assert committed % 4 == 0 and committed <= max(one.steps())
    nodes.link(up=True)
    with supervisor(nodes, 0, run) as one, supervisor(nodes, 1, run) as two:
        assert (one.wait(), two.wait()) == (0, 0)
    assert_same_run(run, in_tmp / "straight", steps=16)


def test_a_node_lost_and_regained_trains_on_the_same_samples(shapes: Path, in_tmp: Path, nodes: Nodes) -> None:
    """On both, on one, on both again; every step's global batch is the straight run's."""
    config = write_config(shapes, 5000, checkpoint={"every": 5})
    source = open_training(config)
    plan = plan_for(
        config, source, config.train.batch_size, None
    )  # a pure function: what the straight run's batches are
    run = in_tmp / "runs" / "run"

    def last() -> tuple[int, int]:
        """Step and world that rank 0 is at."""
        path = in_tmp / "ids-0"
        lines = path.read_text().splitlines() if path.exists() else []
        return tuple(json.loads(lines[-1])[1:3]) if lines else (0, 0)

    def at(world: int, after: int) -> bool:
        step, now = last()
        return now == world and step >= after

    elastic = {"elastic": True, "pause": 0.3}
    with supervisor(nodes, 0, run, **elastic) as one, supervisor(nodes, 1, run, **elastic) as two:
        one.until(lambda: at(2, 7))
        nodes.link(up=False)
        cut = time.monotonic()
        one.until(lambda: at(1, 8))
        figure(f"a node of two lost, node time-out {NODE_TIMEOUT} s: on the rest after {time.monotonic() - cut:.1f} s")
        alone = last()[0]
        one.until(lambda: at(1, alone + 3))
        assert gone([p for p in two._seen.values() if p.pid != two.process.pid])
        nodes.link(up=True)
        back = time.monotonic()
        one.until(lambda: at(2, alone + 4))
        figure(f"the node is back: on both again after {time.monotonic() - back:.1f} s")
        together = last()[0]
        one.until(lambda: at(2, together + 3))
        two.send(signal.SIGTERM)
        assert (one.wait(), two.wait()) == (75, 75)
    kinds = one.incidents()
    assert kinds.count("node_lost") == 1 and kinds.count("node_back") == 1 and "crash_loop" not in kinds
    ours = samples_of(in_tmp)
    reached = checkpoint.read_state(checkpoint.newest(run / "checkpoints")[0])["step"]  # type: ignore[arg-type]
    assert together < reached
    for step in range(1, reached + 1):
        last_attempt = max(ours[step])
        assert ours[step][last_attempt] == sorted(plan.batch_at(step - 1)[1].tolist()), step
    worlds = [line["world"] for line in one.lines("launch/attempts.jsonl") if line["ended"]]
    assert worlds[-3:] == [2, 1, 2]  # the second node may come late on a busy machine, and be taken in as well


def test_deepspeeds_launcher_without_ssh_in_both_namespaces(shapes: Path, in_tmp: Path, nodes: Nodes) -> None:
    """The command that ``longskip launch`` prints for every node: one rank each, met over the link; the straight run's end."""
    config = write_config(shapes, 6, checkpoint={"every": 3})
    assert train_ranks(2, config, in_tmp / "straight") == [0, 0]
    (in_tmp / "hosts").write_text("".join(f"{address} slots=1\n" for address in nodes.addresses))
    run = in_tmp / "runs" / "run"
    words = ["launch", "--hostfile", "hosts", "--no-ssh", "--no-preflight"]

    def node(number: int) -> Launched:
        command = [*nodes.enter(number), sys.executable, "-m", "longskip.launcher", *words, "--node-rank", str(number)]
        return Launched([*command, "--", "train", "run.yaml", f"train.name={run.name}"], run)

    with node(0) as one, node(1) as two:
        assert (one.wait(), two.wait()) == (0, 0), one.text() + two.text()
    (line,) = [line for line in one.lines("launch/attempts.jsonl") if line["ended"]]
    assert (line["nodes"], line["world"]) == ([0, 1], 2)
    assert_same_run(run, in_tmp / "straight", steps=6)
