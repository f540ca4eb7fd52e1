"""Own the choosing of windows by content: which places of a run of bytes are marked, wherever in memory the run begins.

A rolling hash over the last 64 bytes (each step shifts it left and adds a random number for the byte, so that what is older than 64 bytes
has left it) marks the places where its highest bits are zero. Equal bytes so have equal marks at equal places, whatever their address.
Compiled; `mark_plainly` is the same by whole arrays, for a test to compare with, and in use where nothing is compiled.

Must not know: pages, processes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pagefold.core import compiler

WINDOW = 64  # bytes
GEAR: NDArray[np.uint64] = np.random.default_rng(64).integers(0, 2**64, 256, np.uint64)

_ONE = np.uint64(1)


def mark(data: NDArray[np.uint8], bits: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return the last places of the windows chosen, one in 2**bits, and their hashes; repeats of one hash in a row count once."""
    if not compiler.ENABLED:
        return mark_plainly(data, bits)
    places, hashes = np.empty(len(data), np.int64), np.empty(len(data), np.uint64)
    count = _roll(data, GEAR, np.uint64(64 - bits), places, hashes)
    return places[:count], hashes[:count]


def mark_plainly(data: NDArray[np.uint8], bits: int) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
    """Return what `mark` returns: the hash of a window is made from those of its halves."""
    rolled = GEAR[data]
    width = 1
    while width < WINDOW:
        rolled[width:] += rolled[:-width] << np.uint64(width)
        width *= 2
    places = np.flatnonzero(rolled >> np.uint64(64 - bits) == 0)
    places = places[places >= WINDOW - 1]
    hashes = rolled[places]
    new = np.ones(len(places), np.bool_)
    new[1:] = hashes[1:] != hashes[:-1]
    return places[new], hashes[new]


@compiler.entry
def _roll(
    data: NDArray[np.uint8],
    gear: NDArray[np.uint64],
    shift: np.uint64,
    places: NDArray[np.int64],
    hashes: NDArray[np.uint64],
) -> int:
    rolled, last, count = np.uint64(0), np.uint64(0), 0
    for place in range(len(data)):
        rolled = (rolled << _ONE) + gear[data[place]]
        if rolled >> shift == 0 and place >= WINDOW - 1 and (count == 0 or rolled != last):
            places[count] = place
            hashes[count] = last = rolled
            count += 1
    return count
