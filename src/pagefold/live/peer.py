"""Own one connected client: its socket, its files in /proc, its regions, and the windows it was asked for.

Must not know: the engine's rules, the store.
"""

from __future__ import annotations

import bisect
import contextlib
import os
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pagefold.errors import NoSuchProcess
from pagefold.live import control, messages, tracking
from pagefold.live.messages import PAGE, BadMessage
from pagefold.live.region import Int64, Region
from pagefold.machine import Process
from pagefold.sources.memory_reader import MemoryReader

MOST_REGIONS = 1 << 15  # of one client; what it advises beyond is not merged
MOST_PAGES = os.sysconf("SC_PHYS_PAGES")  # of one client: more than the machine has is mostly nothing
_MOST_NUMBERS = 1 << 20  # of regions that are not merged; a client that has more of them is no agent
_MOST_QUEUED = 1 << 20  # bytes for a client that does not read; beyond it is asked nothing more
_TOO_MUCH = 1 << 22  # bytes beyond which it is given up
_PATIENCE = 5.0  # seconds without an answer, after which nobody else waits for it
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

    def add(self, other: Counts) -> None:
        """Count what the other has counted, too."""
        self.by_status = [mine + its for mine, its in zip(self.by_status, other.by_status, strict=True)]
        self.cow_breaks += other.cow_breaks
        self.windows += other.windows


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
        self.ignored: set[int] = set()  # numbers of regions that are too much for us: nothing happens to them
        self.tracked_pages = 0  # of all its regions
        self.process: Process | None = None  # its mirror
        self.pending: dict[int, Batch] = {}
        self.counts = Counts()
        self.extents: set[int] = set()  # those whose descriptor it was sent
        self.unseen: list[Region] = []  # regions that were not looked at yet
        self.last_answer = time.monotonic()
        self._spans: list[tuple[int, int]] = []  # where its regions are, ascending
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
        if self.ended():
            raise NoSuchProcess(f"process {self.pid} ended while it said hello")
        self.reader = MemoryReader(self._memory, living=True)

    def ended(self) -> bool:
        """Tell whether the process has ended: others may have its connection still."""
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

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
        if number <= 0 or number in self.regions or number in self.ignored or len(self.ignored) >= _MOST_NUMBERS:
            raise BadMessage(f"client {self.pid} advised region {number}, which is taken or absurd")
        end = start + pages * PAGE
        if start % PAGE or not PAGE <= start < end <= 1 << 56:
            raise BadMessage(f"client {self.pid} advised {pages} pages at {start:#x}, which no process can have")
        at = bisect.bisect_left(self._spans, (start, end))
        if any(start < other[1] and other[0] < end for other in self._spans[max(at - 1, 0) : at + 1]):
            raise BadMessage(f"client {self.pid} advised memory at {start:#x} twice")
        return number, start, pages

    def add(self, region: Region) -> None:
        """Begin with a region that was checked."""
        self.regions[region.number] = region
        self.tracked_pages += region.pages
        self.unseen.append(region)
        bisect.insort(self._spans, (region.start, region.end))

    def remove(self, region: Region) -> None:
        """End with a region."""
        del self.regions[region.number]
        self.tracked_pages -= region.pages
        self.unseen = [one for one in self.unseen if one is not region]
        del self._spans[bisect.bisect_left(self._spans, (region.start, region.end))]

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

    def written(self, syncing: Collection[Region]) -> list[tuple[Region, Int64]]:
        """Return the pages that were written since the last call: private ones, by index; of untracked regions all that are there.

        Where windows are not safe untracked regions count while somebody waits for them: nothing happens to them else.
        """
        answer = []
        tracked = sorted(
            (region for region in self.regions.values() if region.tracked), key=lambda region: region.start
        )
        at = 0
        while at < len(
            tracked
        ):  # asking takes the answer away, so what lies between, perhaps another's, is not asked for
            first = at
            while at + 1 < len(tracked) and tracked[at + 1].start == tracked[at].end:
                at += 1
            at += 1
            address = tracking.take_written(self._pagemap, tracked[first].start, tracked[at - 1].end)
            for region in tracked[first:at] if len(address) else ():
                begin, stop = np.searchsorted(address, [region.start, region.end])
                if begin < stop:
                    answer.append((region, region.indices(address[begin:stop])))
        for region in self.regions.values():
            if not region.tracked and (self.windows_safe or region in syncing):
                address = tracking.private_pages(self._pagemap, region.start, region.end)
                if len(address):
                    answer.append((region, region.indices(address)))
        return answer

    def inherited(self) -> list[tuple[Region, Int64]]:
        """Return the pages of regions new to us that map a store already: that of a daemon before us."""
        spans = tracking.mapped_stores(self.pid, [(region.start, region.end) for region in self.unseen])
        fresh, self.unseen = self.unseen, []
        return [
            (region, np.concatenate([np.arange(*region.indices(np.array(span)), dtype=np.int64) for span in those]))
            for region, those in zip(fresh, spans, strict=True)
            if those
        ]

    def newly_broken(self) -> list[tuple[Region, Int64]]:
        """Return merged pages that were written since the last call, by index."""
        answer = []
        for region in self.regions.values():
            merged = np.flatnonzero(region.where > 0)
            if not len(merged):
                continue
            start, end = region.start + int(merged[0]) * PAGE, region.start + (int(merged[-1]) + 1) * PAGE
            index = region.indices(tracking.private_pages(self._pagemap, start, end))
            settled = region.wanted[index] == region.where[index]  # else it may just have been given back
            index = index[(region.where[index] > 0) & ~region.broken[index] & settled]
            if len(index):
                region.broken[index] = True
                self.counts.cow_breaks += len(index)
                answer.append((region, index))
        return answer

    def mappings(self) -> int:
        """Return how many mappings its regions will be made of when it has done what it was asked for."""
        return sum(region.mappings() for region in self.regions.values())

    # --- packets --------------------------------------------------------------------------------------------------------------

    def receive(self) -> bytes | None:
        """Return the next packet, b'' at the end, None if there is none now. Descriptors that come along never get to us."""
        try:
            return self.connection.recv(messages.MOST_BYTES)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def say(self, answer: dict[str, Any]) -> None:
        """Answer a question of the command line, after all that was sent before."""
        for packet in control.pack(answer):
            self.send(packet)

    def send(self, packet: bytes, fds: list[int] | None = None) -> None:
        """Send a packet, or queue it; the descriptors are closed once sent."""
        self._queue.append((packet, fds or []))
        self._queued += len(packet)
        self.flush()
        if self.agent and self._queued > _TOO_MUCH:
            self.give_up()

    def give_up(self) -> None:
        """End the connection from our side: the daemon reads its end, and a living client connects anew."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def flush(self) -> None:
        """Send what is queued, as far as the socket takes it."""
        while self._queue:
            packet, fds = self._queue[0]
            try:
                socket.send_fds(self.connection, [packet], fds)
            except BlockingIOError:
                return
            except OSError:  # it is gone, or the kernel has no room for it: what is missing would confuse it
                self.give_up()
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

    @property
    def silent(self) -> bool:
        """Tell whether it has owed us an answer for long: stopped, or hostile."""
        return bool(self.pending) and time.monotonic() - self.last_answer > _PATIENCE

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
