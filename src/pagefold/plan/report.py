"""Own the whole answer of a plan: every prediction, what was left out, and what to bear in mind."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pagefold.plan.prediction import Prediction, predict
from pagefold.plan.reading import Skipped
from pagefold.plan.table import PageTable
from pagefold.sources import Pages


@dataclass(frozen=True, slots=True)
class Report:
    """A plan: `predictions` for merge_across_nodes 1 and 0, each with use_zero_pages 0 and 1."""

    page_size: int
    max_page_sharing: int
    sources: tuple[Pages, ...]
    predictions: tuple[Prediction, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...]
    interval: float  # seconds between the two looks at a process; 0: one look
    advised_only: bool

    def prediction(self, merge_across_nodes: int, use_zero_pages: int) -> Prediction:
        """Return one of the four predictions."""
        return next(
            one
            for one in self.predictions
            if (one.merge_across_nodes, one.use_zero_pages) == (merge_across_nodes, use_zero_pages)
        )


def make_report(
    sources: Sequence[Pages],
    skipped: Sequence[Skipped],
    max_page_sharing: int,
    *,
    interval: float = 0.0,
    advised_only: bool = False,
    kernel: str | None = None,
) -> Report:
    """Predict all four settings from one reading; `kernel` is the release that will merge, by default this machine's."""
    drops = _splits_drop_zeroes(kernel or platform.release())
    table = PageTable.of(sources)
    predictions = tuple(
        predict(
            table,
            merge_across_nodes=across,
            use_zero_pages=zero,
            max_page_sharing=max_page_sharing,
            splits_drop_zeroes=drops,
        )
        for across in (1, 0)
        for zero in (0, 1)
    )
    notes = _notes(table)
    if not interval and any(pages.pid is not None for pages in sources):
        notes += ("processes were looked at once: which pages change is not known, and all count as calm",)
    return Report(
        table.page_size, max_page_sharing, tuple(sources), predictions, tuple(skipped), notes, interval, advised_only
    )


def _splits_drop_zeroes(release: str) -> bool:
    """Tell whether a kernel maps the zero page for pages of zeroes when it splits a huge page: Linux 6.12 and later."""
    numbers = re.match(r"(\d+)\.(\d+)", release)
    return numbers is None or (int(numbers[1]), int(numbers[2])) >= (6, 12)


def _notes(table: PageTable) -> tuple[str, ...]:
    """Say what limits the answer."""
    notes = []
    processes = [pages for pages in table.sources if pages.pid is not None]
    if not len(table):
        notes.append("there is no page that KSM would look at here")
    if any(not pages.frames_known for pages in processes if len(pages)):
        notes.append(
            "frame numbers are hidden (they need CAP_SYS_ADMIN): pages shared by fork are told by address and content"
        )
    merged = sum(int(pages.ksm.sum()) for pages in processes)
    if merged:
        notes.append(f"{merged:,} of these pages are merged already; the figures are against no merging at all")
    huge = sum(int(pages.huge.sum()) for pages in processes)
    if huge:
        notes.append(f"{huge:,} pages are in transparent huge pages, which merging would split")
    outside = int(table.outside.sum())
    if outside:
        notes.append(
            f"{outside:,} pages share their frame with processes that are not planned here: merging them frees nothing"
        )
    unknown = sum(int((pages.node < 0).sum()) for pages in table.sources)
    if 0 < unknown < len(table):
        notes.append(f"the node of {unknown:,} pages is not known: they count as node 0 where nodes matter")
    if len(table) and not any((pages.node >= 0).any() for pages in table.sources):
        notes.append(
            "the node of no page is known: all count as node 0, and both settings of merge_across_nodes are alike"
        )
    elif len(np.unique(table.node)) == 1:
        notes.append("all pages are on one NUMA node: both settings of merge_across_nodes are alike")
    left = {
        "already map the kernel's zero page and are never looked at": sum(pages.zero_mapped for pages in processes),
        "are in swap": sum(pages.swapped for pages in processes),
        "could not be read": sum(pages.unreadable for pages in table.sources),
        "went away between the looks": sum(pages.vanished for pages in processes),
        "are of memory that is not advised MERGEABLE": sum(pages.unadvised for pages in processes),
        "are shared, file or device memory, which KSM never looks at": sum(pages.incompatible for pages in processes),
        "are named by an image that does not hold them": sum(pages.missing for pages in table.sources),
    }
    notes += [f"left out: {count:,} pages {why}" for why, count in left.items() if count]
    return tuple(notes)
