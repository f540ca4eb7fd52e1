"""Own the whole answer to "why do these pages not merge": every resident page under one reason, sums that are the resident set.

The order in which reasons are asked is KSM's own: the kind of the area, whether the page is merged already, whether it is advised, its
content. So a page has the first reason that keeps it back; what is not advised is split once more, by what its content would decide.

Must not know: how it is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagefold.plan.content import decide, frames_freed
from pagefold.plan.diagnosis import Finding, diagnose
from pagefold.plan.looks import Looked
from pagefold.plan.machine_state import MachineState
from pagefold.plan.misalignment import Misplaced, find_misplaced
from pagefold.plan.reading import Skipped
from pagefold.plan.reasons import BESIDE, CODES, Reason, words
from pagefold.plan.table import PageTable
from pagefold.sources import Area

_MOST_PLACES = 20
_SHARED = ("/SYSV", "/dev/shm/", "/dev/zero")
_NAMES = {code: reason for reason, code in CODES.items()}


@dataclass(frozen=True, slots=True)
class AreaShare:
    """So many pages of one area."""

    pid: int | None
    label: str
    start: int
    end: int
    name: str  # '' for anonymous memory
    pages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """All pages of one reason."""

    reason: Reason
    pages: int
    text: str
    remedy: str
    frees: int = 0  # frames that would be free if these pages merged, with the remedy where that is needed
    huge: int = 0  # of them in transparent huge pages, which merging would split
    locked: int = 0  # of them in areas that mlock keeps in memory: that does not keep them from merging
    areas: tuple[AreaShare, ...] = ()  # the largest part first
    details: dict[str, Any] = field(default_factory=dict)
    would: tuple[Row, ...] = ()  # of NOT_ADVISED: what would become of them if they were advised


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why pages do not merge; the pages of `rows` add up to `rss`."""

    page_size: int
    rss: int  # pages, as smaps counts them
    processes: tuple[tuple[str, int | None, int], ...]  # label, PID, pages of Rss
    rows: tuple[Row, ...]  # the most pages first
    beside: tuple[Row, ...]  # memory that Rss does not count
    findings: tuple[Finding, ...]  # the machine's own state
    looks: int
    interval: float  # seconds between two looks
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]


def explain(
    looked: Sequence[Looked],
    state: MachineState,
    *,
    looks: int = 1,
    interval: float = 0.0,
    skipped: Sequence[Skipped] = (),
) -> Explanation:
    """Put every resident page under one reason, by the machine's present settings."""
    sources = [one.pages for one in looked]
    settings = (state.get("merge_across_nodes", 1), state.get("max_page_sharing", 256))
    table, now, advised_all = decide(sources, merge_across_nodes=settings[0], max_page_sharing=settings[1])
    now, advised_all, misplaced = _misaligned(looked, now, advised_all)
    view = _View(looked, table, state, misplaced, *settings)
    ksm = view.joined([_merged(one) for one in looked], np.bool_)
    advised = view.joined([pages.advised for pages in sources], np.bool_)
    code = np.where(advised, now, CODES[Reason.NOT_ADVISED])
    code[ksm] = CODES[Reason.MERGED]
    code[view.area < 0] = -1  # its area went: not resident any more
    rows = [view.row(reason, code) for reason in Reason if (code == CODES[reason]).any()]
    rows = [_split(view, row, code, advised_all) if row.reason is Reason.NOT_ADVISED else row for row in rows]
    rows += _kinds(looked, state)
    rss = sum(_rss(one) for one in looked)
    rows += _rest(rss - sum(row.pages for row in rows), sum(pages.unreadable for pages in sources), state)
    beside = [_plain(reason, pages, state) for reason, pages in zip(BESIDE, _beside(looked), strict=True) if pages]
    return Explanation(
        page_size=table.page_size,
        rss=rss,
        processes=tuple((one.pages.label, one.pages.pid, _rss(one)) for one in looked),
        rows=tuple(sorted(rows, key=lambda row: -abs(row.pages))),
        beside=tuple(beside),
        findings=diagnose(state, None if state.advised else int(advised.sum()) or len(table)),
        looks=looks,
        interval=interval,
        skipped=tuple(skipped),
        notes=tuple(_notes(looked, looks)),
    )


