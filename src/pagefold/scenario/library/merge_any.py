"""PR_SET_MEMORY_MERGE: a whole process may merge."""

from __future__ import annotations

from pagefold.machine import Area
from pagefold.scenario.host import Host, HostProcess
from pagefold.scenario.library.stage import joined, player

needs = {"merge_any"}


def _plain(host: Host, *contents: int) -> tuple[HostProcess, Area]:
    """Start a process with an area that nobody advised."""
    process = host.spawn()
    area = process.mmap(len(contents))
    for index, content in enumerate(contents):
        process.write(area, index, content)
    return process, area


def scenario_merge_any_needs_no_advice(host: Host) -> None:
    """Memory mapped before and after merge_any merges; the other process's must be advised as ever."""
    p1, r1 = _plain(host, 7)
    p2, r2 = _plain(host, 7)
    p1.merge_any(True)
    r3 = p1.mmap(1)
    p1.write(r3, 0, 7)
    host.scan(2)
    seen = host.observe()
    assert joined(seen, (p1, r1), (p1, r3))
    assert seen.sharers(p2, r2, 0) == 1
    assert seen["pages_sharing"] == 1


def scenario_merge_any_off_gives_private_copies(host: Host) -> None:
    """Ending it breaks all of the process's merged pages at once; others keep theirs."""
    p1, r1 = _plain(host, 7, 7)
    p2, r2 = player(host, 7)
    p1.merge_any(True)
    host.scan(2)
    assert host.observe().sharers(p1, r1, 0) == 3
    p1.merge_any(False)
    seen = host.observe()
    assert [seen.sharers(p, r, index) for p, r, index in ((p1, r1, 0), (p1, r1, 1), (p2, r2, 0))] == [1, 1, 1]
    host.scan(2)
    seen = host.observe()
    assert (seen["pages_shared"], seen["pages_sharing"]) == (1, 0)


def scenario_merge_any_is_inherited_by_fork(host: Host) -> None:
    """What a child maps merges too, without anybody saying so; ending it in the child leaves the parent as it was."""
    p1, r1 = _plain(host, 7)
    p1.merge_any(True)
    child = p1.fork()
    p1.write(r1, 0, 8)
    r2 = child.mmap(2)
    child.write(r2, 0, 8)
    child.write(r2, 1, 8)
    host.scan(2)
    seen = host.observe()
    assert seen.sharers(p1, r1, 0) == seen.sharers(child, r2, 1) == 3
    child.merge_any(False)
    r3 = p1.mmap(1)
    p1.write(r3, 0, 8)
    host.scan(2)
    seen = host.observe()
    assert joined(seen, (p1, r1), (p1, r3))
    assert seen.sharers(child, r2, 0) == 1
