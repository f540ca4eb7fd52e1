"""Own the looks at running processes: several of them, how often each page changed, and the areas as they were at the end.

Must not know: what a page's reason is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagefold.errors import PagefoldError, UsageError
from pagefold.plan.reading import Progress, Reader, Skipped
from pagefold.sources import Area, Pages, ProcessReader

MOST_LOOKS = 100


@dataclass(frozen=True, slots=True)
class Looked:
    """One process after all looks."""

    pages: Pages  # as last seen; `volatile` if any look differed from the one before
    changes: NDArray[np.int32]  # for each page, how many looks differed from the one before
    areas: tuple[Area, ...]  # right after the last look, by address
    reader: ProcessReader | None = None  # to read bytes again; None: they cannot be had

    @property
    def area(self) -> NDArray[np.int64]:
        """Return for each page the index of its area; -1 where the area went."""
        starts = np.array([area.start for area in self.areas if area.end <= 1 << 63], np.int64)
        ends = np.array([area.end for area in self.areas if area.end <= 1 << 63], np.int64)
        index = np.searchsorted(starts, self.pages.address, "right") - 1
        index[(index >= 0) & (self.pages.address >= ends[np.maximum(index, 0)])] = -1
        return index


def check_looks(looks: int) -> None:
    """Raise UsageError for a number of looks that cannot be."""
    if not 1 <= looks <= MOST_LOOKS:
        raise UsageError(f"{looks} looks cannot be taken; use 1 to {MOST_LOOKS}")


def take_looks(reader: Reader, looks: int, progress: Progress, rest: Callable[[float], None]) -> list[Looked]:
    """Look at all processes of `reader` so often, `rest(reader.interval)` in between; what ends meanwhile is in `reader.skipped`.

    Raises UsageError for a number of looks that cannot be, and what `Reader` says when nothing is left.
    """
    check_looks(looks)
    seen: dict[ProcessReader, tuple[Pages, NDArray[np.int32]]] = {}
    errors: list[PagefoldError] = []
    for number in range(looks):
        if number and seen:
            progress(f"waiting for look {number + 1}", 0, 1)
            rest(reader.interval)
        for one in reader.readers if not number else list(seen):
            before, changes = seen.pop(one, (None, np.zeros(0, np.int32)))
            pages = reader.look(one, before, progress)
            if pages is None:
                continue
            seen[one] = (pages, _changes(before, changes, pages))
    answer = []
    for one in reader.readers:
        if one in seen:
            try:
                answer.append(Looked(*seen[one], tuple(one.areas()), one))
            except PagefoldError as error:
                errors.append(error)
                reader.skipped.append(Skipped(str(one.pid), str(error)))
    if not answer:
        raise reader.refusal() or errors[0]
    return answer


def _changes(before: Pages | None, changes: NDArray[np.int32], after: Pages) -> NDArray[np.int32]:
    """Count on: `after` has no address that `before` had not."""
    if before is None:
        return np.zeros(len(after), np.int32)
    place = np.searchsorted(before.address, after.address)
    differs = (before.high[place] != after.high) | (before.low[place] != after.low)
    total: NDArray[np.int32] = changes[place] + differs.astype(np.int32)
    return total
