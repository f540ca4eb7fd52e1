"""Own what the content of pages decides: for each page of some processes, what KSM would make of it if it looked at these pages.

Must not know: areas, who is advised, what is merged already.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagefold.plan.prediction import PageState, page_states
from pagefold.plan.reasons import CODES, Reason
from pagefold.plan.table import PageTable
from pagefold.sources import Pages

_NO_LIMIT = 2**62  # of max_page_sharing: which page goes to which copy is decided here


def content_reasons(table: PageTable, *, merge_across_nodes: int, max_page_sharing: int) -> NDArray[np.int8]:
    """Return the code of a content reason for every page: the first of volatile, zero, and what equals there are.

    Pages of one content fill one copy after the other, those merged already first; what does not fit on the first is OVER_LIMIT.
    """
    anywhere = page_states(table, merge_across_nodes=1, max_page_sharing=_NO_LIMIT)
    here = anywhere if merge_across_nodes else page_states(table, merge_across_nodes=0, max_page_sharing=_NO_LIMIT)
    shared = table.outside | (np.bincount(table.frame, minlength=len(table))[table.frame] > 1)
    merges = here == PageState.MERGED
    reason = np.full(len(table), CODES[Reason.UNIQUE], np.int8)
    reason[shared] = CODES[Reason.FORKED]
    reason[anywhere == PageState.MERGED] = CODES[Reason.OTHER_NODE]
    reason[merges] = CODES[Reason.WOULD_MERGE]
    reason[merges & (_rank(table, merges, merge_across_nodes) >= max_page_sharing)] = CODES[Reason.OVER_LIMIT]
    reason[(table.high == 0) & (table.low == 0)] = CODES[Reason.ZERO]
    reason[table.volatile] = CODES[Reason.VOLATILE]
    return reason


def _rank(table: PageTable, merges: NDArray[np.bool_], merge_across_nodes: int) -> NDArray[np.int64]:
    """Return each merging page's place among those of its content (and node), merged ones first, then in the order of a scan."""
    page = np.flatnonzero(merges)
    ksm = np.concatenate([np.zeros(0, np.bool_), *(pages.ksm for pages in table.sources)])[page]
    node = np.zeros(len(page), np.int16) if merge_across_nodes else table.node[page]
    order, new = _groups([table.high[page], table.low[page], node], [page, ~ksm])
    start = np.maximum.accumulate(np.where(new, np.arange(len(page)), 0))
    rank = np.zeros(len(table), np.int64)
    rank[page[order]] = np.arange(len(page)) - start
    return rank


def _groups(keys: list[NDArray[Any]], within: list[NDArray[Any]]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the order that brings equal keys together (and, among them, sorts by `within`, the last first), and where a group begins."""
    order = np.lexsort([*within, *keys])
    new = np.ones(len(order), np.bool_)
    new[1:] = np.logical_or.reduce([key[order][1:] != key[order][:-1] for key in keys])
    return order, new


def frames_freed(
    table: PageTable, chosen: NDArray[np.bool_], reason: Reason, merge_across_nodes: int, limit: int
) -> int:
    """Return how many frames would be free if the chosen pages, all of one reason, merged among themselves as that reason says."""
    page = np.flatnonzero(chosen & ~table.outside)
    frames = len(np.unique(table.frame[page]))
    if reason in (Reason.ZERO, Reason.EQUAL_UNADVISED):
        return frames  # the zero page, or the copy nobody advised, stays anyway
    if reason not in (Reason.WOULD_MERGE, Reason.OVER_LIMIT, Reason.OTHER_NODE):
        return 0
    page = np.flatnonzero(chosen)
    node = (
        table.node[page]
        if reason is not Reason.OTHER_NODE and not merge_across_nodes
        else np.zeros(len(page), np.int16)
    )
    _, new = _groups([table.high[page], table.low[page], node], [])
    counts = np.diff(np.append(np.flatnonzero(new), len(page)))
    copies = -(-counts // limit) if reason is Reason.OVER_LIMIT else np.ones(len(counts), np.int64)
    return max(frames - int(copies.sum()), 0)


def decide(
    sources: list[Pages], *, merge_across_nodes: int, max_page_sharing: int
) -> tuple[PageTable, NDArray[np.int8], NDArray[np.int8]]:
    """Return the table of all pages, what KSM makes of the advised ones, and of every page if all were advised.

    What the first says of pages that are not advised means nothing.
    """
    table = PageTable.of(sources)
    knobs = {"merge_across_nodes": merge_across_nodes, "max_page_sharing": max_page_sharing}
    all_advised = content_reasons(table, **knobs)
    advised = np.concatenate([np.zeros(0, np.bool_), *(pages.advised for pages in sources)])
    if advised.all():
        return table, all_advised, all_advised
    now = all_advised.copy()
    part = PageTable.of([pages.select(pages.advised) for pages in sources])
    now[advised] = content_reasons(part, **knobs)
    alone = np.isin(now, (CODES[Reason.UNIQUE], CODES[Reason.FORKED]))
    equals = np.isin(all_advised, (CODES[Reason.WOULD_MERGE], CODES[Reason.OVER_LIMIT], CODES[Reason.OTHER_NODE]))
    now[advised & alone & equals] = CODES[Reason.EQUAL_UNADVISED]
    return table, now, all_advised
