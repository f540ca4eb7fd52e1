"""The reviewer's five questions on migrating KSM pages, answered by what a kernel of today does (spec section 7).

`pagefold explain-design` tells them by the rules of the patch that was reviewed, with drawings of the trees.
"""

from __future__ import annotations

from pagefold.scenario.host import Host
from pagefold.scenario.library.stage import joined_on, move, player, players

nodes = 2
knobs = {"merge_across_nodes": 0, "smart_scan": 0}


def scenario_how_are_other_pages_kept_off_a_misplaced_page(host: Host) -> None:
    """At the match the nodes are compared: the first process scanned finds its equal in its tree, but on another node, and stays alone."""
    (p1, r1), *others = players(host, 3, 7, node=0)
    host.scan(2)
    p1.write(r1, 0, 7)
    move(others[0], 1)
    host.scan()
    seen = host.observe()
    assert joined_on(seen, 0, (p1, r1))
    assert joined_on(seen, 1, *others)
    assert seen["pages_unshared"] == 1


def scenario_when_does_a_node_leave_migrate_nodes(host: Host) -> None:
    """When the scan next meets one of its mappings: then it finds a place in its new tree, and others of that node can join it."""
    (p1, r1), *others = players(host, 3, 7, node=0)
    last = player(host, 9, node=1)
    host.scan(2)
    last[0].write(last[1], 0, 7)
    host.scan()
    p1.write(r1, 0, 7)
    move(others[0], 1)
    host.scan()
    # p1 put it on migrate_nodes, the next two took it off, and the last one joined: all in one scan, in the order of the ring.
    seen = host.observe()
    assert joined_on(seen, 0, (p1, r1))
    assert joined_on(seen, 1, *others, last)


def scenario_why_is_migrate_nodes_pruned_in_every_scan(host: Host) -> None:
    """A KSM page that waits there may lose its last process, and no search would ever meet its node: the next scan drops it."""
    (p1, r1), (p2, _) = players(host, 2, 7, node=0)
    equals = players(host, 2, 7, node=1)
    host.scan(2)
    p2.exit()
    host.scan()
    move((p1, r1), 1)
    host.scan(2)
    # With one sharer it cannot join its equal, nor does it leave the list.
    seen = host.observe()
    assert joined_on(seen, 1, (p1, r1))
    assert joined_on(seen, 1, *equals)
    for process, _ in ((p1, r1), *equals):
        process.exit()
    player(host, 8)
    host.scan(2)
    seen = host.observe()
    assert (seen["pages_shared"], seen["pages_sharing"], seen["pages_volatile"]) == (0, 0, 0)
    host.set("merge_across_nodes", 1)
    assert host.get("merge_across_nodes") == 1


def scenario_what_if_a_page_of_the_unstable_tree_migrates(host: Host) -> None:
    """Nothing needs repair: every scan builds those trees anew, so the page is put where it belongs, and merges there."""
    waiting = [player(host, 7, node=node) for node in (0, 1)]
    host.scan(2)
    assert host.observe()["pages_unshared"] == 2
    move(waiting[0], 1)
    host.scan()
    assert joined_on(host.observe(), 1, *waiting)


def scenario_why_is_the_displaced_node_marked(host: Host) -> None:
    """Two equal KSM pages swap nodes. The first takes the other's place, and it is that other, displaced, that must wait.

    Each has one sharer left: with more, today's kernel makes a chain of the two before the displaced one leaves it.
    """
    pairs = [players(host, 2, 7, node=node) for node in (0, 1)]
    host.scan(2)
    for _, (process, _) in pairs:
        process.exit()
    host.scan()
    here, there = pairs[0][0], pairs[1][0]
    move(here, 1)
    move(there, 0)
    host.scan()
    assert host.observe()["stable_node_chains"] == 0
    new = [player(host, 7, node=node) for node in (0, 1)]
    host.scan(2)
    seen = host.observe()
    assert joined_on(seen, 1, here, new[1])
    assert joined_on(seen, 0, there, new[0])
