"""Own the reasons why pages do not merge: their names, words, and what can be done about each.

Must not know: pages, or how a reason is found.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pagefold.plan.diagnosis import OPT_IN, rewrite, write
from pagefold.plan.machine_state import MachineState


class Reason(Enum):
    """Why a page is as it is; every resident page has exactly one. The value is its name for programs."""

    # what the kind of the area decides: KSM never looks there
    FILE = "file"
    SHARED_MEMORY = "shared_memory"
    MEMFD = "memfd"
    DEVICE = "device"
    PFN_MAPPED = "pfn_mapped"
    OTHER_KIND = "other_kind"
    # what the kernel did, or was not asked to do
    MERGED = "merged"
    NOT_ADVISED = "not_advised"
    # what the content decides
    VOLATILE = "volatile"
    ZERO = "zero"
    WOULD_MERGE = "would_merge"
    OVER_LIMIT = "over_max_page_sharing"
    OTHER_NODE = "other_node"
    EQUAL_UNADVISED = "equal_not_advised"
    MISALIGNED = "misaligned"
    FORKED = "forked"
    UNIQUE = "unique"
    # what reading could not settle
    UNREADABLE = "unreadable"
    MOVED = "came_or_went"  # may be negative: more were read than the kernel counted a moment later
    # beside the resident set
    HUGE_TLB = "huge_tlb"
    ZERO_PAGE = "zero_page"
    SWAPPED = "swapped"


BESIDE = (Reason.HUGE_TLB, Reason.ZERO_PAGE, Reason.SWAPPED)  # memory that Rss does not count
CODES = {reason: number for number, reason in enumerate(Reason)}  # for arrays

_ALIGN = "data = numpy.frombuffer(mmap.mmap(-1, size), dtype)  # begins at a page, wherever it is made"
_HUGE = "memory.madvise(mmap.MADV_HUGEPAGE)  # on private memory, in place of MAP_HUGETLB"
_PRIVATE = "memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # may merge where MAP_SHARED may not"
_UNADVISE = "memory.madvise(mmap.MADV_UNMERGEABLE)"


@dataclass(frozen=True, slots=True)
class Words:
    """What is said of a reason: `text` follows 'so much of so much'; `remedy` is a command or a line of code, '' if there is none."""

    text: str
    remedy: str = ""


def words(reason: Reason, state: MachineState) -> Words:
    """Say a reason, with the remedy that fits this machine's present settings."""
    limit = state.get("max_page_sharing", 256)
    runs = state.get("run") == 1
    if reason is Reason.WOULD_MERGE:
        return Words(
            "have equals and merge within two passes of ksmd" if runs else "have equals and would merge if KSM ran",
            "" if runs else write("run", 1),
        )
    if reason is Reason.ZERO:
        on = bool(state.get("use_zero_pages"))
        text = "are full of zeroes" + (
            ": they would map the zero page" if on else "; with use_zero_pages they would need no memory at all"
        )
        return Words(text, "" if on or "use_zero_pages" not in state.knobs else write("use_zero_pages", 1))
    if reason is Reason.OVER_LIMIT:
        text = f"have equals, but more than max_page_sharing ({limit:,}): they need further copies"
        return Words(text, rewrite("max_page_sharing", min(limit * 16, 2**31 - 1)))
    if reason is Reason.OTHER_NODE:
        text = "have equals on other NUMA nodes only, and merge_across_nodes is 0"
        return Words(text, rewrite("merge_across_nodes", 1))
    return _WORDS[reason]


_WORDS = {
    Reason.FILE: Words("are pages of files: the page cache holds them once already, and KSM never looks at them"),
    Reason.SHARED_MEMORY: Words("are shared memory (shmem, System V): KSM never looks at it", _PRIVATE),
    Reason.MEMFD: Words("are of memfds: KSM never looks at them", _PRIVATE),
    Reason.DEVICE: Words("are the kernel's own or a device's (vdso, drivers, fixed mappings): KSM never looks at them"),
    Reason.PFN_MAPPED: Words("are bare frames that a driver mapped: KSM never looks at them"),
    Reason.OTHER_KIND: Words("are droppable memory or shadow stacks: KSM never looks at them"),
    Reason.MERGED: Words("are merged now"),
    Reason.NOT_ADVISED: Words("are never looked at: nothing advised them", OPT_IN),
    Reason.VOLATILE: Words("changed between the looks: pages that are written never merge", _UNADVISE),
    Reason.EQUAL_UNADVISED: Words("have equals only in memory that nobody advised", OPT_IN),
    Reason.MISALIGNED: Words("have the same bytes elsewhere, at another offset in the page", _ALIGN),
    Reason.FORKED: Words("are shared by a fork already: one frame, and no equal elsewhere"),
    Reason.UNIQUE: Words("have no equal in these processes", _UNADVISE),
    Reason.UNREADABLE: Words("could not be read"),
    Reason.MOVED: Words("came or went while being read"),
    Reason.HUGE_TLB: Words("are huge-TLB pages: KSM never looks at them", _HUGE),
    Reason.ZERO_PAGE: Words("map the kernel's zero page: they need no memory"),
    Reason.SWAPPED: Words("are in swap: KSM looks at what is in memory"),
}  # fmt: skip
