"""Own the closed form: what merging has done with a table of pages once nothing changes any more (mainline rules).

Why no scan is needed: pages of different content never meet, so the outcome is decided content by content (and, with
merge_across_nodes 0, node by node). Within one content only three things matter: how many pages there are, how many frames
they are on (pages that fork left on one frame cannot found a KSM page among themselves), and `max_page_sharing`.

One thing crosses contents: to merge a page of a transparent huge page the kernel splits that, and since Linux 6.12 every page of zeroes in
it then maps the zero page, merged or not (measured; no counter of KSM tells).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from pagefold.core.layout import RMAP_ITEM_BYTES
from pagefold.plan.table import PageTable

_NONE = np.zeros(0, np.intp)
STABLE_NODE_BYTES = 64  # of the kernel, per KSM page and per chain


class PageState(IntEnum):
    """What becomes of one page."""

    VOLATILE = 0  # changed between the looks: never merges
    UNSHARED = 1  # waits in an unstable tree for an equal
    MERGED = 2  # maps a KSM page
    ZERO = 3  # maps the zero page (use_zero_pages)
    FORKED = 4  # shares the frame of an UNSHARED page; the kernel counts it as volatile
    DROPPED = 5  # zeroes in a huge page that is split: maps the zero page, and KSM does not know


@dataclass(frozen=True, slots=True)
class ProcessPrediction:
    """One source's part; the names are those of /proc/PID/ksm_stat."""

    label: str
    pid: int | None
    pages: int
    ksm_rmap_items: int
    ksm_merging_pages: int
    ksm_zero_pages: int
    split_zero_pages: int
    pages_unshared: int
    pages_volatile: int
    ksm_process_profit: int  # bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The counters KSM would show when settled, and what that is worth; bytes where the name says so."""

    merge_across_nodes: int
    use_zero_pages: int
    max_page_sharing: int
    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_volatile: int
    ksm_zero_pages: int
    split_zero_pages: int
    stable_node_chains: int
    stable_node_dups: int
    general_profit: int  # as the kernel counts it: mappings saved, less rmap_items
    saved_bytes: int  # frames that would be free, against no merging at all
    metadata_bytes: int  # what the kernel would pay for it
    processes: tuple[ProcessPrediction, ...]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """State of every page and the sums that do not follow from it."""

    state: NDArray[np.uint8]
    stable_nodes: int
    chains: int
    dups: int
    frames_left: int  # that no page stays on: they are free then, but for the KSM pages


def predict(
    table: PageTable,
    *,
    merge_across_nodes: int = 1,
    use_zero_pages: int = 0,
    max_page_sharing: int = 256,
    splits_drop_zeroes: bool = True,
) -> Prediction:
    """Predict the settled counters; O(pages x log pages). `splits_drop_zeroes` is how Linux 6.12 and later split huge pages."""
    outcome = _settle(table, bool(merge_across_nodes), bool(use_zero_pages), max_page_sharing, _NONE)
    if splits_drop_zeroes and len(dropped := _dropped(table, outcome.state)):
        outcome = _settle(table, bool(merge_across_nodes), bool(use_zero_pages), max_page_sharing, dropped)
    state = outcome.state
    merged = int((state == PageState.MERGED).sum())
    zero = int((state == PageState.ZERO).sum())
    sharing = merged - outcome.stable_nodes
    split = int((state == PageState.DROPPED).sum())
    items = (len(table) - zero - split) * RMAP_ITEM_BYTES  # what maps the zero page is not looked at any more
    return Prediction(
        merge_across_nodes=merge_across_nodes,
        use_zero_pages=use_zero_pages,
        max_page_sharing=max_page_sharing,
        pages_shared=outcome.stable_nodes,
        pages_sharing=sharing,
        pages_unshared=int((state == PageState.UNSHARED).sum()),
        pages_volatile=int(_counts_as_volatile(state).sum()),
        ksm_zero_pages=zero,
        split_zero_pages=split,
        stable_node_chains=outcome.chains,
        stable_node_dups=outcome.dups,
        general_profit=(sharing + zero) * table.page_size - items,
        # A KSM page that stays on a frame of processes outside the table costs none: never less than nothing is saved.
        saved_bytes=max(outcome.frames_left - outcome.stable_nodes, 0) * table.page_size,
        metadata_bytes=items + (outcome.stable_nodes + outcome.chains) * STABLE_NODE_BYTES,
        processes=tuple(_part(table, state, index) for index in range(len(table.sources))),
    )


def page_states(
    table: PageTable, *, merge_across_nodes: int = 1, use_zero_pages: int = 0, max_page_sharing: int = 256
) -> NDArray[np.uint8]:
    """Predict the settled `PageState` of every page, in the order of the table, as if no huge page were split; O(pages x log pages)."""
    return _settle(table, bool(merge_across_nodes), bool(use_zero_pages), max_page_sharing, _NONE).state


def _counts_as_volatile(state: NDArray[np.uint8]) -> NDArray[np.bool_]:
    answer: NDArray[np.bool_] = (state == PageState.VOLATILE) | (state == PageState.FORKED)
    return answer


def _part(table: PageTable, state: NDArray[np.uint8], index: int) -> ProcessPrediction:
    """Sum up one source."""
    own = state[table.source == index]
    merging, zero = int((own == PageState.MERGED).sum()), int((own == PageState.ZERO).sum())
    split = int((own == PageState.DROPPED).sum())
    items = len(own) - zero - split
    return ProcessPrediction(
        label=table.sources[index].label,
        pid=table.sources[index].pid,
        pages=len(own),
        ksm_rmap_items=items,
        ksm_merging_pages=merging,
        ksm_zero_pages=zero,
        split_zero_pages=split,
        pages_unshared=int((own == PageState.UNSHARED).sum()),
        pages_volatile=int(_counts_as_volatile(own).sum()),
        ksm_process_profit=(merging + zero) * table.page_size - items * RMAP_ITEM_BYTES,
    )


