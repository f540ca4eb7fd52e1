"""How a page stops being shared: by a write, an exit, an unmap, an advice, or `run` 2."""

from __future__ import annotations

from pagefold.scenario.files import states
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


def scenario_write_of_the_same_content_unshares_too(host: Host) -> None:
    """A write is a write, whatever is written; the page is as calm as it was, so that the very next scan merges it again."""
    (p1, r1), *others = players(host, 3, 7)
    host.scan(2)
    p1.write(r1, 0, 7)
    assert joined(host.observe(), *others)
    host.scan()
    assert joined(host.observe(), (p1, r1), *others)


@states(knobs={"smart_scan": 0})
def scenario_every_sharer_writes(host: Host) -> None:
    """When the last sharer writes, the KSM page is free, and its stable node stale: equal pages must find each other anew."""
    three = players(host, 3, 7)
    host.scan(2)
    for content, (p, r) in enumerate(three, 1):
        p.write(r, 0, content)
    host.scan(2)
    seen = host.observe()
    assert (seen["pages_shared"], seen["pages_sharing"], seen["pages_unshared"]) == (0, 0, 3)
    for p, r in three:
        p.write(r, 0, 7)
    host.scan(2)
    assert joined(host.observe(), *three)


def scenario_exit_of_one_sharer(host: Host) -> None:
    """The KSM page stays when one of its sharers exits, even when only one is left, and can be joined again."""
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


def scenario_exit_of_all_sharers(host: Host) -> None:
    """Nothing is left of a KSM page whose sharers have all exited."""
    three = players(host, 3, 7)
    host.scan(2)
    assert host.observe()["pages_sharing"] == 2
    for p, _ in three:
        p.exit()
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
    for p, r in ((p1, r3), (p2, r4)):
        p.write(r, 0, 9)
        p.madvise(r, "MERGEABLE")
    new = player(host, 7)
    host.scan(3)
    seen = host.observe()
    assert joined(seen, (p1, r3), (p2, r4))
    assert seen.sharers(*new, 0) == 1
    assert (p1.read(r3, 0), new[0].read(new[1], 0)) == (9, 7)


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


def scenario_advised_again_merges_again(host: Host) -> None:
    """A page whose area was un-advised and advised again starts afresh: its checksum is forgotten if a scan passed between."""
    p1, r1 = player(host, 7)
    other = player(host, 7)
    host.scan(2)
    p1.madvise(r1, "UNMERGEABLE")
    host.scan()
    p1.madvise(r1, "MERGEABLE")
    host.scan()
    assert host.observe().sharers(p1, r1, 0) == 1
    host.scan()
    assert joined(host.observe(), (p1, r1), other)


def scenario_process_without_advised_area_leaves_the_ring(host: Host) -> None:
    """With nobody left to scan, full_scans stands still; an advice starts it again."""
    p1, r1 = player(host, 7)
    host.scan()
    p1.madvise(r1, "UNMERGEABLE")
    host.scan(2)
    scans = host.get("full_scans")
    host.scan(3)
    assert host.get("full_scans") == scans
    p1.madvise(r1, "MERGEABLE")
    host.scan()
    assert host.get("full_scans") != scans


def scenario_run_2_unmerges_everything(host: Host) -> None:
    """`run` 2 gives everybody private copies and forgets all there is; with `run` 1 it all begins again at full_scans 0."""
    three = players(host, 3, 7, 8)
    host.scan(3)
    assert host.get("full_scans") == 3
    host.set("run", 2)
    seen = host.observe()
    assert all(seen.sharers(p, r, index) == 1 for p, r in three for index in (0, 1))
    assert (seen["pages_shared"], seen["pages_sharing"], seen["pages_volatile"], seen["full_scans"]) == (0, 0, 0, 0)
    assert all(p.read(r, 1) == 8 for p, r in three)
    new = player(host, 7)
    host.set("run", 1)
    assert host.get("full_scans") == 0
    host.scan(2)
    assert joined(host.observe(), *three, new)
    assert host.get("full_scans") == 2
