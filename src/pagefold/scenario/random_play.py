"""Own scenarios by chance: a list of small numbers becomes things that are done to a host, the same ones on every host.

What a move means depends only on the moves before it, never on what a host answered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pagefold.errors import PagefoldError
from pagefold.machine import Area
from pagefold.scenario.host import Host, HostFailed, HostProcess

KINDS = (
    *(
        "scan",
        "write",
        "write_many",
        "mmap",
        "spawn",
        "fork",
        "exit",
        "munmap",
        "mergeable",
        "unmergeable",
        "move",
        "move_many",
    ),
    *("pin", "unpin", "merge_any", "knob", "run", "read"),
)
Move = tuple[str, int, int, int]  # of KINDS, and three numbers from 0 to 255
PAGES = 4  # per area
MOST_PROCESSES = 6
KNOBS = (
    *(("merge_across_nodes", 0), ("merge_across_nodes", 1), ("max_page_sharing", 2), ("max_page_sharing", 3)),
    *(("max_page_sharing", 256), ("use_zero_pages", 1), ("use_zero_pages", 0), ("smart_scan", 0), ("smart_scan", 1)),
)


class Player:
    """Plays moves on a host."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.living: list[tuple[HostProcess, list[Area]]] = []
        self.pinned: list[tuple[HostProcess, Area, int]] = []

    def begin(self, processes: int = 2, *, areas_on: Sequence[int | None] = (None,)) -> None:
        """Start some processes, each with an advised area per node named."""
        for _ in range(processes):
            process = self.host.spawn()
            self.living.append((process, []))
            for node in areas_on:
                self._mmap(len(self.living) - 1, node)

    def play(self, moves: Iterable[Move]) -> None:
        """Play moves; one that the host refuses is a move too."""
        for kind, a, b, c in moves:
            try:
                self._move(kind, a, b, c)
            except HostFailed:
                raise
            except (OSError, PagefoldError):
                continue

    def _mmap(self, at: int, node: int | None) -> None:
        process, areas = self.living[at]
        area = process.mmap(PAGES, node=node)
        areas.append(area)
        process.madvise(area, "MERGEABLE")

    def _move(self, kind: str, a: int, b: int, c: int) -> None:
        if kind == "scan":
            self.host.scan(1 + a % 2)
        elif kind == "knob":
            self.host.set(*KNOBS[a % len(KNOBS)])
        elif kind == "run":
            self.host.set("run", 2)
            self.host.set("run", 1)
        elif kind == "spawn":
            if len(self.living) < MOST_PROCESSES:
                self.living.append((self.host.spawn(), []))
                self._mmap(len(self.living) - 1, a % self.host.nodes)
        elif kind == "unpin":
            if self.pinned:
                process, area, index = self.pinned.pop(a % len(self.pinned))
                process.unpin(area, index)
        elif self.living:
            self._process_move(kind, a % len(self.living), b, c)

    def _process_move(self, kind: str, at: int, b: int, c: int) -> None:
        process, areas = self.living[at]
        if kind == "fork":
            if len(self.living) < MOST_PROCESSES:
                self.living.append((process.fork(), list(areas)))
        elif kind == "exit":
            self.living.pop(at)
            self.pinned = [held for held in self.pinned if held[0] is not process]
            process.exit()
        elif kind == "merge_any":
            process.merge_any(bool(b % 2))
        elif kind == "mmap" or not areas:
            self._mmap(at, b % self.host.nodes)
        else:
            self._area_move(kind, process, areas[b // PAGES % len(areas)], b % PAGES, c)

    def _area_move(self, kind: str, process: HostProcess, area: Area, index: int, c: int) -> None:
        if kind == "write":
            process.write(area, index, c % 4)
        elif kind == "write_many":
            for page in range(PAGES):
                process.write(area, page, (c >> 2 * page) % 4)
        elif kind == "munmap":
            process.munmap(area, index, 1 + c % (PAGES - index))
        elif kind == "mergeable":
            process.madvise(area, "MERGEABLE")
        elif kind == "unmergeable":
            process.madvise(area, "UNMERGEABLE")
        elif kind == "move":
            process.move_pages(area, {index: c % self.host.nodes})
        elif kind == "move_many":
            process.move_pages(area, {page: (c >> page) % self.host.nodes for page in range(PAGES)})
        elif kind == "pin":
            process.pin(area, index)
            self.pinned.append((process, area, index))
        elif kind == "read":
            process.read(area, index)
