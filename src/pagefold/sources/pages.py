"""Own `Pages`, the table of one source's pages: what every later stage works on.

Must not know: where the pages came from.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]
Bool = NDArray[np.bool_]

UNKNOWN_NODE = -1
UNKNOWN_FRAME = -1


def system_page_size() -> int:
    """Return the size of a page of this machine in bytes."""
    return resource.getpagesize()


@dataclass(slots=True, kw_only=True)
class Pages:
    """Hold one entry per page that same-page merging could look at, as arrays of equal length.

    Entries are in the order of their unsigned address. Pages left out are counted, never listed; those counts
    belong to the whole source and survive `select`.
    """

    label: str  # for people: 'python3 [1234]', or the name of the image's file
    pid: int | None  # None: an image
    page_size: int  # bytes
    address: Int64  # byte address, page-aligned; addresses of 2**63 and more (kernel cores) are negative
    high: UInt64  # first half of the content's xxh3_128; a page of zeros is exactly (0, 0)
    low: UInt64  # second half
    node: NDArray[np.int16]  # NUMA node, UNKNOWN_NODE if the kernel does not say
    frame: Int64  # pfn, UNKNOWN_FRAME without CAP_SYS_ADMIN; of an image: number of the page in it
    exclusive: Bool  # mapped once, by this process only
    ksm: Bool  # is a KSM page already; False where /proc/kpageflags cannot be read
    huge: Bool  # part of a transparent huge page that is mapped as one
    volatile: Bool  # content changed between two looks; False before a second look
    advised: Bool  # the area is MERGEABLE

    zero_mapped: int = 0  # mappings of the kernel's zero page: no KSM ever looks at those
    swapped: int = 0  # pages that are in swap
    unreadable: int = 0  # present, but the bytes could not be had
    vanished: int = 0  # were there at one look and not at the next
    incompatible: int = 0  # present pages of areas that KSM never looks at (shared, I/O, huge-TLB and so on)
    unadvised: int = 0  # anonymous pages left out because only advised areas were asked for
    missing: int = 0  # pages an image names without holding their (whole) content

    def __len__(self) -> int:
        return len(self.address)

    def __post_init__(self) -> None:
        for name in ARRAYS:
            if len(getattr(self, name)) != len(self.address):
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, address {len(self.address)}")

    @property
    def zero(self) -> Bool:
        """Tell which pages are full of zeros."""
        zero: Bool = (self.high == 0) & (self.low == 0)
        return zero

    @property
    def frames_known(self) -> bool:
        """Tell whether every entry has its frame; without, pages shared by a fork look like copies."""
        return bool((self.frame != UNKNOWN_FRAME).all())

    def select(self, mask: NDArray[Any]) -> Pages:
        """Return the entries chosen by a mask or by indexes, with the same label and counts."""
        return replace(self, **{name: getattr(self, name)[mask] for name in ARRAYS})


ARRAYS = tuple(f.name for f in fields(Pages) if "NDArray" in str(f.type) or str(f.type) in ("Int64", "UInt64", "Bool"))


@dataclass(slots=True)
class Mapped:
    """Hold where pages are, before their content is known: one entry per page, in the order of addresses."""

    address: Int64
    huge: Bool
    area: NDArray[np.int32]  # index in the list of areas surveyed
    zero_mapped: int = 0
    swapped: int = 0
    zero_unknown: bool = False  # mappings of the zero page could not be told from pages and are among them

    def __len__(self) -> int:
        return len(self.address)


@dataclass(slots=True)
class Contents:
    """Hold the hashes of pages, and which could be read: where `ok` is False they mean nothing."""

    high: UInt64
    low: UInt64
    ok: Bool = field(default_factory=lambda: np.empty(0, np.bool_))
