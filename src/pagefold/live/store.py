"""Own the store: the merged pages of one domain, in sealed extents of shared memory. Must not know: pages' contents, sockets, the engine.

Why a client may map a slot and trust it for ever:
1. An extent is mapped for writing once, here, before F_SEAL_FUTURE_WRITE; from then on no other writable mapping and no write(2) to it is
   possible, whoever asks and through whatever descriptor. F_SEAL_SHRINK and the write seal refuse to truncate it and to punch holes
   into it, to us as well; F_SEAL_SEAL keeps it so. Clients get read-only descriptions, and its mode is 0400.
2. A slot is written between `allocate` and `publish` and never after: publishing takes our own right to write to it away.
3. A slot is never given out twice. Only whole extents are freed, by closing them: what a client still maps stays mapped.
4. That nobody has an extent is proved, not counted: every description that a client gets holds a shared flock, which lives
   as long as any descriptor, mapping or forked copy of it; our exclusive flock succeeds when the last one is gone. A client that
   unlocks its own description deceives the accounting, and harms nobody (3).
5. Slots are backed by memory before they are given out (`fallocate`), so writing to one cannot fail for want of memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt

from pagefold.errors import PagefoldError
from pagefold.live.headroom import Headroom
from pagefold.live.mapping import PAGE, Mapping

Run = tuple["Extent", int, int]  # extent, first slot, pages

MFD_CLOEXEC, MFD_ALLOW_SEALING, MFD_NOEXEC_SEAL = 0x1, 0x2, 0x8
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE = 0x1, 0x2, 0x4, 0x10
SEALS = F_SEAL_FUTURE_WRITE | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL

_OPEN_EXTENTS = (
    4  # per node, from which slots are taken: a run that does not fit into one leaves its rest to shorter runs
)
_SPARSE_DEAD = 64  # pages: fewer are not worth moving the others
_SPARSE_SHARE = 4  # an extent is sparse if at most one in so many of its taken slots lives


class StoreFull(PagefoldError):  # noqa: N818
    """No memory, descriptor or address space for more slots; nothing was taken. Merging pauses, what is merged stays."""


class Extent:
    """Some consecutive slots of one node; slot 0 is the first.

    `memory` is a writable array [slots, 4096] at `address`; `taken` slots have been given out, `live` counts those of them in use.
    """

    def __init__(self, number: int, node: int, slots: int, *, bind: bool) -> None:
        self.number, self.node, self.slots = number, node, slots
        self.fd = _make(f"pagefold-{number}", slots * PAGE)
        try:
            self._mapping = Mapping(self.fd, slots * PAGE)
            if bind:
                self._mapping.prefer_node(node)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
            os.fchmod(self.fd, 0o400)
        except BaseException:
            os.close(self.fd)
            raise
        self.memory: npt.NDArray[np.uint8] = self._mapping.array().reshape(slots, PAGE)
        self.address = self._mapping.address
        self.taken = 0
        self.live = 0
        self.clients: set[int] = set()  # keys that `descriptor_for` was asked for
        self._alive = np.zeros(slots, np.bool_)

    @property
    def room(self) -> int:
        """Return how many slots are left to take."""
        return self.slots - self.taken

    def live_slots(self) -> npt.NDArray[np.int64]:
        """Return the slots in use."""
        return np.flatnonzero(self._alive)

    def address_of(self, slot: int) -> int:
        """Return where a slot is in our own memory."""
        return self.address + slot * PAGE

    def descriptor_for(self, client: int) -> int:
        """Return a new read-only description that holds the proof of use (4); the caller sends it and closes it. OSError as open(2)."""
        fd = os.open(f"/proc/self/fd/{self.fd}", os.O_RDONLY | os.O_CLOEXEC)
        # A client that holds it exclusively breaks the rules: then this one has no proof, which harms only the accounting (4).
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self.clients.add(client)
        return fd

    def populate(self, first: int, pages: int) -> None:
        """Map slots here for writing all at once, before they are filled: one fault for each would take longer than filling it."""
        self._mapping.populate_range(first * PAGE, pages * PAGE)

    def publish(self, first: int, pages: int) -> None:
        """Make filled slots immutable, and unmap them here, so that the kernel counts them for clients alone."""
        self._mapping.seal_range(first * PAGE, pages * PAGE)
        self._mapping.unmap_range(first * PAGE, pages * PAGE)

    def forget(self) -> None:
        """Unmap here what reading published slots has mapped again; their bytes stay."""
        self._mapping.unmap_range(0, self.slots * PAGE)

    def backed_pages(self) -> int:
        """Return how many pages of memory the kernel holds for it."""
        return os.fstat(self.fd).st_blocks * 512 // PAGE

    def unused(self) -> bool:
        """Say whether nobody has a descriptor or a mapping of it, by the kernel's word (4)."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(self.fd, fcntl.LOCK_UN)
        return True

    def _take(self, pages: int) -> Run:
        first = self.taken
        self.taken += pages
        self.live += pages
        self._alive[first : first + pages] = True
        return self, first, pages

    def _back(self, pages: int) -> None:
        os.posix_fallocate(self.fd, self.taken * PAGE, pages * PAGE)

    def _give(self, slots: npt.NDArray[np.int64]) -> None:
        assert self._alive[slots].all() and np.unique(slots).size == slots.size, (
            "a slot is given back once, by its user"
        )
        self._alive[slots] = False
        self.live -= slots.size

    def _close(self) -> None:
        os.close(self.fd)
        self.fd = -1
        del self.memory, self._mapping  # unmapped when the last view of it goes


