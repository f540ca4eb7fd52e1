"""Chains: a content with more sharers than max_page_sharing has several KSM pages, the dups of one tree node."""

from __future__ import annotations

from pagefold.scenario.files import states
from pagefold.scenario.host import Host
from pagefold.scenario.library.stage import Player, joined, player, players


def _exit(*sharers: Player) -> None:
    for process, _ in sharers:
        process.exit()


@states(knobs={"max_page_sharing": 2})
def scenario_pairs_at_max_page_sharing_2(host: Host) -> None:
    """Six equal pages become three KSM pages of two: one chain with three dups."""
    six = players(host, 6, 7)
    host.scan(2)
    seen = host.observe()
    assert all(seen.sharers(p, r, 0) == 2 for p, r in six)
    assert (seen["stable_node_chains"], seen["stable_node_dups"]) == (1, 3)
    assert (seen["pages_shared"], seen["pages_sharing"]) == (3, 3)


@states(knobs={"max_page_sharing": 3})
def scenario_threes_at_max_page_sharing_3(host: Host) -> None:
    """Of seven equal pages the last finds both KSM pages full, and no partner: it waits in the unstable tree."""
    seven = players(host, 7, 7)
    host.scan(3)
    seen = host.observe()
    assert joined(seen, *seven[:3])
    assert joined(seen, *seven[3:6])
    assert seen.sharers(*seven[6], 0) == 1
    assert (seen["stable_node_dups"], seen["pages_unshared"]) == (2, 1)


@states(needs={"max_page_sharing"})
def scenario_300_equal_pages_at_max_page_sharing_256(host: Host) -> None:
    """At the kernel's default limit 300 equal pages are 256 and 44."""
    p1, r1 = player(host, *[7] * 300)
    host.scan(2)
    seen = host.observe()
    assert [seen.sharers(p1, r1, index) for index in (0, 255, 256, 299)] == [256, 256, 44, 44]
    assert (seen["pages_shared"], seen["pages_sharing"]) == (2, 298)
    assert (seen["stable_node_chains"], seen["stable_node_dups"]) == (1, 2)


@states(knobs={"max_page_sharing": 2})
def scenario_empty_chain_is_left_behind(host: Host) -> None:
    """When all who shared its content are gone, a chain stays while nobody searches for that content: `no-leak` does not hold."""
    four = players(host, 4, 7)
    players(host, 2, 6)
    host.scan(2)
    _exit(*four)
    host.scan(4)
    seen = host.observe()
    assert (seen["stable_node_chains"], seen["stable_node_dups"]) == (1, 0)
    assert (seen["pages_shared"], seen["pages_sharing"]) == (1, 1)


@states(knobs={"max_page_sharing": 2})
def scenario_chain_left_with_one_dup_collapses(host: Host) -> None:
    """A search that finds one dup only makes it a plain node again, and one that finds none frees the chain; until then it stays."""
    four = players(host, 4, 7)
    gone = players(host, 4, 8)
    host.scan(2)
    assert (host.get("stable_node_chains"), host.get("stable_node_dups")) == (2, 4)
    _exit(*four[2:], *gone)
    host.scan()
    assert (host.get("stable_node_chains"), host.get("stable_node_dups")) == (2, 1)
    new = [player(host, content) for content in (7, 9)]
    host.scan(2)
    seen = host.observe()
    assert (seen["stable_node_chains"], seen["stable_node_dups"], seen["pages_shared"]) == (0, 0, 1)
    assert joined(seen, *four[:2])
    assert [seen.sharers(*one, 0) for one in new] == [1, 1]


def _two_dups_with_room(host: Host) -> tuple[list[Player], list[Player], Player]:
    """Leave a chain of two dups: the older one with two sharers, the newer one, at the front, with one; and a newcomer."""
    six = players(host, 6, 7)
    host.scan(2)
    _exit(six[0], six[3], six[4])
    return six[1:3], six[5:], player(host, 7)


@states(knobs={"max_page_sharing": 3})
def scenario_newcomer_takes_the_first_dup_with_room(host: Host) -> None:
    """While the prune time of a chain has not passed, a search takes the first dup with room, not the best."""
    _, newer, newcomer = _two_dups_with_room(host)
    host.scan(2)
    assert joined(host.observe(), *newer, newcomer)


@states(knobs={"max_page_sharing": 3, "stable_node_chains_prune_millisecs": 0})
def scenario_newcomer_takes_the_fullest_dup_when_pruning(host: Host) -> None:
    """A search that prunes walks all dups, and takes the fullest that has room, so that others may become empty."""
    older, _, newcomer = _two_dups_with_room(host)
    host.scan(2)
    assert joined(host.observe(), *older, newcomer)
