"""Pages that somebody holds for I/O: they are never replaced, and what is left behind when that is found out late."""

from __future__ import annotations

from pagefold.scenario.host import Host
from pagefold.scenario.library.stage import joined, player, players

needs = {"pin"}


def scenario_pinned_page_never_merges(host: Host) -> None:
    """A pinned page keeps its frame, though equal pages are there; it merges as soon as it is unpinned."""
    (p1, r1), *others = players(host, 3, 7)
    p1.pin(r1, 0)
    host.scan(3)
    seen = host.observe()
    assert seen.sharers(p1, r1, 0) == 1
    assert joined(seen, *others)
    p1.unpin(r1, 0)
    host.scan()
    assert joined(host.observe(), (p1, r1), *others)


def scenario_each_pin_counts(host: Host) -> None:
    """A page pinned twice does not merge before both pins are gone."""
    (p1, r1), other = players(host, 2, 7)
    p1.pin(r1, 0)
    p1.pin(r1, 0)
    host.scan(2)
    p1.unpin(r1, 0)
    host.scan()
    assert host.observe()["pages_sharing"] == 0
    p1.unpin(r1, 0)
    host.scan()
    assert joined(host.observe(), (p1, r1), other)


def scenario_pin_of_a_merged_page_unshares_it(host: Host) -> None:
    """Pinning a page makes it the process's own first, as a write would: the KSM page itself is never pinned."""
    (p1, r1), *others = players(host, 3, 7)
    host.scan(2)
    p1.pin(r1, 0)
    seen = host.observe()
    assert seen.sharers(p1, r1, 0) == 1
    assert joined(seen, *others)
    host.scan(2)
    assert host.observe().sharers(p1, r1, 0) == 1
    p1.unpin(r1, 0)
    host.scan()
    assert joined(host.observe(), (p1, r1), *others)


def scenario_fork_copies_a_pinned_page(host: Host) -> None:
    """A child gets its own copy of a pinned page at once, and that copy may merge; the parent's stays where the device writes."""
    (p1, r1), other = players(host, 2, 7)
    p1.pin(r1, 0)
    child = p1.fork()
    assert host.observe().sharers(p1, r1, 0) == 1
    host.scan(3)
    seen = host.observe()
    assert seen.sharers(p1, r1, 0) == 1
    assert joined(seen, other, (child, r1))


def scenario_exit_gives_pins_back(host: Host) -> None:
    """The pins of a process end with it; nothing of it is left."""
    (p1, r1), other = players(host, 2, 7)
    p1.pin(r1, 0)
    host.scan(2)
    p1.exit()
    host.scan()
    seen = host.observe()
    assert (seen["pages_shared"], seen["pages_unshared"]) == (0, 1)
    new = player(host, 7)
    host.scan(2)
    assert joined(host.observe(), other, new)


def scenario_writes_to_a_pinned_page_stay_in_place(host: Host) -> None:
    """The owner of a pinned page writes in place before, between and after the scans that could not merge it."""
    (p1, r1), other = players(host, 2, 7)
    p1.pin(r1, 0)
    for content in (7, 8, 7):
        p1.write(r1, 0, content)
        host.scan(2)
        assert p1.read(r1, 0) == content
        assert host.observe()["pages_sharing"] == 0
    p1.unpin(r1, 0)
    host.scan()
    assert joined(host.observe(), (p1, r1), other)


def scenario_lone_ksm_page_of_forked_processes(host: Host) -> None:
    """A page becomes KSM first, and then its partner turns out to be pinned: only the scanned process gets its page back.

    Who shared that page by fork is left with a KSM page without a stable node. It never merges, until its owner writes.
    """
    p1, r1 = player(host, 7)
    p1.pin(r1, 0)
    p2, r2 = player(host, 7)
    p3 = p2.fork()
    host.scan(2)
    seen = host.observe()
    assert seen.sharers(p2, r2, 0) == seen.sharers(p3, r2, 0) == 1
    assert seen["pages_shared"] == 0
    p1.unpin(r1, 0)
    host.scan(4)
    seen = host.observe()
    assert joined(seen, (p1, r1), (p2, r2))
    assert seen.sharers(p3, r2, 0) == 1
    p3.write(r2, 0, 7)
    host.scan(2)
    assert joined(host.observe(), (p1, r1), (p2, r2), (p3, r2))
