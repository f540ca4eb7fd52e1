"""Own what the daemon asks about a client's page tables: what was written, and what was merged and written; and once, what is merged.

The first two are asked again and again: one system call for any number of unchanged pages (PAGEMAP_SCAN, Linux 6.7).
Must not know: contents, the engine.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pagefold.live.messages import PAGE
from pagefold.sources import pagemap

Int64 = NDArray[np.int64]
_WP_MATCHING = 1 << 0
_WP_ALLOWED = 1 << 0
_WRITTEN = 1 << 1
_REGIONS = 4096
_STORE = b"/memfd:pagefold-"  # how the names of extents begin
# struct procmap_query: size, query_flags, query_addr; vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
# dev_major, dev_minor, vma_name_size, build_id_size; vma_name_addr, build_id_addr.
_QUERY = struct.Struct("=9Q4I2Q")
_PROCMAP_QUERY = 0xC0686611  # _IOWR('f', 17, struct procmap_query), Linux 6.11
_NEXT_FILE = 0x10 | 0x20  # the mapping at an address or the next behind it, of those of files
_LONGEST_NAME = 4096 + 64


def _addresses(fd: int, start: int, end: int, *, mask: int, inverted: int = 0, flags: int = 0) -> Int64:
    """Return the addresses of pages of [start, end) whose categories match, ascending."""
    found = np.empty(_REGIONS, pagemap.REGION)
    size = ctypes.sizeof(pagemap.ScanArgument)
    argument = pagemap.ScanArgument(size=size, flags=flags, end=end, vec=found.ctypes.data, vec_len=_REGIONS)
    argument.category_mask, argument.category_inverted = mask | inverted, inverted
    argument.return_mask = pagemap.PAGE_IS_PRESENT
    parts = []
    while start < end:
        argument.start = start
        count = fcntl.ioctl(fd, pagemap.PAGEMAP_SCAN, argument)
        if count:
            parts.append(found[:count].copy())
        start = argument.walk_end
    if not parts:
        return np.empty(0, np.int64)
    runs = np.concatenate(parts)
    first = runs["start"].astype(np.int64)
    pages = ((runs["end"] - runs["start"]) // np.uint64(PAGE)).astype(np.int64)
    address = np.repeat(first - (np.cumsum(pages) - pages) * PAGE, pages)
    address += np.arange(len(address), dtype=np.int64) * PAGE
    return address


def take_written(fd: int, start: int, end: int) -> Int64:
    """Return the present private pages of tracked mappings that were written since the last call, and begin anew for them."""
    mask = _WP_ALLOWED | _WRITTEN | pagemap.PAGE_IS_PRESENT
    return _addresses(fd, start, end, mask=mask, inverted=pagemap.PAGE_IS_PFNZERO, flags=_WP_MATCHING)


def private_pages(fd: int, start: int, end: int) -> Int64:
    """Return the present private pages: of a range that maps the store, those that were written since they were merged."""
    mask = pagemap.PAGE_IS_PRESENT
    return _addresses(fd, start, end, mask=mask, inverted=pagemap.PAGE_IS_FILE | pagemap.PAGE_IS_PFNZERO)


def mapped_stores(pid: int, spans: Sequence[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Return, for each range of a process's memory, the parts of it that map extents of a store, of whatever daemon."""
    if not spans:
        return []
    with Path(f"/proc/{pid}/maps").open("rb") as file:
        try:
            return [list(_file_mappings(file.fileno(), start, end)) for start, end in spans]
        except OSError as error:
            if error.errno not in (errno.ENOTTY, errno.EINVAL):
                raise
        lines = [line.split(maxsplit=5) for line in file if _STORE in line]
    those = [tuple(int(part, 16) for part in line[0].split(b"-")) for line in lines if line[-1].startswith(_STORE)]
    return [[(max(a, start), min(b, end)) for a, b in those if a < end and start < b] for start, end in spans]


def _file_mappings(fd: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of [start, end) that are mappings of a store."""
    name = array.array("B", bytes(_LONGEST_NAME))
    at = start
    while at < end:
        packet = bytearray(
            _QUERY.pack(_QUERY.size, _NEXT_FILE, at, *[0] * 6, 0, 0, len(name), 0, name.buffer_info()[0], 0)
        )
        try:
            fcntl.ioctl(fd, _PROCMAP_QUERY, packet)
        except OSError as error:
            if error.errno == errno.ENOENT:  # no file is mapped at this address or behind it
                return
            raise
        first, last = _QUERY.unpack(packet)[3:5]
        if first >= end:
            return
        if name[: len(_STORE)].tobytes() == _STORE:
            yield max(first, start), min(last, end)
        at = last