class Store:
    """All extents of one domain. One thread at a time; `close` (or the end of the process) frees what no client has."""

    def __init__(self, nodes: int, extent_pages: int = 4096, *, headroom: Headroom | None = None) -> None:
        self.nodes, self.extent_pages = nodes, extent_pages
        self.extents: dict[int, Extent] = {}
        self._headroom = headroom or Headroom()
        self._numbers = 0
        self._open: list[list[Extent]] = [[] for _ in range(nodes)]

    def __getitem__(self, number: int) -> Extent:
        """Return the extent of that number; KeyError if it was freed or never was."""
        return self.extents[number]

    def __iter__(self) -> Iterator[Extent]:
        """Yield the extents, the oldest first."""
        return iter(list(self.extents.values()))

    def allocate(self, node: int, count: int) -> list[Run]:
        """Take `count` slots of a node in as few runs as there can be; they live until `give`. StoreFull: nothing was taken."""
        if short := self._headroom.short_of(count, node if self.nodes > 1 else None):
            raise StoreFull(f"no memory for {count} more pages of the store: {short}")
        wanted = self._plan(node, count)
        try:
            for extent, pages in wanted:
                extent._back(pages)
        except OSError as error:
            self._drop_unused(node)
            raise StoreFull(_no_memory(count, error)) from None
        return [extent._take(pages) for extent, pages in wanted]

    def publish(self, extent: Extent, first: int, pages: int) -> None:
        """Make filled slots immutable, and unmap them here (`Extent.publish`)."""
        extent.publish(first, pages)

    def give(self, extent: Extent, slots: Iterable[int] | npt.NDArray[np.integer]) -> None:
        """End the life of slots. Their bytes stay as they are, for clients that still map them, and the slots are never taken again."""
        array = slots if isinstance(slots, np.ndarray) else np.fromiter(slots, np.int64)
        extent._give(array.astype(np.int64))

    def retire(self, extent: Extent) -> None:
        """Take no more slots from it: it is being emptied."""
        if extent in self._open[extent.node]:
            self._open[extent.node].remove(extent)

    def free_extents(self) -> list[int]:
        """Free the extents that have no live slot and that nobody has open or mapped; returns their numbers."""
        freed = []
        for extent in self:
            if extent.live == 0 and extent.taken and extent.unused():
                self._free(extent)
                freed.append(extent.number)
        return freed

    def sparse(self) -> list[Extent]:
        """Return the extents worth emptying, the emptiest first: much of their memory is for slots that are dead."""
        found = [
            extent
            for extent in self
            if 0 < extent.live * _SPARSE_SHARE <= extent.taken and extent.taken - extent.live >= _SPARSE_DEAD
        ]
        return sorted(found, key=lambda extent: extent.live)

    def backed_bytes(self) -> int:
        """Return the memory the kernel holds for the store."""
        return sum(extent.backed_pages() for extent in self) * PAGE

    def live_pages(self) -> int:
        """Return how many slots are in use."""
        return sum(extent.live for extent in self)

    def close(self) -> None:
        """Let go of everything; clients keep what they map."""
        for extent in self:
            self._free(extent)

    def _plan(self, node: int, count: int) -> list[tuple[Extent, int]]:
        """Choose where `count` slots come from, making extents if need be: full ones, and one that holds all the rest."""
        planned = []
        try:
            while count >= self.extent_pages:
                planned.append((self._make_extent(node), self.extent_pages))
                count -= self.extent_pages
            if count:
                fitting = [extent for extent in self._open[node] if extent.room >= count]
                extent = min(fitting, key=lambda one: one.room) if fitting else self._make_open(node)
                planned.append((extent, count))
        except OSError as error:
            self._drop_unused(node)
            raise StoreFull(_no_memory(count, error)) from None
        return planned

    def _make_open(self, node: int) -> Extent:
        extent = self._make_extent(node)
        those = self._open[node]
        those.append(extent)
        those.sort(key=lambda one: one.room)
        del those[:-_OPEN_EXTENTS]  # the fullest
        return extent

    def _make_extent(self, node: int) -> Extent:
        extent = Extent(self._numbers + 1, node, self.extent_pages, bind=self.nodes > 1)
        self._numbers += 1
        self.extents[extent.number] = extent
        return extent

    def _drop_unused(self, node: int) -> None:
        """Free the extents of a node that an allocation made before it failed."""
        for extent in self:
            if extent.node == node and extent.taken == 0:
                self._free(extent)

    def _free(self, extent: Extent) -> None:
        self.retire(extent)
        del self.extents[extent.number]
        extent._close()


def _make(name: str, size: int) -> int:
    """Return a new memory file of that size that can be sealed and never executed."""
    try:
        fd = os.memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a kernel before 6.3 has no MFD_NOEXEC_SEAL
            raise
        fd = os.memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _no_memory(count: int, error: OSError) -> str:
    remedies = {
        errno.EMFILE: "raise the limit of open files (ulimit -n) of the daemon",
        errno.ENFILE: "raise fs.file-max",
        errno.EFBIG: "raise the limit of file size (ulimit -f) of the daemon",
    }
    remedy = remedies.get(error.errno or 0, "free some, or raise the limit of the daemon's memory cgroup")
    return f"no memory for {count} more pages of the store ({error.strerror}): {remedy}"
