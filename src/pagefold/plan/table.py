"""Own the table of all pages of all sources: the one thing every prediction is made from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pagefold.errors import UsageError
from pagefold.sources.pages import Pages


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTable:
    """All pages of all sources, in the order of a scan: source by source, by address."""

    sources: tuple[Pages, ...]
    source: NDArray[np.int32]  # index in `sources`
    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    node: NDArray[np.int16]  # unknown nodes count as node 0
    frame: NDArray[np.int64]  # a name: index of the first page that is on it (fork leaves several)
    volatile: NDArray[np.bool_]
    outside: NDArray[
        np.bool_
    ]  # the frame is mapped by a process that is not in the table, and stays when this page leaves it
    huge_page: NDArray[
        np.int64
    ]  # a name: index of the first page that is in the same transparent huge page; -1: in none
    page_size: int

    def __len__(self) -> int:
        return len(self.source)

    @classmethod
    def of(cls, sources: Sequence[Pages]) -> PageTable:
        """Put the pages of several sources together; all must have the same page size."""
        sizes = {pages.page_size for pages in sources}
        if len(sizes) > 1:
            raise UsageError(f"sources with pages of {sorted(sizes)} bytes cannot be planned together; plan them apart")
        counts = [len(pages) for pages in sources]
        frame = _frame_names(sources)
        shared = [~pages.exclusive & ~pages.ksm & (pages.pid is not None) for pages in sources]
        alone = np.bincount(frame, minlength=len(frame))[frame] == 1
        return cls(
            sources=tuple(sources),
            source=np.repeat(np.arange(len(sources), dtype=np.int32), counts),
            high=_joined([pages.high for pages in sources], np.uint64),
            low=_joined([pages.low for pages in sources], np.uint64),
            node=np.maximum(_joined([pages.node for pages in sources], np.int16), 0),
            frame=frame,
            volatile=_joined([pages.volatile for pages in sources], np.bool_),
            outside=_joined(shared, np.bool_) & alone,
            huge_page=_huge_page_names(sources),
            page_size=sizes.pop() if sizes else 4096,
        )


def _joined(parts: Sequence[NDArray[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    """Concatenate, also nothing."""
    return np.concatenate([*parts, np.zeros(0, dtype)]) if parts else np.zeros(0, dtype)


def _huge_page_names(sources: Sequence[Pages]) -> NDArray[np.int64]:
    """Name each page's transparent huge page, source by source: a last-level page table maps as much as one entry above it."""
    names = [np.zeros(0, np.int64)]
    position = 0
    for pages in sources:
        name = np.full(len(pages), -1, np.int64)
        members = np.flatnonzero(pages.huge)
        block = pages.address[members] // (pages.page_size * (pages.page_size // 8))
        first = np.flatnonzero(np.append(True, block[1:] != block[:-1])[: len(block)])
        name[members] = np.repeat(members[first] + position, np.diff(np.append(first, len(members))))
        names.append(name)
        position += len(pages)
    return np.concatenate(names)


def _frame_names(sources: Sequence[Pages]) -> NDArray[np.int64]:
    """Name each page's frame so that pages that fork left on one frame have one name, and all others their own.

    Processes share frames of equal number; KSM pages count as apart, since merging is what is to be predicted. Where the
    kernel hides frame numbers, pages that are not exclusive, at one address and of one content are taken to be shared by a fork.
    """
    total = sum(len(pages) for pages in sources)
    names = np.arange(total, dtype=np.int64)  # apart, unless shown otherwise
    position = 0
    known: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    hidden: list[tuple[NDArray[np.int64], Pages, NDArray[np.bool_]]] = []
    for pages in sources:
        place = np.arange(position, position + len(pages), dtype=np.int64)
        position += len(pages)
        if pages.pid is None:
            continue
        shared = ~pages.exclusive & ~pages.ksm
        seen = shared & (pages.frame >= 0)
        known.append((place[seen], pages.frame[seen]))
        hidden.append((place, pages, shared & (pages.frame < 0)))
    if known:
        _merge_names(names, np.concatenate([p for p, _ in known]), [np.concatenate([f for _, f in known])])
    if hidden:
        places = np.concatenate([place[mask] for place, _, mask in hidden])
        keys = [
            np.concatenate([getattr(pages, key)[mask] for _, pages, mask in hidden])
            for key in ("address", "high", "low")
        ]
        _merge_names(names, places, keys)
    return names


def _merge_names(names: NDArray[np.int64], places: NDArray[np.int64], keys: list[NDArray[np.generic]]) -> None:
    """Give the pages at `places` that agree in all keys the name of the first of them."""
    if not len(places):
        return
    order = np.lexsort([places, *keys])
    new = np.ones(len(places), np.bool_)
    new[1:] = False
    for key in keys:
        new[1:] |= key[order][1:] != key[order][:-1]
    first = places[order][np.flatnonzero(new)]
    names[places[order]] = first[np.cumsum(new) - 1]