def _dropped(table: PageTable, state: NDArray[np.uint8]) -> NDArray[np.intp]:
    """Return the calm pages of zeroes whose huge page is split because something in it merges.

    A page of zeroes that merges splits its own; the very last of them, which has no partner left, is split too when it
    meets another of the same huge page.
    """
    inside = table.huge_page >= 0
    moves = inside & ((state == PageState.MERGED) | (state == PageState.ZERO))
    split = np.zeros(len(table), np.bool_)
    split[table.huge_page[moves]] = True
    return np.flatnonzero(inside & split[table.huge_page] & _calm_zeroes(table))


def _calm_zeroes(table: PageTable) -> NDArray[np.bool_]:
    zero: NDArray[np.bool_] = (table.high == 0) & (table.low == 0) & ~table.volatile
    return zero


def _settle(table: PageTable, across: bool, use_zero: bool, limit: int, dropped: NDArray[np.intp]) -> _Outcome:
    """Decide every page's state."""
    state = np.full(len(table), PageState.VOLATILE, np.uint8)
    calm_mask = ~table.volatile
    if use_zero:
        zero = _calm_zeroes(table)
        state[zero] = PageState.ZERO
        calm_mask &= ~zero
    state[dropped] = PageState.DROPPED
    calm_mask[dropped] = False
    calm = np.flatnonzero(calm_mask)
    if not len(calm):
        return _Outcome(state, 0, 0, 0, _frames_left(table, state))

    node = np.zeros(len(calm), np.int16) if across else table.node[calm]
    order = np.lexsort((calm, node, table.low[calm], table.high[calm]))
    page = calm[order]
    starts = _starts(table.high[page], table.low[page], node[order])
    lengths = np.diff(np.append(starts, len(page)))
    group = np.repeat(np.arange(len(starts)), lengths)
    rank = np.arange(len(page)) - starts[group]  # place of a page within its group, in scan order
    by_frame = np.lexsort((table.frame[page], group))
    frame_starts = _starts(group[by_frame], table.frame[page][by_frame])
    frames = np.bincount(group[by_frame][frame_starts], minlength=len(starts))

    # Groups of one frame: the first page waits, the rest hang on it by fork.
    alone = frames == 1
    state[page] = PageState.MERGED
    state[page[alone[group]]] = PageState.FORKED
    state[page[alone[group] & (rank == 0)]] = PageState.UNSHARED
    # All others fill KSM pages of `limit` mappings; a last one left over waits.
    nodes = np.where(alone, 0, lengths // limit + (lengths % limit >= 2))
    lone = ~alone & (lengths % limit == 1)
    state[page[lone[group] & (rank == (lengths - 1)[group])]] = PageState.UNSHARED
    # More pages than one KSM page takes, and some of them on one frame: the order decides, so it is played through.
    for one in np.flatnonzero(~alone & (lengths > limit) & (frames < lengths)):
        members = page[starts[one] : starts[one] + lengths[one]]
        nodes[one], state[members] = _play(table.frame[members], limit)
    chains = nodes > 1
    return _Outcome(state, int(nodes.sum()), int(chains.sum()), int(nodes[chains].sum()), _frames_left(table, state))


def _frames_left(table: PageTable, state: NDArray[np.uint8]) -> int:
    """Count the frames that every page leaves; one that fork left to several stays in use while any of them keeps it."""
    moves = (state == PageState.MERGED) | (state == PageState.ZERO) | (state == PageState.DROPPED)
    left = np.zeros(len(table), np.bool_)
    left[table.frame[moves]] = True
    left[table.frame[~moves | table.outside]] = False
    return int(left.sum())


def _starts(*keys: NDArray[np.generic]) -> NDArray[np.intp]:
    """Return where runs of equal keys begin."""
    new = np.ones(len(keys[0]), np.bool_)
    new[1:] = False
    for key in keys:
        new[1:] |= key[1:] != key[:-1]
    return np.flatnonzero(new)


def _play(frames: NDArray[np.int64], limit: int) -> tuple[int, NDArray[np.uint8]]:
    """Scan one content's pages (frame names in scan order) until nothing changes; return KSM pages and states.

    A new KSM page is founded only when no other has room, so at most one has. The frame of the scanned page becomes it, and what fork left
    on that frame is part of it whatever the limit (spec 4.1); what fork left on the partner's frame is not.
    """
    names = frames.tolist()
    state = np.full(len(frames), PageState.FORKED, np.uint8)
    founded: set[int] = set()  # frames that are KSM pages
    newest, mappings = -1, limit  # the KSM page founded last, the only one that may have room
    left, before = list(range(len(frames))), -1
    while len(left) != before:
        before = len(left)
        waiting = -1  # the page in the unstable tree
        for index in left:
            frame = names[index]
            if frame in founded:
                mappings += frame == newest
            elif mappings < limit:
                mappings += 1
            elif waiting < 0:
                waiting = index
                continue
            elif names[waiting] != frame:
                founded.add(frame)
                newest, mappings = frame, 2
                state[waiting] = PageState.MERGED
                waiting = -1
            else:
                continue
            state[index] = PageState.MERGED
        left = [index for index in left if state[index] != PageState.MERGED]
    if left:
        state[left[0]] = PageState.UNSHARED
    return len(founded), state
