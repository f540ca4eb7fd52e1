"""Own the knobs: the kernel's names, defaults, limits, and what it answers when a value is refused.

Every knob is a file of /sys/kernel/mm/ksm. Must not know the engine: whether a busy knob may change is its affair.
"""

from __future__ import annotations

import errno
import operator
import re
from dataclasses import dataclass
from typing import Literal

from pagefold.errors import KnobInvalid, UnknownKnob, UsageError

Rules = Literal["classic", "mainline", "pagefold"]
RULES: tuple[Rules, ...] = ("classic", "mainline", "pagefold")
UINT_MAX = 2**32 - 1
ULONG_MAX = 2**64 - 1


@dataclass(frozen=True)
class Knob:
    """One knob: inclusive limits, the unit, and whether the classic rules know it."""

    name: str
    default: int
    low: int
    high: int
    unit: str
    help: str
    classic: bool = True


def _knob(name: str, default: int, low: int, high: int, unit: str, help_: str, *, classic: bool = True) -> Knob:
    return Knob(name, default, low, high, unit, help_, classic)


KNOBS: dict[str, Knob] = {
    knob.name: knob
    for knob in (
        _knob("run", 0, 0, 2, "", "0 stop (merged pages stay), 1 merge, 2 unmerge everything"),
        _knob("pages_to_scan", 100, 0, UINT_MAX, "pages", "how many pages one batch looks at"),
        _knob("sleep_millisecs", 20, 0, UINT_MAX, "ms", "rest between two batches"),
        _knob("merge_across_nodes", 1, 0, 1, "", "1: pages of different NUMA nodes may merge"),
        _knob("max_page_sharing", 256, 2, 2**31 - 1, "pages", "most mappings of one KSM page", classic=False),
        _knob("use_zero_pages", 0, 0, 1, "", "1: pages of zeroes become the kernel's zero page", classic=False),
        _knob("smart_scan", 1, 0, 1, "", "1: pages that never merged are looked at less often", classic=False),
        _knob(
            "stable_node_chains_prune_millisecs",
            *(2000, 0, UINT_MAX, "ms", "how often chains are searched for stale nodes"),
            classic=False,
        ),
        _knob("advisor_mode", 0, 0, 1, "", "none, or scan-time: pages_to_scan is tuned after each scan", classic=False),
        _knob("advisor_max_cpu", 70, 0, ULONG_MAX, "%", "most CPU the advisor lets the scan use", classic=False),
        _knob("advisor_min_pages_to_scan", 500, 0, ULONG_MAX, "pages", "where the advisor starts", classic=False),
        _knob("advisor_max_pages_to_scan", 30000, 0, ULONG_MAX, "pages", "the advisor's limit", classic=False),
        _knob("advisor_target_scan_time", 200, 1, ULONG_MAX, "s", "how long a full scan should take", classic=False),
    )
}
ADVISOR_MODES = ("none", "scan-time")
# Of these the kernel passes on that its parser says ERANGE, where the number does not fit its type; of all others it says EINVAL.
_TYPE_MAX = {"max_page_sharing": 2**31 - 1, "merge_across_nodes": ULONG_MAX}
_YES_OR_NO = ("use_zero_pages", "smart_scan")  # knobs that take words too


def check_rules(rules: str) -> Rules:
    """Return the name of a rule set, or raise UsageError."""
    for known in RULES:
        if rules == known:
            return known
    raise UsageError(f"rules {rules!r} are not known; use one of {', '.join(RULES)}")


def find(name: str, rules: Rules = "mainline") -> Knob:
    """Return the knob of that name; UnknownKnob, or KnobInvalid where the rule set has no such knob."""
    knob = KNOBS.get(name)
    if knob is None:
        raise UnknownKnob(f"there is no knob {name!r}; the knobs are {', '.join(KNOBS)}")
    if rules == "classic" and not knob.classic:
        raise KnobInvalid(name, "the classic rules have no such knob; use rules='mainline'")
    return knob


def parse(knob: Knob, value: int | str) -> int:
    """Turn what a user gives into the knob's number, or raise KnobInvalid with the limits."""
    if knob.name == "advisor_mode":
        if value not in ADVISOR_MODES:
            raise KnobInvalid(knob.name, f"{value!r} is not a mode; use {' or '.join(ADVISOR_MODES)}")
        return ADVISOR_MODES.index(str(value))
    if knob.name in _YES_OR_NO and isinstance(value, str):
        return _yes_or_no(knob, value)
    try:
        number = _number(value) if isinstance(value, str) else operator.index(value)
    except (ValueError, TypeError):
        raise KnobInvalid(knob.name, f"{value!r} is not a whole number; use {knob.low} to {knob.high}") from None
    if not knob.low <= number <= knob.high:
        code = errno.ERANGE if number > _TYPE_MAX.get(knob.name, number) else errno.EINVAL
        raise KnobInvalid(knob.name, f"{number} is out of range; use {knob.low} to {knob.high}", code)
    return number & UINT_MAX if knob.name == "advisor_max_cpu" else number  # the kernel keeps 32 bits of it


def _number(text: str) -> int:
    """Read a number as the kernel does: decimal, perhaps with a sign and with one newline behind; ValueError for anything else."""
    if not re.fullmatch(r"[+-]?[0-9]+\n?", text, re.ASCII):
        raise ValueError
    return int(text)


def _yes_or_no(knob: Knob, text: str) -> int:
    """Read yes or no as the kernel does, by the first letter, or two of them: y, t, 1, on; n, f, 0, off."""
    start = text[:2].lower()
    if start[:1] in ("y", "t", "1") or start == "on":
        return 1
    if start[:1] in ("n", "f", "0") or start == "of":
        return 0
    raise KnobInvalid(knob.name, f"{text!r} is neither yes nor no; use 0 or 1")
