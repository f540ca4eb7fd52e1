"""How a page stops being shared: by a write, an exit, an unmap, an advice, or `run` 2."""

from __future__ import annotations

from pagefold.scenario.host import Host
from pagefold.scenario.library.stage import joined, player, players


def scenario_write_makes_a_private_copy(host: Host) -> None:
    """Who writes to a KSM page gets a page of its own; the others keep theirs."""
    (p1, r1), *others = players(host, 3, 7)
    host.scan(2)
    p1.write(r1, 0, 8)
    seen = host.observe()
    assert seen.sharers(p1, r1, 0) == 1
    assert joined(seen, *others)
    assert [p.read(r, 0) for p, r in ((p1, r1), *others)] == [8, 7, 7]
    host.scan()
    assert host.observe()["pages_sharing"] == 1


def scenario_sharers_exit_one_by_one(host: Host) -> None:
    """The KSM page stays as long as one sharer does, and can be joined again; when all have exited nothing is left of it."""
    (p1, _), (p2, _), last = players(host, 3, 7)
    host.scan(2)
    p1.exit()
    host.scan()
    assert host.observe()["pages_sharing"] == 1
    p2.exit()
    host.scan()
    seen = host.observe()
    assert (seen["pages_shared"], seen["pages_sharing"]) == (1, 0)
    new = player(host, 7)
    host.scan(2)
    assert joined(host.observe(), last, new)
    for process, _ in (last, new):
        process.exit()
    host.scan()
    seen = host.observe()
    assert (seen["pages_shared"], seen["pages_sharing"], seen["pages_volatile"]) == (0, 0, 0)
    assert seen["general_profit"] == 0


def scenario_unmapped_page_leaves_the_others(host: Host) -> None:
    """Unmapping one page of an area takes it off its KSM page; its rmap_item goes with the next scan."""
    (p1, r1), (p2, r2) = players(host, 2, 7, 8, 7)
    host.scan(2)
    p1.munmap(r1, 0, 1)
    seen = host.observe()
    assert seen.place(p1, r1, 0) is None
    assert seen.sharers(p2, r2, 0) == 3
    assert seen.processes[p1.number]["ksm_rmap_items"] == 3
    host.scan()
    seen = host.observe()
    assert (seen["pages_shared"], seen["pages_sharing"]) == (2, 3)
    assert seen.processes[p1.number]["ksm_rmap_items"] == 2


def scenario_page_freed_and_mapped_again(host: Host) -> None:
    """A KSM page's frame may be anybody's once it was freed: a new page with another content is never taken for it."""
    (p1, r1), (p2, r2) = players(host, 2, 7)
    host.scan(2)
    p1.munmap(r1)
    p2.munmap(r2)
    r3, r4 = p1.mmap(1), p2.mmap(1)
    for process, area in ((p1, r3), (p2, r4)):
        process.write(area, 0, 9)
        process.madvise(area, "MERGEABLE")
    p5, r5 = player(host, 7)
    host.scan(3)
    seen = host.observe()
    assert joined(seen, (p1, r3), (p2, r4))
    assert seen.sharers(p5, r5, 0) == 1
    assert (p1.read(r3, 0), p5.read(r5, 0)) == (9, 7)


def scenario_unmergeable_gives_private_copies(host: Host) -> None:
    """MADV_UNMERGEABLE breaks the pages of the range at once; the rmap_items go with the next scan."""
    (p1, r1), (p2, r2), (p3, r3) = players(host, 3, 7, 7)
    host.scan(2)
    p1.madvise(r1, "UNMERGEABLE")
    seen = host.observe()
    assert [seen.sharers(p1, r1, index) for index in (0, 1)] == [1, 1]
    assert seen.sharers(p2, r2, 0) == seen.sharers(p3, r3, 1) == 4
    assert p1.read(r1, 1) == 7
    host.scan()
    seen = host.observe()
    assert (seen["pages_shared"], seen["pages_sharing"]) == (1, 3)
    assert seen.processes[p1.number]["ksm_rmap_items"] == 0


def scenario_run_2_unmerges_everything(host: Host) -> None:
    """`run` 0 leaves what is merged; 2 gives private copies and forgets all there is; with 1 it begins again at full_scans 0."""
    three = players(host, 3, 7, 8)
    host.scan(3)
    host.set("run", 0)
    assert joined(host.observe(), *three)
    assert host.get("full_scans") == 3
    host.set("run", 2)
    seen = host.observe()
    assert all(seen.sharers(p, r, index) == 1 for p, r in three for index in (0, 1))
    assert (seen["pages_shared"], seen["pages_sharing"], seen["pages_volatile"], seen["full_scans"]) == (0, 0, 0, 0)
    assert all(p.read(r, 1) == 8 for p, r in three)
    new = player(host, 7)
    host.set("run", 1)
    host.scan(2)
    assert joined(host.observe(), *three, new)
    assert host.get("full_scans") == 2
