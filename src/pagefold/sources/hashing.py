"""Own the loop that hashes pages: copy a chunk into a buffer that stays in the cache, hash it, next.

Each thread copies and hashes its own chunks, so bytes are hashed on the core whose cache they are in. Copying
runs without the interpreter's lock, hashing holds it: while one thread hashes, the other copies.

Must not know: processes, files.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from pagefold.sources.memory_reader import MemoryReader
from pagefold.sources.pages import Contents, Int64

# 1 MiB. Smaller chunks pay for more system calls and hand-overs, larger ones leave the cache.
CHUNK_PAGES = 256
THREADS = 2

Progress = Callable[[int], None]


def page_ranges(address: Int64, page_size: int) -> tuple[NDArray[np.uint64], Int64]:
    """Return ranges (address, bytes) of neighbouring pages within a chunk, and each chunk's first range.

    The second array has one entry more than there are chunks.
    """
    count = len(address)
    if not count:
        return np.empty((0, 2), np.uint64), np.zeros(1, np.int64)
    new = np.ones(count, np.bool_)
    new[1:] = np.diff(address) != page_size
    new[::CHUNK_PAGES] = True
    first = np.flatnonzero(new)
    ranges = np.empty((len(first), 2), np.uint64)
    ranges[:, 0] = address[first].view(np.uint64)
    ranges[:, 1] = np.diff(first, append=count) * page_size
    chunks = np.searchsorted(first, np.arange(0, count, CHUNK_PAGES))
    return ranges, np.append(chunks, len(first))


class PageHasher:
    """Read and hash pages at given addresses, once; `read_pages` is the door."""

    def __init__(self, reader: MemoryReader, address: Int64, page_size: int) -> None:
        self.reader = reader
        self.page_size = page_size
        self.address = address
        self.ok = np.ones(len(address), np.bool_)
        self.ranges, self.first_range = page_ranges(address, page_size)
        self.digests: list[bytes] = [b""] * (len(self.first_range) - 1)
        self.next_chunk = itertools.count()  # one step of it is atomic: it deals out the work
        self.pages_done = 0
        self.failures: list[BaseException] = []

    def work(self, progress: Progress | None = None) -> int:
        """Read and hash chunks until none is left or someone failed; return how many pages were told."""
        buffer = np.empty(CHUNK_PAGES * self.page_size, np.uint8)
        view, size = buffer.data, self.page_size
        pages = [view[at : at + size] for at in range(0, len(buffer), size)]
        told = 0
        try:
            while not self.failures and (chunk := next(self.next_chunk)) < len(self.digests):
                ranges = self.ranges[self.first_range[chunk] : self.first_range[chunk + 1]]
                count = min(CHUNK_PAGES, len(self.address) - chunk * CHUNK_PAGES)
                whole = self.reader.copy(ranges, buffer[: count * size]) // size
                if whole < count:
                    self._rest(chunk * CHUNK_PAGES, whole, count, buffer)
                self.digests[chunk] = b"".join(map(xxh3_128_digest, pages[:count]))
                self.pages_done += count  # may lose a step to another thread; it only feeds the progress bar
                if progress:
                    now = self.pages_done
                    progress(max(0, now - told))
                    told = max(told, now)
        except BaseException as error:
            self.failures.append(error)
        return told

    def _rest(self, base: int, begin: int, end: int, buffer: NDArray[np.uint8]) -> None:
        """Read the rest of a chunk behind a failure, one page at a time; mark those that cannot be had."""
        size = self.page_size
        one = np.empty((1, 2), np.uint64)
        one[0, 1] = size
        for at in range(begin, end):
            one[0, 0] = self.address[base + at].view(np.uint64)
            self.ok[base + at] = self.reader.copy(one, buffer[at * size : (at + 1) * size]) == size

    def run(self, progress: Progress | None) -> Contents:
        """Do all the work in `THREADS` threads, this one included; raises the first failure."""
        threads = min(THREADS, os.cpu_count() or 1, len(self.digests)) - 1
        helpers = [threading.Thread(target=self.work, daemon=True) for _ in range(threads)]
        for helper in helpers:
            helper.start()
        told = self.work(progress)
        for helper in helpers:
            helper.join()
        if self.failures:
            raise self.failures[0]
        if progress and len(self.address) > told:
            progress(len(self.address) - told)
        return self._contents()

    def _contents(self) -> Contents:
        halves = np.frombuffer(b"".join(self.digests), ">u8").reshape(-1, 2).astype(np.uint64)
        zero = np.frombuffer(xxh3_128_digest(bytes(self.page_size)), ">u8").astype(np.uint64)
        halves[(halves == zero).all(axis=1)] = 0
        return Contents(np.ascontiguousarray(halves[:, 0]), np.ascontiguousarray(halves[:, 1]), self.ok)


def read_pages(reader: MemoryReader, address: Int64, page_size: int, progress: Progress | None = None) -> Contents:
    """Return the hashes of the pages at the given addresses; a page of zeros hashes to (0, 0).

    `progress` is called in this thread with the number of pages done since its last call; the sum is always
    the number of addresses.
    """
    return PageHasher(reader, address, page_size).run(progress)
