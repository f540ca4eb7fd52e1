"""Own one shared mapping of a file: its address, and calls on ranges of it that Python's own mmap has not. Must not know: what is in it."""

from __future__ import annotations

import ctypes
import os
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

PAGE = 4096
_PROT_READ, _PROT_WRITE, _MAP_SHARED, _MADV_DONTNEED, _MADV_POPULATE_WRITE, _MPOL_PREFERRED = 1, 2, 1, 4, 23, 1
_SYS_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235}
_MOST_NODES = 1024

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = _libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long


class Mapping:
    """A file's first `size` bytes, shared and writable; unmapped when this and every array of it are gone.

    Python's mmap would keep a second descriptor for each. Offsets and sizes are whole pages. Everything may raise OSError.
    """

    def __init__(self, fd: int, size: int) -> None:
        address = _libc.mmap(None, size, _PROT_READ | _PROT_WRITE, _MAP_SHARED, fd, 0)
        if address == ctypes.c_void_p(-1).value:
            raise _error("mmap")
        self.address = int(address)
        self.size = size
        weakref.finalize(self, _libc.munmap, self.address, size).atexit = False

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Say to NumPy where the bytes are; an array made from it keeps this object."""
        return {"version": 3, "typestr": "|u1", "shape": (self.size,), "data": (self.address, False)}

    def array(self) -> npt.NDArray[np.uint8]:
        """Return the bytes as a writable array."""
        return np.asarray(self)

    def seal_range(self, offset: int, size: int) -> None:
        """Take away the right to write to a range through this mapping."""
        _check(_libc.mprotect(self.address + offset, size, _PROT_READ), "mprotect")

    def populate_range(self, offset: int, size: int) -> None:
        """Make page-table entries for writing to a range; a kernel before 5.14 cannot, and makes them when it is written."""
        _libc.madvise(self.address + offset, size, _MADV_POPULATE_WRITE)  # whatever fails here fails there, and says so

    def unmap_range(self, offset: int, size: int) -> None:
        """Drop the page-table entries of a range; the file's pages stay and come back when touched."""
        _check(_libc.madvise(self.address + offset, size, _MADV_DONTNEED), "madvise")

    def prefer_node(self, node: int) -> None:
        """Let the kernel take the file's new pages from that node, while it has any: a strict policy would call its OOM killer instead."""
        number = _SYS_MBIND.get(os.uname().machine)
        if number is None:
            return
        mask = (ctypes.c_ulong * (_MOST_NODES // 64))()
        mask[node // 64] = 1 << (node % 64)
        arguments = (ctypes.c_void_p(self.address), ctypes.c_ulong(self.size), ctypes.c_long(_MPOL_PREFERRED))
        _check(_libc.syscall(ctypes.c_long(number), *arguments, mask, ctypes.c_ulong(_MOST_NODES + 1), 0), "mbind")


def _check(result: int, what: str) -> None:
    if result:
        raise _error(what)


def _error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")
