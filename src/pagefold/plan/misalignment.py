"""Own the search for pages whose bytes exist elsewhere at another offset in the page: equal memory that no KSM can merge.

How it is found: windows chosen by their content (`windows`) mark equal bytes wherever they lie. Two places with one mark, at different
offsets, say where a page's bytes might be; then the whole page is
compared. So what is reported is true, and what the marks miss is not reported.

Must not know: why a page is asked about.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagefold.errors import PagefoldError
from pagefold.plan.looks import Looked
from pagefold.plan.windows import WINDOW, mark
from pagefold.sources.memory_reader import MemoryReader

_CHUNK = 256  # pages read at a time
_MOST_MARKS = 1 << 22
_OFFERED = 4  # places offered for a page, and guesses tried for it
_MOST_EQUAL = 64  # places of one mark; more of them are a pattern that says nothing


@dataclass(frozen=True, slots=True)
class Misplaced:
    """Pages found, as indexes into the list of all pages, with where their bytes are as well."""

    page: NDArray[np.int64]
    other_source: NDArray[np.int64]  # index of the process
    other_address: NDArray[np.int64]  # byte address; not at the same offset in a page
    frees: NDArray[np.bool_]  # the other place comes earlier: with equal offsets, this page would go


def find_misplaced(looked: Sequence[Looked], candidate: Sequence[NDArray[np.bool_]]) -> Misplaced:
    """Find which candidate pages (one mask per process) have their bytes at another offset, in candidates or beside them."""
    offsets = np.cumsum([0, *(len(one.pages) for one in looked)])
    total = sum(int(mask.sum()) for mask in candidate)
    size = looked[0].pages.page_size if looked else 4096
    bits = max(8, (total * size // _MOST_MARKS).bit_length())
    marks = [_marks(one, mask, bits) for one, mask in zip(looked, candidate, strict=True)]
    address = np.concatenate([np.zeros(0, np.int64), *(place for place, _ in marks)])
    hashes = np.concatenate([np.zeros(0, np.uint64), *(found for _, found in marks)])
    source = np.repeat(np.arange(len(looked)), [len(place) for place, _ in marks])
    here, there = _pairs(source, address, hashes, size)
    parts = []
    for number, (one, mask) in enumerate(zip(looked, candidate, strict=True)):
        pages = np.flatnonzero(mask)
        mine = source[here] == number
        guesses = _guesses(
            one.pages.address[pages], address[here[mine]], source[there[mine]], address[there[mine]], size
        )
        to, shift = np.full(len(pages), -1), np.zeros(len(pages), np.int64)
        for source_guess, shift_guess in guesses:
            left = to < 0
            good = left & _compare(looked, number, pages, np.where(left, source_guess, -1), shift_guess)
            to[good], shift[good] = source_guess[good], shift_guess[good]
        pages, to, where = pages[to >= 0], to[to >= 0], (one.pages.address[pages] + shift)[to >= 0]
        earlier = (to < number) | ((to == number) & (where < one.pages.address[pages]))
        parts.append((pages + offsets[number], to, where, earlier))
    joined = [
        np.concatenate([part[column] for part in parts]) if parts else np.zeros(0, np.int64) for column in range(4)
    ]
    return Misplaced(joined[0], joined[1], joined[2], joined[3].astype(np.bool_))


def _marks(one: Looked, mask: NDArray[np.bool_], bits: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return addresses and hashes of the windows of a process's candidate pages."""
    size = one.pages.page_size
    address = one.pages.address[mask]
    places, hashes = [np.zeros(0, np.int64)], [np.zeros(0, np.uint64)]
    for begin, end in _runs(address, size):
        tail = np.zeros(0, np.uint8)  # the last bytes before a chunk: windows reach across its begin
        for at in range(begin, end, _CHUNK):
            data = _read(one, int(address[at]), min(_CHUNK, end - at))
            if data is None:
                tail = tail[:0]
                continue
            found, hashed = mark(np.concatenate([tail, data]), bits)
            places.append(found - len(tail) + address[at])
            hashes.append(hashed)
            tail = data[1 - WINDOW :]
    return np.concatenate(places), np.concatenate(hashes)


def _runs(address: NDArray[np.int64], step: int) -> list[tuple[int, int]]:
    """Return begin and end of the runs of neighbouring pages."""
    breaks = np.flatnonzero(np.diff(address) != step) + 1
    return list(zip([0, *breaks.tolist()], [*breaks.tolist(), len(address)], strict=True)) if len(address) else []


