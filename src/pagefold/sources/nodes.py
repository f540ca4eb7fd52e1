"""Own the question on which NUMA node a page is: sysfs and the asking form of move_pages(2).

Must not know: contents.
"""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pagefold.sources.pages import UNKNOWN_NODE, Int64

SYS = Path("/sys")
_SYSCALL = {"x86_64": 279, "aarch64": 239, "riscv64": 239, "loongarch64": 239, "ppc64le": 301, "s390x": 310}
_BATCH = 1 << 14

_libc = ctypes.CDLL(None, use_errno=True)


def online_nodes(sys: Path = SYS) -> list[int]:
    """Return the NUMA nodes of this machine; a kernel that knows no nodes has one, 0."""
    try:
        text = (sys / "devices/system/node/online").read_text()
    except OSError:
        return [0]
    nodes: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        nodes += range(int(first), int(last or first) + 1)
    return nodes


def query_nodes(pid: int, address: Int64) -> NDArray[np.int16]:
    """Ask the kernel for the node of each page; UNKNOWN_NODE where it will not say. Moves nothing."""
    nodes = np.full(len(address), UNKNOWN_NODE, np.int16)
    number = _SYSCALL.get(platform.machine())
    if number is None:
        return nodes
    status = np.empty(_BATCH, np.int32)
    for begin in range(0, len(address), _BATCH):
        batch = np.ascontiguousarray(address[begin : begin + _BATCH])
        status.fill(UNKNOWN_NODE)
        failed = _libc.syscall(
            ctypes.c_long(number),
            ctypes.c_long(pid),
            ctypes.c_ulong(len(batch)),
            ctypes.c_void_p(batch.ctypes.data),
            ctypes.c_void_p(None),
            ctypes.c_void_p(status.ctypes.data),
            ctypes.c_long(0),
        )
        if failed:
            break
        nodes[begin : begin + len(batch)] = np.maximum(status[: len(batch)], UNKNOWN_NODE)
    return nodes


def page_nodes(pid: int, address: Int64, sys: Path = SYS) -> NDArray[np.int16]:
    """Return the node of each page: without asking where there is but one."""
    nodes = online_nodes(sys)
    if len(nodes) == 1:
        return np.full(len(address), nodes[0], np.int16)
    return query_nodes(pid, address)
