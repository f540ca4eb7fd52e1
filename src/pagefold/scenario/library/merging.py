"""What merges, what does not, and when."""

from __future__ import annotations

from pagefold.scenario.host import Host
from pagefold.scenario.library.stage import joined, player, players


def scenario_two_equal_pages_become_one(host: Host) -> None:
    """Equal pages of two processes become one KSM page, and both still read what they wrote."""
    (p1, r1), (p2, r2) = players(host, 2, 7)
    host.scan(2)
    seen = host.observe()
    assert joined(seen, (p1, r1), (p2, r2))
    assert (seen["pages_shared"], seen["pages_sharing"]) == (1, 1)
    assert p1.read(r1, 0) == p2.read(r2, 0) == 7


def scenario_first_scan_only_learns_checksums(host: Host) -> None:
    """A page must be found unchanged once before anything is compared with it: nothing merges in the first full scan."""
    equal = players(host, 2, 7)
    host.scan()
    seen = host.observe()
    assert (seen["pages_volatile"], seen["pages_unshared"], seen["pages_sharing"]) == (2, 0, 0)
    host.scan()
    assert joined(host.observe(), *equal)


def scenario_equal_pages_of_one_process(host: Host) -> None:
    """Pages of one process merge with each other as well."""
    p1, r1 = player(host, 7, 8, 7, 7)
    host.scan(2)
    seen = host.observe()
    assert [seen.sharers(p1, r1, index) for index in range(4)] == [3, 1, 3, 3]
    assert (seen["pages_shared"], seen["pages_sharing"], seen["pages_unshared"]) == (1, 2, 1)


def scenario_many_processes_many_contents(host: Host) -> None:
    """Each content becomes one KSM page, whatever the order in which pages of it are met."""
    many = [player(host, *(1 + (index * step) % 5 for index in range(5))) for step in (1, 2, 3, 4) * 3]
    host.scan(2)
    seen = host.observe()
    assert (seen["pages_shared"], seen["pages_sharing"]) == (5, 5 * 12 - 5)
    assert all(seen.sharers(p, r, index) == 12 for p, r in many for index in range(5))


def scenario_unlike_pages_stay_apart(host: Host) -> None:
    """Pages that differ only in the first or in the last byte of each word do not merge; they wait in the unstable tree."""
    unlike = [player(host, content) for content in (7, 8, 7 + 2**56, 7 + 2**63, 0, 2**64 - 1)]
    host.scan(3)
    seen = host.observe()
    assert (seen["pages_unshared"], seen["pages_shared"], seen["pages_sharing"]) == (6, 0, 0)
    assert all(seen.sharers(p, r, 0) == 1 for p, r in unlike)


def scenario_newcomer_joins_a_ksm_page(host: Host) -> None:
    """A page whose content is already in the stable tree joins that KSM page, but not at first sight: it must be calm first."""
    old = players(host, 2, 7)
    host.scan(2)
    new = player(host, 7)
    host.scan()
    assert joined(host.observe(), *old)
    host.scan()
    seen = host.observe()
    assert joined(seen, *old, new)
    assert (seen["pages_shared"], seen["pages_sharing"]) == (1, 2)


def scenario_changing_pages_never_merge(host: Host) -> None:
    """Pages rewritten between any two scans are volatile: equal in every scan, and never merged."""
    (p1, r1), (p2, r2) = players(host, 2, 100)
    for content in range(6):
        host.scan()
        seen = host.observe()
        assert (seen["pages_volatile"], seen["pages_sharing"]) == (2, 0)
        p1.write(r1, 0, content)
        p2.write(r2, 0, content)


def scenario_changed_page_merges_when_it_rests(host: Host) -> None:
    """A page that stops changing merges in the second scan after its last change."""
    p1, r1 = player(host, 7)
    resting = player(host, 9)
    for content in (7, 8, 9):
        p1.write(r1, 0, content)
        host.scan()
        assert host.observe()["pages_sharing"] == 0
    host.scan()
    assert joined(host.observe(), (p1, r1), resting)


def scenario_only_advised_memory_merges(host: Host) -> None:
    """An equal page in memory that was not advised is never looked at, until it is advised."""
    equal = players(host, 2, 7)
    p3 = host.spawn()
    r3 = p3.mmap(1)
    p3.write(r3, 0, 7)
    host.scan(3)
    seen = host.observe()
    assert joined(seen, *equal)
    assert seen.processes[p3.number]["ksm_rmap_items"] == 0
    p3.madvise(r3, "MERGEABLE")
    host.scan(2)
    assert joined(host.observe(), *equal, (p3, r3))


def scenario_untouched_pages_cost_nothing(host: Host) -> None:
    """Only pages that are there get an rmap_item and are counted as scanned; no page comes to be by scanning."""
    p1 = host.spawn()
    r1 = p1.mmap(8)
    p1.write(r1, 5, 7)
    p1.madvise(r1, "MERGEABLE")
    host.scan(3)
    seen = host.observe()
    assert seen.processes[p1.number]["ksm_rmap_items"] == 1
    assert seen["pages_scanned"] == 3
    assert seen.place(p1, r1, 0) is None


def scenario_profit_is_saved_pages_less_rmap_items(host: Host) -> None:
    """general_profit and each process's own: a page for every page saved, less 64 bytes for every rmap_item."""
    (p1, _), (p2, _) = player(host, 7, 8), player(host, 7, 9)
    host.scan(2)
    seen = host.observe()
    page = (seen["general_profit"] + 4 * 64) // seen["pages_sharing"]
    assert page >= 4096
    for process in (p1, p2):
        stat = seen.processes[process.number]
        assert (stat["ksm_rmap_items"], stat["ksm_merging_pages"]) == (2, 1)
        assert stat["ksm_process_profit"] == page - 2 * 64


def scenario_stopped_merger_keeps_what_is_merged(host: Host) -> None:
    """`run` 0 stops the scan and nothing else: what is merged stays so, and merging goes on with `run` 1."""
    old = players(host, 2, 7)
    host.scan(2)
    host.set("run", 0)
    new = player(host, 7)
    scans = host.get("full_scans")
    assert joined(host.observe(), *old)
    host.set("run", 1)
    assert host.get("full_scans") == scans
    host.scan(2)
    assert joined(host.observe(), *old, new)


def scenario_processes_are_scanned_in_the_order_of_advice(host: Host) -> None:
    """A process enters the ring when it is first advised, at the end. Pairs of two show the order, with max_page_sharing 2."""
    processes = [host.spawn() for _ in range(4)]
    host.set("max_page_sharing", 2)
    areas = [process.mmap(1) for process in processes]
    for at in (2, 0, 3, 1):
        processes[at].write(areas[at], 0, 7)
        processes[at].madvise(areas[at], "MERGEABLE")
    host.scan(2)
    seen = host.observe()
    pages = list(zip(processes, areas, strict=True))
    assert joined(seen, pages[2], pages[0])
    assert joined(seen, pages[3], pages[1])


def scenario_children_enter_the_ring_as_they_are_forked(host: Host) -> None:
    """A child of a registered process is registered at the fork, behind all others."""
    host.set("max_page_sharing", 2)
    p1, area = player(host, 1)
    p2, p3 = p1.fork(), p1.fork()
    p4 = p2.fork()
    for process in (p4, p3, p2, p1):
        process.write(area, 0, 7)
    host.scan(2)
    seen = host.observe()
    assert joined(seen, (p1, area), (p2, area))
    assert joined(seen, (p3, area), (p4, area))
