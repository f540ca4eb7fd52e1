"""Own how the store gets smaller: slots of pages that are gone die, sparse extents are emptied, what nobody has is freed.

Must not know: how pages are merged; it asks for windows like everybody.
"""

from __future__ import annotations

import numpy as np

from pagefold.live import messages
from pagefold.live.merging import Merging
from pagefold.live.peer import Peer
from pagefold.live.region import SHIFT, Int64, Region
from pagefold.live.store import StoreFull

_LONGEST = 64  # calls between two tries to empty the same extents


class Tidying:
    """One domain's broom: call `tidy` now and then."""

    def __init__(self, merging: Merging) -> None:
        self.merging = merging
        self._calls = 0
        self._dead: list[int] = []  # extents that somebody still mapped the last time
        self._wait = self._until = 0  # calls to wait before asking for them again, and until which

    def tidy(self) -> None:
        """Let slots of frames that are gone die, move the last ones out of sparse extents, and free what nobody has."""
        merging, store = self.merging, self.merging.store
        merging.slots.sweep()
        for extent in store.sparse():
            self._empty(extent.number)
        for extent in store:
            if extent.live == 0:
                store.retire(extent)
                for peer in merging.peers.values():
                    if extent.number in peer.extents:
                        peer.extents.discard(extent.number)
                        peer.send(messages.pack(messages.RELEASE, extent=extent.number))
        store.free_extents()
        if merging.settled or merging.mirror.engine.get("run") != 1:
            self._leave_dead()

    def _empty(self, number: int) -> None:
        """Let an extent's last pages be merged elsewhere, if all who map them can be asked."""
        merging = self.merging
        wanted: list[tuple[Peer, Region, Int64]] = []
        for peer in merging.peers.values():
            for region in peer.regions.values():
                index = np.flatnonzero((region.where >> SHIFT == number) & ~region.broken)
                if len(index) and (peer.crowded or not merging.may_ask(peer, region)):
                    return
                wanted.append((peer, region, index))
        try:
            moved = merging.slots.relocate(merging.store[number])
        except StoreFull:
            return
        for peer, region, index in wanted:
            target = moved[region.where[index] & 0xFFFFFFFF]
            if target.any():
                merging.ask(peer, [(region, index[target > 0], target[target > 0])])

    def _leave_dead(self) -> None:
        """Ask for the pages that keep extents without a live slot: where the mirror has them, or private if it has them nowhere.

        Those are pages that were written since (their mapping is still one of the extent), and those whose windows came to nothing.
        """
        merging = self.merging
        self._calls += 1
        dead = [extent.number for extent in merging.store if extent.live == 0]
        if dead != self._dead:
            self._dead, self._wait, self._until = dead, 1, 0
        if not dead or self._calls < self._until:
            return
        self._until = self._calls + self._wait
        self._wait = min(self._wait * 2, _LONGEST)
        for peer in merging.peers.values():
            assert peer.process is not None
            for region in peer.regions.values():
                index = np.flatnonzero(np.isin(region.where >> SHIFT, dead))
                if len(index) and merging.may_ask(peer, region) and not peer.crowded:
                    frames = merging.mirror.frames_of(peer.process, region)[index]
                    merging.ask(peer, [(region, index, np.where(region.broken[index], 0, merging.slots.of(frames)))])