class _View:
    """The table of all listed pages, with what rows are made from."""

    def __init__(
        self,
        looked: Sequence[Looked],
        table: PageTable,
        state: MachineState,
        misplaced: Misplaced,
        across: int,
        limit: int,
    ) -> None:
        self.misplaced = misplaced
        self.looked, self.table, self.state, self.across, self.limit = looked, table, state, across, limit
        self.area = self.joined([one.area for one in looked], np.int64)
        self.huge = self.joined([one.pages.huge for one in looked], np.bool_)
        self.changes = self.joined([one.changes for one in looked], np.int32)
        locked = [np.array(["lo" in area.flags for area in one.areas] + [False], np.bool_)[one.area] for one in looked]
        self.locked = self.joined(locked, np.bool_)

    @staticmethod
    def joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
        """Concatenate, also nothing."""
        return np.concatenate([*parts, np.zeros(0, dtype)])

    def row(self, reason: Reason, code: NDArray[np.int8]) -> Row:
        """Return the row of the pages that have the code of a reason."""
        chosen = code == CODES[reason]
        details: dict[str, Any] = {}
        frees = frames_freed(self.table, chosen, reason, self.across, self.limit)
        if reason is Reason.MISALIGNED:
            inside = chosen[self.misplaced.page]
            frees = int(self.misplaced.frees[inside].sum())
            details = {"places": self._places(inside)}
        elif reason is Reason.MERGED:
            details = self._copies(chosen)
        elif reason is Reason.VOLATILE:
            times, pages = np.unique(self.changes[chosen], return_counts=True)
            details = {"changed_in_looks": {int(time): int(count) for time, count in zip(times, pages, strict=True)}}
        return replace(
            _plain(reason, int(chosen.sum()), self.state),
            frees=frees,
            huge=int((chosen & self.huge).sum()),
            locked=int((chosen & self.locked).sum()),
            areas=self._areas(chosen),
            details=details,
        )

    def _areas(self, chosen: NDArray[np.bool_]) -> tuple[AreaShare, ...]:
        most = 1 + max(len(one.areas) for one in self.looked)
        found, counts = np.unique(self.table.source[chosen] * np.int64(most) + self.area[chosen], return_counts=True)
        shares = []
        for place, count in zip(found.tolist(), counts.tolist(), strict=True):
            one = self.looked[place // most]
            shares.append(_share(one, one.areas[place % most], count))
        return tuple(sorted(shares, key=lambda share: -share.pages))

    def _places(self, inside: NDArray[np.bool_]) -> list[dict[str, Any]]:
        """Return the longest runs of misaligned pages: where they are, where their bytes are as well, and how many bytes."""
        found, size = self.misplaced, self.table.page_size
        page, to, other = (column[inside] for column in (found.page, found.other_source, found.other_address))
        source = self.table.source[page]
        address = self.joined([one.pages.address for one in self.looked], np.int64)[page]
        new = np.ones(len(page), np.bool_)
        new[1:] = (np.diff(address) != size) | (np.diff(other) != size) | (np.diff(source) != 0) | (np.diff(to) != 0)
        starts = np.flatnonzero(new)
        counts = np.diff(np.append(starts, len(page)))
        longest = starts[np.argsort(-counts, kind="stable")][:_MOST_PLACES]
        return [
            {
                "pid": self.looked[source[at]].pages.pid,
                "address": int(address[at]),
                "other_pid": self.looked[to[at]].pages.pid,
                "other_address": int(other[at]),
                "bytes": int(counts[np.searchsorted(starts, at)]) * size,
            }
            for at in longest.tolist()
        ]

    def _copies(self, merged: NDArray[np.bool_]) -> dict[str, Any]:
        """Say on how many copies merged pages are, and how many of these pages the fullest has; where frames are known."""
        frames = self.joined([one.pages.frame for one in self.looked], np.int64)[merged]
        if (frames < 0).any():
            return {}
        counts = np.unique(frames, return_counts=True)[1]
        return {"copies": len(counts), "most_on_one_copy": int(counts.max())}


def _split(view: _View, row: Row, code: NDArray[np.int8], advised_all: NDArray[np.int8]) -> Row:
    """Split what is not advised by what would become of it."""
    inner = np.where(code == CODES[Reason.NOT_ADVISED], advised_all, -1)
    parts = [view.row(_NAMES[one], inner) for one in np.unique(inner).tolist() if one >= 0]
    parts.sort(key=lambda part: -part.pages)
    # What needs more than advice (a setting, another offset) is told with its part only.
    frees = sum(part.frees for part in parts if part.reason in (Reason.WOULD_MERGE, Reason.OVER_LIMIT))
    return replace(row, frees=frees, would=tuple(parts))


def _misaligned(
    looked: Sequence[Looked], now: NDArray[np.int8], advised_all: NDArray[np.int8]
) -> tuple[NDArray[np.int8], NDArray[np.int8], Misplaced]:
    """Mark among the pages without an equal those that have one at another offset."""
    advised = np.concatenate([np.zeros(0, np.bool_), *(one.pages.advised for one in looked)])
    alone = np.where(advised, now, advised_all) == CODES[Reason.UNIQUE]
    bounds = np.cumsum([len(one.pages) for one in looked])[:-1]
    misplaced = find_misplaced(looked, np.split(alone, bounds))
    now, advised_all = now.copy(), advised_all.copy()
    now[misplaced.page] = advised_all[misplaced.page] = CODES[Reason.MISALIGNED]
    return now, advised_all, misplaced


def _plain(reason: Reason, pages: int, state: MachineState) -> Row:
    said = words(reason, state)
    return Row(reason=reason, pages=pages, text=said.text, remedy=said.remedy)


def _share(one: Looked, area: Area, pages: int) -> AreaShare:
    return AreaShare(one.pages.pid, one.pages.label, area.start, area.end, area.name, pages)


def _merged(one: Looked) -> NDArray[np.bool_]:
    """Tell which pages are merged.

    Where the kernel hides that, take as many in each area as smaps counts, those mapped more than once first.
    """
    pages, area = one.pages, one.area
    merged = pages.ksm.copy()
    kib = pages.page_size // 1024
    for index, place in enumerate(one.areas):
        count = place.kib.get("KSM", 0) // kib
        if count and not pages.frames_known:
            members = np.flatnonzero(area == index)
            members = members[np.argsort(pages.exclusive[members], kind="stable")]
            merged[members[:count]] = True
    return merged


def _rss(one: Looked) -> int:
    return sum(area.kib.get("Rss", 0) for area in one.areas) * 1024 // one.pages.page_size


def _kinds(looked: Sequence[Looked], state: MachineState) -> list[Row]:
    """Return the rows of pages whose area decides: those that `Pages` does not list."""
    shares: dict[Reason, list[tuple[AreaShare, bool]]] = {}
    for one in looked:
        for area in one.areas:
            kib = area.kib.get("Rss", 0) - (area.kib.get("Anonymous", 0) if area.compatible else 0)
            if pages := kib * 1024 // one.pages.page_size:
                shares.setdefault(_kind(area), []).append((_share(one, area, pages), "lo" in area.flags))
    return [
        replace(
            _plain(reason, sum(share.pages for share, _ in found), state),
            locked=sum(share.pages for share, locked in found if locked),
            areas=tuple(sorted((share for share, _ in found), key=lambda share: -share.pages)),
        )
        for reason, found in shares.items()
    ]


def _kind(area: Area) -> Reason:
    """Say what kind of memory an area has, but for its private anonymous pages."""
    if "ht" in area.flags:
        return Reason.HUGE_TLB
    if "pf" in area.flags:
        return Reason.PFN_MAPPED
    if area.flags & {"io", "de", "mm"} or area.end > 1 << 63:
        return Reason.DEVICE
    if area.flags & {"dp", "ss"}:
        return Reason.OTHER_KIND
    if area.name.startswith("/memfd:"):
        return Reason.MEMFD
    return Reason.SHARED_MEMORY if area.name.startswith(_SHARED) else Reason.FILE


def _rest(pages: int, unreadable: int, state: MachineState) -> list[Row]:
    """Return the rows of what is missing to the resident set: what could not be read, and what came or went."""
    unreadable = max(min(unreadable, pages), 0)
    parts = {Reason.UNREADABLE: unreadable, Reason.MOVED: pages - unreadable}
    return [_plain(reason, count, state) for reason, count in parts.items() if count]


def _beside(looked: Sequence[Looked]) -> tuple[int, int, int]:
    """Count huge-TLB pages (in pages of normal size), mappings of the zero page, and pages in swap."""
    size = looked[0].pages.page_size if looked else 4096
    huge = sum(
        area.kib.get(name, 0) for one in looked for area in one.areas for name in ("Shared_Hugetlb", "Private_Hugetlb")
    )
    return huge * 1024 // size, sum(one.pages.zero_mapped for one in looked), sum(one.pages.swapped for one in looked)


def _notes(looked: Sequence[Looked], looks: int) -> list[str]:
    """Say what limits the answer."""
    notes = []
    if looks == 1:
        notes.append("one look only: which pages change is not known, and all count as calm")
    if any(not one.pages.frames_known for one in looked if len(one.pages)):
        notes.append(
            "frame numbers are hidden (they need CAP_SYS_ADMIN): which pages are merged is told by area, shared ones by content"
        )
    notes.append("equals are looked for in the processes named, and nowhere else")
    notes.append("pinned pages (I/O buffers) do not merge, and cannot be seen from outside")
    return notes
