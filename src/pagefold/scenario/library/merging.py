"""What merges, what does not, and when."""

from __future__ import annotations

from pagefold.scenario.files import states
from pagefold.scenario.host import Host
from pagefold.scenario.library.stage import joined, player, players


def scenario_two_equal_pages_become_one(host: Host) -> None:
    """Equal pages of two processes become one KSM page in the second scan: the first one only learns their checksums."""
    (p1, r1), (p2, r2) = players(host, 2, 7)
    host.scan()
    seen = host.observe()
    assert (seen["pages_volatile"], seen["pages_unshared"], seen["pages_shared"]) == (2, 0, 0)
    host.scan()
    seen = host.observe()
    assert joined(seen, (p1, r1), (p2, r2))
    assert (seen["pages_shared"], seen["pages_sharing"]) == (1, 1)
    assert p1.read(r1, 0) == p2.read(r2, 0) == 7


def scenario_many_processes_many_contents(host: Host) -> None:
    """Each content becomes one KSM page, within a process and across all, whatever the order in which pages of it are met."""
    many = [player(host, *(1 + (index * step) % 5 for index in range(5))) for step in (1, 2, 3, 4, 1, 3)]
    p1, r1 = player(host, 1, 6, 1)
    host.scan(2)
    seen = host.observe()
    assert (seen["pages_shared"], seen["pages_sharing"], seen["pages_unshared"]) == (5, 5 * 6 - 5 + 2, 1)
    assert all(seen.sharers(p, r, 1) == 6 for p, r in many[1:])
    assert [seen.sharers(p1, r1, index) for index in range(3)] == [8, 1, 8]


def scenario_newcomer_joins_a_ksm_page(host: Host) -> None:
    """A page whose content is in the stable tree already joins that KSM page, but not at first sight: it must be calm first."""
    old = players(host, 2, 7)
    host.scan(2)
    new = player(host, 7)
    host.scan()
    assert joined(host.observe(), *old)
    host.scan()
    seen = host.observe()
    assert joined(seen, *old, new)
    assert (seen["pages_shared"], seen["pages_sharing"]) == (1, 2)


@states(needs={"smart_scan"}, knobs={"smart_scan": 0})
def scenario_changing_pages_merge_when_they_rest(host: Host) -> None:
    """Pages rewritten between any two scans are equal in each, but volatile; two scans after the last change they are one."""
    pages = players(host, 2, 100)
    for content in range(6):
        host.scan()
        seen = host.observe()
        assert (seen["pages_volatile"], seen["pages_shared"]) == (2, 0)
        for process, area in pages:
            process.write(area, 0, content)
    host.scan(2)
    assert joined(host.observe(), *pages)


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


def scenario_profit_is_saved_pages_less_rmap_items(host: Host) -> None:
    """Every page saved counts as profit, and 64 bytes of loss every rmap_item; pages that were never touched have none."""
    (p1, _), (p2, _) = player(host, 7, 8), player(host, 7, 9)
    p1.madvise(p1.mmap(8), "MERGEABLE")
    host.scan(2)
    seen = host.observe()
    page = seen["general_profit"] + 4 * 64
    assert page in (4096, 16384, 65536)
    for process in (p1, p2):
        stat = seen.processes[process.number]
        assert (stat["ksm_rmap_items"], stat["ksm_merging_pages"]) == (2, 1)
        assert stat["ksm_process_profit"] == page - 2 * 64


@states(knobs={"max_page_sharing": 2})
def scenario_processes_are_scanned_in_the_order_of_advice(host: Host) -> None:
    """A process enters the ring at its end, when it is first advised. With pairs of two it can be seen who came after whom."""
    processes = [host.spawn() for _ in range(4)]
    pages = [(process, process.mmap(1)) for process in processes]
    for at in (2, 0, 3, 1):
        process, area = pages[at]
        process.write(area, 0, 7)
        process.madvise(area, "MERGEABLE")
    host.scan(2)
    seen = host.observe()
    assert joined(seen, pages[2], pages[0])
    assert joined(seen, pages[3], pages[1])


@states(knobs={"max_page_sharing": 2})
def scenario_children_are_scanned_in_the_order_of_forks(host: Host) -> None:
    """The child of a registered process is registered at the fork, behind all others."""
    p1, area = player(host, 1)
    p2, p3 = p1.fork(), p1.fork()
    p4 = p2.fork()
    for process in (p4, p3, p2, p1):
        process.write(area, 0, 7)
    host.scan(2)
    seen = host.observe()
    assert joined(seen, (p1, area), (p2, area))
    assert joined(seen, (p3, area), (p4, area))
