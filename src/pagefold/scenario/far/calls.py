"""Own how the far side speaks to its kernel: system calls through ctypes, pages and their addresses, requests that may fail."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAGE = mmap.PAGESIZE
BASE = 1 << 36  # page number 0 of every process stands here; only what lies above is ours
TOP = 1 << 40
MADV_NOHUGEPAGE = 15
MAP_FIXED_NOREPLACE = 0x100000
PRESENT, SWAPPED, PFN = 1 << 63, 1 << 62, (1 << 55) - 1
SYSCALLS = {
    "x86_64": {"mbind": 237, "set_mempolicy": 238, "move_pages": 279},
    "aarch64": {"mbind": 235, "set_mempolicy": 237, "move_pages": 239},
}.get(platform.machine(), {})
SYSCALLS.update(io_uring_setup=425, io_uring_register=427)

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)
libc.syscall.restype = ctypes.c_long


def checked(result: int, name: str) -> int:
    """Return what a C function returned, or raise OSError with its errno."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result


def system(name: str, *arguments: Any) -> int:
    """Call the kernel by the name of a system call."""
    if name not in SYSCALLS:
        raise OSError(errno.ENOSYS, f"{name}: its number is not known on {platform.machine()}")
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return checked(libc.syscall(ctypes.c_long(SYSCALLS[name]), *words), name)


def write_file(path: Path, text: str) -> None:
    """Write a file of the kernel in one call, once: a buffer would try again at its close what has just failed."""
    with path.open("wb", buffering=0) as file:
        file.write(text.encode())


def where(vpn: int) -> int:
    """Return the address of a page number."""
    return BASE + vpn * PAGE


def pagemap(pid: int | str, vpn: int, pages: int) -> tuple[int, ...]:
    """Return the pagemap entries of some pages."""
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as file:
        return struct.unpack(f"{pages}Q", os.pread(file.fileno(), 8 * pages, where(vpn) // PAGE * 8))


def nodemask(node: int) -> Any:
    """Return a kernel nodemask of 1024 bits with one node."""
    return (ctypes.c_ulong * 16)(*(1 << node % 64 if i == node // 64 else 0 for i in range(16)))


def map_pages(vpn: int, pages: int) -> None:
    """Map private anonymous memory without huge pages."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    if libc.mmap(where(vpn), pages * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != where(vpn):
        checked(-1, "mmap")
    if libc.madvise(where(vpn), pages * PAGE, MADV_NOHUGEPAGE) and ctypes.get_errno() != errno.EINVAL:
        checked(-1, "madvise")  # EINVAL: this kernel has no huge pages


def unmap_pages(vpn: int, pages: int) -> None:
    """Unmap."""
    checked(libc.munmap(where(vpn), pages * PAGE), "munmap")


def attempt(action: Callable[..., Any], arguments: list[Any]) -> dict[str, Any]:
    """Return {"ok": result}, or what OSError came."""
    try:
        return {"ok": action(*arguments)}
    except OSError as error:
        return {"errno": error.errno, "text": error.strerror or str(error)}
