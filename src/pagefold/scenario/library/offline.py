"""Memory offline: a node's memory is taken away while pages on it are merged, misplaced, or waiting."""

from __future__ import annotations

import errno

from pagefold.scenario.files import states
from pagefold.scenario.host import Host
from pagefold.scenario.library.stage import Player, joined, joined_on, move, nodes_of, player, players, refused

nodes = 2
needs = {"offline"}
knobs = {"merge_across_nodes": 0, "smart_scan": 0}


def _node(host: Host, one: Player) -> int:
    """Return the node of a player's first page."""
    place = host.observe().place(*one, 0)
    assert place is not None
    return place.node


def scenario_merged_page_of_an_offlined_node(host: Host) -> None:
    """A KSM page moves to another node with all its sharers, is put into the tree there, and is joined by that node's equals."""
    last = host.nodes - 1
    three = players(host, 3, 7, node=last)
    host.scan(2)
    host.offline(last)
    refuge = _node(host, three[0])
    assert refuge != last
    assert joined_on(host.observe(), refuge, *three)
    new = player(host, 7, node=refuge)
    host.scan(2)
    seen = host.observe()
    assert joined_on(seen, refuge, *three, new)
    assert (seen["pages_shared"], seen["pages_sharing"]) == (1, 3)
    host.online(last)
    host.scan()
    move(new, last)
    left = player(host, 7, node=refuge)
    host.scan(2)
    seen = host.observe()
    assert joined_on(seen, last, *three, new)
    assert joined_on(seen, refuge, left)


def scenario_offlined_to_where_an_equal_is(host: Host) -> None:
    """The KSM page of an offlined node meets its equal: they stay two pages, in one chain, and nothing is lost."""
    last = host.nodes - 1
    pairs = [players(host, 2, 7, 8, node=node) for node in range(host.nodes)]
    host.scan(2)
    host.offline(last)
    host.scan(2)
    seen = host.observe()
    assert last not in nodes_of(seen).values()
    assert all(joined(seen, *pair) for pair in pairs)
    assert (seen["pages_sharing"], seen["stable_node_chains"], seen["stable_node_dups"]) == (2 * host.nodes, 2, 4)
    assert [p.read(r, 1) for p, r in pairs[last]] == [8, 8]
    host.online(last)


@states(knobs={"merge_across_nodes": 0, "smart_scan": 0, "max_page_sharing": 2})
def scenario_chain_of_an_offlined_node(host: Host) -> None:
    """All dups of a chain go elsewhere, and are a chain again there; the old tree is empty when the node is back."""
    last = host.nodes - 1
    six = players(host, 6, 7, node=last)
    host.scan(2)
    host.offline(last)
    host.scan(2)
    seen = host.observe()
    assert all(joined(seen, *six[at : at + 2]) for at in (0, 2, 4))
    assert seen["stable_node_dups"] == 3
    host.online(last)
    fresh = players(host, 2, 7, node=last)
    host.scan(2)
    seen = host.observe()
    assert joined_on(seen, last, *fresh)
    assert (seen["stable_node_dups"], seen["pages_shared"]) == (3, 4)


def scenario_offlined_node_with_pages_in_every_state(host: Host) -> None:
    """A stale node on migrate_nodes, a KSM page just arrived, one that just left, an unmerged page: an offline finds all of them."""
    last = host.nodes - 1
    single, (gone, _) = players(host, 2, 7, node=0)
    equals = players(host, 2, 7, node=last)
    arrived, left = players(host, 2, 8, node=0), players(host, 2, 9, node=last)
    unmerged = player(host, 6, node=last)
    host.scan(2)
    gone.exit()
    host.scan()
    move(single, last)
    host.scan()
    # The single page waits on migrate_nodes, having an equal here. With the write its page is free, and its node is stale.
    single[0].write(single[1], 0, 5)
    move(arrived[0], last)
    move(left[0], 0)
    seen = host.observe()
    assert joined_on(seen, last, *arrived)
    assert joined_on(seen, 0, *left)
    host.offline(last)
    partner = player(host, 6, node=_node(host, unmerged))
    host.scan(2)
    seen = host.observe()
    assert last not in nodes_of(seen).values()
    assert all(joined(seen, *pair) for pair in (equals, arrived, left, (unmerged, partner)))
    assert joined_on(seen, 0, *left)
    host.online(last)
    host.scan()
    assert host.observe()["pages_shared"] == 4


def scenario_memory_wanted_on_an_offlined_node(host: Host) -> None:
    """An area that wants its pages on an offlined node gets them elsewhere, where they merge; no page can be moved there."""
    last = host.nodes - 1
    processes = [host.spawn(), host.spawn()]
    pair = [(process, process.mmap(1, node=last)) for process in processes]
    host.offline(last)
    for process, area in pair:
        process.madvise(area, "MERGEABLE")
        process.write(area, 0, 7)
    host.scan(2)
    seen = host.observe()
    assert joined(seen, *pair)
    assert last not in nodes_of(seen).values()
    (p1, r1), (p2, r2) = pair
    assert p1.move_pages(r1, {0: last}) == {0: -errno.ENODEV}
    host.online(last)
    for process, area in pair:
        process.write(area, 0, 8)
    host.scan(2)
    assert joined_on(host.observe(), last, (p1, r1), (p2, r2))


def scenario_processes_exit_while_their_node_is_away(host: Host) -> None:
    """The sharers of an offlined KSM page exit before it found its new place: nothing of it is left."""
    last = host.nodes - 1
    pair = players(host, 2, 7, node=last)
    other = player(host, 8, node=0)
    host.scan(2)
    assert joined_on(host.observe(), last, *pair)
    host.offline(last)
    for process, _ in pair:
        process.exit()
    host.online(last)
    host.scan()
    seen = host.observe()
    assert (seen["pages_shared"], seen["pages_volatile"]) == (0, 0)
    assert joined(seen, other)
    host.set("merge_across_nodes", 1)
    assert host.get("merge_across_nodes") == 1


def scenario_offline_is_refused_for_a_page_that_cannot_be_moved(host: Host) -> None:
    """A KSM page that a parent still maps, though only its child's page was merged, keeps its node where it is, and scans go on."""
    last = host.nodes - 1
    one = player(host, 7, node=last)
    parent = host.spawn()
    area = parent.mmap(1, node=last)
    parent.write(area, 0, 7)
    child = parent.fork()
    child.madvise(area, "MERGEABLE")
    host.scan(2)
    with refused(errno.EBUSY):
        host.offline(last)
    assert joined_on(host.observe(), last, one, (parent, area), (child, area))
    parent.exit()
    host.offline(last)
    assert last not in nodes_of(host.observe()).values()
    assert joined(host.observe(), one, (child, area))
    host.online(last)


def scenario_memory_cannot_be_bound_to_an_offlined_node(host: Host) -> None:
    """A new area on a node that has no memory is refused, and nothing is mapped; when the node is back it is taken."""
    last = host.nodes - 1
    process = host.spawn()
    host.offline(last)
    with refused(errno.EINVAL):
        process.mmap(1, node=last)
    host.online(last)
    area = process.mmap(1, node=last)
    process.write(area, 0, 7)
    assert set(nodes_of(host.observe()).values()) == {last}
