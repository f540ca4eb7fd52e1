"""Own the doors of the window tests: building csrc's windows as a library and as a C driver, and calling them through ctypes.

Run as a program it opens the kit in a fresh process where some system calls are refused, and prints what became of it.
Must not know: the agent, the daemon.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path

CSRC = Path(__file__).parents[2] / "csrc"
SOURCES = [
    "kernel",
    "regions",
    "suitable",
    "kit",
    "run",
    "window",
    "remap",
    "plain",
    "restore",
    "fresh",
    "listener",
    "selftest",
]
WARNINGS = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wstrict-prototypes", "-Wmissing-prototypes"]
PAGE = 4096
PRESENT, SWAP, FILE = 1 << 63, 1 << 62, 1 << 61
_IO_URING_SETUP, _IO_URING_REGISTER = 425, 427

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
for _name in ("munmap", "mlock"):
    getattr(libc, _name).argtypes = [ctypes.c_void_p, ctypes.c_size_t]
for _name in ("madvise", "mprotect"):
    getattr(libc, _name).argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class Status(IntEnum):
    """Name what became of a page: enum pf_status."""

    MERGED, ALREADY, DIFFERS, PINNED, SHARED, UNMANAGED, NO_VMA, UNSUITABLE, BROKEN, ABSENT, BUSY, OFF, BAD = range(13)


class Target(ctypes.Structure):
    """Lay out struct pf_target."""

    _fields_ = (
        ("extent", ctypes.c_uint32),
        ("slot", ctypes.c_uint32),
        ("fd", ctypes.c_int),
        ("bytes", ctypes.c_void_p),
        ("offset", ctypes.c_uint64),
    )


class Region(ctypes.Structure):
    """Lay out struct pf_region."""

    _fields_ = (
        ("id", ctypes.c_int64),
        ("start", ctypes.c_uint64),
        ("pages", ctypes.c_uint64),
        ("quiet", ctypes.c_uint32),
        ("tracked", ctypes.c_uint32),
        ("closing", ctypes.c_uint32),
        ("abandoned", ctypes.c_uint32),
        ("vma", ctypes.c_uint32),
        ("suits", ctypes.c_int32),
        ("where", ctypes.c_void_p),
    )


class Counts(ctypes.Structure):
    """Lay out struct pf_counts."""

    _fields_ = (
        ("windows", ctypes.c_uint64),
        ("by_status", ctypes.c_uint64 * 16),
        ("restored", ctypes.c_uint64),
        ("remapped", ctypes.c_uint64),
        ("forks", ctypes.c_uint64),
    )


class FaultPlan(ctypes.Structure):
    """Lay out struct pf_fault_plan."""

    CALL = ctypes.CFUNCTYPE(None)
    _fields_ = (
        *((name, ctypes.c_int) for name in ("read", "kind", "point", "signal")),
        ("passes", ctypes.c_long),
        ("call", CALL),
    )


def _compile(output: Path, *more: str) -> Path:
    sources = [str(CSRC / f"{name}.c") for name in SOURCES]
    command = [
        "gcc",
        *WARNINGS,
        "-O2",
        "-g",
        "-fPIC",
        "-DPF_FAULTS",
        f"-I{CSRC}",
        "-o",
        str(output),
        *more,
        *sources,
        "-lpthread",
    ]
    subprocess.run(command, check=True)
    return output


def build_library(folder: Path) -> Path:
    """Build the windows alone, all functions visible."""
    failing = str(Path(__file__).with_name("failing_maps.c"))
    return _compile(folder / "windows.so", "-shared", "-Wl,--wrap=mmap,--wrap=mremap", failing)


def build_driver(folder: Path) -> Path:
    """Build window_driver.c, fault points active."""
    return _compile(folder / "driver", str(Path(__file__).with_name("window_driver.c")))


class Windows:
    """Call the windows of one library, in this process."""

    def __init__(self, library: Path) -> None:
        self.calls = ctypes.CDLL(str(library))
        u32, u64, i64, pointer = ctypes.c_uint32, ctypes.c_uint64, ctypes.c_int64, ctypes.c_void_p
        for name, result, arguments in (
            ("pf_kit_open", ctypes.c_int, [ctypes.c_int, ctypes.c_char_p]),
            ("pf_kit_close", None, []),
            ("pf_kit_ready", ctypes.c_bool, []),
            ("pf_track", ctypes.c_int, [u64, u64]),
            ("pf_untrack", None, [u64, u64]),
            ("pf_window", None, [i64, u64, u32, ctypes.POINTER(Target), ctypes.c_int, pointer]),
            ("pf_window_drop", None, []),
            ("pf_window_counts", None, [ctypes.POINTER(Counts)]),
            ("pf_restore", i64, [u64, u64, ctypes.c_int]),
            ("pf_suitable", ctypes.c_int, [u64, u64, ctypes.c_char_p]),
            ("pf_region_add", i64, [u64, u64, u32, u32]),
            ("pf_region_close", ctypes.c_int, [i64]),
            ("pf_region_abandon", ctypes.c_int, [i64]),
            ("pf_region_remove", ctypes.c_int, [i64]),
            ("pf_region_get", ctypes.c_bool, [i64, ctypes.POINTER(Region)]),
            ("pf_region_next", ctypes.c_bool, [i64, ctypes.POINTER(Region)]),
            ("pf_region_at", ctypes.c_bool, [u64, ctypes.POINTER(Region)]),
            ("pf_region_where", ctypes.c_int, [i64, u64, u64, ctypes.POINTER(u64)]),
            ("pf_region_totals", None, [ctypes.POINTER(u32), ctypes.POINTER(u64)]),
            ("pf_region_overlaps", ctypes.c_bool, [u64, u64]),
        ):
            function = getattr(self.calls, name)
            function.restype, function.argtypes = result, arguments

    def __getattr__(self, name: str) -> Callable[..., int]:
        """Let `windows.track(...)` call pf_track."""
        return getattr(self.calls, f"pf_{name}")  # type: ignore[no-any-return]

    def open(self, device: int = -1) -> tuple[int, str]:
        """Open the kit: its answer, and why."""
        why = ctypes.create_string_buffer(160)
        return self.calls.pf_kit_open(device, why), why.value.decode()

    def at_fault(self, kind: int, point: int, call: Callable[[], object]) -> FaultPlan:
        """Have a function called at a fault point, in the middle of whatever happens there. Keep the answer until it is over."""
        plan = FaultPlan.in_dll(self.calls, "pf_fault_plan")
        plan.kind, plan.point, plan.passes, plan.call = kind, point, 1, FaultPlan.CALL(lambda: call() and None)
        return plan

    def fail_maps(self, times: int) -> ctypes.c_int:
        """Let so many mappings onto a fixed place fail, the place unmapped; the answer counts down."""
        left = ctypes.c_int.in_dll(self.calls, "fail_maps")
        left.value = times
        return left

    def suitable(self, start: int, pages: int) -> tuple[int, str]:
        """Ask whether a mapping can be merged: the answer, and why not."""
        why = ctypes.create_string_buffer(160)
        return self.calls.pf_suitable(start, pages * PAGE, why), why.value.decode()

    def counts(self) -> Counts:
        """Return the counters."""
        counts = Counts()
        self.calls.pf_window_counts(ctypes.byref(counts))
        return counts

    def where(self, region: int, pages: int) -> list[int]:
        """Return what the registry knows of a region's pages."""
        out = (ctypes.c_uint64 * pages)()
        assert self.calls.pf_region_where(region, 0, pages, out) == 0
        return list(out)

    def swap(self, region: int, start: int, pages: int, target: Target, plain: int = 0) -> list[Status]:
        """Run one window."""
        status = (ctypes.c_uint8 * pages)(*[255] * pages)
        self.calls.pf_window(region, start, pages, ctypes.byref(target), plain, status)
        return [Status(value) for value in status]


