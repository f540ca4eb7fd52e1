"""The files of /sys/kernel/mm/ksm: what they take, what they refuse, and how."""

from __future__ import annotations

import errno

from pagefold.scenario.files import states
from pagefold.scenario.host import KNOBS, Host
from pagefold.scenario.library.stage import joined, players, refused


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


@states(needs=set(KNOBS))
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
        "advisor_mode": ("nonsense", "scan", 1),
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


@states(needs={"max_page_sharing"})
def scenario_numbers_as_text(host: Host) -> None:
    """A number may have a plus sign, zeros in front and one newline behind, and nothing else."""
    for text in ("5\n", "+5", "005"):
        host.set("max_page_sharing", text)
        assert host.get("max_page_sharing") == 5
        host.set("max_page_sharing", 6)
    for text in (" 5", "5 ", "5\n\n", "0x5", "1_0", "5.0", "five"):
        for knob in ("max_page_sharing", "sleep_millisecs"):
            with refused(errno.EINVAL):
                host.set(knob, text)
    assert host.get("max_page_sharing") == 6


@states(needs={"merge_across_nodes", "max_page_sharing"})
def scenario_numbers_too_large(host: Host) -> None:
    """A number that does not fit is out of range for max_page_sharing and merge_across_nodes, and invalid for other knobs."""
    for knob, value, code in (
        ("max_page_sharing", 2**31, errno.ERANGE),
        ("merge_across_nodes", 2**64, errno.ERANGE),
        ("merge_across_nodes", 2**32, errno.EINVAL),
        ("pages_to_scan", 2**32, errno.EINVAL),
    ):
        with refused(code):
            host.set(knob, value)


@states(needs={"use_zero_pages", "smart_scan"})
def scenario_yes_and_no_as_text(host: Host) -> None:
    """use_zero_pages and smart_scan also take yes and no, on and off, in words or by their first letter."""
    for knob in ("use_zero_pages", "smart_scan"):
        for yes, no in ((1, 0), ("1\n", "0\n"), ("y", "n"), ("Yes", "No"), ("on", "off")):
            host.set(knob, yes)
            assert host.get(knob) == 1
            host.set(knob, no)
            assert host.get(knob) == 0
        with refused(errno.EINVAL):
            host.set(knob, "maybe")


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
    """While a KSM page has a sharer, merge_across_nodes and max_page_sharing are busy, but for the value they have.

    Free are they after `run` 2, or when the scan has noticed that the last sharer is gone.
    """
    host.set("merge_across_nodes", 0)
    host.set("max_page_sharing", 5)
    three = players(host, 3, 7)
    host.scan(2)
    for knob, now, other in (("merge_across_nodes", 0, 1), ("max_page_sharing", 5, 2)):
        with refused(errno.EBUSY):
            host.set(knob, other)
        host.set(knob, now)
        assert host.get(knob) == now
    assert joined(host.observe(), *three)
    host.set("run", 2)
    host.set("merge_across_nodes", 1)
    host.set("max_page_sharing", 2)
    host.set("run", 1)
    host.scan(2)
    seen = host.observe()
    assert joined(seen, *three[:2])
    assert seen.sharers(*three[2], 0) == 1
    for process, area in three[:2]:
        process.write(area, 0, 8)
        with refused(errno.EBUSY):
            host.set("max_page_sharing", 3)
    host.scan()
    host.set("max_page_sharing", 3)
