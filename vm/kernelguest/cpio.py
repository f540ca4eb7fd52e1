"""Own the archive format that a kernel unpacks at boot: cpio, "newc" (Documentation/driver-api/early-userspace/buffer-format.rst).

Knows nothing of what the files are for. Same entries, same bytes: no clock, no inode of the host, no user gets in.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from typing import NamedTuple

_TRAILER = "TRAILER!!!"


class Entry(NamedTuple):
    """One member: its path without a leading slash, its st_mode with the type bits, its bytes (a link's target), its device."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def directory(path: str) -> Entry:
    """Return an entry for a directory that everyone may enter."""
    return Entry(path, stat.S_IFDIR | 0o755)


def regular(path: str, data: bytes, executable: bool = False) -> Entry:
    """Return an entry for a file that everyone may read."""
    return Entry(path, stat.S_IFREG | (0o755 if executable else 0o644), data)


def symlink(path: str, target: str) -> Entry:
    """Return an entry for a symbolic link."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def with_parents(entries: Iterable[Entry]) -> list[Entry]:
    """Return the entries in order, each after the directories that it lies in; the kernel makes none by itself."""
    known: dict[str, Entry] = {}
    for entry in entries:
        parts = entry.path.split("/")
        for depth in range(1, len(parts)):
            parent = "/".join(parts[:depth])
            known.setdefault(parent, directory(parent))
        known[entry.path] = entry
    return list(known.values())


def archive(entries: Iterable[Entry]) -> bytes:
    """Return the entries as one archive; ValueError for a path that is absolute or not in ASCII."""
    out = bytearray()
    inode = 0
    for inode, entry in enumerate(entries, start=1):
        if entry.path.startswith("/") or not entry.path.isascii():
            raise ValueError(f"{entry.path!r} cannot be a path in an archive: relative ASCII paths can")
        _append(out, inode, entry)
    _append(out, inode + 1, Entry(_TRAILER, 0))
    return bytes(out)


def _append(out: bytearray, inode: int, entry: Entry) -> None:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    #         ino    mode        uid gid links mtime size             dev of the file itself, which nobody reads, then of the node
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    out += b"070701" + b"".join(b"%08X" % field for field in fields) + name
    out += bytes(-len(out) % 4)
    out += entry.data
    out += bytes(-len(out) % 4)