class Slots:
    """A memfd with one page per content, as a daemon would make it."""

    def __init__(self, contents: Sequence[bytes], extent: int = 1) -> None:
        self.extent = extent
        self.fd = os.memfd_create("slots")
        for number, content in enumerate(contents):
            os.pwrite(self.fd, content, number * PAGE)
        self.view = libc.mmap(None, len(contents) * PAGE, mmap.PROT_READ, mmap.MAP_SHARED, self.fd, 0)

    def at(self, slot: int) -> Target:
        """The slots from this one on."""
        return Target(self.extent, slot, self.fd, self.view + slot * PAGE, slot * PAGE)


class Memory:
    """Pages under test, and what the kernel says of them."""

    def __init__(
        self, pages: int, flags: int = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, fd: int = -1, align: int = PAGE
    ) -> None:
        self.pages = pages
        self._mapped = libc.mmap(None, pages * PAGE + align, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
        self.start = -(-self._mapped // align) * align
        for at, length in (
            (self._mapped, self.start - self._mapped),
            (self.start + pages * PAGE, self._mapped + align - self.start),
        ):
            if length:
                libc.munmap(at, length)

    def at(self, page: int) -> int:
        """Address of a page."""
        return self.start + page * PAGE

    def __getitem__(self, page: int) -> bytes:
        return ctypes.string_at(self.at(page), PAGE)

    def __setitem__(self, page: int, content: bytes) -> None:
        ctypes.memmove(self.at(page), content, len(content))

    def entries(self) -> list[int]:
        """Read the pagemap entries."""
        with Path("/proc/self/pagemap").open("rb", buffering=0) as pagemap:
            pagemap.seek(self.start // PAGE * 8)
            data = pagemap.read(self.pages * 8)
        return [int.from_bytes(data[at : at + 8], "little") for at in range(0, len(data), 8)]

    def mappings(self) -> list[tuple[int, int, str, str]]:
        """List the mappings: first page, pages, rights and path, flags."""
        found, inside = [], False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            header = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \S+ *(.*)", line)
            if header:
                low, high = int(header[1], 16), int(header[2], 16)
                inside = low < self.start + self.pages * PAGE and high > self.start
                first, last = max(low, self.start), min(high, self.start + self.pages * PAGE)
                about = ((first - self.start) // PAGE, (last - first) // PAGE, f"{header[3]} {header[4]}".strip())
            elif inside and line.startswith("VmFlags:"):
                found.append((*about, " ".join(sorted(set(line.split()[1:]) - {"sd"}))))
        return found

    def free(self) -> None:
        """Unmap it."""
        libc.munmap(self.start, self.pages * PAGE)


def content(number: int) -> bytes:
    """A page unlike the others: no zeros, and another number in every word."""
    return b"".join((number << 32 | word << 8 | 1).to_bytes(8, "little") for word in range(PAGE // 8))


class Pin:
    """An io_uring fixed buffer."""

    def __init__(self, address: int, pages: int) -> None:
        self.ring = libc.syscall(_IO_URING_SETUP, 1, (ctypes.c_uint32 * 30)())
        buffer = (ctypes.c_uint64 * 2)(address, pages * PAGE)
        assert self.ring >= 0 and libc.syscall(_IO_URING_REGISTER, self.ring, 0, buffer, 1) == 0

    def end(self) -> None:
        """Unpin, and wait for it."""
        assert libc.syscall(_IO_URING_REGISTER, self.ring, 1, None, 0) == 0
        os.close(self.ring)


def refuse_calls(numbers: Sequence[int], answer: int) -> None:
    """From here on these system calls have this answer, by a seccomp filter."""
    load, allow = (0x20, 0, 0, 0), (0x06, 0, 0, 0x7FFF0000)
    steps = [load, *((0x15, len(numbers) - at, 0, number) for at, number in enumerate(numbers)), allow]
    steps.append((0x06, 0, 0, answer))
    code = b"".join(
        op.to_bytes(2, "little") + bytes([yes, no]) + value.to_bytes(4, "little") for op, yes, no, value in steps
    )
    holder = ctypes.create_string_buffer(code)
    program = (ctypes.c_uint64 * 2)(len(steps), ctypes.addressof(holder))
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, program) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


if __name__ == "__main__":
    numbers = {"io_uring": 425, "process_vm_readv": 310, "userfaultfd": 323}
    answers = {"refuse": 0x00050026, "kill": 0x80000000}  # ENOSYS; SECCOMP_RET_KILL_PROCESS
    refuse_calls([numbers[word] for word in sys.argv[3:]], answers[sys.argv[2]])
    print(*Windows(Path(sys.argv[1])).open())