def _read(one: Looked, address: int, pages: int) -> NDArray[np.uint8] | None:
    """Return the bytes of pages, None if they cannot be had (any more)."""
    if one.reader is None:
        return None
    length = pages * one.pages.page_size
    buffer = np.empty(length, np.uint8)
    try:
        with one.reader.files.errors(), one.reader.files.opened("mem") as fd:
            got = MemoryReader(fd, living=True).copy(np.array([[address, length]], np.uint64), buffer)
    except PagefoldError:
        return None
    return buffer if got == length else None


def _pairs(
    source: NDArray[np.int64], address: NDArray[np.int64], hashes: NDArray[np.uint64], size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return marks, each with an equal at another offset in the page; of each hash the first few are offered to all others."""
    order = np.lexsort((address, source, hashes))
    new = np.ones(len(order), np.bool_)
    new[1:] = hashes[order][1:] != hashes[order][:-1]
    starts = np.flatnonzero(new)
    counts = np.diff(np.append(starts, len(order)))
    group = np.cumsum(new) - 1
    here, there = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for number in range(_OFFERED):
        some = (counts > max(number, 1)) & (counts <= _MOST_EQUAL)
        mark_at = order[some[group]]
        other = order[(starts + number)[group[some[group]]]]
        differs = (address[mark_at] - address[other]) % size != 0
        here.append(mark_at[differs])
        there.append(other[differs])
    return np.concatenate(here), np.concatenate(there)


def _guesses(
    pages: NDArray[np.int64], address: NDArray[np.int64], to: NDArray[np.int64], other: NDArray[np.int64], size: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield for each page (its address) the process and the distance that most of its marks name, then the next; -1 for none.

    A page without marks takes what its neighbours say.
    """
    keys = np.column_stack([np.searchsorted(pages, address, "right") - 1, to, other - address])
    votes, counts = np.unique(keys, axis=0, return_counts=True) if len(keys) else (keys, np.zeros(0, np.int64))
    order = np.lexsort((-counts, votes[:, 0]))
    votes = votes[order]
    place = np.arange(len(votes)) - np.searchsorted(votes[:, 0], votes[:, 0])  # 0: the guess of most marks
    for number in range(_OFFERED):
        source, shift = np.full(len(pages), -1, np.int64), np.zeros(len(pages), np.int64)
        chosen = votes[place == number]
        source[chosen[:, 0]], shift[chosen[:, 0]] = chosen[:, 1], chosen[:, 2]
        for step in (1, -1):  # from the neighbour before, then from the one behind
            bare = np.flatnonzero(source < 0)
            near = bare - step
            inside = (near >= 0) & (near < len(pages))
            bare, near = bare[inside], near[inside]
            joined = pages[bare] - pages[near] == step * size
            source[bare[joined]], shift[bare[joined]] = source[near[joined]], shift[near[joined]]
        yield source, shift


def _compare(
    looked: Sequence[Looked], number: int, pages: NDArray[np.int64], to: NDArray[np.int64], shift: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Tell which pages have all their bytes where it was guessed, in pages that are present there; bytes are read once more."""
    one, size = looked[number], looked[number].pages.page_size
    address = one.pages.address[pages]
    good = np.zeros(len(pages), np.bool_)
    distant = (to >= 0) & ~((to == number) & (np.abs(shift) < size))
    for target in np.unique(to[distant]).tolist():
        listed = looked[target].pages.address
        lower = (address + shift) // size * size
        there = _listed(listed, lower) & _listed(listed, lower + size)
        chosen = np.flatnonzero(distant & (to == target) & there)
        # Runs of neighbours that are guessed at one distance are read at once.
        breaks = np.flatnonzero((np.diff(address[chosen]) != size) | (np.diff(shift[chosen]) != 0)) + 1
        for run in np.split(chosen, breaks) if len(chosen) else ():
            for at in range(0, len(run), _CHUNK):
                part = run[at : at + _CHUNK]
                mine = _read(one, int(address[part[0]]), len(part))
                other = _read(looked[target], int(address[part[0]] + shift[part[0]]), len(part))
                if mine is not None and other is not None:
                    good[part] = (mine.reshape(-1, size) == other.reshape(-1, size)).all(axis=1)
    return good


def _listed(listed: NDArray[np.int64], address: NDArray[np.int64]) -> NDArray[np.bool_]:
    if not len(listed):
        return np.zeros(len(address), np.bool_)
    place = np.minimum(np.searchsorted(listed, address), len(listed) - 1)
    answer: NDArray[np.bool_] = listed[place] == address
    return answer
