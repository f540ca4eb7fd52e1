"""Own the files of one process in /proc: opening them, and turning the kernel's refusals into errors of ours.

Must not know: contents.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pagefold.errors import NotReadable
from pagefold.sources.areas import Area, parse_smaps
from pagefold.sources.identity import PROC, gone, has_memory, identify, identify_readable, refused
from pagefold.sources.pagemap import frame_flags, open_kpageflags
from pagefold.sources.pages import Bool, Int64


class ProcessFiles:
    """Open the files of one process.

    Making one checks that the process may be read: raises `NoSuchProcess`, `NotPermitted` or `NotReadable`.
    """

    def __init__(self, pid: int, proc: Path = PROC) -> None:
        self.pid = pid
        self.proc = proc
        self.identity = identify_readable(pid, proc)
        with self.errors():
            for name in ("smaps", "pagemap"):
                with self.opened(name):
                    pass

    @contextmanager
    def opened(self, name: str) -> Iterator[int]:
        """Open one of the process's files for reading, as long as the block runs."""
        fd = os.open(self.proc / str(self.pid) / name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what the system refuses inside the block into one of our errors."""
        try:
            yield
        except FileNotFoundError as error:
            if has_memory(self.pid, self.proc):
                raise NotReadable(f"{error.filename} is missing: this kernel lacks CONFIG_PROC_PAGE_MONITOR") from None
            raise gone(self.pid, self.identity.name) from None
        except ProcessLookupError:
            raise gone(self.pid, self.identity.name) from None
        except PermissionError:
            raise refused(self.pid, self.identity.name) from None
        except OSError as error:
            raise NotReadable(f"{self.identity.label}: {error.strerror}") from error

    def areas(self) -> list[Area]:
        """Return all areas of the process by address."""
        with self.errors():
            path = self.proc / str(self.pid) / "smaps"
            areas = list(parse_smaps(path.read_text(errors="replace")))
        if not areas:
            raise gone(self.pid, self.identity.name)
        return areas

    def has_flag(self, frame: Int64, flag: np.uint64) -> Bool:
        """Tell which frames have a flag of /proc/kpageflags; none, where it cannot be read."""
        if not len(frame) or (kpageflags := open_kpageflags(self.proc)) is None:
            return np.zeros(len(frame), np.bool_)
        try:
            return frame_flags(kpageflags, frame, flag)
        finally:
            os.close(kpageflags)

    def still_there(self) -> None:
        """Refuse a result that may be of two processes: ours ended, perhaps another has its PID."""
        there = has_memory(self.pid, self.proc)
        if not there or identify(self.pid, self.proc).started != self.identity.started:
            raise gone(self.pid, self.identity.name)
