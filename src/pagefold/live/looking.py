"""Own what the mirror knows of clients' memory: asking their kernel what was written, reading that, following what migrates.

Must not know: what the engine makes of it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Collection, Iterable

import numpy as np
from numpy.typing import NDArray

from pagefold.live.messages import PAGE
from pagefold.live.mirror import Mirror
from pagefold.live.peer import Peer
from pagefold.live.region import FOREVER, HOLE, SHIFT, Int64, Region
from pagefold.live.slots import Slots
from pagefold.live.store import Store
from pagefold.machine import Process
from pagefold.sources.hashing import read_pages
from pagefold.sources.nodes import page_nodes, query_nodes

READ_PAGES = 32768  # most pages read and hashed in one step
_READ_PIECES = 1024  # of so many regions at most


class Looking:
    """The pages that must be read, and how often everybody was looked at."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.looks = 0  # at every client's page tables, ever
        self.unreadable: list[tuple[Peer, Region, Int64]] = []  # pages that could not be had in the last `read`
        self._to_read: deque[tuple[Peer, Region, Int64]] = deque()

    @property
    def reading(self) -> bool:
        """Tell whether pages wait to be read and hashed."""
        return bool(self._to_read)

    def look(self, peers: Iterable[Peer], syncing: Collection[Region]) -> bool:
        """Ask clients' page tables what was written, and queue what must be read. Tell whether the mirror changed at once.

        `syncing`: regions that somebody waits for.
        """
        self.looks += 1
        changed = False
        for peer in peers:
            inherited: list[tuple[Region, Int64]] = []
            try:
                with contextlib.suppress(OSError):  # no descriptor left; the next look asks again
                    inherited = peer.inherited()
                written = peer.written(syncing)
                changed |= self.find_broken(peer)
            except OSError:  # it ended; its connection says so soon
                continue
            assert peer.process is not None
            for region, index in written:
                self._holes_written(peer.process, region, index[region.where[index] == HOLE])
                if region.tracked:  # only private mappings are: whatever was merged there is so no more
                    region.became(index, np.zeros(len(index), np.int64))
                else:  # those that windows are under way for would only be found as they were
                    index = index[region.wanted[index] == region.where[index]]
                self._queue(peer, region, index[(region.held_until[index] == 0) & ~region.broken[index]])
            for region, index in [*inherited, *self._released(peer)]:
                self._queue(peer, region, index)
        return changed

    def find_broken(self, peer: Peer) -> bool:
        """Note which merged pages a client has written since; tell whether there are any."""
        assert peer.process is not None
        broken = peer.newly_broken()
        for region, index in broken:
            self.mirror.hold(peer.process, region.vpn + index)
            region.held_until[index] = FOREVER
        return bool(broken)

    def _holes_written(self, process: Process, region: Region, index: Int64) -> None:
        """Note that pages that were merged as zeros are there again, and leave them alone for a while: longer each time."""
        if not len(index):
            return
        region.became(index, np.zeros(len(index), np.int64))
        region.hold(index, region.refused(index, self.looks))
        self.mirror.hold(process, region.vpn + index)

    def _released(self, peer: Peer) -> list[tuple[Region, Int64]]:
        """Return pages whose time of being left alone is over."""
        answer = []
        for region in peer.regions.values():
            if not region.holds:
                continue
            index = np.flatnonzero((region.held_until > 0) & (region.held_until <= self.looks))
            region.held_until[index] = 0
            region.holds = bool((region.held_until > 0).any())
            if len(index):
                answer.append((region, index))
        return answer

    def _queue(self, peer: Peer, region: Region, index: Int64) -> None:
        for at in range(0, len(index), READ_PAGES):
            self._to_read.append((peer, region, index[at : at + READ_PAGES]))

    def read(self) -> bool:
        """Read and hash what is queued, up to READ_PAGES of one client, and tell the mirror; tell whether that changed."""
        self.unreadable = []
        peer, _, _ = self._to_read[0]
        pieces: list[tuple[Region, Int64]] = []
        room = READ_PAGES
        while self._to_read and self._to_read[0][0] is peer and len(self._to_read[0][2]) <= room:
            if len(pieces) >= _READ_PIECES:
                break
            _, region, index = self._to_read.popleft()
            index = index[region.held_until[index] == 0]  # others were refused since, and are left alone
            pieces.append((region, index))
            room -= len(index)
        address = np.concatenate([region.start + index * PAGE for region, index in pieces])
        try:
            contents = read_pages(peer.reader, address, PAGE)
            nodes = page_nodes(peer.pid, address)
        except OSError:  # it ended; its connection says so soon
            return False
        assert peer.process is not None
        at, changed = 0, False
        for region, index in pieces:
            part = slice(at, at + len(index))
            at += len(index)
            ok = contents.ok[part]
            if not ok.all():
                self.unreadable.append((peer, region, index[~ok]))
            vpns = region.vpn + index[ok]
            home = np.maximum(nodes[part][ok], 0)
            changed |= self.mirror.update(peer.process, vpns, contents.high[part][ok], contents.low[part][ok], home)
        return changed

    def forget(self, peer: Peer, region: Region | None = None) -> None:
        """Read nothing more of a client, or of one of its regions."""
        self._to_read = deque(one for one in self._to_read if one[0] is not peer or (region and one[1] is not region))

    def follow_migrations(self, peers: Iterable[Peer], store: Store, slots: Slots) -> bool:
        """Let the mirror's frames be where the real pages are; tell whether any moved."""
        moved = False
        for extent in store:
            live = extent.live_slots()
            if len(live):
                int(extent.memory[live, 0].sum())  # present here, so that the kernel can say where
                nodes = query_nodes(0, extent.address_of(0) + live * PAGE)
                moved |= self._moved(slots, extent.number << SHIFT | live, nodes)
            extent.forget()
        for peer in peers:
            assert peer.process is not None
            for region in peer.regions.values():
                frames = self.mirror.frames_of(peer.process, region)
                index = np.flatnonzero((frames > 0) & (region.where == 0) & (region.held_until == 0))
                index = index[~self.mirror.is_ksm(frames[index])]
                nodes = query_nodes(peer.pid, region.start + index * PAGE)
                away = (nodes >= 0) & (nodes != self.mirror.nodes_of(frames[index]))
                for at, node in zip(index[away].tolist(), nodes[away].tolist(), strict=True):
                    moved |= self.mirror.move(peer.process, region.vpn + at, node)
        return moved

    def astray(self, peer: Peer, address: Int64, frames: Int64, store: Store, slots: Slots) -> NDArray[np.bool_]:
        """Tell which pages, or the slots they shall map, are on another node than the mirror believes: they moved since the last look."""
        nodes = self.mirror.nodes_of(frames)
        found = query_nodes(peer.pid, address)
        answer: NDArray[np.bool_] = (found >= 0) & (found != nodes)
        where = slots.of(frames)
        for number in np.unique(where[where > 0] >> SHIFT).tolist():
            extent = store[number]
            here = np.flatnonzero(where >> SHIFT == number)
            slot = where[here] & 0xFFFFFFFF
            int(extent.memory[slot, 0].sum())  # present here, so that the kernel can say where
            found = query_nodes(0, extent.address_of(0) + slot * PAGE)
            extent.forget()
            answer[here] |= (found >= 0) & (found != nodes[here])
        return answer

    def _moved(self, slots: Slots, numbers: Int64, nodes: np.ndarray[tuple[int], np.dtype[np.int16]]) -> bool:
        """Follow slots of the store that were migrated."""
        moved = False
        frames = slots.frames_of(numbers)
        away = np.flatnonzero((nodes >= 0) & (frames > 0) & (nodes != self.mirror.nodes_of(frames)))
        for old, node in zip(frames[away].tolist(), nodes[away].tolist(), strict=True):
            new = self.mirror.move_frame(old, node)
            if new:
                slots.move(old, new)
                moved = True
        return moved
