"""Be clients without the agent: speak the plain protocol, and swap pages plainly, for nobody else writes to them meanwhile.

`Client` lives in the test's own process, as many as wanted. As a program it is a process of its own, told what to do on stdin:

    clients.py SOCKET   then a JSON list per line, [method of `Worker`, arguments...]; answers a line of JSON each

It goes on with its memory when its daemon dies, and finds the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import mmap
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagefold.live import messages
from pagefold.live.messages import PAGE

Pages = npt.NDArray[np.uint8]
Status = npt.NDArray[np.uint8]

PRIVATE_FIXED, ANONYMOUS = 0x02 | 0x10, 0x20
_SYS_USERFAULTFD = 323
_UFFDIO_API, _UFFDIO_REGISTER = 0xC018AA3F, 0xC020AA00
_WP_UNPOPULATED, _WP_ASYNC = 1 << 13, 1 << 15
_MODE_WP = 2

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def random_pages(seed: int, count: int) -> Pages:
    """Return pages of which no two are equal, always the same for a seed."""
    return np.random.default_rng(seed).integers(0, 256, (count, PAGE), np.uint8)


class Buffer:
    """Advised memory: `pages` is what is there, `expected` what must be."""

    def __init__(self, contents: Pages) -> None:
        self.count = len(contents)
        self.size = self.count * PAGE
        around = _libc.mmap(
            None, self.size + 2 * PAGE, 0, 0x02 | ANONYMOUS, -1, 0
        )  # a mapping of its own for the kernel
        assert around not in (None, ctypes.c_void_p(-1).value)
        self.address = int(around) + PAGE
        assert _libc.mmap(self.address, self.size, 3, PRIVATE_FIXED | ANONYMOUS, -1, 0) == self.address
        raw = (ctypes.c_ubyte * self.size).from_address(self.address)
        self.pages: Pages = np.frombuffer(raw, np.uint8).reshape(self.count, PAGE)
        self.pages[:] = contents
        self.expected = contents.copy()

    def write(self, index: int, byte: int) -> None:
        """Change a page, and know it."""
        self.pages[index, 17] = self.expected[index, 17] = byte

    def right(self) -> bool:
        """Tell whether every byte is what it must be."""
        return np.array_equal(self.pages, self.expected)

    def unmap(self) -> None:
        _libc.munmap(self.address - PAGE, self.size + 2 * PAGE)


def ready(files: Sequence[Any], seconds: float | None) -> list[Any]:
    """Return those of some files that can be read, waiting so long for the first. (select() knows no more than 1024.)"""
    poll = select.poll()
    by_number = {one if isinstance(one, int) else one.fileno(): one for one in files}
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(None if seconds is None else seconds * 1000)]


class Client:
    """A connection, and what the daemon asks for through it. `swap` may be replaced, to be another sort of client."""

    def __init__(
        self, path: Path | str, *, windows_safe: bool = True, max_map_count: int = 65530, hello: bool = True
    ) -> None:
        self.path = str(path)
        self.windows_safe, self.max_map_count = windows_safe, max_map_count
        self.buffers: dict[int, Buffer] = {}
        self.how: dict[int, dict[str, int]] = {}  # what else was said of each region
        self.extents: dict[int, tuple[int, mmap.mmap]] = {}
        self.answers: list[np.void] = []  # SYNCED
        self.released: list[int] = []  # extents
        self.welcomes: list[list[int]] = []  # descriptors that came along
        self.statuses: list[int] = []  # of every page that was asked for
        self.asked: list[tuple[int, int, int, int, int]] = []  # region, first page, pages, extent, slot
        self.unanswered: list[tuple[int, Status]] = []
        self.answering = True
        self.closed = True
        self.swap: Callable[[np.void], Status] = self.plain_swap
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connect(hello=hello)

    # --- what it says -----------------------------------------------------------------------------------------------------

    def connect(self, *, hello: bool = True) -> None:
        """Connect (anew), and say everything from the start."""
        self.connection.close()
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect(self.path)
        self.closed = False
        for fd, _ in self.extents.values():
            os.close(fd)
        self.extents.clear()
        self.unanswered.clear()
        if hello:
            self.send(messages.HELLO, windows_safe=int(self.windows_safe), max_map_count=self.max_map_count)
            for number, buffer in self.buffers.items():
                self._say_advise(number, buffer)

    def send(self, kind: int, **fields: object) -> None:
        self.connection.send(messages.pack(kind, **fields))

    def advise(self, contents: Pages, *, number: int = 0, quiet: bool = False, tracked: bool = False) -> Buffer:
        """Make memory with these contents and advise it."""
        buffer = Buffer(contents)
        if tracked:
            track(buffer.address, buffer.size)
        number = number or max(self.buffers, default=0) + 1
        self.buffers[number] = buffer
        self.how[number] = {"quiet": int(quiet), "tracked": int(tracked)}
        self._say_advise(number, buffer)
        return buffer

    def _say_advise(self, number: int, buffer: Buffer) -> None:
        self.send(messages.ADVISE, region=number, start=buffer.address, pages=buffer.count, **self.how[number])

    def unadvise(self, number: int) -> Buffer:
        """End with a region: its pages become private again first, then the daemon hears it."""
        buffer = self.buffers.pop(number)
        self.make_private(buffer, 0, buffer.count)
        self.send(messages.UNADVISE, region=number)
        return buffer

    def sync(self, number: int, token: int = 7) -> None:
        self.send(messages.SYNC, token=token, region=number)

    # --- what it is asked ---------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        return self.connection.fileno()

    def pump(self) -> None:
        """Handle everything that has arrived."""
        while not self.closed and ready([self], 0):
            self.handle()

    def handle(self) -> None:
        """Handle one packet."""
        try:
            packet, fds, _, _ = socket.recv_fds(self.connection, messages.MOST_BYTES, 4)
        except ConnectionResetError:
            packet, fds = b"", []
        if not packet:
            self.closed = True
            return
        kind, said = messages.unpack(packet)
        if kind == messages.EXTENT:
            view = mmap.mmap(fds[0], int(said["slots"]) * PAGE, prot=mmap.PROT_READ)
            self.extents[int(said["extent"])] = (fds[0], view)
        elif kind == messages.RELEASE:
            fd, _ = self.extents.pop(int(said["extent"]), (-1, None))
            if fd >= 0:
                os.close(fd)
            self.released.append(int(said["extent"]))
        elif kind == messages.WELCOME:
            self.welcomes.append(fds)
        elif kind == messages.SYNCED:
            self.answers.append(said)
        elif kind == messages.WINDOWS:
            for run in said["runs"][: said["count"]]:
                number = int(run["region"])
                first = (int(run["start"]) - self.buffers[number].address) // PAGE if number in self.buffers else -1
                self.asked.append((number, first, int(run["pages"]), int(run["extent"]), int(run["slot"])))
            status = np.concatenate([self.swap(run) for run in said["runs"][: said["count"]]])
            self.unanswered.append((int(said["batch"]), status))
            if self.answering:
                self.answer()

    def answer(self) -> None:
        """Answer every batch that was not answered yet."""
        for batch, status in self.unanswered:
            self.statuses += status.tolist()
            try:
                self.send(messages.OUTCOME, batch=batch, pages=len(status), status=status)
            except OSError:
                self.closed = True
        self.unanswered.clear()

    def plain_swap(self, run: np.void) -> Status:
        """Swap a run: what must be equal is compared, and what differs is told page by page."""
        buffer, count = self.buffers.get(int(run["region"])), int(run["pages"])
        if buffer is None:
            return np.full(count, messages.UNMANAGED, np.uint8)
        first = (int(run["start"]) - buffer.address) // PAGE
        assert first >= 0 and first + count <= buffer.count, "a run that is not in its region"
        extent, slot = int(run["extent"]), int(run["slot"])
        if extent == messages.PRIVATE:
            self.make_private(buffer, first, count)
            return np.full(count, messages.MERGED, np.uint8)
        status = np.full(count, messages.DIFFERS, np.uint8)
        fd, view = self.extents[extent] if extent else (-1, None)
        for at in range(count):
            here = bytes(PAGE) if view is None else view[(slot + at) * PAGE : (slot + at + 1) * PAGE]
            if buffer.pages[first + at].tobytes() == here:
                status[at] = messages.MERGED
        for begin, end in runs(status == messages.MERGED):
            flags = PRIVATE_FIXED | (ANONYMOUS if fd < 0 else 0)
            self._map(buffer.address + (first + begin) * PAGE, (end - begin) * PAGE, flags, fd, (slot + begin) * PAGE)
        return status

    def make_private(self, buffer: Buffer, first: int, count: int) -> None:
        """Give pages back as private anonymous memory."""
        contents = buffer.pages[first : first + count].copy()
        self._map(buffer.address + first * PAGE, count * PAGE, PRIVATE_FIXED | ANONYMOUS, -1, 0)
        buffer.pages[first : first + count] = contents
        for number, one in self.buffers.items():
            if one is buffer and self.how[number]["tracked"]:
                track(buffer.address + first * PAGE, count * PAGE)

    @staticmethod
    def _map(address: int, size: int, flags: int, fd: int, offset: int) -> None:
        got = _libc.mmap(address, size, 3, flags, fd, offset)
        assert got == address, os.strerror(ctypes.get_errno())

    def close(self) -> None:
        """End the connection; memory stays as it is."""
        self.connection.close()
        self.closed = True
        for fd, _ in self.extents.values():
            os.close(fd)
        self.extents.clear()


def runs(flags: npt.NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Return the runs (first, behind the last) of what is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]


_tracker = -1


def track(address: int, size: int) -> None:
    """Let the kernel remember what is written in a range from now on (userfaultfd, WP_ASYNC)."""
    global _tracker
    if _tracker < 0:
        _tracker = _libc.syscall(_SYS_USERFAULTFD, os.O_CLOEXEC | os.O_NONBLOCK)
        if _tracker < 0:
            raise PermissionError(ctypes.get_errno(), "userfaultfd")
        fcntl.ioctl(_tracker, _UFFDIO_API, bytearray(struct.pack("=3Q", 0xAA, _WP_ASYNC | _WP_UNPOPULATED, 0)))
    fcntl.ioctl(_tracker, _UFFDIO_REGISTER, bytearray(struct.pack("=4Q", address, size, _MODE_WP, 0)))


class Crowd:
    """Several clients of this process, served together while a test waits for something."""

    def __init__(self) -> None:
        self.clients: list[Client] = []

    def join(self, path: Path, **how: Any) -> Client:
        """Let one more join a daemon."""
        self.clients.append(Client(path, **how))
        return self.clients[-1]

    def pump(self, seconds: float = 0.0) -> None:
        """Serve everybody, waiting so long for the first packet."""
        living = [client for client in self.clients if not client.closed]
        for client in ready(living, seconds):
            client.pump()

    def until(self, condition: Callable[[], object], seconds: float = 60.0) -> None:
        """Serve everybody until something is so."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "waited in vain"
            self.pump(0.005)

    def right(self) -> bool:
        """Tell whether everybody's memory is what it must be."""
        return all(buffer.right() for client in self.clients for buffer in client.buffers.values())

    def close(self) -> None:
        for client in self.clients:
            client.close()


