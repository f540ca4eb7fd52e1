"""Be a client without the agent: advise equal pages over the plain protocol and swap them plainly. Run as a program; speaks lines.

usage: plain_agent.py SOCKET SEED PAGES   then lines: "write INDEX BYTE", "check", "unadvise", "quit"
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import socket
import sys

import numpy as np

from pagefold.live import messages
from pagefold.live.messages import PAGE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
PRIVATE_FIXED = 0x02 | 0x10


class PlainAgent:
    """A region of pages, and what the daemon asks for it."""

    def __init__(self, path: str, contents: np.ndarray) -> None:
        self.pages = len(contents)
        self.memory = mmap.mmap(-1, self.pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.bytes = np.frombuffer(self.memory, np.uint8).reshape(self.pages, PAGE)
        self.bytes[:] = contents
        self.address = self.bytes.ctypes.data
        self.extents: dict[int, tuple[int, np.ndarray]] = {}
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.connection.connect(path)
        self.send(messages.HELLO, windows_safe=1, max_map_count=65530)
        self.send(messages.ADVISE, region=1, start=self.address, pages=self.pages)

    def send(self, kind: int, **fields: object) -> None:
        self.connection.send(messages.pack(kind, **fields))

    def handle(self) -> bool:
        """Handle one packet; False at the end."""
        packet, fds, _, _ = socket.recv_fds(self.connection, messages.MOST_BYTES, 4)
        if not packet:
            return False
        kind, said = messages.unpack(packet)
        if kind == messages.EXTENT:
            view = mmap.mmap(fds[0], int(said["slots"]) * PAGE, prot=mmap.PROT_READ)
            self.extents[int(said["extent"])] = (fds[0], np.frombuffer(view, np.uint8).reshape(-1, PAGE))
        elif kind == messages.RELEASE:
            os.close(self.extents.pop(int(said["extent"]))[0])
        elif kind == messages.WINDOWS:
            status = np.concatenate([self.swap(run) for run in said["runs"][: said["count"]]])
            self.send(messages.OUTCOME, batch=said["batch"], pages=len(status), status=status)
        return True

    def swap(self, run: np.void) -> np.ndarray:
        """Swap a run plainly: nobody writes meanwhile, this is the only thread."""
        first, count = (int(run["start"]) - self.address) // PAGE, int(run["pages"])
        fd, slots, offset = -1, np.zeros((count, PAGE), np.uint8), 0
        if run["extent"] and run["extent"] != messages.PRIVATE:
            fd, all_slots = self.extents[int(run["extent"])]
            offset = int(run["slot"])
            slots = all_slots[offset : offset + count]
        mine = self.bytes[first : first + count].copy()
        if run["extent"] != messages.PRIVATE and not np.array_equal(mine, slots):
            return np.full(count, messages.DIFFERS, np.uint8)
        flags = PRIVATE_FIXED | (0x20 if fd < 0 else 0)
        got = _libc.mmap(int(run["start"]), count * PAGE, 3, flags, fd, offset * PAGE)
        assert got == int(run["start"])
        if run["extent"] == messages.PRIVATE:
            self.bytes[first : first + count] = mine
        return np.full(count, messages.MERGED, np.uint8)


def main() -> None:
    path, seed, pages = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    expected = np.random.default_rng(seed).integers(0, 256, (pages, PAGE), np.uint8)
    expected[pages // 2 : pages // 2 + 3] = 0
    agent = PlainAgent(path, expected)
    print("ready", os.getpid(), flush=True)
    while True:
        ready, _, _ = select.select([agent.connection, sys.stdin], [], [])
        if agent.connection in ready and not agent.handle():
            break
        if sys.stdin in ready:
            word, *rest = sys.stdin.readline().split() or ["quit"]
            if word == "write":
                index, byte = map(int, rest)
                agent.bytes[index, 17] = expected[index, 17] = byte
                print("wrote", flush=True)
            elif word == "check":
                print("equal" if np.array_equal(agent.bytes, expected) else "WRONG", flush=True)
            elif word == "unadvise":
                agent.send(messages.UNADVISE, region=1)
                print("ended", flush=True)
            else:
                break


if __name__ == "__main__":
    main()
