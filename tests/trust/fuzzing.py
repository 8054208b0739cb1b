"""How hostile input is made for fuzzing: sound bytes, damaged in ways that damage really has."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisWarning

FAST, SLOW = 60, 600
CASES = [FAST, pytest.param(SLOW, marks=pytest.mark.slow)]
"""Cases of each target: few and always the same in the fast suite, many and new ones every time in the slow one."""

ODD_NUMBERS = [0, -1, 1, 2, 255, 256, 511, 512, 513, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30]


def fuzz(cases: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], Any]) -> None:
    """``check`` on so many cases."""
    warnings.simplefilter("ignore", HypothesisWarning)
    how = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=cases <= FAST,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )

    def once(case: Any) -> None:
        check(case)

    how(given(strategy)(once))()


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` with bytes flipped, cut, repeated, put in, zeroed, or a number in it made huge."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        if not data:
            break
        at = draw(st.integers(0, len(data) - 1))
        size = draw(st.sampled_from([1, 2, 4, 8, 64, 512]))
        match draw(st.integers(0, 7)):
            case 0:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case 1:
                data[at] = draw(st.integers(0, 255))
            case 2:
                del data[at:]
            case 3:
                del data[at : at + size]
            case 4:
                data[at:at] = data[at : at + size] * draw(st.integers(1, 20))
            case 5:
                data[at:at] = draw(st.binary(min_size=1, max_size=24))
            case 6:
                data[at : at + size] = bytes(min(size, len(data) - at))
            case _:
                code = draw(st.sampled_from(["<q", ">q", "<I", ">I"]))
                top = 2 ** (8 * struct.calcsize(code) - (code[1] == "q"))
                number = struct.pack(code, draw(st.sampled_from(ODD_NUMBERS)) % top)
                data[at : at + len(number)] = number
    return bytes(data)


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.sampled_from(ODD_NUMBERS),
        st.sampled_from([0.0, -0.5, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")]),
        st.sampled_from(
            ["", "1e-4", "../x", "/etc/passwd", "a/b", "..", "\x00", "é\ud800"[:1], "x" * 300, "pipe:touch x"]
        ),
        st.text(max_size=6),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5) | st.just("file"), inner, max_size=3)
    ),
    max_leaves=5,
)
"""Values that JSON and YAML can hold, the awkward ones often."""


@st.composite
def altered(draw: st.DrawFn, tree: Any) -> Any:
    """A JSON tree with some of its places given another value, taken out, doubled or renamed."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        if not isinstance(tree, (dict, list)) or not tree:
            return draw(values)
        node: Any = tree
        while True:
            key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
            if isinstance(node[key], (dict, list)) and node[key] and draw(st.integers(0, 3)):
                node = node[key]
                continue
            break
        match draw(st.integers(0, 5)):
            case 0:
                del node[key]
            case 1 if isinstance(node, dict):
                node[draw(st.text(max_size=8) | st.sampled_from(["../x", "a/b", "/x", "__class__"]))] = node[key]
            case 2 if isinstance(node, list):
                node.append(node[key])
            case 3 if isinstance(node[key], (int, float)) and not isinstance(node[key], bool):
                node[key] = draw(st.sampled_from([-node[key], node[key] + 1, node[key] * 10**15, float(node[key])]))
            case _:
                node[key] = draw(values)
    return tree
