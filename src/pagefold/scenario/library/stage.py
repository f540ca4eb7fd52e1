"""Own what many scenarios begin with: processes with advised pages; and how what came of it is looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pagefold.machine import Area
from pagefold.scenario.host import Host, HostProcess, Observation

Player = tuple[HostProcess, Area]  # a process, and its one advised area


def player(host: Host, *contents: int, node: int | None = None) -> Player:
    """Start a process with one advised area: a page for each content, on a node if given."""
    process = host.spawn()
    area = process.mmap(len(contents), node=node)
    for index, content in enumerate(contents):
        process.write(area, index, content)
    process.madvise(area, "MERGEABLE")
    return process, area


def players(host: Host, count: int, *contents: int, node: int | None = None) -> list[Player]:
    """Start that many players, all with the same contents."""
    return [player(host, *contents, node=node) for _ in range(count)]


def joined(seen: Observation, *players: Player) -> bool:
    """Tell whether the first pages of these players are one page, which nobody else maps."""
    places = {seen.place(process, area, 0) for process, area in players}
    return len(places) == 1 and seen.sharers(*players[0], 0) == len(players)


def joined_on(seen: Observation, node: int, *players: Player) -> bool:
    """Tell whether the first pages of these players are one page on that node, which nobody else maps."""
    place = seen.place(*players[0], 0)
    return joined(seen, *players) and place is not None and place.node == node


def move(player: Player, node: int) -> None:
    """Move a player's first page, with all who map it, to a node."""
    process, area = player
    assert process.move_pages(area, {0: node}) == {0: node}


def nodes_of(seen: Observation) -> dict[tuple[int, int], int]:
    """Return on which node each page is."""
    return {page: place.node for page, place in seen.pages.items()}


@contextmanager
def refused(code: int) -> Iterator[None]:
    """Expect that what is done in the block is refused with this errno."""
    try:
        yield
    except OSError as error:
        assert error.errno == code, f"refused with errno {error.errno}, not {code}"
    else:
        raise AssertionError(f"not refused, though errno {code} was expected")
