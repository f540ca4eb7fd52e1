"""Own the question what kind of mapping a range of our own memory is: one that can be merged, or why not.

Asks for single mappings by PROCMAP_QUERY (Linux 6.11: half a microsecond each, however many there are), else reads /proc/self/maps once.
What neither shows (locked memory, a memory policy ...) is looked up in smaps only to explain a refusal. Standard library only.
Must not know: buffers, regions.
"""

from __future__ import annotations

import array
import bisect
import errno
import fcntl
import os
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

STORE = "/memfd:pagefold"  # how the names of mappings of the store begin

# struct procmap_query: size, query_flags, query_addr; vma_start, vma_end, vma_flags, vma_page_size, vma_offset, inode;
# dev_major, dev_minor, vma_name_size, build_id_size; vma_name_addr, build_id_addr.
_QUERY = struct.Struct("=9Q4I2Q")
_PROCMAP_QUERY = 0xC0686611  # _IOWR('f', 17, struct procmap_query)
_COVERING_OR_NEXT = 0x10
_LONGEST_NAME = 4096 + 64
_PAGE = 4096
_AT_ONCE = 1 << 16  # pages
_PRESENT_OR_SWAPPED, _FILE = 3 << 62, 1 << 61  # of a word of pagemap
_MANY = {"lo": "locked (mlock)", "ht": "of huge pages (hugetlbfs)", "dc": "MADV_DONTFORK", "wf": "MADV_WIPEONFORK"}
_MANY |= {"dd": "MADV_DONTDUMP", "um": "watched by a userfaultfd", "uw": "watched by a userfaultfd", "io": "a device's"}
_MANY |= {"pf": "a device's", "mm": "a device's", "ss": "a shadow stack", "dp": "droppable", "sl": "sealed (mseal)"}


class Vma(NamedTuple):
    """Describe one mapping as the kernel lists it."""

    start: int
    end: int
    permissions: str  # as 'rw-p'
    inode: int  # 0: anonymous
    name: str


def why_not(vma: Vma) -> str:
    """Return why this mapping cannot be merged; '' if it can (as far as its line in maps tells)."""
    if vma.permissions.endswith("s"):
        return "shared memory: other processes may see it change"
    if vma.name.startswith(STORE):
        return ""
    if vma.inode:
        return "memory of a file: the page cache holds it once already"
    if vma.name.startswith("[") and vma.name != "[heap]" and not vma.name.startswith("[anon:"):
        return f"special memory: {vma.name}"
    if not vma.permissions.startswith("rw"):
        return f"protected memory ({vma.permissions[:3]})"
    return "executable memory" if vma.permissions[2] == "x" else ""


def split(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int, str]]:
    """Split ascending ranges into (start, end, why not) wherever the answer changes; '' is memory that can be merged."""
    with _Maps() as maps:
        vma: Vma | None = None
        for start, end in ranges:
            at, reason = start, None
            while at < end:
                if vma is None or not vma.start <= at < vma.end:
                    vma = maps.find(at)
                if vma is None or vma.start > at:
                    here, until = "not mapped", min(end, vma.start if vma else end)
                else:
                    here, until = why_not(vma), min(end, vma.end)
                if reason is not None and here != reason:
                    yield start, at, reason
                    start = at
                at, reason = until, here
            if reason is not None:
                yield start, end, reason


def at(address: int) -> Vma | None:
    """Return the mapping at an address, None if there is none."""
    with _Maps() as maps:
        vma = maps.find(address)
    return vma if vma and vma.start <= address else None


