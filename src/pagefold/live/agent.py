"""Own the door to the agent, the part of a client that is C (csrc/agent.h says what each function means).

`Library` calls it as it is: negative answers are errno. `Agent` raises errors that say what to do. Standard library only: workers load
this. Must not know: buffers, the daemon's protocol.
"""

from __future__ import annotations

import ctypes
import errno
import os
from functools import cache
from pathlib import Path
from typing import Any

from pagefold.errors import NotHere, NotPermitted, PagefoldError, UsageError

PAGE = 4096
STATUSES = 16
TEXT = 160
STATUS_NAMES = (
    *("merged", "already", "differs", "pinned", "shared", "unmanaged", "no_vma", "unsuitable"),
    *("broken", "absent", "busy", "off", "bad", "unknown", "", ""),
)  # as in messages.py, which needs NumPy
NO_TIMEOUT = 2**64 - 1

_FOLDER = Path(__file__).parent
_NAME = "_agent.so"
_FAULTS = "_agent_faults.so"  # of tests: with fault points


class State(ctypes.Structure):
    """What the agent of this process says of itself: struct pf_state."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("size", "started", "connected", "windows_safe")),
        *(("why_errno", ctypes.c_int32), ("regions", ctypes.c_uint32), ("region_pages", ctypes.c_uint64)),
        *(("windows", ctypes.c_uint64), ("by_status", ctypes.c_uint64 * STATUSES), ("restored", ctypes.c_uint64)),
        *(("remapped", ctypes.c_uint64), ("forks", ctypes.c_uint64), ("why", ctypes.c_char * TEXT)),
    ]
    size: int
    started: int
    connected: int
    windows_safe: int
    why_errno: int
    regions: int
    region_pages: int
    windows: int
    by_status: ctypes.Array[ctypes.c_uint64]
    restored: int
    remapped: int
    forks: int
    why: bytes

    def pages(self) -> dict[str, int]:
        """Return the pages that windows dealt with, by what became of them."""
        return _by_name(self.by_status)


class Report(ctypes.Structure):
    """What a synchronous merge found: struct pf_report."""

    _fields_ = [
        *(("size", ctypes.c_uint32), ("through_daemon", ctypes.c_uint32), ("pages", ctypes.c_uint64)),
        *(("by_status", ctypes.c_uint64 * STATUSES), ("zero_pages", ctypes.c_uint64), ("saved_bytes", ctypes.c_uint64)),
    ]
    size: int
    through_daemon: int
    pages: int
    by_status: ctypes.Array[ctypes.c_uint64]
    zero_pages: int
    saved_bytes: int

    def by_name(self) -> dict[str, int]:
        """Return the pages by what became of them."""
        return _by_name(self.by_status)


def _by_name(counts: ctypes.Array[ctypes.c_uint64]) -> dict[str, int]:
    return {name: int(count) for name, count in zip(STATUS_NAMES, counts, strict=True) if name and count}


class Library:
    """The functions of the library, typed. Negative answers are errno; -ESRCH: not started in this process."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or _FOLDER / (_FAULTS if os.environ.get("PAGEFOLD_FAULT") else _NAME)
        try:
            self.functions = ctypes.CDLL(str(self.path))
        except OSError as error:
            raise NotHere(
                f"pagefold's agent cannot be loaded ({error}); build it with `make agent` (it needs Linux, gcc and make), "
                "or install pagefold again"
            ) from None
        _declare(self.functions)

    def start(self, socket_path: str = "") -> int:
        """Start it, and go to that daemon ("": to none)."""
        return int(self.functions.pf_start(os.fsencode(socket_path)))

    def stop(self) -> int:
        """End its threads; memory stays as it is."""
        return int(self.functions.pf_stop())

    def state(self) -> State:
        """Return its view of this process; `size` is 0 where there can be none (a child of a bare clone(2))."""
        state = State(size=ctypes.sizeof(State))
        if self.functions.pf_get_state(ctypes.byref(state)) < 0:
            state.size = 0
        return state

    def advise(self, start: int, size: int, *, quietly: bool = False) -> int:
        """Begin a region and return its number."""
        return int(self.functions.pf_advise(start, size, int(quietly)))

    def suits(self, region: int) -> int:
        """Tell whether the mapping of a region that was advised unseen can be merged: 0, -EOPNOTSUPP or -ENOMEM; other errors pass."""
        return int(self.functions.pf_suits(region))

    def find(self, address: int) -> tuple[int, int, int]:
        """Return the region that holds an address, where it starts and where it ends; a negative number if there is none."""
        start, size = ctypes.c_uint64(), ctypes.c_uint64()
        number = int(self.functions.pf_find(address, ctypes.byref(start), ctypes.byref(size)))
        return number, start.value, start.value + size.value

    def unadvise(self, region: int) -> int:
        """End a region, its pages private and anonymous; return how many could not be."""
        return int(self.functions.pf_unadvise(region))

    def unadvise_plainly(self, region: int) -> int:
        """End a region that nobody writes to during the call, where windows are not safe."""
        return int(self.functions.pf_unadvise_plainly(region))

    def forget(self, region: int) -> int:
        """End a region whose memory is unmapped next."""
        return int(self.functions.pf_forget(region))

    def discard(self, region: int, start: int = 0, size: int = 0) -> int:
        """End a region whose content nobody wants: its merged pages become fresh memory; return how many could not."""
        return int(self.functions.pf_discard(region))

    def merge(self, region: int, timeout_ms: int = NO_TIMEOUT) -> tuple[int, Report]:
        """Merge a region now; an errno (or 0), and what was found."""
        report = Report(size=ctypes.sizeof(Report))
        return int(self.functions.pf_merge(region, timeout_ms, ctypes.byref(report))), report

    def array_functions(self) -> dict[str, int]:
        """Return the addresses of the functions of a NumPy memory handler (NEP 49)."""
        return {
            name: ctypes.cast(getattr(self.functions, f"pf_array_{name}"), ctypes.c_void_p).value or 0
            for name in ("malloc", "calloc", "realloc", "free")
        }

    def layout(self) -> str:
        """Return where the fields of all messages and structs lie, a line each."""
        return bytes(self.functions.pf_layout()).decode()


