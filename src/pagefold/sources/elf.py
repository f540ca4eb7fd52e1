"""Own the format of ELF core files: which runs of whole pages they hold, at which addresses.

Understands 64-bit little-endian cores: of the kernel, of gdb's gcore, and QEMU's dumps of a guest, where
the pages are those of the guest's physical memory.

Must not know: hashes, `Pages`.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass

from pagefold.errors import NotAnImage, TruncatedImage

MAGIC = b"\x7fELF"
HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
SEGMENT = struct.Struct("<IIQQQQQQ")
SECTION = struct.Struct("<IIQQQQIIQQ")
ET_CORE = 4
PT_LOAD = 1
PN_XNUM = 0xFFFF
_KINDS = {1: "an object file", 2: "a program", 3: "a program or a shared library"}


@dataclass(frozen=True, slots=True)
class Segment:
    """Describe one loadable segment, in bytes."""

    offset: int  # in the file
    address: int  # virtual; physical in a dump that gives no virtual ones
    file_size: int
    memory_size: int


@dataclass(frozen=True, slots=True)
class Run:
    """Describe neighbouring whole pages that the file holds."""

    address: int  # page-aligned
    offset: int  # in the file, of the first page
    pages: int


def read_segments(fd: int, name: str) -> list[Segment]:
    """Return the loadable segments of a core in the order of addresses; `name` is for messages.

    Raises `NotAnImage` for anything that is not a core we understand, `TruncatedImage` for one cut short.
    """
    size = os.fstat(fd).st_size
    head = os.pread(fd, HEADER.size, 0)
    if len(head) > 4 and head[4] != 2:
        raise NotAnImage(f"{name}: a 32-bit ELF file: only 64-bit cores can be read")
    if len(head) > 5 and head[5] != 1:
        raise NotAnImage(f"{name}: a big-endian ELF file: only little-endian cores can be read")
    _promise(name, HEADER.size, size)
    _, kind, _, _, _, table, sections, _, _, entry_size, entries, section_size, _, _ = HEADER.unpack(head)
    if kind != ET_CORE:
        raise NotAnImage(f"{name}: ELF, but {_KINDS.get(kind, f'of kind {kind}')}: not a core; make one with gcore PID")
    if entries == PN_XNUM:
        # More segments than 16 bits can count: the number stands in the first section header.
        _promise(name, sections + SECTION.size, size)
        if section_size != SECTION.size:
            raise NotAnImage(f"{name}: damaged core: section headers of {section_size} bytes instead of {SECTION.size}")
        entries = SECTION.unpack(os.pread(fd, SECTION.size, sections))[7]
    if entries and entry_size != SEGMENT.size:
        raise NotAnImage(f"{name}: damaged core: program headers of {entry_size} bytes instead of {SEGMENT.size}")
    _promise(name, table + entries * SEGMENT.size, size)
    loads = [
        fields
        for fields in SEGMENT.iter_unpack(os.pread(fd, entries * SEGMENT.size, table) if entries else b"")
        if fields[0] == PT_LOAD
    ]
    if not loads:
        raise NotAnImage(f"{name}: a core without memory: it has no loadable segment")
    # QEMU writes no virtual addresses unless told to page: then all are 0 and the physical ones count.
    place = 3 if any(fields[3] for fields in loads) else 4
    segments = [Segment(fields[2], fields[place], fields[5], fields[6]) for fields in loads]
    for segment in segments:
        if segment.file_size > segment.memory_size or segment.address + segment.memory_size > 1 << 64:
            raise NotAnImage(f"{name}: damaged core: the segment at {segment.address:#x} has impossible sizes")
    _promise(name, max((part.offset + part.file_size for part in segments if part.file_size), default=0), size)
    return sorted(segments, key=lambda segment: segment.address)


def whole_pages(segments: list[Segment], page_size: int) -> tuple[list[Run], int]:
    """Return the runs of whole pages in the file, and the number of pages not (wholly) in it.

    Pages are cut at multiples of the page size in memory, wherever they stand in the file. Bytes that
    several segments name are told once.
    """
    runs, missing, seen = [], 0, set()
    for segment in segments:
        start = -(-segment.address // page_size) * page_size
        pages = max(0, (segment.address + segment.file_size) // page_size - start // page_size)
        touched = -(-(segment.address + segment.memory_size) // page_size) - segment.address // page_size
        missing += touched - pages if segment.memory_size else 0
        run = Run(start, segment.offset + start - segment.address, pages)
        if pages and (run.offset, pages) not in seen:
            seen.add((run.offset, pages))
            runs.append(run)
    return runs, missing


def _promise(name: str, expected: int, size: int) -> None:
    if expected > size:
        raise TruncatedImage(
            f"{name}: truncated core: {expected} bytes expected, the file has {size}: copy it again, in full"
        )
