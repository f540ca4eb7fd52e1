"""What fork does to merged pages, and merging to pages that fork shares."""

from __future__ import annotations

import errno

from pagefold.scenario.files import states
from pagefold.scenario.host import Host
from pagefold.scenario.library.stage import joined, player, players, refused


def scenario_child_inherits_a_merged_page(host: Host) -> None:
    """A child maps its parent's KSM page at once; the counters hear of it when the child is scanned."""
    (p1, r1), other = players(host, 2, 7)
    host.scan(2)
    child = p1.fork()
    seen = host.observe()
    assert joined(seen, (p1, r1), other, (child, r1))
    assert seen["pages_sharing"] == 1
    host.scan()
    seen = host.observe()
    assert joined(seen, (p1, r1), other, (child, r1))
    assert seen["pages_sharing"] == 2
    assert seen.processes[child.number]["ksm_merging_pages"] == 1


def scenario_fork_then_write_in_the_parent(host: Host) -> None:
    """The parent's write after a fork leaves the KSM page to the child and to the others."""
    (p1, r1), other = players(host, 2, 7)
    host.scan(2)
    child = p1.fork()
    p1.write(r1, 0, 8)
    host.scan()
    seen = host.observe()
    assert joined(seen, other, (child, r1))
    assert (p1.read(r1, 0), child.read(r1, 0)) == (8, 7)
    assert seen["pages_sharing"] == 1


def scenario_fork_then_write_in_the_child(host: Host) -> None:
    """The child's write leaves the KSM page to the parent and to the others, also if it comes after a scan."""
    (p1, r1), other = players(host, 2, 7)
    host.scan(2)
    child = p1.fork()
    host.scan()
    child.write(r1, 0, 8)
    host.scan()
    seen = host.observe()
    assert joined(seen, (p1, r1), other)
    assert (p1.read(r1, 0), child.read(r1, 0)) == (7, 8)
    assert seen["pages_sharing"] == 1


def scenario_page_shared_by_fork_is_not_merged_with_itself(host: Host) -> None:
    """Parent and child map one anonymous page already: there is nothing to merge, and it does not become a KSM page."""
    p1, r1 = player(host, 7)
    child = p1.fork()
    host.scan(3)
    seen = host.observe()
    assert joined(seen, (p1, r1), (child, r1))
    assert (seen["pages_shared"], seen["pages_sharing"]) == (0, 0)


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


def scenario_child_unadvises_its_inherited_page(host: Host) -> None:
    """A child that un-advises gets its own copy; its parent's page stays merged."""
    (p1, r1), other = players(host, 2, 7)
    host.scan(2)
    child = p1.fork()
    child.madvise(r1, "UNMERGEABLE")
    seen = host.observe()
    assert joined(seen, (p1, r1), other)
    assert seen.sharers(child, r1, 0) == 1


def scenario_generations_share_one_page(host: Host) -> None:
    """Children of children join too; writes here and there leave everybody with what he wrote or inherited."""
    line = [player(host, 7, 8)]
    other = player(host, 7, 8)
    for content in (9, 10, 11):
        host.scan(2)
        process, area = line[-1]
        child = process.fork()
        child.write(area, 1, content)
        line.append((child, area))
    host.scan(2)
    seen = host.observe()
    assert joined(seen, *line, other)
    assert [process.read(area, 1) for process, area in line] == [8, 9, 10, 11]
    assert seen["pages_sharing"] == 4 + 1


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
