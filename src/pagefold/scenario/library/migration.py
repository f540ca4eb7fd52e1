"""Migration with merge_across_nodes 0: a stable node found in the wrong tree looks for its place in the right one."""

from __future__ import annotations

import errno

from pagefold.scenario.files import states
from pagefold.scenario.host import Host
from pagefold.scenario.library.stage import joined, joined_on, move, player, players

nodes = 2
knobs = {"merge_across_nodes": 0, "smart_scan": 0}


def scenario_migrated_page_takes_a_free_place(host: Host) -> None:
    """Where it has no equal, a migrated KSM page is put into the new node's tree, and newcomers of that node join it."""
    pair = players(host, 2, 7, node=0)
    host.scan(2)
    move(pair[0], 1)
    here, there = player(host, 7, node=1), player(host, 7, node=0)
    host.scan(2)
    seen = host.observe()
    assert joined_on(seen, 1, *pair, here)
    assert joined_on(seen, 0, there)


def scenario_migrated_to_where_an_equal_is(host: Host) -> None:
    """A KSM page with several sharers is not merged into the equal it meets: the two become dups of one chain."""
    guests = players(host, 2, 7, node=0)
    locals_ = players(host, 2, 7, node=1)
    host.scan(2)
    move(guests[0], 1)
    host.scan(2)
    seen = host.observe()
    assert joined_on(seen, 1, *guests)
    assert joined_on(seen, 1, *locals_)
    assert (seen["stable_node_chains"], seen["stable_node_dups"]) == (1, 2)
    new = player(host, 7, node=1)
    host.scan(2)
    assert host.observe().sharers(*new, 0) == 3


def scenario_migrated_to_where_an_equal_has_left(host: Host) -> None:
    """The equal in the tree is itself misplaced, and nobody merges onto it: both find their places in one scan.

    The first is hung beside it, in a chain; it leaves when it is met, and the next search makes the chain a plain node.
    """
    guests = players(host, 2, 7, node=0)
    locals_ = players(host, 2, 7, node=1)
    host.scan(2)
    elsewhere = 2 % host.nodes
    move(guests[0], 1)
    move(locals_[0], elsewhere)
    host.scan()
    seen = host.observe()
    assert joined_on(seen, 1, *guests)
    assert joined_on(seen, elsewhere, *locals_)
    assert (seen["stable_node_chains"], seen["stable_node_dups"]) == (1, 1)
    new = [player(host, 7, node=node) for node in (1, elsewhere)]
    host.scan(2)
    seen = host.observe()
    assert joined_on(seen, 1, *guests, new[0])
    assert joined_on(seen, elsewhere, *locals_, new[1])
    assert (seen["stable_node_chains"], seen["stable_node_dups"]) == (0, 0)


@states(knobs={"merge_across_nodes": 0, "smart_scan": 0, "max_page_sharing": 2})
def scenario_migrated_to_where_a_full_chain_is(host: Host) -> None:
    """A full KSM page that meets a full chain of equals becomes its third dup."""
    guests = players(host, 2, 7, node=0)
    locals_ = players(host, 4, 7, node=1)
    host.scan(2)
    assert host.observe()["stable_node_dups"] == 2
    move(guests[0], 1)
    host.scan(2)
    seen = host.observe()
    assert joined_on(seen, 1, *guests)
    assert joined_on(seen, 1, *locals_[:2])
    assert joined_on(seen, 1, *locals_[2:])
    assert (seen["stable_node_chains"], seen["stable_node_dups"]) == (1, 3)
    assert (seen["pages_shared"], seen["pages_sharing"]) == (3, 3)


@states(knobs={"merge_across_nodes": 0, "smart_scan": 0, "max_page_sharing": 3})
def scenario_migrated_to_where_a_chain_is(host: Host) -> None:
    """In the chain that it joins, a migrated KSM page with room is the first that newcomers find."""
    guests = players(host, 2, 7, node=0)
    locals_ = players(host, 6, 7, node=1)
    host.scan(2)
    move(guests[0], 1)
    new = player(host, 7, node=1)
    host.scan(2)
    seen = host.observe()
    assert joined_on(seen, 1, *guests, new)
    assert (seen["stable_node_chains"], seen["stable_node_dups"]) == (1, 3)
    assert joined_on(seen, 1, *locals_[:3])


@states(knobs={"merge_across_nodes": 0, "smart_scan": 0, "max_page_sharing": 2})
def scenario_dup_migrates_out_of_its_chain(host: Host) -> None:
    """One dup of a chain migrates: it becomes a plain node of the other tree, and the chain is one shorter."""
    six = players(host, 6, 7, node=0)
    host.scan(2)
    move(six[2], 1)
    host.scan()
    seen = host.observe()
    assert joined_on(seen, 1, *six[2:4])
    assert joined_on(seen, 0, *six[:2])
    assert joined_on(seen, 0, *six[4:])
    assert (seen["stable_node_chains"], seen["stable_node_dups"]) == (1, 2)


@states(knobs={"merge_across_nodes": 0, "smart_scan": 0, "max_page_sharing": 2})
def scenario_stranger_takes_a_leavers_place(host: Host) -> None:
    """A full KSM page that becomes a dup loses the rmap_item that was scanned, and a stranger finds room: three share it, not two."""
    locals_ = players(host, 2, 7, node=1)
    guests = players(host, 2, 7, node=0)
    stranger = player(host, 9, node=1)
    host.scan(2)
    stranger[0].write(stranger[1], 0, 7)
    host.scan()
    move(guests[0], 1)
    host.scan()
    assert joined_on(host.observe(), 1, *guests, stranger)
    assert host.observe()["pages_sharing"] == 2
    host.scan()
    seen = host.observe()
    assert joined_on(seen, 1, *locals_)
    assert (seen["pages_shared"], seen["pages_sharing"]) == (2, 3)


