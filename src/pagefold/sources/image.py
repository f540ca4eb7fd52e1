"""Own the reading of memory images: raw files of whole pages, and ELF cores.

Must not know: running processes.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pagefold.errors import NotAnImage, NotReadable
from pagefold.sources.elf import MAGIC, Run, read_segments, whole_pages
from pagefold.sources.hashing import Progress, read_pages
from pagefold.sources.memory_reader import MemoryReader
from pagefold.sources.pages import UNKNOWN_NODE, Int64, Pages, system_page_size


def count_image(path: Path | str, *, page_size: int | None = None) -> int:
    """Return how many pages `read_image` will read; raises as that does."""
    with _opened(Path(path)) as fd:
        return sum(run.pages for run in _runs(fd, Path(path).name, page_size or system_page_size())[0])


def read_image(path: Path | str, progress: Progress | None = None, *, page_size: int | None = None) -> Pages:
    """Read and hash every page of a memory image; addresses of a raw image are offsets in the file.

    Every page counts as mapped once, on an unknown node, in an area nobody advised. Raises `NotReadable`,
    `NotAnImage` or `TruncatedImage`.
    """
    name, size = Path(path).name, page_size or system_page_size()
    with _opened(Path(path)) as fd:
        runs, missing = _runs(fd, name, size)
        address = _expand([run.address for run in runs], runs, size)
        offset = _expand([run.offset for run in runs], runs, size)
        try:
            contents = read_pages(MemoryReader(fd, living=False), offset, size, progress)
        except OSError as error:
            raise NotReadable(
                f"{path}: {error.strerror}; give a raw memory image or an ELF core that can be read"
            ) from None
    count = len(address)
    pages = Pages(
        label=name,
        pid=None,
        page_size=size,
        address=address,
        high=contents.high,
        low=contents.low,
        node=np.full(count, UNKNOWN_NODE, np.int16),
        frame=np.arange(count, dtype=np.int64),
        exclusive=np.ones(count, np.bool_),
        ksm=np.zeros(count, np.bool_),
        huge=np.zeros(count, np.bool_),
        volatile=np.zeros(count, np.bool_),
        advised=np.zeros(count, np.bool_),
        unreadable=int((~contents.ok).sum()),
        missing=missing,
    )
    return pages if contents.ok.all() else pages.select(contents.ok)


def _expand(firsts: list[int], runs: list[Run], page_size: int) -> Int64:
    """Return the place of every page of every run; places of 2**63 and more turn negative."""
    counts = np.array([run.pages for run in runs], np.int64)
    within = np.arange(counts.sum(), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    places: Int64 = np.repeat(np.array(firsts, np.uint64).view(np.int64), counts) + within * page_size
    return places


def _runs(fd: int, name: str, page_size: int) -> tuple[list[Run], int]:
    if os.pread(fd, len(MAGIC), 0) == MAGIC:
        return whole_pages(read_segments(fd, name), page_size)
    size = os.fstat(fd).st_size
    if size == 0:
        raise NotAnImage(f"{name}: empty: a memory image has at least one page of {page_size} bytes")
    if size % page_size:
        raise NotAnImage(
            f"{name}: {size} bytes are not a whole number of {page_size}-byte pages, as a raw image must be: "
            f"copy it again in full, or fill up its end: truncate -s %{page_size} FILE"
        )
    return [Run(0, 0, size // page_size)], 0


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        # Non-blocking, so that a FIFO nobody writes to is refused rather than waited for.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NotReadable(
            f"{path}: {error.strerror}; give a raw memory image or an ELF core that can be read"
        ) from None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise NotReadable(f"{path}: not a regular file: copy the memory into a file first")
        yield fd
    finally:
        os.close(fd)
