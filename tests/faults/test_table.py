"""The table itself: complete, its tests are there, its patches still apply; and the proof tells what proves nothing."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from tests.faults.defences import ROOT, Copy, Defence, Patch, stale
from tests.faults.running import environment, run_tests, summary
from tests.faults.table import FAULTS

EVERY = [pytest.param(defence, id=f"{fault.number}-{defence.what}") for fault in FAULTS for defence in fault.defences]


def test_all_thirty_have_tests_and_defences() -> None:
    assert [fault.number for fault in FAULTS] == list(range(1, 31))
    for fault in FAULTS:
        assert fault.tests and fault.defences, fault.title
        named = {test.partition("[")[0] for test in fault.tests}
        for defence in fault.defences:
            assert {test.partition("[")[0] for test in defence.caught_by} <= named, (fault.number, defence.what)


def test_every_named_test_is_there() -> None:
    functions: dict[str, set[str]] = {}
    for fault in FAULTS:
        for test in fault.tests:
            file, _, name = test.partition("::")
            if file not in functions:
                tree = ast.parse((ROOT / file).read_text("utf-8"))
                functions[file] = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert name.partition("[")[0] in functions[file], test


@pytest.mark.parametrize("defence", EVERY)
def test_every_defence_can_still_be_taken_out(defence: Defence) -> None:
    assert not stale(defence)


@pytest.mark.slow
def test_every_parameter_of_a_named_test_is_there() -> None:
    """As pytest collects them: one that is not there makes it collect nothing at all."""
    tests = {test for fault in FAULTS for test in (*fault.tests, *(t for d in fault.defences for t in d.caught_by))}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *sorted(tests)],
        cwd=ROOT,
        env=environment(ROOT),
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-2000:]


@pytest.fixture(scope="module")
def little(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """A copy of a little tree: a defence in ``longskip/door.py`` and tests of it."""
    root = tmp_path_factory.mktemp("little") / "tree"
    for package in ("longskip", "tests"):
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").touch()
    (root / "longskip" / "door.py").write_text("def enter(name):\n    if name == 'thief':\n        raise KeyError\n")
    (root / "tests" / "test_door.py").write_text(
        "import pytest\nfrom longskip.door import enter\n\n\n"
        "@pytest.fixture\ndef house():\n    enter('friend')\n\n\n"
        "@pytest.mark.parametrize('name', ['thief'])\n"
        "def test_thieves(house, name):\n    with pytest.raises(KeyError):\n        enter(name)\n\n\n"
        "def test_nothing():\n    pass\n\n\ndef test_skipped():\n    pytest.skip('no door')\n"
    )
    (root / ".git").mkdir()
    (root / ".git" / "large").touch()
    return Copy(root.parent / "copy", root)


def test_a_copy_is_what_its_tests_import(little: Copy) -> None:
    assert not (little.folder / ".git").exists()
    session = run_tests(["tests/test_door.py"], little.folder)
    assert {outcome.test.partition("::")[2]: outcome.status for outcome in session.outcomes} == {
        "test_thieves[thief]": "passed", "test_nothing": "passed", "test_skipped": "skipped"
    }  # fmt: skip
    assert summary(session.of("tests/test_door.py::test_thieves")) == "passed"
    assert len(session.of("tests/test_door.py::test_thieves[thief]")) == 1
    assert not session.of("tests/test_door.py::test_thie")


@pytest.mark.parametrize(
    ("test", "new", "wrong"),
    [
        ("test_thieves", "if False", None),
        ("test_thieves[thief]", "if False", None),
        ("test_nothing", "if False", "its tests still pass"),
        ("test_skipped", "if False", "its tests still pass"),
        ("test_thieves", "if nothing_of_this_name", "could not be set up"),  # in the fixture already
        ("test_thieves", "if name == 'thief' and no_name", "breaks the program: NameError"),
        ("test_of_another_name", "if False", "no test ran"),
    ],
)
def test_what_a_missing_defence_proves(little: Copy, test: str, new: str, wrong: str | None) -> None:
    before = (little.folder / "longskip" / "door.py").read_text()
    old = "if name == 'thief'"
    defence = Defence("the door", (f"tests/test_door.py::{test}",), (Patch("longskip/door.py", old, new),))
    proof = little.prove(defence)
    assert proof.wrong is None if wrong is None else wrong in (proof.wrong or ""), proof.wrong
    assert bool(proof.failed) == (test.startswith("test_thieves") and "nothing" not in new)
    assert (little.folder / "longskip" / "door.py").read_text() == before


@pytest.mark.parametrize("old", ["if name == 'stranger'", "e"])
def test_a_patch_that_does_not_apply_is_told(little: Copy, old: str) -> None:
    assert stale(Defence("the door", (), (Patch("longskip/door.py", old, "pass"),)), little.folder)
    assert stale(Defence("the door", (), (Patch("longskip/door.py", "if name", "if if"),)), little.folder)
    assert stale(Defence("the door", (), (Patch("longskip/gate.py", "if name", "if"),)), little.folder)
