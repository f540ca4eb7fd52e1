"""Own the copying of pages into a buffer of ours: positioned reads of /proc/PID/mem or of an image.

Why /proc/PID/mem and not process_vm_readv, though that copies up to twice as fast (benchmarks/plan_read.py):
process_vm_readv pins what it reads, and since Linux 5.19 pinning a page that is shared after a fork, or a KSM page,
first gives the process a private copy of it. Reading would undo the very sharing it is to measure, and take memory.
/proc/PID/mem only looks. It also gets at pages the process itself may not read (PROT_NONE); KSM merges those too.

Why images are not mapped: a file that is cut short while it is mapped kills its reader with SIGBUS.

Must not know: hashes, page tables.
"""

from __future__ import annotations

import errno
import os

import numpy as np
from numpy.typing import NDArray


class MemoryReader:
    """Copy ranges of an open file: a process's memory, where addresses are offsets, or an image.

    `living` says that it is a process's memory, of which nothing at all is left once the process ended.
    """

    def __init__(self, fd: int, *, living: bool) -> None:
        self.fd = fd
        self.living = living

    def copy(self, ranges: NDArray[np.uint64], buffer: NDArray[np.uint8]) -> int:
        """Copy `ranges`, rows of (address, bytes), into `buffer`, one behind the other.

        Returns the number of bytes copied before the first that could not be had. Raises `ProcessLookupError`
        when the process is gone.
        """
        view, done = buffer.data, 0
        for address, length in ranges.tolist():
            try:
                # The interpreter's lock is let go here: that is where two threads gain.
                got = os.preadv(self.fd, [view[done : done + length]], address)
            except OSError as error:
                if error.errno not in (errno.EIO, errno.EFAULT):
                    raise
                return done
            if got == 0 and self.living:
                raise ProcessLookupError(errno.ESRCH, "the process has ended")
            done += got
            if got < length:
                break
        return done