def scenario_page_with_one_sharer_does_not_join_its_equal(host: Host) -> None:
    """A migrated KSM page with one sharer cannot merge into its equal, being write-protected as KSM already: it waits.

    It stays alone, and cannot even move again, until its process writes: then it is a page like any other.
    """
    (p1, r1), (p2, _) = players(host, 2, 7, node=0)
    locals_ = players(host, 2, 7, node=1)
    host.scan(2)
    p2.exit()
    host.scan()
    move((p1, r1), 1)
    host.scan(4)
    seen = host.observe()
    assert joined_on(seen, 1, (p1, r1))
    assert joined_on(seen, 1, *locals_)
    assert p1.move_pages(r1, {0: 0}) == {0: -errno.EBUSY}
    p1.write(r1, 0, 7)
    new = player(host, 7, node=0)
    host.scan(2)
    assert joined_on(host.observe(), 0, (p1, r1), new)


def scenario_migrated_while_its_sharers_exit(host: Host) -> None:
    """The last of three sharers carries the KSM page to its place."""
    (p1, _), (p2, _), last = players(host, 3, 7, node=0)
    host.scan(2)
    p1.exit()
    move(last, 1)
    p2.exit()
    here, there = player(host, 7, node=1), player(host, 7, node=0)
    host.scan(2)
    seen = host.observe()
    assert joined_on(seen, 1, last, here)
    assert joined_on(seen, 0, there)
    assert (seen["pages_shared"], seen["pages_sharing"]) == (1, 1)


def scenario_migrated_page_is_written(host: Host) -> None:
    """Who writes to a migrated KSM page gets a copy on the node that his area wants; the page stays with the others where it went."""
    (p1, r1), *others = players(host, 3, 7, node=0)
    host.scan(2)
    move((p1, r1), 1)
    p1.write(r1, 0, 8)
    host.scan()
    seen = host.observe()
    assert joined_on(seen, 0, (p1, r1))
    assert joined_on(seen, 1, *others)
    assert [p.read(r, 0) for p, r in ((p1, r1), *others)] == [8, 7, 7]
    p1.write(r1, 0, 7)
    host.scan(2)
    assert joined_on(host.observe(), 0, (p1, r1))


def scenario_back_and_forth_between_scans(host: Host) -> None:
    """A KSM page that is on another node in every scan keeps its sharers; one that comes home before a scan is not noticed."""
    three = players(host, 3, 7, node=0)
    host.scan(2)
    for turn in range(6):
        move(three[turn % 3], 1 - turn % 2)
        host.scan()
        seen = host.observe()
        assert joined_on(seen, 1 - turn % 2, *three)
        assert seen["pages_sharing"] == 2
    for node in (1, 0):
        move(three[0], node)
    here, there = player(host, 7, node=0), player(host, 7, node=1)
    host.scan(2)
    seen = host.observe()
    assert joined_on(seen, 0, *three, here)
    assert joined_on(seen, 1, there)


def scenario_tour_of_all_nodes(host: Host) -> None:
    """A KSM page that goes from node to node collects the equal page that waits on each."""
    travellers = players(host, 2, 7, node=0)
    waiting = {node: player(host, 7, node=node) for node in range(1, host.nodes)}
    host.scan(2)
    for node, one in waiting.items():
        move(travellers[0], node)
        host.scan(2)
        travellers.append(one)
        seen = host.observe()
        assert joined_on(seen, node, *travellers)
        assert seen["pages_sharing"] == len(travellers) - 1


@states(nodes=4)
def scenario_equal_pages_of_all_nodes_rotate(host: Host) -> None:
    """One equal KSM page on each of four nodes: all of them go one node further, and again, until at home."""
    pairs = [players(host, 2, 7, node=node) for node in range(host.nodes)]
    host.scan(2)
    for turn in range(1, host.nodes + 1):
        for at, pair in enumerate(pairs):
            move(pair[0], (at + turn) % host.nodes)
        host.scan()
        seen = host.observe()
        for at, pair in enumerate(pairs):
            assert joined_on(seen, (at + turn) % host.nodes, *pair)
        assert (seen["pages_shared"], seen["pages_sharing"]) == (host.nodes, host.nodes)
    new = [player(host, 7, node=node) for node in range(host.nodes)]
    host.scan(2)
    for node in range(host.nodes):
        assert joined_on(host.observe(), node, *pairs[node], new[node])


def scenario_run_2_forgets_migrated_nodes(host: Host) -> None:
    """`run` 2 takes apart what is misplaced and what waits for a place, as all else."""
    guests, locals_ = players(host, 2, 7, node=0), players(host, 2, 7, node=1)
    single, gone = players(host, 2, 8, node=0)
    equals = players(host, 2, 8, node=1)
    host.scan(2)
    gone[0].exit()
    host.scan()
    move(single, 1)
    host.scan(2)
    move(guests[0], 1)
    seen = host.observe()
    assert all(joined_on(seen, 1, *group) for group in (guests, locals_, [single], equals))
    host.set("run", 2)
    seen = host.observe()
    assert all(seen.sharers(*one, 0) == 1 for one in (*guests, *locals_, single, *equals))
    host.set("merge_across_nodes", 1)
    host.set("run", 1)
    host.scan(2)
    seen = host.observe()
    assert joined(seen, *guests, *locals_)
    assert joined(seen, single, *equals)
