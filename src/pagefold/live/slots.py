"""Own which slot of the store holds which KSM frame of the mirror.

Why a slot never holds bytes that the mirror does not expect: it is filled from a page, its hash is compared with the frame's, and only
then anyone is told of it. It is never written again. Must not know: the engine's rules, sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from pagefold.live.messages import PAGE
from pagefold.live.mirror import Mirror
from pagefold.live.region import SHIFT, Int64
from pagefold.live.store import Extent, Store
from pagefold.sources.memory_reader import MemoryReader

_ZERO = np.frombuffer(xxh3_128_digest(bytes(PAGE)), ">u8").astype(np.uint64)


@dataclass(frozen=True)
class Source:
    """Where the bytes of new KSM frames can be read: neighbours in `frames` are in the order of `addresses`."""

    reader: MemoryReader
    frames: Int64
    addresses: Int64


def hashes(memory: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the hash of each page of memory [pages, PAGE] as rows of (high, low); a page of zeros is (0, 0)."""
    view = _flat(memory)
    digests = b"".join(xxh3_128_digest(view[at : at + PAGE]) for at in range(0, len(view), PAGE))
    answer = np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64)
    answer[(answer == _ZERO).all(axis=1)] = 0
    return answer


def _flat(memory: NDArray[np.uint8]) -> memoryview:
    """Return the bytes of whole pages as one flat view."""
    return memory.reshape(-1).data


class Slots:
    """Map frames to slots; a slot dies with its frame."""

    def __init__(self, store: Store, mirror: Mirror) -> None:
        self.store = store
        self.mirror = mirror
        self._slot_of = np.zeros(1, np.int64)  # by frame: as `Region.where`, 0 for none

    def of(self, frames: Int64) -> Int64:
        """Return the slot of each frame, 0 where it has none."""
        self._grow()
        answer: Int64 = self._slot_of[frames]
        return answer

    def _grow(self) -> None:
        count = self.mirror.frame_count()
        if count > len(self._slot_of):
            bigger = np.zeros(count, np.int64)
            bigger[: len(self._slot_of)] = self._slot_of
            self._slot_of = bigger

    def forget(self, frames: Int64) -> None:
        """Let frames (that are other pages now) have no slot; what they had is dead."""
        self._grow()
        slots = self._slot_of[frames]
        self._give(slots[slots != 0])
        self._slot_of[frames] = 0

    def sweep(self) -> int:
        """Let the slots of frames that are gone die; return how many."""
        self._grow()
        frames = np.flatnonzero(self._slot_of)
        gone = frames[~self.mirror.is_ksm(frames)]
        if len(gone):
            self.forget(gone)
        return len(gone)

    def move(self, old: int, new: int) -> None:
        """Follow a frame that migrated in the mirror."""
        self._grow()
        self._slot_of[new], self._slot_of[old] = self._slot_of[old], 0

    def relocate(self, extent: Extent) -> Int64:
        """Copy what is alive in an extent to other ones of its node; the old slots are dead, and mapped until clients follow.

        Return the new slot of each old one, 0 for those that were dead. Raises StoreFull.
        """
        moved = np.zeros(extent.slots, np.int64)
        self._grow()
        self.store.retire(extent)
        frames = np.flatnonzero(self._slot_of >> SHIFT == extent.number)
        slots = self._slot_of[frames] & 0xFFFFFFFF
        at = 0
        for home, first, count in self.store.allocate(extent.node, len(frames)):
            old = slots[at : at + count]
            home.memory[first : first + count] = extent.memory[old]
            home.publish(first, count)
            moved[old] = home.number << SHIFT | np.arange(first, first + count)
            self._slot_of[frames[at : at + count]] = moved[old]
            at += count
        self.store.give(extent, slots)
        extent.forget()
        return moved

    def frames_of(self, slots: Int64) -> Int64:
        """Return the frame whose slot each is, 0 if there is none."""
        self._grow()
        frames = np.flatnonzero(self._slot_of)
        held = self._slot_of[frames]
        by_slot = np.argsort(held)
        at = np.minimum(np.searchsorted(held[by_slot], slots), max(len(frames) - 1, 0))
        if not len(frames):
            return np.zeros(len(slots), np.int64)
        found = frames[by_slot[at]]
        answer: Int64 = np.where(self._slot_of[found] == slots, found, 0)
        return answer

    def _give(self, slots: Int64) -> None:
        for number in np.unique(slots >> SHIFT).tolist():
            extent = self.store.extents[number]
            self.store.give(extent, (slots[slots >> SHIFT == number] & 0xFFFFFFFF).astype(np.int64))

    def fill(self, sources: Sequence[Source]) -> None:
        """Give every frame a slot on its node and fill it; one whose page cannot be read, or changed, gets none. Raises StoreFull."""
        self._grow()
        for source in sources:
            nodes = self.mirror.nodes_of(source.frames)
            for node in np.unique(nodes).tolist():
                here = np.flatnonzero(nodes == node)
                at = 0
                for extent, first, count in self.store.allocate(int(node), len(here)):
                    part = here[at : at + count]
                    self._fill_run(source, part, extent, first)
                    at += count

    def _fill_run(self, source: Source, part: Int64, extent: Extent, first: int) -> None:
        count = len(part)
        memory = extent.memory[first : first + count]
        ok = self._copy(source.reader, source.addresses[part], memory)
        frames = source.frames[part]
        expected = self.mirror.contents_of(frames)
        found = hashes(memory)
        ok &= (found[:, 0] == expected["hi"]) & (found[:, 1] == expected["lo"])
        slots = np.arange(first, first + count, dtype=np.int64)
        self._slot_of[frames[ok]] = extent.number << SHIFT | slots[ok]
        if not ok.all():
            self.store.give(extent, slots[~ok])
        extent.publish(first, count)

    def _copy(self, reader: MemoryReader, addresses: Int64, memory: NDArray[np.uint8]) -> NDArray[np.bool_]:
        """Copy pages into slots; tell which came whole."""
        ok = np.zeros(len(addresses), np.bool_)
        breaks = np.flatnonzero(np.diff(addresses) != PAGE) + 1
        for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(addresses)], strict=True):
            ranges = np.array([[addresses[begin], (end - begin) * PAGE]], np.uint64)
            try:
                done = reader.copy(ranges, memory[begin:end].reshape(-1)) // PAGE
            except OSError:
                done = 0
            ok[begin : begin + done] = True
        return ok
