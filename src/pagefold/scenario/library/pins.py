"""Pages that somebody holds for I/O: they are never replaced, and what is left behind when that is found out late."""

from __future__ import annotations

from pagefold.scenario.host import Host
from pagefold.scenario.library.stage import joined, player, players

needs = {"pin"}
knobs = {"smart_scan": 0}


def scenario_pinned_page_never_merges(host: Host) -> None:
    """A pinned page keeps its frame, though an equal KSM page is there; it joins that as soon as it is unpinned."""
    *others, (p1, r1) = players(host, 3, 7)
    p1.pin(r1, 0)
    host.scan(3)
    seen = host.observe()
    assert seen.sharers(p1, r1, 0) == 1
    assert joined(seen, *others)
    p1.unpin(r1, 0)
    host.scan()
    assert joined(host.observe(), (p1, r1), *others)


def scenario_pinned_page_keeps_its_equals_apart(host: Host) -> None:
    """A pinned page that is scanned first is everybody's partner in the unstable tree, and no merge with it succeeds."""
    (p1, r1), *others = players(host, 3, 7)
    p1.pin(r1, 0)
    host.scan(4)
    seen = host.observe()
    assert all(seen.sharers(p, r, 0) == 1 for p, r in ((p1, r1), *others))
    p1.write(r1, 0, 8)
    host.scan(2)
    seen = host.observe()
    assert seen.sharers(p1, r1, 0) == 1
    assert joined(seen, *others)


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
    """A child gets its own copy of a pinned page at once, and that may merge; the parent's stays where the device writes."""
    merged = players(host, 2, 7)
    p1, r1 = player(host, 7)
    p1.pin(r1, 0)
    child = p1.fork()
    assert host.observe().sharers(p1, r1, 0) == 1
    host.scan(3)
    seen = host.observe()
    assert seen.sharers(p1, r1, 0) == 1
    assert joined(seen, *merged, (child, r1))


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
