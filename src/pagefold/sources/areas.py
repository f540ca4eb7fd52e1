"""Own areas: what /proc/PID/smaps says of a process's address space, and which of it KSM could look at.

Must not know: single pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# Words of VmFlags for what KSM refuses (spec section 1): shared or ever shareable memory, ranges of bare
# frames, device memory, areas of fixed size, huge-TLB, mixed maps, droppable memory, shadow stacks.
# Files on DAX are refused by the kernel too, but smaps does not tell them; their uncopied pages are not
# anonymous, so only pages that were written and copied can be taken for mergeable there.
INCOMPATIBLE = frozenset({"sh", "ms", "pf", "io", "de", "ht", "mm", "dp", "ss"})

_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) [0-9a-f]+ \S+ \d+ *(.*)$")
_KIB = re.compile(r"^(\w+): +(\d+) kB$")
_SIZES = frozenset({"Rss", "Anonymous", "AnonHugePages", "Swap", "KSM", "Shared_Hugetlb", "Private_Hugetlb"})


@dataclass(frozen=True, slots=True)
class Area:
    """Describe one area of an address space; `kib` holds sizes in KiB by the names smaps gives them."""

    start: int  # byte address of the first page
    end: int  # byte address behind the last page
    permissions: str  # as 'rw-p'
    name: str  # file, '[heap]', '' for anonymous
    flags: frozenset[str]  # two-letter words of VmFlags
    kib: dict[str, int] = field(default_factory=dict, hash=False)

    @property
    def compatible(self) -> bool:
        """Tell whether KSM would accept advice for this area."""
        # [vsyscall] is no area of the process at all: its address lies beyond what a process may map.
        return self.end <= 1 << 63 and not self.flags & INCOMPATIBLE

    @property
    def advised(self) -> bool:
        """Tell whether the area is MERGEABLE, by madvise or for the whole process."""
        return "mg" in self.flags

    @property
    def size(self) -> int:
        """Return the size in bytes."""
        return self.end - self.start


def parse_smaps(text: str) -> Iterator[Area]:
    """Yield the areas of a smaps file in the order of addresses.

    An area whose permissions say it is shared counts as such even where the kernel prints no VmFlags.
    """
    head: re.Match[str] | None = None
    flags: frozenset[str] = frozenset()
    kib: dict[str, int] = {}
    for line in text.splitlines():
        if match := _HEADER.match(line):
            if head:
                yield _area(head, flags, kib)
            head, flags, kib = match, frozenset(), {}
        elif line.startswith("VmFlags:"):
            flags = frozenset(line.split()[1:])
        elif (size := _KIB.match(line)) and size[1] in _SIZES:
            kib[size[1]] = int(size[2])
    if head:
        yield _area(head, flags, kib)


def _area(head: re.Match[str], flags: frozenset[str], kib: dict[str, int]) -> Area:
    shared = {"sh"} if head[3].endswith("s") else set()
    return Area(int(head[1], 16), int(head[2], 16), head[3], head[4], flags | shared, kib)
