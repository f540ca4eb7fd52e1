"""What move_pages(2) says of KSM pages and of others, and which pages cannot be moved."""

from __future__ import annotations

import errno

from pagefold.scenario.files import states
from pagefold.scenario.host import ZERO, Host
from pagefold.scenario.library.stage import joined_on, move, player

nodes = 2
knobs = {"merge_across_nodes": 0, "smart_scan": 0}


@states(knobs={"merge_across_nodes": 0, "use_zero_pages": 1})
def scenario_status_of_every_kind_of_page(host: Host) -> None:
    """A page is told its node, moved or not; ENOENT: not there. EFAULT: not mapped, or the zero page. ENODEV: no such node."""
    p1 = host.spawn()
    r1 = p1.mmap(6, node=0)
    for index, content in ((0, 7), (1, 8), (2, 8), (3, 0)):
        p1.write(r1, index, content)
    p1.madvise(r1, "MERGEABLE")
    p1.munmap(r1, 5)
    host.scan(2)
    last = host.nodes - 1
    wanted = {0: last, 1: last, 2: last, 3: -errno.EFAULT, 4: -errno.ENOENT, 5: -errno.EFAULT}
    assert p1.move_pages(r1, dict.fromkeys(range(6), last)) == wanted
    seen = host.observe()
    places = [seen.place(p1, r1, index) for index in range(4)]
    assert [place.node for place in places if place] == [last, last, last, ZERO]
    assert seen.sharers(p1, r1, 1) == 2
    for node in (host.nodes, 1000, -1):
        assert set(p1.move_pages(r1, dict.fromkeys(range(6), node)).values()) == {-errno.ENODEV}


@states(needs={"pin"})
def scenario_pinned_page_cannot_be_moved(host: Host) -> None:
    """EBUSY while it is pinned; but it is told its node if it is there already."""
    p1, r1 = player(host, 7, node=0)
    p1.pin(r1, 0)
    assert p1.move_pages(r1, {0: 1}) == {0: -errno.EBUSY}
    assert p1.move_pages(r1, {0: 0}) == {0: 0}
    assert joined_on(host.observe(), 0, (p1, r1))
    p1.unpin(r1, 0)
    move((p1, r1), 1)
    assert joined_on(host.observe(), 1, (p1, r1))


def scenario_parent_that_did_not_merge_keeps_the_page_in_place(host: Host) -> None:
    """Only the child's side of a page became KSM: no rmap_item leads to the parent's, so the page cannot move until he is gone."""
    partner = player(host, 7, node=0)
    parent = host.spawn()
    area = parent.mmap(1, node=0)
    parent.write(area, 0, 7)
    child = parent.fork()
    child.madvise(area, "MERGEABLE")
    host.scan(2)
    assert joined_on(host.observe(), 0, partner, (parent, area), (child, area))
    for process, r in (partner, (parent, area), (child, area)):
        assert process.move_pages(r, {0: 1}) == {0: -errno.EBUSY}
    parent.exit()
    move((child, area), 1)
    host.scan()
    assert joined_on(host.observe(), 1, partner, (child, area))


@states(needs={"pin"})
def scenario_lone_ksm_page_cannot_be_moved(host: Host) -> None:
    """A KSM page without a stable node, left behind by a merge that failed, stays where it is until it is written."""
    p1, r1 = player(host, 7, node=0)
    p1.pin(r1, 0)
    p2, r2 = player(host, 7, node=0)
    p3 = p2.fork()
    host.scan(2)
    assert joined_on(host.observe(), 0, (p3, r2))
    assert p3.move_pages(r2, {0: 1}) == {0: -errno.EBUSY}
    move((p2, r2), 1)
    p3.write(r2, 0, 7)
    move((p3, r2), 1)
    host.scan(2)
    assert joined_on(host.observe(), 1, (p2, r2), (p3, r2))
