"""Own which slot of the store holds which KSM frame of the mirror.

Why a slot never holds bytes that the mirror does not expect: it is filled from a page, its hash is compared with the frame's, and only
then anyone is told of it. It is never written again. Must not know: the engine's rules, sockets.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from pagefold.core import layout
from pagefold.live.messages import PAGE
from pagefold.live.mirror import Mirror
from pagefold.live.region import SHIFT, Int64
from pagefold.live.store import Extent, Run, Store, StoreFull
from pagefold.sources.hashing import CHUNK_PAGES, THREADS
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
        self._holds = np.zeros(1, layout.content)  # by frame: what its slot holds
        self._threads = ThreadPoolExecutor(THREADS, "fill")  # while one hashes, the other copies

    def of(self, frames: Int64) -> Int64:
        """Return the slot of each frame, 0 where it has none: one that died and came back as another page has none yet."""
        self._grow()
        answer: Int64 = np.where(self._stale(frames), 0, self._slot_of[frames])
        return answer

    def _stale(self, frames: Int64) -> NDArray[np.bool_]:
        """Tell which frames are not the page that their slot was filled from."""
        now, then = self.mirror.contents_of(frames), self._holds[frames]
        answer: NDArray[np.bool_] = (now["hi"] != then["hi"]) | (now["lo"] != then["lo"]) | ~self.mirror.is_ksm(frames)
        return answer

    def _grow(self) -> None:
        count = self.mirror.frame_count()
        if count > len(self._slot_of):
            bigger = np.zeros(count, np.int64)
            holds = np.zeros(count, layout.content)
            bigger[: len(self._slot_of)], holds[: len(self._holds)] = self._slot_of, self._holds
            self._slot_of, self._holds = bigger, holds

    def sweep(self) -> int:
        """Let the slots of frames that are gone die; return how many."""
        self._grow()
        frames = np.flatnonzero(self._slot_of)
        gone = frames[self._stale(frames)]
        if len(gone):
            self._forget(gone)
        return len(gone)

    def _forget(self, frames: Int64) -> None:
        """Let frames have no slot; those that they had are dead."""
        slots = self._slot_of[frames]
        self._give(slots[slots != 0])
        self._slot_of[frames] = 0

    def move(self, old: int, new: int) -> None:
        """Follow a frame that migrated in the mirror."""
        self._grow()
        self._slot_of[new], self._slot_of[old] = self._slot_of[old], 0
        self._holds[new] = self._holds[old]

    def relocate(self, extent: Extent) -> Int64:
        """Copy what is alive in an extent to other ones, each slot on the node where it is; the old ones are mapped until clients follow.

        Return the new slot of each old one, 0 for those that were dead. Raises StoreFull.
        """
        moved = np.zeros(extent.slots, np.int64)
        self._grow()
        self.store.retire(extent)
        frames = np.flatnonzero(self._slot_of >> SHIFT == extent.number)
        frames = frames[np.argsort(self.mirror.nodes_of(frames), kind="stable")]
        slots = self._slot_of[frames] & 0xFFFFFFFF
        at = 0
        for home, first, count in self._allocate(self.mirror.nodes_of(frames)):
            old = slots[at : at + count]
            home.memory[first : first + count] = extent.memory[old]
            home.publish(first, count)
            moved[old] = home.number << SHIFT | np.arange(first, first + count)
            self._slot_of[frames[at : at + count]] = moved[old]
            at += count
        self.store.give(extent, slots)
        extent.forget()
        return moved

    def _allocate(self, nodes: NDArray[np.int16]) -> list[Run]:
        """Take a slot on each of these nodes (ascending); all of them or, with StoreFull, none."""
        runs: list[Run] = []
        try:
            for node, count in zip(*np.unique(nodes, return_counts=True), strict=True):
                runs += self.store.allocate(int(node), int(count))
        except StoreFull:
            for extent, first, count in runs:
                self.store.give(extent, range(first, first + count))
            raise
        return runs

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
        frames = source.frames[part]
        expected = self.mirror.contents_of(frames)
        ok = np.zeros(count, np.bool_)

        def piece(at: int) -> None:
            here = slice(at, min(at + CHUNK_PAGES, count))
            memory = extent.memory[first + here.start : first + here.stop]
            extent.populate(first + here.start, len(memory))
            came = self._copy(source.reader, source.addresses[part[here]], memory)
            found = hashes(memory)
            ok[here] = came & (found[:, 0] == expected["hi"][here]) & (found[:, 1] == expected["lo"][here])

        pieces = range(0, count, CHUNK_PAGES)
        list(self._threads.map(piece, pieces) if len(pieces) > 1 else map(piece, pieces))
        slots = np.arange(first, first + count, dtype=np.int64)
        self._forget(frames)
        self._holds[frames] = expected
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