# --- as a program -----------------------------------------------------------------------------------------------------------


class Worker:
    """What the program can be told to do."""

    def __init__(self, path: str) -> None:
        self.client = Client(path)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Go on if the daemon is dead by now: the next one hears everything from the start."""
        try:
            yield
        except OSError:
            self.client.closed = True

    def advise(self, seed: int, count: int, zeros: Sequence[int] = ()) -> int:
        contents = random_pages(seed, count)
        contents[list(zeros)] = 0
        with self.alone():
            self.client.advise(contents)
        return max(self.client.buffers)

    def unadvise(self, number: int) -> bool:
        buffer = self.client.buffers[number]
        with self.alone():
            self.client.unadvise(number)
        return buffer.right()

    def write(self, number: int, index: int, byte: int) -> bool:
        self.client.buffers[number].write(index, byte)
        return True

    def right(self) -> bool:
        return all(buffer.right() for buffer in self.client.buffers.values())

    def touch(self) -> bool:
        """Read everything, so that the kernel counts it for us."""
        return bool(sum(int(buffer.pages[:, 0].sum()) for buffer in self.client.buffers.values()) >= 0)

    def pss(self) -> int:
        """Return the bytes the kernel counts for the regions, in shares."""
        spans = [(buffer.address, buffer.address + buffer.size) for buffer in self.client.buffers.values()]
        total, inside = 0, False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            head = line.split()[0]
            if not head.endswith(":"):
                start, end = (int(part, 16) for part in head.split("-"))
                inside = any(a < end and start < b for a, b in spans)
            elif inside and head in ("Pss:", "SwapPss:"):
                total += int(line.split()[1]) * 1024
        return total

    def stores(self) -> list[str]:
        """Return the names of the store's files that are mapped."""
        lines = Path("/proc/self/maps").read_text().splitlines()
        return sorted({line.split()[5] for line in lines if "/memfd:pagefold" in line})

    def drop(self) -> bool:
        """Close the views and descriptors of extents, keeping what is mapped."""
        for fd, view in self.client.extents.values():
            os.close(fd)
            view.close()
        self.client.extents.clear()
        return True

    def connected(self) -> bool:
        return not self.client.closed

    def descriptors(self) -> int:
        return len([*Path("/proc/self/fd").iterdir()])

    def uid(self) -> int:
        return os.getuid()


def main() -> None:
    worker = Worker(sys.argv[1])
    print(json.dumps(os.getpid()), flush=True)
    line = b""
    while True:
        if worker.client.closed:
            try:
                worker.client.connect()
            except OSError:  # no daemon yet
                worker.client.closed = True
        watched: list[Any] = [0] if worker.client.closed else [0, worker.client]
        now = ready(watched, 0.01 if worker.client.closed else None)
        if worker.client in now:
            worker.client.handle()
        if 0 in now:
            line += os.read(0, 1 << 16) or sys.exit()
            *whole, line = line.split(b"\n")
            for one in whole:
                name, *arguments = json.loads(one)
                print(json.dumps(getattr(worker, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
