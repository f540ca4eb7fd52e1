"""Trees per node (merge_across_nodes 0): each NUMA node has its own trees, and no page merges with one of another node."""

from __future__ import annotations

import errno

from pagefold.scenario.files import states
from pagefold.scenario.host import Host
from pagefold.scenario.library.stage import joined, joined_on, player, players, refused

nodes = 2
knobs = {"merge_across_nodes": 0}


def scenario_equal_pages_of_different_nodes_stay_apart(host: Host) -> None:
    """Pages merge within each node, and never between two; a lonely one waits, though there are equals elsewhere."""
    pairs = [players(host, 2, 7, node=node) for node in reversed(range(host.nodes))]
    lonely = [player(host, 8, node=node) for node in range(host.nodes)]
    host.scan(3)
    seen = host.observe()
    for node, pair in enumerate(reversed(pairs)):
        assert joined_on(seen, node, *pair)
        assert joined_on(seen, node, lonely[node])
    assert (seen["pages_shared"], seen["pages_sharing"], seen["pages_unshared"]) == (host.nodes,) * 3


@states(knobs={"merge_across_nodes": 1})
def scenario_pages_of_different_nodes_merge(host: Host) -> None:
    """With merge_across_nodes 1 they all become one page: the frame of the one that was scanned when the first two met."""
    p1 = player(host, 7, node=0)
    p2 = player(host, 7, node=1)
    others = [player(host, 7, node=node) for node in range(host.nodes)]
    host.scan(2)
    assert joined_on(host.observe(), 1, p1, p2, *others)


def scenario_write_lands_on_the_node_of_the_area(host: Host) -> None:
    """The private copy that a write makes is taken on the node that the area wants, and merges there again."""
    (p1, r1), *others = players(host, 3, 7, node=1)
    host.scan(2)
    p1.write(r1, 0, 8)
    fresh = player(host, 8, node=1), player(host, 8, node=0)
    host.scan(2)
    seen = host.observe()
    assert joined_on(seen, 1, (p1, r1), fresh[0])
    assert joined_on(seen, 1, *others)
    assert seen.sharers(*fresh[1], 0) == 1


def scenario_merge_across_nodes_is_changed(host: Host) -> None:
    """merge_across_nodes is busy while merged pages remain; after `run` 2 it can change, and what merges is other pages."""
    (p1, r1), (p2, r2) = player(host, 7, node=0), player(host, 7, node=1)
    pair = players(host, 2, 8)
    host.scan(2)
    seen = host.observe()
    assert seen.sharers(p1, r1, 0) == seen.sharers(p2, r2, 0) == 1
    assert joined(seen, *pair)
    with refused(errno.EBUSY):
        host.set("merge_across_nodes", 1)
    host.set("run", 2)
    host.set("merge_across_nodes", 1)
    host.set("run", 1)
    host.scan(2)
    assert joined(host.observe(), (p1, r1), (p2, r2))
    with refused(errno.EBUSY):
        host.set("merge_across_nodes", 0)
    host.set("run", 2)
    host.set("merge_across_nodes", 0)
    assert host.get("merge_across_nodes") == 0
