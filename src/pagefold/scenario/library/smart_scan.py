"""Smart scan: pages that never merged are looked at less and less often."""

from __future__ import annotations

from pagefold.scenario.host import Host
from pagefold.scenario.library.stage import joined, player, players

knobs = {"smart_scan": 1}
# In which full scan a page that never merges is looked at; in all others it is skipped.
LOOKED_AT = (1, 2, 3, 4, 6, 9, 14, 23, 32)


def scenario_pages_skipped_to_the_page(host: Host) -> None:
    """A page of age 3 is skipped once, then twice, four times, then eight times between any two looks."""
    player(host, 7)
    for scan in range(1, 33):
        host.scan()
        seen = host.observe()
        looks = sum(at <= scan for at in LOOKED_AT)
        assert (seen["pages_scanned"], seen["pages_skipped"]) == (looks, scan - looks)
        assert seen["pages_unshared"] == (scan > 1 and scan in LOOKED_AT)


def scenario_merged_pages_do_not_age(host: Host) -> None:
    """A KSM page is met in every scan; one that was merged for long is as young as on the day of its merge, when it is written."""
    (p1, r1), (p2, r2) = players(host, 2, 7)
    host.scan(12)
    seen = host.observe()
    assert (seen["pages_scanned"], seen["pages_skipped"]) == (24, 0)
    p1.write(r1, 0, 9)
    new = player(host, 9)
    host.scan(2)
    seen = host.observe()
    assert joined(seen, (p1, r1), new)
    assert (seen["pages_skipped"], seen.sharers(p2, r2, 0)) == (0, 1)


def scenario_pages_of_different_age_may_never_meet(host: Host) -> None:
    """Two old pages that are looked at in different scans miss each other every time, though they are equal."""
    p1, r1 = player(host, 1)
    host.scan(4)
    p2, r2 = player(host, 2)
    host.scan(28)
    p1.write(r1, 0, 7)
    p2.write(r2, 0, 7)
    host.scan(30)
    assert host.observe()["pages_sharing"] == 0
    host.set("smart_scan", 0)
    host.scan(2)
    assert joined(host.observe(), (p1, r1), (p2, r2))


def scenario_new_mapping_is_young_again(host: Host) -> None:
    """Age is the rmap_item's: a page un-advised for one scan and advised again is looked at like a new one."""
    p1, r1 = player(host, 7)
    host.scan(15)
    skipped = host.get("pages_skipped")
    p1.madvise(r1, "UNMERGEABLE")
    host.scan()
    p1.madvise(r1, "MERGEABLE")
    new = player(host, 7)
    host.scan(2)
    assert host.get("pages_skipped") == skipped
    assert joined(host.observe(), (p1, r1), new)
