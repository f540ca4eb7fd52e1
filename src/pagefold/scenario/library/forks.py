"""What fork does to merged pages, and merging to pages that fork shares."""

from __future__ import annotations

import errno

from pagefold.scenario.files import states
from pagefold.scenario.host import Host
from pagefold.scenario.library.stage import joined, player, players, refused


def scenario_fork_then_write_in_parent_and_child(host: Host) -> None:
    """Whoever writes after a fork leaves the KSM page, the parent before the child was scanned, a child after; the others stay."""
    (p1, r1), other = players(host, 2, 7)
    host.scan(2)
    p3, p4 = p1.fork(), p1.fork()
    p1.write(r1, 0, 8)
    host.scan()
    seen = host.observe()
    assert joined(seen, other, (p3, r1), (p4, r1))
    assert seen["pages_sharing"] == 2
    p3.write(r1, 0, 9)
    host.scan()
    seen = host.observe()
    assert joined(seen, other, (p4, r1))
    assert seen["pages_sharing"] == 1
    assert [process.read(r1, 0) for process in (p1, p3, p4)] == [8, 9, 7]


def scenario_page_shared_by_fork_is_not_merged_with_itself(host: Host) -> None:
    """Parent and child map one anonymous page already: there is nothing to merge, and it does not become a KSM page."""
    p1, r1 = player(host, 7)
    child = p1.fork()
    host.scan(3)
    seen = host.observe()
    assert joined(seen, (p1, r1), (child, r1))
    assert (seen["pages_shared"], seen["pages_unshared"], seen["pages_volatile"]) == (0, 1, 1)


def scenario_page_shared_by_fork_merges_with_a_third(host: Host) -> None:
    """A page that fork shares merges with a stranger's, one mapping after the other."""
    p1, r1 = player(host, 7)
    child = p1.fork()
    stranger = player(host, 7)
    host.scan(2)
    assert host.observe()["pages_sharing"] >= 1
    host.scan()
    seen = host.observe()
    assert joined(seen, (p1, r1), (child, r1), stranger)
    assert (seen["pages_shared"], seen["pages_sharing"]) == (1, 2)


@states(knobs={"max_page_sharing": 2})
def scenario_forks_exceed_max_page_sharing(host: Host) -> None:
    """Children join a full KSM page all the same, by fork; a stranger does not."""
    (p1, r1), other = players(host, 2, 7)
    host.scan(2)
    children = [(p1.fork(), r1) for _ in range(3)]
    strangers = players(host, 2, 7)
    host.scan(2)
    seen = host.observe()
    assert joined(seen, (p1, r1), other, *children)
    assert joined(seen, *strangers)
    assert (seen["pages_shared"], seen["pages_sharing"]) == (2, 5)


def scenario_parent_exits_before_the_child_is_scanned(host: Host) -> None:
    """Only the child maps the KSM page now, and no rmap_item told of it: the next scan hangs the child's on it."""
    (p1, r1), (p2, _) = players(host, 2, 7)
    host.scan(2)
    child = p1.fork()
    p1.exit()
    p2.exit()
    host.scan()
    seen = host.observe()
    assert (seen["pages_shared"], seen["pages_sharing"]) == (1, 0)
    assert seen.processes[child.number]["ksm_merging_pages"] == 1
    new = player(host, 7)
    host.scan(2)
    assert joined(host.observe(), (child, r1), new)


@states(needs={"merge_across_nodes"})
def scenario_merged_page_in_memory_that_is_not_advised(host: Host) -> None:
    """A child un-advises a page while it is anonymous, its parent's side merges: `run` 2 leaves the child its KSM page.

    As long as that is mapped, what needs an empty forest is busy.
    """
    other = player(host, 7)
    p1, r1 = player(host, 7)
    child = p1.fork()
    child.madvise(r1, "UNMERGEABLE")
    host.scan(2)
    assert joined(host.observe(), other, (p1, r1), (child, r1))
    host.set("run", 2)
    seen = host.observe()
    assert seen["pages_shared"] == 0
    assert seen.sharers(*other, 0) == seen.sharers(p1, r1, 0) == seen.sharers(child, r1, 0) == 1
    knob = 1 - int(host.get("merge_across_nodes"))
    with refused(errno.EBUSY):
        host.set("merge_across_nodes", knob)
    child.write(r1, 0, 8)
    host.set("merge_across_nodes", knob)
    assert host.get("merge_across_nodes") == knob
