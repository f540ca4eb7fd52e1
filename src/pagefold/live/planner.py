"""Own how wished pages become runs: neighbours in memory with neighbouring slots, at most RUN_PAGES long, within the client's VMA budget.

Must not know: sockets, the engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from pagefold.live.messages import PAGE, PRIVATE, RUN_PAGES
from pagefold.live.region import HOLE, SHIFT, Int64, Region


@dataclass(frozen=True)
class Run:
    """Pages `index` to `index + pages` of a region that shall map slots from `target` on (HOLE: nothing, 0: pages of their own)."""

    region: Region
    index: int
    pages: int
    target: int

    @property
    def record(self) -> tuple[int, int, int, int, int, int]:
        """The run as `messages.run` says it."""
        start = self.region.start + self.index * PAGE
        if self.target > 0:
            return self.region.number, start, self.pages, self.target >> SHIFT, self.target & 0xFFFFFFFF, 0
        return self.region.number, start, self.pages, PRIVATE if self.target == 0 else 0, 0, 0


def runs_of(region: Region, index: Int64, target: Int64) -> list[Run]:
    """Group pages (ascending) into runs."""
    if not len(index):
        return []
    slots = target > 0
    same = np.where(slots[1:], target[1:] == target[:-1] + 1, target[1:] == target[:-1])
    new = np.ones(len(index), np.bool_)
    new[1:] = (np.diff(index) != 1) | ~same
    first = np.flatnonzero(new)
    lengths = np.diff(first, append=len(index))
    runs = []
    for begin, length in zip(first.tolist(), lengths.tolist(), strict=True):
        for at in range(begin, begin + length, RUN_PAGES):
            count = min(RUN_PAGES, begin + length - at)
            runs.append(Run(region, int(index[at]), count, int(target[at])))
    return runs


def by_region(runs: list[Run]) -> Iterator[tuple[Region, Int64, Int64]]:
    """Yield the pages of runs, region by region, and what each shall map: what `runs_of` began with."""
    for region, group in groupby(runs, key=lambda run: run.region):
        rows = np.array([(run.index, run.pages, run.target) for run in group])
        first, pages, target = rows[:, 0], rows[:, 1], np.repeat(rows[:, 2], rows[:, 1])
        within = np.arange(pages.sum()) - np.repeat(np.cumsum(pages) - pages, pages)
        yield region, np.repeat(first, pages) + within, np.where(target > 0, target + within, target)


def costs_mappings(run: Run) -> int:
    """Return how many mappings (VMAs) a run of slots adds at most: none where it continues what is beside it, two if it stands alone."""
    if run.target <= 0:
        return 0
    wanted, before, after = run.region.wanted, run.index - 1, run.index + run.pages
    joins = int(before < 0 or wanted[before] == run.target - 1)
    return 2 - joins - int(after >= run.region.pages or wanted[after] == run.target + run.pages)


def within_budget(runs: list[Run], budget: int) -> tuple[list[Run], list[Run]]:
    """Split runs into those that the budget of mappings allows, longest first, and the rest. Order is kept."""
    costs = [costs_mappings(run) for run in runs]
    if sum(costs) <= budget:
        return runs, []
    allowed: NDArray[np.bool_] = np.zeros(len(runs), np.bool_)
    for at in sorted(range(len(runs)), key=lambda at: -runs[at].pages):
        if costs[at] <= budget:
            budget -= costs[at]
            allowed[at] = True
    return (
        [run for run, yes in zip(runs, allowed, strict=True) if yes],
        [run for run, yes in zip(runs, allowed, strict=True) if not yes],
    )


__all__ = ["HOLE", "Run", "costs_mappings", "runs_of", "within_budget"]