class _Maps:
    """Look mappings up, as long as the block lasts."""

    def __init__(self, *, query: bool = True) -> None:
        self._use_query = query
        self._table: list[Vma] | None = None

    def __enter__(self) -> _Maps:
        self._fd = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
        self._name = array.array("B", bytes(_LONGEST_NAME))
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def find(self, address: int) -> Vma | None:
        """Return the mapping at an address or the next one behind it."""
        if self._use_query:
            try:
                return self._query(address)
            except OSError as error:
                if error.errno not in (errno.ENOTTY, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.ENAMETOOLONG):
                    raise
                self._use_query = False
        if self._table is None:
            self._table = parse(_read_all(self._fd))
        place = bisect.bisect_right(self._table, address, key=lambda vma: vma.end)
        return self._table[place] if place < len(self._table) else None

    def _query(self, address: int) -> Vma | None:
        fields = [
            _QUERY.size,
            _COVERING_OR_NEXT,
            address,
            *[0] * 6,
            0,
            0,
            _LONGEST_NAME,
            0,
            self._name.buffer_info()[0],
            0,
        ]
        packet = bytearray(_QUERY.pack(*fields))
        try:
            fcntl.ioctl(self._fd, _PROCMAP_QUERY, packet)
        except OSError as error:
            if error.errno == errno.ENOENT:  # nothing at this address or behind it
                return None
            raise
        _, _, _, start, end, flags, _, _, inode, _, _, length, *_ = _QUERY.unpack(packet)
        permissions = "".join(letter if flags & bit else "-" for letter, bit in (("r", 1), ("w", 2), ("x", 4)))
        name = self._name[: max(length - 1, 0)].tobytes().decode(errors="replace")
        return Vma(start, end, permissions + ("s" if flags & 8 else "p"), inode, name)


def parse(text: str) -> list[Vma]:
    """Return the mappings of the text of /proc/PID/maps, ascending."""
    found = []
    for line in text.splitlines():
        addresses, permissions, _, _, inode, *name = line.split(maxsplit=5)
        start, _, end = addresses.partition("-")
        found.append(Vma(int(start, 16), int(end, 16), permissions, int(inode), name[0] if name else ""))
    return found


class Census(NamedTuple):
    """Count pages by how they are mapped."""

    merged: int = 0  # map the store
    written: int = 0  # of a mapping of the store, but copies of their own since they were written
    private: int = 0
    absent: int = 0  # nothing is mapped: reads as zeros


def census(ranges: Iterable[tuple[int, int]]) -> Census:
    """Count the pages of ascending ranges."""
    merged = written = private = absent = 0
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        with _Maps() as maps:
            for start, end in ranges:
                while start < end:
                    vma = maps.find(start)
                    until = min(end, vma.end if vma and vma.start <= start else vma.start if vma else end)
                    pages = (until - start) // _PAGE
                    anonymous = _anonymous_pages(fd, start, pages)
                    if vma and vma.start <= start and vma.name.startswith(STORE):
                        merged, written = merged + pages - anonymous, written + anonymous
                    else:
                        private, absent = private + anonymous, absent + pages - anonymous
                    start = until
    finally:
        os.close(fd)
    return Census(merged, written, private, absent)


def store_ranges() -> list[tuple[int, int]]:
    """Return all ranges of this process that were merged; not where the agent itself looks at the store."""
    table = parse(_read_file("/proc/self/maps"))
    return [(vma.start, vma.end) for vma in table if vma.name.startswith(STORE) and vma.permissions.endswith("p")]


def _anonymous_pages(pagemap: int, start: int, pages: int) -> int:
    """Count the pages that are present or swapped, and not of a file."""
    count = 0
    for first in range(0, pages, _AT_ONCE):
        words = array.array("Q", os.pread(pagemap, min(_AT_ONCE, pages - first) * 8, (start // _PAGE + first) * 8))
        count += sum(1 for word in words if word & _PRESENT_OR_SWAPPED and not word & _FILE)
    return count


class Marks:
    """What smaps says against merging mappings that look well in maps, as it is now: read once, however many are asked for."""

    def __init__(self) -> None:
        self._found: list[tuple[int, int, str]] = []  # ascending
        low = high = 0
        for line in _read_file("/proc/self/smaps").splitlines():
            first = line.split(maxsplit=1)[0]
            if not first.endswith(":"):
                low, high = (int(part, 16) for part in first.split("-"))
            elif first == "VmFlags:":
                flags = [_MANY[flag] for flag in line.split()[1:] if flag in _MANY]
                self._found += [(low, high, flags[0])] if flags else []

    def explain(self, start: int, end: int) -> str:
        """Return why [start, end) was refused."""
        place = bisect.bisect_right(self._found, start, key=lambda one: one[1])
        if self._found[place : place + 1] and self._found[place][0] < end:
            return f"this memory is {self._found[place][2]}"
        return "its mapping is of a kind that cannot be swapped (a memory policy or a protection key, for instance)"


def _read_file(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _read_all(fd)
    finally:
        os.close(fd)


def _read_all(fd: int) -> str:
    pieces = []
    while piece := os.read(fd, 1 << 20):
        pieces.append(piece)
    return b"".join(pieces).decode(errors="replace")
