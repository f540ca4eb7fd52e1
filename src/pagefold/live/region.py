"""Own one advised region of a client, as the daemon knows it: where its pages map, and which of them to leave alone.

Must not know: the engine, sockets.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pagefold.live.messages import PAGE

Int64 = NDArray[np.int64]
HOLE = -1  # in `where`: merged as zeros, nothing is mapped
FOREVER = 2**31 - 1  # in `held_until`
_LONGEST_HOLD = 6  # looks to wait double with every refusal, up to 2**this
SHIFT = 32  # `where` of a merged page: number of the extent << SHIFT | slot


class Region:
    """Hold a run of a client's pages; indices of pages count from its first.

    `where` and `broken` are what the client has, `wanted` is what it was asked for at last. `vpn` is the run's place in the mirror.
    Nothing here takes memory for pages that were never there: everything begins as 0.
    """

    def __init__(self, number: int, start: int, pages: int, *, tracked: bool, quiet: bool, vpn: int) -> None:
        self.number = number
        self.start = start  # address
        self.pages = pages
        self.tracked = tracked
        self.quiet = quiet  # nothing happens to it but in a SYNC
        self.vpn = vpn
        self.where = np.zeros(pages, np.int64)  # 0: private, HOLE, or a slot
        self.wanted = np.zeros(pages, np.int64)  # as `where`, which it becomes, or goes back to
        self.broken = np.zeros(pages, np.bool_)  # merged once, written since: private, but in a mapping of the store
        self.held_until = np.zeros(
            pages, np.int32
        )  # the pass from which a page that was refused may merge again; 0: now
        self.refusals = np.zeros(pages, np.uint8)  # in a row, for the back-off
        self.holds = False  # whether any page is held
        self.told = (0, 0)  # pages that the last answer to a SYNC called merged, and bytes it called saved
        self.status = np.zeros(pages, np.uint8)  # what became of each page at last; 0: nothing yet, or merged

    @property
    def end(self) -> int:
        """The address behind its last page."""
        return self.start + self.pages * PAGE

    def indices(self, address: Int64) -> Int64:
        """Return which of its pages these addresses are."""
        return (address - self.start) // PAGE

    def became(self, index: Int64, target: Int64) -> None:
        """Note what pages map now, whatever else is under way for them."""
        last = (self.wanted[index] == target) | (self.wanted[index] == self.where[index])
        self.wanted[index[last]] = target[last]
        self.where[index] = target
        self.broken[index] = False

    def stayed(self, index: Int64, target: Int64) -> None:
        """Note that pages are as they were, whatever else is under way for them."""
        last = index[self.wanted[index] == target]
        self.wanted[last] = self.where[last]

    def refused(self, index: Int64, looks: int) -> NDArray[np.int32]:
        """Count one more refusal of pages, and return until which look each should be left alone: longer each time."""
        self.refusals[index] = np.minimum(self.refusals[index] + 1, _LONGEST_HOLD)
        until: NDArray[np.int32] = looks + (1 << self.refusals[index].astype(np.int32))
        return until

    def hold(self, index: Int64, until: NDArray[np.int32]) -> None:
        """Leave pages alone until a look."""
        self.held_until[index] = until
        self.holds = True

    def merged(self) -> NDArray[np.bool_]:
        """Tell which pages map a slot now and were not written since."""
        return (self.where > 0) & ~self.broken

    def mappings(self) -> int:
        """Return how many mappings (VMAs) the region will be made of: neighbours with neighbouring slots are one."""
        slots = self.wanted > 0
        joined = (slots[1:] == slots[:-1]) & (~slots[1:] | (self.wanted[1:] == self.wanted[:-1] + 1))
        return int(self.pages - np.count_nonzero(joined))