def _declare(functions: Any) -> None:
    number, u32, u64, pointer = ctypes.c_int64, ctypes.c_uint32, ctypes.c_uint64, ctypes.c_void_p
    for name, result, *arguments in (
        ("pf_start", ctypes.c_int, ctypes.c_char_p),
        ("pf_stop", ctypes.c_int),
        ("pf_get_state", ctypes.c_int, ctypes.POINTER(State)),
        ("pf_advise", number, u64, u64, u32),
        ("pf_advise_unseen", number, u64, u64, u32),
        ("pf_suits", ctypes.c_int, number),
        ("pf_find", number, u64, ctypes.POINTER(u64), ctypes.POINTER(u64)),
        ("pf_unadvise", number, number),
        ("pf_unadvise_plainly", number, number),
        ("pf_forget", ctypes.c_int, number),
        ("pf_discard", number, number),
        ("pf_merge", ctypes.c_int, number, u64, ctypes.POINTER(Report)),
        ("pf_array_malloc", pointer, pointer, ctypes.c_size_t),
        ("pf_array_calloc", pointer, pointer, ctypes.c_size_t, ctypes.c_size_t),
        ("pf_array_realloc", pointer, pointer, pointer, ctypes.c_size_t),
        ("pf_array_free", None, pointer, pointer, ctypes.c_size_t),
        ("pf_layout", ctypes.c_char_p),
    ):
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments


@cache
def library() -> Library:
    """Return the library, loaded once. Before a fork, if children shall merge with their parent without a daemon."""
    return Library()


class AgentError(PagefoldError):
    """The agent cannot do what it was asked; `code` is the errno."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Agent:
    """The agent of this process. Every method raises PagefoldError with what to do."""

    def __init__(self, functions: Library | None = None) -> None:
        self.library = functions or library()

    def start(self, socket_path: str = "") -> None:
        """Start it (in a forked child: again), and go to that daemon ("": to none)."""
        code = -self.library.start(socket_path)
        if code == errno.ENAMETOOLONG:
            raise UsageError(f"{socket_path}: longer than the 107 bytes a socket's name may have; use a shorter path")
        if code in (errno.EPERM, errno.EACCES, errno.ENOSYS):
            raise NotPermitted(
                "the agent needs a file table of its own, and neither close_range(2) nor unshare(2) is allowed here; "
                "allow one of them in the seccomp profile of this container"
            )
        if code == errno.EAGAIN:
            raise AgentError(
                code, "no thread can be started for the agent; raise the limit on processes (ulimit -u, pids.max)"
            )
        _check(code)

    def stop(self) -> None:
        """End its threads and its connection; memory stays as it is."""
        _check(-self.library.stop())

    def state(self) -> State:
        """Return its view of this process."""
        return self.library.state()

    def advise(self, start: int, size: int, *, quietly: bool = False) -> int:
        """Let this memory be merged from now on (`quietly`: only by `merge`); return the region's number."""
        code = self.library.advise(start, size, quietly=quietly)
        what = f"{size} bytes at {start:#x}"
        if code == -errno.EINVAL:
            raise UsageError(f"{what}: not whole pages of {PAGE} bytes; leave out what is not")
        if code == -errno.EEXIST:
            raise AgentError(-code, f"{what}: some of it is advised already; end that first")
        if code == -errno.EOPNOTSUPP:
            raise AgentError(
                -code,
                f"{what}: shared, file, locked or special memory, which cannot be merged; copy it into plain memory",
            )
        if code == -errno.ENOMEM:
            raise AgentError(-code, f"{what}: not mapped as a whole, or no memory for the region's record")
        _check(-code)
        return code

    def unadvise(self, region: int) -> int:
        """End a region: private anonymous memory again; return how many pages could not be (pinned; correct where they are)."""
        return _counted(self.library.unadvise(region), region)

    def forget(self, region: int) -> None:
        """End a region whose memory is unmapped next."""
        _counted(self.library.forget(region), region)

    def discard(self, region: int) -> int:
        """End a region whose content nobody wants, but whose memory stays mapped; return how many pages could not be made fresh."""
        return _counted(self.library.discard(region), region)

    def merge(self, region: int, timeout: float | None = None) -> Report:
        """Merge a region now. Where windows are not safe nobody may write to it during the call."""
        code, report = self.library.merge(region, NO_TIMEOUT if timeout is None else int(max(timeout, 0) * 1000))
        if code == -errno.ETIMEDOUT:
            raise AgentError(-code, f"the daemon did not merge region {region} in {timeout} s; give it more time")
        if code == -errno.EAGAIN:
            raise AgentError(-code, "the daemon does not merge now; say `pagefold set run=1`")
        _counted(code, region)
        return report


def _counted(code: int, region: int) -> int:
    if code == -errno.ENOENT:
        raise UsageError(f"{region} is no region, or it was ended already")
    _check(-code)
    return code


def _check(code: int) -> None:
    if code == errno.ESRCH:
        raise AgentError(code, "the agent is not started in this process; call start() (in a forked child, again)")
    if code == errno.ECHILD:
        raise AgentError(code, "this process was made by a bare clone(2), which no library can follow; use fork()")
    if code > 0:
        raise AgentError(code, f"the agent failed: {os.strerror(code)}")
