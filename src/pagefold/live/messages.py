"""Own the messages between agents and the daemon: fixed size, versioned, one packet each.

`csrc/messages.h` says the same in C, and what each message means; a test compares sizes and offsets. Must not know: sockets, the engine.
Control messages of the command line are the one exception: a header and then JSON (`control.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pagefold.errors import PagefoldError

MAGIC = 0x4C4F4650
VERSION = 1
PAGE = 4096
RUN_PAGES = 64  # most pages of one window
BATCH_RUNS = 64  # most runs of one WINDOWS
BATCH_PAGES = BATCH_RUNS * RUN_PAGES
STATUSES = 16
TEXT = 160
PRIVATE = 0xFFFFFFFF  # as the extent of a run: give its pages back as private anonymous memory
MOST_BYTES = 65536  # of any packet

HELLO, ADVISE, UNADVISE, OUTCOME, SYNC = 1, 2, 3, 4, 5
WELCOME, EXTENT, WINDOWS, RELEASE, SYNCED = 16, 17, 18, 19, 20
CONTROL = 32

# What became of a page in a window (agent.h says what each means).
STATUS_NAMES = (
    *("merged", "already", "differs", "pinned", "shared", "unmanaged", "no_vma", "unsuitable"),
    *("broken", "absent", "busy", "off", "bad", "unknown", "", ""),
)
(MERGED, ALREADY, DIFFERS, PINNED, SHARED, UNMANAGED, NO_VMA, UNSUITABLE) = range(8)
(BROKEN, ABSENT, BUSY, OFF, BAD, UNKNOWN) = range(8, 14)

header = np.dtype([("magic", "<u4"), ("version", "<u2"), ("type", "<u2"), ("length", "<u4"), ("zero", "<u4")])
run = np.dtype(
    [("region", "<i8"), ("start", "<u8"), ("pages", "<u4"), ("extent", "<u4"), ("slot", "<u4"), ("zero", "<u4")]
)
_FIELDS: dict[int, list[Any]] = {
    HELLO: [
        *(("windows_safe", "<u4"), ("why_errno", "<i4"), ("want_device", "<u4"), ("max_map_count", "<u4")),
        ("why", f"S{TEXT}"),
    ],
    ADVISE: [("region", "<i8"), ("start", "<u8"), ("pages", "<u8"), ("tracked", "<u4"), ("quiet", "<u4")],
    UNADVISE: [("region", "<i8")],
    OUTCOME: [("batch", "<u8"), ("pages", "<u4"), ("zero", "<u4"), ("status", "u1", (BATCH_PAGES,))],
    SYNC: [("token", "<u8"), ("region", "<i8")],
    WELCOME: [("has_device", "<u4"), ("zero", "<u4")],
    EXTENT: [("extent", "<u4"), ("slots", "<u4"), ("node", "<i4"), ("zero", "<u4")],
    WINDOWS: [("batch", "<u8"), ("count", "<u4"), ("plain", "<u4"), ("runs", run, (BATCH_RUNS,))],
    RELEASE: [("extent", "<u4"), ("zero", "<u4")],
    SYNCED: [
        *(("token", "<u8"), ("error", "<i4"), ("zero", "<u4"), ("pages", "<u8")),
        *(("by_status", "<u8", (STATUSES,)), ("zero_pages", "<u8"), ("saved_bytes", "<u8")),
    ],
}
LAYOUT: dict[int, np.dtype[np.void]] = {
    kind: np.dtype([("header", header), *fields]) for kind, fields in _FIELDS.items()
}
NAMES = {
    HELLO: "hello",
    ADVISE: "advise_message",
    UNADVISE: "unadvise_message",
    OUTCOME: "outcome",
    SYNC: "sync",
    WELCOME: "welcome",
    EXTENT: "extent",
    WINDOWS: "windows",
    RELEASE: "release",
    SYNCED: "synced",
}  # as in csrc: struct pf_<name>


class BadMessage(PagefoldError):  # noqa: N818
    """A packet that no agent of this version sends: whoever sent it is dropped."""


def pack(kind: int, **fields: Any) -> bytes:
    """Return the packet of a message; fields not given are 0."""
    record = np.zeros((), LAYOUT[kind])
    record["header"]["magic"], record["header"]["version"] = MAGIC, VERSION
    record["header"]["type"], record["header"]["length"] = kind, record.nbytes
    for name, value in fields.items():
        if name in ("runs", "status"):
            record[name][: len(value)] = value
        else:
            record[name] = value
    return record.tobytes()


def unpack(packet: bytes) -> tuple[int, Any]:
    """Return a packet's type and its record (for CONTROL: the bytes of its JSON), or raise BadMessage."""
    if len(packet) < header.itemsize:
        raise BadMessage(f"a packet of {len(packet)} bytes is no message")
    head = np.frombuffer(packet, header, 1)[0]
    kind = int(head["type"])
    if head["magic"] != MAGIC or head["version"] != VERSION or head["length"] != len(packet) or head["zero"]:
        raise BadMessage(f"a packet of {len(packet)} bytes is not of protocol version {VERSION}; update the older side")
    if kind == CONTROL:
        return kind, packet[header.itemsize :]
    layout = LAYOUT.get(kind)
    if layout is None or layout.itemsize != len(packet):
        raise BadMessage(f"a message of type {kind} cannot have {len(packet)} bytes")
    return kind, np.frombuffer(packet, layout, 1)[0]
