"""Own a process that holds an extent in every way there is, and does what it is told on stdin: one word a line, one answer a line.

holder.py DESCRIPTOR SLOTS
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import sys
from pathlib import Path

PAGE = 4096


class Holder:
    def __init__(self, fd: int, slots: int) -> None:
        self.fd, self.slots = fd, slots
        self.mapped: mmap.mmap | None = None
        self.address = 0
        self.libc = ctypes.CDLL(None)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]

    def map(self) -> object:
        """Map it as a client does: private, writable, and with no descriptor kept behind it."""
        self.address = self.libc.mmap(None, self.slots * PAGE, 3, mmap.MAP_PRIVATE, self.fd, 0)
        return self.address not in (None, ctypes.c_void_p(-1).value)

    def close(self) -> object:
        os.close(self.fd)
        return True

    def unlock(self) -> object:
        import fcntl

        fcntl.flock(self.fd, fcntl.LOCK_UN)
        return True

    def hog(self) -> object:
        """Try to hold it alone, against the rules."""
        import fcntl

        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def fork(self) -> object:
        """Leave a child that does nothing."""
        child = os.fork()
        if child == 0:
            os.close(0)
            os.close(1)
            while True:
                signal.pause()
        return child

    def unmap(self) -> object:
        return self.libc.munmap(ctypes.c_void_p(self.address), ctypes.c_size_t(self.slots * PAGE)) == 0

    def half(self) -> object:
        """Unmap all but the last slot."""
        return self.libc.munmap(ctypes.c_void_p(self.address), ctypes.c_size_t((self.slots - 1) * PAGE)) == 0

    def read(self) -> object:
        """Touch every page; answer their first bytes."""
        return bytes(ctypes.string_at(self.address + at * PAGE, 1)[0] for at in range(self.slots)).hex()

    def write(self) -> object:
        """Write to the first page, which then is ours alone."""
        ctypes.memset(self.address, 0xEE, 1)
        return True

    def pss(self) -> object:
        """Answer the bytes that the kernel counts for the mapping."""
        text = Path("/proc/self/smaps").read_text()
        entry = text.split(f"{self.address:x}-", 1)[1]
        return int(entry.split("\nPss:", 1)[1].split()[0]) * 1024


def main() -> None:
    holder = Holder(int(sys.argv[1]), int(sys.argv[2]))
    for line in sys.stdin:
        print(getattr(holder, line.strip())(), flush=True)


if __name__ == "__main__":
    main()
