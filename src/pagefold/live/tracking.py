"""Own the two questions the daemon asks a client's page tables again and again: what was written, and what was merged and written.

Both are one system call for any number of unchanged pages (PAGEMAP_SCAN, Linux 6.7). Must not know: contents, the engine.
"""

from __future__ import annotations

import ctypes
import fcntl

import numpy as np
from numpy.typing import NDArray

from pagefold.live.messages import PAGE
from pagefold.sources import pagemap

Int64 = NDArray[np.int64]
_WP_MATCHING = 1 << 0
_WP_ALLOWED = 1 << 0
_WRITTEN = 1 << 1
_REGIONS = 4096


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
