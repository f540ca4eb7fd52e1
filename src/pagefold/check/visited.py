"""Own sets of fingerprints: open addressing in an array whose length is a power of two; 0 is an empty place."""

from __future__ import annotations

import numpy as np

from pagefold.core.compiler import entry, jit
from pagefold.core.layout import Records

_NOTHING = np.uint64(0)


@jit
def place_of(table: Records, print_: np.uint64) -> int:
    """Return where a fingerprint is, or where it would be put."""
    last = len(table) - 1
    place = int(np.int64(print_ & np.uint64(last)))
    while table[place] != _NOTHING and table[place] != print_:
        place = (place + 1) & last
    return place


@jit
def is_in(table: Records, print_: np.uint64) -> bool:
    """Tell whether a fingerprint is in the set."""
    return bool(table[place_of(table, print_)] == print_)


@jit
def put_in(table: Records, print_: np.uint64) -> bool:
    """Put a fingerprint in; False if it was there. The caller keeps a quarter of the places empty."""
    place = place_of(table, print_)
    if table[place] == print_:
        return False
    table[place] = print_
    return True


@entry
def keep_new(table: Records, prints: Records, kept: Records) -> int:
    """Put fingerprints in, in order; note the indices of those that were new in `kept`, and return how many they are."""
    count = 0
    for index in range(len(prints)):
        if put_in(table, prints[index]):
            kept[count] = index
            count += 1
    return count
