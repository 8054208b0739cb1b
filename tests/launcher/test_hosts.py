"""Hostfiles: what is read is what DeepSpeed itself reads, and nothing that ssh or pdsh could take for an option passes."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longskip.errors import ConfigError
from longskip.launcher import hosts
from longskip.launcher.hosts import Cluster, cluster, hostfile, parse_hostfile, read_hostfile

SAFE = set(string.ascii_letters + string.digits + "._-")


def test_a_hostfile() -> None:
    text = "# two nodes\nnode-1 slots=8   # the first\r\n\n\t10.0.0.2\tslots=8\n"
    assert parse_hostfile(text) == Cluster(2, 8, ("node-1", "10.0.0.2"))
    assert parse_hostfile(text).world == 16


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("-oProxyCommand=touch${IFS}x slots=1", "no host name"),
        ("-w slots=1", "no host name"),
        ("a;reboot slots=1", "no host name"),
        ("$(reboot) slots=1", "no host name"),
        ("`reboot` slots=1", "no host name"),
        ("a|b slots=1", "no host name"),
        ("me@a slots=1", "no host name"),
        ("ssh:a slots=1", "no host name"),
        ("^/etc/passwd slots=1", "no host name"),
        ("/x/ slots=1", "no host name"),
        ("n[1-9] slots=1", "no host name"),
        ("a,b slots=1", "no host name"),
        ("a%20b slots=1", "no host name"),
        ("a..b slots=1", "no host name"),
        ("a- slots=1", "no host name"),
        (f"{'a' * 64} slots=1", "no host name"),
        ("nöde slots=1", "no host name"),
        ("::1 slots=1", "IPv6"),
        ("10.0.0.256 slots=1", "IPv4"),
        ("10.0.1 slots=1", "IPv4"),
        ("a", "NAME slots=N"),
        ("a slots=", "NAME slots=N"),
        ("a slots=-1", "NAME slots=N"),
        ("a slots=1 b", "NAME slots=N"),
        ("a slots=1;reboot", "NAME slots=N"),
        ("a slots=0", "1 to 1024"),
        ("a slots=1025", "1 to 1024"),
        ("a slots=99999999999999999999", "NAME slots=N"),
        ("a slots=1\na slots=1", "twice"),
        ("a slots=1\nA slots=1", "twice"),
        ("a slots=1\nb slots=2", "every node starts as many"),
        ("", "names no host"),
        ("# a slots=1", "names no host"),
        ("a slots=1\x00", "NAME slots=N"),
        ("a\x0bb slots=1", "NAME slots=N"),
        ("a slots=1\u2028-oX slots=1", "NAME slots=N"),
    ],
)
def test_what_is_refused(line: str, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        parse_hostfile(line)


def test_files_that_are_no_hostfiles(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("n\xf6de slots=1".encode("latin-1"))
    (tmp_path / "big").write_bytes(b"# \n" * (hosts.MOST_BYTES // 3 + 1))
    for name, word in (
        ("latin", "not ASCII"),
        ("big", "bytes"),
        ("nowhere", "cannot be read"),
        (".", "not a file"),
        ("\0", "cannot"),
    ):
        with pytest.raises(ConfigError, match=word):
            read_hostfile(tmp_path / name)
    with pytest.raises(ConfigError, match="not a file"):
        read_hostfile("/dev/zero")  # would never end


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet=st.sampled_from("ab1-. \t=slot#,;$`|&\n\r\x0b\u2028é'\"\\[]@:/^%"), max_size=60))
@example("a slots=1\n")
@example("a slots=1\r-b slots=1\n")
def test_any_text_is_a_cluster_or_refused(text: str) -> None:
    try:
        found = parse_hostfile(text)
    except ConfigError:
        return
    assert all(set(name) <= SAFE and name[0] not in "-." for name in found.hosts)
    assert 1 <= found.ranks_per_node <= hosts.MOST_SLOTS and len(set(found.hosts)) == found.nodes


NAMES = st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,8}[a-z0-9])?(\.[a-z]{2,5})?\Z").filter(lambda n: not n.isdigit())


@settings(max_examples=25, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=6, unique=True), st.integers(1, hosts.MOST_SLOTS))
def test_deepspeed_reads_the_same(names: list[str], slots: int) -> None:
    from deepspeed.launcher.runner import _parse_hostfile

    text = hostfile(names, slots)
    assert dict(_parse_hostfile(text.splitlines(keepends=True))) == dict.fromkeys(names, slots)
    assert parse_hostfile(text) == cluster(len(names), slots, names)


@pytest.mark.parametrize(("nodes", "ranks"), [(0, 1), (hosts.MOST_HOSTS + 1, 1), (1, 0), (1, hosts.MOST_SLOTS + 1)])
def test_counts(nodes: int, ranks: int) -> None:
    with pytest.raises(ConfigError, match="are possible"):
        cluster(nodes, ranks)
    assert cluster(hosts.MOST_HOSTS, hosts.MOST_SLOTS).world == hosts.MOST_HOSTS * hosts.MOST_SLOTS
