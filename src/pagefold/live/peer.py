"""Own one connected client: its socket, its files in /proc, its regions, and the windows it was asked for.

Must not know: the engine's rules, the store.
"""

from __future__ import annotations

import os
import select
import socket
import struct
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pagefold.errors import NoSuchProcess
from pagefold.live import messages, tracking
from pagefold.live.messages import PAGE, BadMessage
from pagefold.live.region import Int64, Region
from pagefold.machine import Process
from pagefold.sources.memory_reader import MemoryReader

MOST_REGIONS = 1 << 17
MOST_PAGES = 1 << 31
_MOST_QUEUED = 1 << 20  # bytes for a client that does not read; beyond it is asked nothing more
_SO_PEERPIDFD = 77


@dataclass
class Batch:
    """Runs a client was asked for: which pages of which regions, and what they shall map."""

    regions: list[Region]
    indices: list[Int64]
    targets: list[Int64]


@dataclass
class Counts:
    """What became of a client's pages so far."""

    by_status: list[int] = field(default_factory=lambda: [0] * messages.STATUSES)
    cow_breaks: int = 0
    windows: int = 0


class Peer:
    """One connection. Everything a client says is checked here; nonsense raises BadMessage, and the daemon drops it."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.setblocking(False)
        self.pid, self.uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        self.agent = False  # it said HELLO
        self.windows_safe = False
        self.why = ""
        self.max_mappings = 65530
        self.regions: dict[int, Region] = {}
        self.process: Process | None = None  # its mirror
        self.pending: dict[int, Batch] = {}
        self.counts = Counts()
        self.extents: set[int] = set()  # those whose descriptor it was sent
        self.retry: list[tuple[Region, Int64]] = []  # pages that could not be read for the moment
        self.last_answer = time.monotonic()
        self._batches = 0
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._queued = 0
        self._pagemap = -1
        self._memory = -1
        self._pidfd = -1

    # --- the process ------------------------------------------------------------------------------------------------------

    def open_files(self) -> None:
        """Open what is needed of /proc; raises OSError if this user may not, NoSuchProcess if it is not the one that connected."""
        self._pidfd = self._peer_pidfd()
        self._pagemap = os.open(f"/proc/{self.pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        if select.select([self._pidfd], [], [], 0)[0]:
            raise NoSuchProcess(f"process {self.pid} ended while it said hello")
        self.reader = MemoryReader(self._memory, living=True)

    def _peer_pidfd(self) -> int:
        """Return a descriptor of the very process that connected, where the kernel can say (6.5); else of the one with its number."""
        try:
            raw = self.connection.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4)
        except OSError:
            return os.pidfd_open(self.pid)
        return int(struct.unpack("i", raw)[0])

    def command(self) -> str:
        """Return the command of the process, for people."""
        try:
            with Path(f"/proc/{self.pid}/cmdline").open("rb") as file:
                words = file.read(4096).rstrip(b"\0").split(b"\0")
        except OSError:
            return ""
        return b" ".join(words).decode(errors="replace")[:200]

    def close(self) -> None:
        """Close everything."""
        for fd in (self._pagemap, self._memory, self._pidfd):
            if fd >= 0:
                os.close(fd)
        self._pagemap = self._memory = self._pidfd = -1
        for _, fds in self._queue:
            for fd in fds:
                os.close(fd)
        self._queue.clear()
        self.connection.close()

    # --- regions ------------------------------------------------------------------------------------------------------------

    def check_advise(self, said: np.void) -> tuple[int, int, int]:
        """Return (number, start, pages) of a region it may advise; BadMessage for anything no agent would say."""
        number, start, pages = int(said["region"]), int(said["start"]), int(said["pages"])
        if number <= 0 or number in self.regions or len(self.regions) >= MOST_REGIONS:
            raise BadMessage(f"client {self.pid} advised region {number}, which is taken or absurd")
        end = start + pages * PAGE
        if start % PAGE or not PAGE <= start < end <= 1 << 56 or self.tracked_pages() + pages > MOST_PAGES:
            raise BadMessage(f"client {self.pid} advised {pages} pages at {start:#x}, which no process can have")
        for other in self.regions.values():
            if start < other.end and other.start < end:
                raise BadMessage(f"client {self.pid} advised memory at {start:#x} twice")
        return number, start, pages

    def tracked_pages(self) -> int:
        """Return how many pages its regions have."""
        return sum(region.pages for region in self.regions.values())

    def by_vpn(self, vpns: Int64) -> list[tuple[Region, Int64]]:
        """Split page numbers of the mirror (ascending) by region: (region, which entries of `vpns`)."""
        regions = sorted(self.regions.values(), key=lambda region: region.vpn)
        bounds = np.searchsorted(vpns, [region.vpn for region in regions])
        ends = np.searchsorted(vpns, [region.vpn + region.pages for region in regions])
        return [
            (region, np.arange(begin, end, dtype=np.int64))
            for region, begin, end in zip(regions, bounds, ends, strict=True)
            if begin < end
        ]

    def written(self) -> list[tuple[Region, Int64]]:
        """Return the pages that were written since the last call: private ones, by index; of untracked regions all that are there."""
        answer = []
        tracked = [region for region in self.regions.values() if region.tracked]
        if tracked:
            start, end = min(r.start for r in tracked), max(r.end for r in tracked)
            address = tracking.take_written(self._pagemap, start, end)
            if len(address):
                for region in tracked:
                    begin, stop = np.searchsorted(address, [region.start, region.end])
                    if begin < stop:
                        answer.append((region, region.indices(address[begin:stop])))
        for region in self.regions.values():
            if not region.tracked:
                address = tracking.private_pages(self._pagemap, region.start, region.end)
                if len(address):
                    answer.append((region, region.indices(address)))
        return answer

    def newly_broken(self) -> list[tuple[Region, Int64]]:
        """Return merged pages that were written since the last call, by index."""
        answer = []
        for region in self.regions.values():
            merged = np.flatnonzero(region.where > 0)
            if not len(merged):
                continue
            start, end = region.start + int(merged[0]) * PAGE, region.start + (int(merged[-1]) + 1) * PAGE
            index = region.indices(tracking.private_pages(self._pagemap, start, end))
            index = index[(region.where[index] > 0) & ~region.broken[index]]
            if len(index):
                region.broken[index] = True
                self.counts.cow_breaks += len(index)
                answer.append((region, index))
        return answer

    def mappings(self) -> int:
        """Return how many mappings its regions are made of."""
        return sum(region.mappings() for region in self.regions.values())

    # --- packets --------------------------------------------------------------------------------------------------------------

    def receive(self) -> bytes | None:
        """Return the next packet, b'' at the end, None if there is none now. Descriptors that come along are closed."""
        try:
            packet, fds, _, _ = socket.recv_fds(self.connection, messages.MOST_BYTES, 16)
        except BlockingIOError:
            return None
        except OSError:
            return b""
        for fd in fds:
            os.close(fd)
        return packet

    def send(self, packet: bytes, fds: list[int] | None = None) -> None:
        """Send a packet, or queue it; the descriptors are closed once sent."""
        self._queue.append((packet, fds or []))
        self._queued += len(packet)
        self.flush()

    def flush(self) -> None:
        """Send what is queued, as far as the socket takes it."""
        while self._queue:
            packet, fds = self._queue[0]
            try:
                socket.send_fds(self.connection, [packet], fds)
            except BlockingIOError:
                return
            except OSError:  # it is gone; the daemon sees that by reading
                pass
            self._queue.popleft()
            self._queued -= len(packet)
            for fd in fds:
                os.close(fd)

    @property
    def wants_to_send(self) -> bool:
        """Tell whether packets wait for the socket."""
        return bool(self._queue)

    @property
    def crowded(self) -> bool:
        """Tell whether it does not keep up: nothing more should be asked of it for now."""
        return self._queued > _MOST_QUEUED or len(self.pending) > 256

    def ask(self, batch: Batch, packet_runs: list[tuple[int, int, int, int, int, int]], *, plain: bool) -> None:
        """Send WINDOWS for a batch and remember it."""
        self._batches += 1
        if not self.pending:
            self.last_answer = time.monotonic()
        self.pending[self._batches] = batch
        self.counts.windows += len(packet_runs)
        runs = np.array(packet_runs, messages.run)
        self.send(messages.pack(messages.WINDOWS, batch=self._batches, count=len(runs), plain=int(plain), runs=runs))

    def take_batch(self, said: np.void) -> tuple[Batch, np.ndarray[tuple[int], np.dtype[np.uint8]]]:
        """Return the batch an OUTCOME answers, with a status per page; BadMessage if there is none such."""
        batch = self.pending.pop(int(said["batch"]), None)
        pages = int(said["pages"])
        if batch is None or pages != sum(map(len, batch.indices)):
            raise BadMessage(f"client {self.pid} answered windows that it was not asked for")
        status = said["status"][:pages]
        if (status >= messages.UNKNOWN).any():
            raise BadMessage(f"client {self.pid} answered with a status that does not exist")
        self.last_answer = time.monotonic()
        counts = np.bincount(status, minlength=messages.STATUSES)
        self.counts.by_status = [old + int(new) for old, new in zip(self.counts.by_status, counts, strict=True)]
        return batch, status
