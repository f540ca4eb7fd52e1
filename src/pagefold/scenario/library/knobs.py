"""The files of /sys/kernel/mm/ksm: what they take, what they refuse, and how."""

from __future__ import annotations

import errno

from pagefold.scenario.files import states
from pagefold.scenario.host import KNOBS, Host
from pagefold.scenario.library.stage import joined, player, players, refused


@states(needs=set(KNOBS))
def scenario_knobs_read_back(host: Host) -> None:
    """Every knob reads what was written to it last."""
    for knob, default in KNOBS.items():
        assert host.get(knob) == default, knob
    assert host.get("run") == 1
    for knob, value in (
        ("sleep_millisecs", 4294967295),
        ("pages_to_scan", 0),
        ("pages_to_scan", 4294967295),
        ("merge_across_nodes", 0),
        ("max_page_sharing", 2),
        ("max_page_sharing", 2**31 - 1),
        ("use_zero_pages", 1),
        ("smart_scan", 0),
        ("stable_node_chains_prune_millisecs", 0),
        ("advisor_max_cpu", 99),
        ("advisor_min_pages_to_scan", 1000),
        ("advisor_max_pages_to_scan", 2000),
        ("advisor_target_scan_time", 1),
        ("advisor_mode", "scan-time"),
        ("advisor_mode", "none"),
        ("run", 0),
        ("run", 2),
        ("run", 1),
    ):
        host.set(knob, value)
        assert host.get(knob) == value, knob


@states(needs={"merge_across_nodes", "max_page_sharing", "use_zero_pages", "smart_scan"})
def scenario_values_out_of_range_are_invalid(host: Host) -> None:
    """A value that a knob cannot have is refused with EINVAL, and nothing changes."""
    for knob, values in {
        "run": (3, 4, -1, "on"),
        "pages_to_scan": (-1, 2**32, "many"),
        "sleep_millisecs": (-1, 2**32, "1.5"),
        "merge_across_nodes": (2, -1, "yes"),
        "max_page_sharing": (1, 0, -1, "all"),
        "use_zero_pages": (2, -1),
        "smart_scan": (2, -1),
        "stable_node_chains_prune_millisecs": (-1, 2**32),
    }.items():
        before = host.get(knob)
        for value in values:
            with refused(errno.EINVAL):
                host.set(knob, value)
            assert host.get(knob) == before, knob


@states(needs={"advisor_mode"})
def scenario_advisor_values_out_of_range(host: Host) -> None:
    """The advisor has two modes, and its scan time must be a second at least."""
    for knob, values in {
        "advisor_mode": ("nonsense", "scan", ""),
        "advisor_max_cpu": (-1, "much"),
        "advisor_min_pages_to_scan": (-1,),
        "advisor_max_pages_to_scan": (-1,),
        "advisor_target_scan_time": (0, -1),
    }.items():
        before = host.get(knob)
        for value in values:
            with refused(errno.EINVAL):
                host.set(knob, value)
            assert host.get(knob) == before, knob


@states(needs={"advisor_mode"})
def scenario_advisor_owns_pages_to_scan(host: Host) -> None:
    """With the advisor on pages_to_scan cannot be set; it begins at the advisor's least, and at 100 when it is off again."""
    host.set("pages_to_scan", 7)
    host.set("advisor_mode", "scan-time")
    assert host.get("pages_to_scan") == 500
    for value in (7, 500):
        with refused(errno.EINVAL):
            host.set("pages_to_scan", value)
    host.set("advisor_mode", "none")
    assert host.get("pages_to_scan") == 100
    host.set("pages_to_scan", 7)
    assert host.get("pages_to_scan") == 7


@states(needs={"merge_across_nodes", "max_page_sharing"})
def scenario_what_needs_an_empty_forest_is_busy(host: Host) -> None:
    """While a merged page exists merge_across_nodes and max_page_sharing are busy, but for the value they have."""
    host.set("merge_across_nodes", 0)
    host.set("max_page_sharing", 5)
    (p1, _), (p2, r2) = equal = players(host, 2, 7)
    host.scan(2)
    for knob, now, other in (("merge_across_nodes", 0, 1), ("max_page_sharing", 5, 6)):
        with refused(errno.EBUSY):
            host.set(knob, other)
        host.set(knob, now)
        assert host.get(knob) == now
    assert joined(host.observe(), *equal)
    p1.exit()
    host.scan()
    with refused(errno.EBUSY):
        host.set("max_page_sharing", 6)
    p2.write(r2, 0, 8)
    with refused(errno.EBUSY):
        host.set("max_page_sharing", 6)
    host.scan()
    assert host.get("pages_shared") == 0
    host.set("max_page_sharing", 6)
    host.set("merge_across_nodes", 1)


@states(needs={"max_page_sharing"})
def scenario_run_2_frees_the_busy_knobs(host: Host) -> None:
    """After `run` 2 nothing is merged, and max_page_sharing can change; the new limit holds for what merges then."""
    five = players(host, 5, 7)
    host.scan(2)
    with refused(errno.EBUSY):
        host.set("max_page_sharing", 2)
    host.set("run", 2)
    host.set("max_page_sharing", 2)
    host.set("run", 1)
    host.scan(3)
    seen = host.observe()
    assert max(seen.sharers(p, r, 0) for p, r in five) == 2
    assert (seen["pages_shared"], seen["pages_unshared"]) == (2, 1)


def scenario_run_2_twice_does_nothing(host: Host) -> None:
    """`run` 2 written again, or 1 and 0 in any order, changes nothing but `run`."""
    equal = players(host, 2, 7)
    host.scan(2)
    for value in (0, 1, 0, 0, 1, 1):
        host.set("run", value)
        assert joined(host.observe(), *equal)
    for value in (2, 2, 0, 2, 1):
        host.set("run", value)
        seen = host.observe()
        assert (seen["pages_shared"], seen["full_scans"]) == (0, 0)


def scenario_pages_to_scan_does_not_change_what_merges(host: Host) -> None:
    """How many pages a batch looks at, and how long it rests, changes when things merge, and not what."""
    host.set("pages_to_scan", 1)
    host.set("sleep_millisecs", 0)
    one, other = player(host, 7, 8, 9), player(host, 9, 8, 7)
    host.scan(2)
    seen = host.observe()
    assert all(seen.sharers(p, r, index) == 2 for p, r in (one, other) for index in range(3))
    assert (host.get("pages_to_scan"), host.get("sleep_millisecs")) == (1, 0)
