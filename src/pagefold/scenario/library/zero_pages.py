"""Zero pages (use_zero_pages): a page of zeroes can give way to the kernel's zero page, which belongs to nobody."""

from __future__ import annotations

from pagefold.scenario.files import states
from pagefold.scenario.host import ZERO, Host
from pagefold.scenario.library.stage import joined, player, players

knobs = {"use_zero_pages": 1}


@states(knobs={"use_zero_pages": 0})
def scenario_zeroes_merge_like_any_content(host: Host) -> None:
    """Without use_zero_pages, pages of zeroes become one KSM page."""
    equal = players(host, 3, 0)
    host.scan(2)
    seen = host.observe()
    assert joined(seen, *equal)
    assert (seen["pages_sharing"], seen["ksm_zero_pages"]) == (2, 0)


def scenario_one_page_of_zeroes_is_enough(host: Host) -> None:
    """A page of zeroes needs no partner: in its second scan the zero page is mapped instead, and its frame is free. A write ends it."""
    p1, r1 = player(host, 0, 7)
    host.scan()
    assert host.observe()["ksm_zero_pages"] == 0
    host.scan()
    seen = host.observe()
    place = seen.place(p1, r1, 0)
    assert place is not None and place.node == ZERO
    assert (seen["ksm_zero_pages"], seen["pages_shared"], seen["pages_unshared"]) == (1, 0, 1)
    assert seen.processes[p1.number]["ksm_zero_pages"] == 1
    assert p1.read(r1, 0) == 0
    p1.write(r1, 0, 8)
    seen = host.observe()
    assert (seen["ksm_zero_pages"], seen.processes[p1.number]["ksm_zero_pages"]) == (0, 0)


def scenario_unadvised_zero_pages_become_private(host: Host) -> None:
    """MADV_UNMERGEABLE gives real pages of zeroes back, and `run` 2 all that are left."""
    p1, r1 = player(host, 0, 0)
    p2, r2 = player(host, 0)
    host.scan(2)
    assert host.observe()["ksm_zero_pages"] == 3
    p1.madvise(r1, "UNMERGEABLE")
    seen = host.observe()
    for index in (0, 1):
        place = seen.place(p1, r1, index)
        assert place is not None and place.node != ZERO
    assert seen["ksm_zero_pages"] == seen.processes[p2.number]["ksm_zero_pages"] == 1
    host.set("run", 2)
    seen = host.observe()
    place = seen.place(p2, r2, 0)
    assert place is not None and place.node != ZERO
    assert seen["ksm_zero_pages"] == 0


def scenario_child_inherits_zero_pages(host: Host) -> None:
    """After a fork a zero page counts once for the parent and once for the child, each until it writes, unmaps or exits."""
    p1, r1 = player(host, 0)
    host.scan(2)
    child = p1.fork()
    seen = host.observe()
    assert seen["ksm_zero_pages"] == 2
    assert seen.processes[child.number]["ksm_zero_pages"] == 1
    child.write(r1, 0, 7)
    host.scan()
    seen = host.observe()
    assert seen["ksm_zero_pages"] == 1
    assert (p1.read(r1, 0), child.read(r1, 0)) == (0, 7)
    other = p1.fork()
    p1.exit()
    assert host.observe()["ksm_zero_pages"] == 1
    other.munmap(r1)
    assert host.observe()["ksm_zero_pages"] == 0


@states(knobs={"use_zero_pages": 0})
def scenario_merged_zeroes_do_not_become_zero_pages(host: Host) -> None:
    """Switched on late, use_zero_pages leaves a KSM page of zeroes as it is; newcomers, and who writes zeroes anew, go."""
    (p1, r1), *others = players(host, 3, 0)
    host.scan(2)
    host.set("use_zero_pages", 1)
    new = player(host, 0)
    host.scan(2)
    seen = host.observe()
    assert joined(seen, (p1, r1), *others)
    assert seen.processes[new[0].number]["ksm_zero_pages"] == 1
    p1.write(r1, 0, 0)
    host.scan(2)
    seen = host.observe()
    assert joined(seen, *others)
    assert seen["ksm_zero_pages"] == 2
