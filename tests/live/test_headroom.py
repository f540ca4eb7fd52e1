"""Judge the look before memory is taken: every limit there is counts, a look holds for a moment, and a reserve is left."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagefold.live.headroom import Headroom

MIB = 1 << 20
PAGES = MIB // 4096


class Machine:
    """A /proc and cgroup folders with the figures a test wants, in MiB."""

    def __init__(self, folder: Path) -> None:
        self.proc, self.groups, self.nodes = folder / "proc", folder / "cgroup", folder / "node"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "cgroup").write_text("")
        (self.proc / "self" / "mountinfo").write_text("")
        self.time = 0.0
        self.available(16384)

    def available(self, mib: int, total: int = 32768) -> None:
        (self.proc / "meminfo").write_text(f"MemTotal: {total * 1024} kB\nMemAvailable: {mib * 1024} kB\n")

    def second(self, path: str, root: str = "/") -> None:
        """Be in a cgroup of the second version."""
        (self.proc / "self" / "cgroup").write_text(f"0::{path}\n")
        (self.proc / "self" / "mountinfo").write_text(
            f"30 23 0:26 {root} {self.groups} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
        )
        self.groups.mkdir(exist_ok=True)

    def first(self, path: str) -> None:
        """Be in a memory cgroup of the first version, beside others."""
        (self.proc / "self" / "cgroup").write_text(f"5:cpu,cpuacct:/elsewhere\n4:memory:{path}\n0::/\n")
        (self.proc / "self" / "mountinfo").write_text(
            f"31 23 0:27 / {self.groups.parent / 'cpu'} rw - cgroup cgroup rw,cpu,cpuacct\n"
            f"32 23 0:28 / {self.groups} rw,nosuid - cgroup cgroup rw,memory\n"
        )
        self.groups.mkdir(exist_ok=True)

    def group(self, path: str, **files: str | int) -> None:
        folder = self.groups / path.lstrip("/")
        folder.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            number = value * MIB if isinstance(value, int) else value
            (folder / name.replace("__", ".")).write_text(f"{number}\n")

    def node(self, number: int, mib: int, file: int = 0) -> None:
        folder = self.nodes / f"node{number}"
        folder.mkdir(parents=True, exist_ok=True)
        text = f"Node {number} MemTotal: 99999999 kB\nNode {number} MemFree: {mib * 1024} kB\n"
        (folder / "meminfo").write_text(f"{text}Node {number} Inactive(file): {file * 1024} kB\n")

    def headroom(self) -> Headroom:
        return Headroom(self.proc, self.nodes, lambda: self.time)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_the_machines_own_limit(machine: Machine) -> None:
    machine.available(100)
    assert machine.headroom().short_of(36 * PAGES) == ""
    assert "the machine has 100 MiB left" in machine.headroom().short_of(36 * PAGES + 1)  # 64 MiB are left alone
    machine.available(100, total=320)
    assert machine.headroom().short_of(90 * PAGES) == ""
    assert machine.headroom().short_of(90 * PAGES + 1)
    machine.available(10)
    assert machine.headroom().short_of(1)


def test_a_cgroup_of_the_second_version(machine: Machine) -> None:
    machine.second("/a/b")
    machine.group("/a", memory__max=1000, memory__current=900, memory__stat="inactive_file 0")
    machine.group("/a/b", memory__max="max", memory__current=100)
    # 100 MiB are free above, a 32nd of the limit (31.25 MiB) is left alone
    assert machine.headroom().short_of(68 * PAGES) == ""
    assert "cgroup/a is at its limit; raise its memory.max" in machine.headroom().short_of(69 * PAGES)


def test_memory_high_counts_too(machine: Machine) -> None:
    machine.second("/a")
    machine.group("/a", memory__max="max", memory__high=320, memory__current=300)
    assert machine.headroom().short_of(10 * PAGES) == ""
    assert machine.headroom().short_of(11 * PAGES)


def test_what_can_be_reclaimed_counts_as_free(machine: Machine) -> None:
    machine.second("/a")
    stat = f"anon 5\ninactive_file {50 * MIB}\n"
    machine.group("/a", memory__max=320, memory__current=310, memory__stat=stat)
    assert machine.headroom().short_of(50 * PAGES) == ""
    assert machine.headroom().short_of(51 * PAGES)


def test_a_cgroup_of_the_first_version(machine: Machine) -> None:
    machine.first("/a/b")
    machine.group("/", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes=9999)
    machine.group("/a", memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes=9999)
    stat = f"inactive_file 77\ntotal_inactive_file {20 * MIB}\n"
    machine.group("/a/b", memory__limit_in_bytes=320, memory__usage_in_bytes=300, memory__stat=stat)
    assert machine.headroom().short_of(30 * PAGES) == ""
    assert "memory.limit_in_bytes" in machine.headroom().short_of(31 * PAGES)


def test_in_a_container_the_mount_is_the_cgroup(machine: Machine) -> None:
    machine.second("/docker/1234", root="/docker/1234")
    machine.group("/", memory__max=320, memory__current=300, memory__stat="inactive_file 0")
    assert machine.headroom().short_of(10 * PAGES) == ""
    assert machine.headroom().short_of(11 * PAGES)
    machine.second("/../elsewhere", root="/docker/1234")
    assert machine.headroom().short_of(11 * PAGES)


def test_no_limit_to_be_seen(machine: Machine) -> None:
    machine.second("/a")
    machine.group("/a", memory__max="max", memory__current=9999)
    assert machine.headroom().short_of(4096) == ""
    (machine.proc / "self" / "cgroup").unlink()
    assert machine.headroom().short_of(4096) == ""


def test_a_node_that_is_full(machine: Machine) -> None:
    machine.node(0, 50)
    machine.node(1, 3, file=2)
    headroom = machine.headroom()
    assert headroom.short_of(10 * PAGES, 0) == ""
    assert headroom.short_of(5 * PAGES, 1) == ""
    assert "node 1 has 5 MiB left" in machine.headroom().short_of(6 * PAGES, 1)
    assert machine.headroom().short_of(6 * PAGES, 2) == "", "nobody knows"


def test_a_look_holds_for_a_moment_and_for_so_many_pages(machine: Machine) -> None:
    headroom = machine.headroom()
    assert headroom.short_of(16) == ""
    machine.available(0)
    assert headroom.short_of(4096 - 16) == "", "a look allows 4,096 pages"
    assert headroom.short_of(1) != ""
    machine.available(16384)
    assert headroom.short_of(16) == "", "a refusal is not remembered"
    machine.available(0)
    machine.time += 0.2
    assert headroom.short_of(16) != ""


def test_much_at_once_is_looked_at_anew(machine: Machine) -> None:
    headroom = machine.headroom()
    assert headroom.short_of(1 << 20) == ""
    machine.available(0)
    assert headroom.short_of(1) != ""
