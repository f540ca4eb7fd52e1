"""Own the one table of fields: name, unit, short title and help. Text, JSON and every later output read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["pages", "bytes", "count", "seconds", ""]


@dataclass(frozen=True)
class Field:
    """One figure: `name` is the kernel's where the kernel has it, and the key in JSON."""

    name: str
    unit: Unit
    help: str


FIELDS: dict[str, Field] = {
    field.name: field
    for field in (
        Field("pages_shared", "pages", "KSM pages in use: copies that stay"),
        Field("pages_sharing", "pages", "further mappings of those: copies that go"),
        Field("pages_unshared", "pages", "looked at again and again, but no equal was found"),
        Field("pages_volatile", "pages", "changed between two looks, or shared by fork only"),
        Field("ksm_zero_pages", "pages", "pages of zeroes that map the zero page instead"),
        Field(
            "split_zero_pages",
            "pages",
            "pages of zeroes in huge pages that merging splits: they map the zero page then",
        ),
        Field("stable_node_chains", "count", "contents with more mappings than max_page_sharing"),
        Field("stable_node_dups", "count", "KSM pages that hang on those"),
        Field("saved_bytes", "bytes", "memory that merging frees"),
        Field(
            "metadata_bytes", "bytes", "what the kernel would need for it (64 bytes a page looked at, and a KSM page)"
        ),
        Field("general_profit", "bytes", "the kernel's own figure: pages_sharing and zero pages, less 64 bytes a page"),
        Field("ksm_rmap_items", "pages", "pages looked at"),
        Field("ksm_merging_pages", "pages", "pages that map a KSM page"),
        Field("ksm_process_profit", "bytes", "the kernel's own figure for one process"),
        Field("pages", "pages", "present anonymous pages"),
        Field("full_scans", "count", "passes over everything"),
        Field("pages_scanned", "pages", "looks at a page"),
        Field("pages_skipped", "pages", "looks that smart scan saved"),
        Field("store_bytes", "bytes", "memory that the store holds: every merged content once"),
        Field("tracked_bytes", "bytes", "memory that clients let pagefold manage"),
        Field("daemon_bytes", "bytes", "what the daemon itself needs"),
        Field("cpu_seconds", "seconds", "processor time that the daemon took"),
        Field("uptime_seconds", "seconds", "since the daemon was started"),
        Field("settled_seconds", "seconds", "when the last thing merged that could, since the daemon was started"),
        Field("windows", "count", "runs of pages that clients were asked to swap"),
        Field("cow_breaks", "pages", "merged pages that were written, and are private again"),
        Field("merged_pages", "pages", "pages that map the store now"),
        Field("zero_pages", "pages", "pages of zeros that map nothing now"),
        Field("broken_pages", "pages", "merged once, written since"),
        Field("refused_pages", "pages", "left alone for a while, because a window could not swap them"),
        Field("mappings", "count", "mappings that the advised memory is made of"),
    )
}


def show(name: str, value: float) -> str:
    """Return a figure for people: pages and counts with thousands, bytes in binary units, seconds with a tenth."""
    unit = FIELDS[name].unit
    if unit == "seconds":
        return seconds(value)
    return size(int(value)) if unit == "bytes" else f"{int(value):,}"


def seconds(value: float) -> str:
    """Return a time for people."""
    return f"{value:,.1f} s"


def size(value: int) -> str:
    """Return bytes for people, in binary units, exact below 10 KiB."""
    if abs(value) < 10240:
        return f"{value:,} B"
    amount = float(value)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        amount /= 1024
        if round(abs(amount), 1) < 1024 or unit == "TiB":
            return f"{amount:,.1f} {unit}"
    raise AssertionError("unreachable")
