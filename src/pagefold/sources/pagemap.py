"""Own the kernel's view of page tables: PAGEMAP_SCAN, /proc/PID/pagemap and /proc/kpageflags.

Two ways to find the present anonymous pages: `scan_areas` by the ioctl (Linux 6.7), `walk_areas` by the plain
file. They agree wherever frames are visible (CAP_SYS_ADMIN). Without frames the plain file does not tell the
zero page from other pages that are mapped more than once, nor huge mappings from many small ones.

Must not know: contents, processes by name.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pagefold.sources.areas import Area
from pagefold.sources.pages import UNKNOWN_FRAME, Bool, Int64, Mapped, UInt64

# Bits of an entry of /proc/PID/pagemap.
PRESENT = np.uint64(1 << 63)
SWAPPED = np.uint64(1 << 62)
FILE = np.uint64(1 << 61)
GUARD = np.uint64(1 << 58)
EXCLUSIVE = np.uint64(1 << 56)
PFN = np.uint64((1 << 55) - 1)
# Bits of an entry of /proc/kpageflags.
KPF_KSM = np.uint64(1 << 21)
KPF_ZERO_PAGE = np.uint64(1 << 24)

PAGEMAP_SCAN = 0xC060_6610  # _IOWR('f', 16, struct pm_scan_arg), 96 bytes
PAGE_IS_FILE = 1 << 2
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_PFNZERO = 1 << 5
PAGE_IS_HUGE = 1 << 6
PAGE_IS_GUARD = 1 << 8  # Linux 6.15; older kernels refuse the whole request with EINVAL
WANTED = PAGE_IS_FILE | PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO | PAGE_IS_HUGE

REGION = np.dtype([("start", np.uint64), ("end", np.uint64), ("categories", np.uint64)])
_REGIONS = 8192  # per call: 192 KiB
_GAP = 128  # words read in vain rather than paying a further system call
_WORDS = 1 << 16  # per pread: 512 KiB
_SPARSE = 1 << 30  # bytes; larger areas that hold nothing are not walked word by word


class ScanMissing(Exception):  # noqa: N818
    """This kernel has no PAGEMAP_SCAN."""


class ScanArgument(ctypes.Structure):
    """The argument of PAGEMAP_SCAN."""

    _fields_ = [
        (name, ctypes.c_uint64)
        for name in (
            "size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages",
            "category_inverted", "category_mask", "category_anyof_mask", "return_mask",
        )
    ]  # fmt: skip


def scan_regions(fd: int, start: int, end: int) -> NDArray[np.void]:
    """Return runs (`REGION`) of present or swapped pages of equal kind between two addresses.

    Raises `ScanMissing` where the kernel does not know the request, `OSError` for everything else.
    """
    found = np.empty(_REGIONS, REGION)
    parts: list[NDArray[np.void]] = []
    argument = ScanArgument(size=ctypes.sizeof(ScanArgument), end=end, vec=found.ctypes.data, vec_len=_REGIONS)
    argument.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED
    argument.return_mask = WANTED | PAGE_IS_GUARD
    while start < end:
        argument.start = start
        try:
            count = fcntl.ioctl(fd, PAGEMAP_SCAN, argument)
        except OSError as error:
            if error.errno == errno.ENOTTY:
                raise ScanMissing from error
            if error.errno == errno.EINVAL and argument.return_mask != WANTED:
                argument.return_mask = WANTED
                continue
            raise
        parts.append(found[:count].copy())
        start = argument.walk_end
    return np.concatenate(parts) if parts else np.empty(0, REGION)


def scan_areas(fd: int, areas: Sequence[Area], page_size: int) -> Mapped:
    """Find the present anonymous pages of areas by PAGEMAP_SCAN."""
    parts, huge, number, zero_mapped, swapped = [], [], [], 0, 0
    for index, area in enumerate(areas):
        regions = scan_regions(fd, area.start, area.end)
        kinds = regions["categories"]
        pages = ((regions["end"] - regions["start"]) // np.uint64(page_size)).astype(np.int64)
        present = kinds & np.uint64(PAGE_IS_PRESENT) != 0
        zero = kinds & np.uint64(PAGE_IS_PFNZERO) != 0
        file = kinds & np.uint64(PAGE_IS_FILE) != 0
        guard = kinds & np.uint64(PAGE_IS_GUARD) != 0
        zero_mapped += int(pages[present & zero].sum())
        swapped += int(pages[(kinds & np.uint64(PAGE_IS_SWAPPED) != 0) & ~present & ~guard].sum())
        keep = present & ~zero & ~file
        first, counts = regions["start"][keep].astype(np.int64), pages[keep]
        address = np.repeat(first - (np.cumsum(counts) - counts) * page_size, counts)
        address += np.arange(len(address), dtype=np.int64) * page_size
        parts.append(address)
        huge.append(np.repeat(kinds[keep] & np.uint64(PAGE_IS_HUGE) != 0, counts))
        number.append(np.full(len(address), index, np.int32))
    return _joined(parts, huge, number, zero_mapped, swapped)


def walk_areas(fd: int, areas: Sequence[Area], page_size: int, kpageflags: int | None) -> Mapped:
    """Find the present anonymous pages of areas by reading every entry of the plain pagemap.

    `kpageflags` is an open file or None. Without it or without frames, mappings of the zero page stay in, and
    `zero_unknown` says so. Areas over 1 GiB that hold nothing are skipped: zero mappings there go uncounted.
    """
    parts, huge, number, zero_mapped, swapped, zero_unknown = [], [], [], 0, 0, False
    for index, area in enumerate(areas):
        if area.size > _SPARSE and area.kib.get("Rss", 1) + area.kib.get("Swap", 0) == 0:
            continue
        for start in range(area.start, area.end, _WORDS * page_size):
            end = min(start + _WORDS * page_size, area.end)
            words = read_words(fd, np.arange(start // page_size, end // page_size))
            guard = words & GUARD != 0
            swapped += int(((words & SWAPPED != 0) & ~guard).sum())
            keep = np.flatnonzero((words & PRESENT != 0) & (words & FILE == 0))
            frames = (words[keep] & PFN).astype(np.int64)
            if kpageflags is not None and frames.any():
                # A mapping of the zero page is never exclusive: few candidates.
                suspect = np.flatnonzero(words[keep] & EXCLUSIVE == 0)
                zero = suspect[frame_flags(kpageflags, frames[suspect], KPF_ZERO_PAGE)]
                zero_mapped += len(zero)
                keep, frames = np.delete(keep, zero), np.delete(frames, zero)
            elif len(keep):
                zero_unknown = True
            address = keep * page_size + start
            parts.append(address)
            huge.append(_huge_blocks(address, frames, area, page_size))
            number.append(np.full(len(address), index, np.int32))
    mapped = _joined(parts, huge, number, zero_mapped, swapped)
    mapped.zero_unknown = zero_unknown
    return mapped


def _joined(parts: list[Int64], huge: list[Bool], number: list[NDArray[np.int32]], zero: int, swapped: int) -> Mapped:
    if not parts:
        return Mapped(np.empty(0, np.int64), np.empty(0, np.bool_), np.empty(0, np.int32), zero, swapped)
    return Mapped(np.concatenate(parts), np.concatenate(huge), np.concatenate(number), zero, swapped)


def _huge_blocks(address: Int64, frames: Int64, area: Area, page_size: int) -> Bool:
    """Guess which pages are mapped by a huge entry: full aligned blocks of adjacent frames, where known."""
    huge = np.zeros(len(address), np.bool_)
    if not area.kib.get("AnonHugePages") or not len(address):
        return huge
    block_size = page_size * (page_size // 8)
    _, first, count = np.unique(address // block_size, return_index=True, return_counts=True)
    for begin in first[count == block_size // page_size]:
        frame = frames[begin : begin + block_size // page_size]
        huge[begin : begin + len(frame)] = not frame[0] or (
            frame[0] % len(frame) == 0 and bool((np.diff(frame) == 1).all())
        )
    return huge


def read_words(fd: int, indexes: Int64) -> UInt64:
    """Return the 64-bit words at ascending indexes of a file; words that are not there read as 0."""
    words = np.zeros(len(indexes), np.uint64)
    if not len(indexes):
        return words
    # Near neighbours are read in one call; a run ends at a wide gap or at the size of a buffer.
    breaks = np.flatnonzero(np.diff(indexes) > _GAP) + 1
    for begin, end in zip([0, *breaks.tolist()], [*breaks.tolist(), len(indexes)], strict=True):
        at = begin
        while at < end:
            first = int(indexes[at])
            stop = int(np.searchsorted(indexes[at:end], first + _WORDS)) + at
            data = os.pread(fd, (int(indexes[stop - 1]) - first + 1) * 8, first * 8)
            got = np.frombuffer(data, np.uint64, len(data) // 8)
            offsets = indexes[at:stop] - first
            there = offsets < len(got)
            words[at:stop][there] = got[offsets[there]]
            at = stop
    return words


def read_entries(fd: int, address: Int64, page_size: int) -> tuple[Int64, Bool, Bool]:
    """Return frame (`UNKNOWN_FRAME` where hidden), exclusive and present for pages at ascending addresses."""
    words = read_words(fd, address // page_size)
    present = words & PRESENT != 0
    frame = (words & PFN).astype(np.int64)
    frame[(frame == 0) | ~present] = UNKNOWN_FRAME
    return frame, words & EXCLUSIVE != 0, present


def frame_flags(fd: int, frames: Int64, flag: np.uint64) -> Bool:
    """Tell which frames have a flag of /proc/kpageflags; unknown frames have none."""
    unique, inverse = np.unique(frames, return_inverse=True)
    known = unique > 0
    has = np.zeros(len(unique), np.bool_)
    has[known] = read_words(fd, unique[known]) & flag != 0
    return has[inverse]


def open_kpageflags(proc: Path) -> int | None:
    """Open /proc/kpageflags, or return None where that is not allowed."""
    try:
        return os.open(proc / "kpageflags", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
