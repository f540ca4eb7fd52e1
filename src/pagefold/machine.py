"""Own the simulated computer: NUMA nodes, processes and their memory, as pleasant Python over the compiled core.

Must not know how pages are merged: `Engine` does that over the same arrays.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from pagefold.core import arena, compiler, doors, events, layout
from pagefold.core.layout import World
from pagefold.errors import KnobBusy, NoSuchProcess, OutOfMemory, UsageError

Kind = Literal["anonymous", "shared", "file", "hugetlb", "pfnmap", "io"]
KINDS: tuple[Kind, ...] = ("anonymous", "shared", "file", "hugetlb", "pfnmap", "io")
MAX_NODES = 1024
MAX_VPN = 2**52  # page numbers of 64-bit addresses
_LOW = 2**64 - 1
_ERRNO = {
    layout.ABSENT: errno.ENOENT,
    layout.BUSY: errno.EBUSY,
    layout.NO_MEMORY: errno.ENOMEM,
    layout.NO_NODE: errno.ENODEV,
    layout.NO_AREA: errno.EFAULT,
    layout.THE_ZERO_PAGE: errno.EFAULT,
}


@dataclass(frozen=True)
class Area:
    """A run of `pages` virtual pages from page number `start`; stays a name for them after parts are unmapped."""

    start: int
    pages: int

    def vpn(self, index: int) -> int:
        """Return the page number of page `index`, or raise UsageError."""
        if not 0 <= index < self.pages:
            raise UsageError(f"page {index} is not in an area of {self.pages} pages; use 0 to {self.pages - 1}")
        return self.start + index

    def span(self, first: int = 0, count: int | None = None) -> tuple[int, int]:
        """Return (page number, pages) of `count` pages (default: the rest) from page `first`, or raise UsageError."""
        pages = self.pages - first if count is None else count
        if not 0 <= first < self.pages or not 1 <= pages <= self.pages - first:
            raise UsageError(f"pages {first} to {first + pages - 1} are not in an area of {self.pages} pages")
        return self.start + first, pages


@dataclass(frozen=True)
class Mapping_:  # noqa: N801  (Mapping is the abstract class)
    """Where a page is: `node` and `frame`, or node -1 for the zero page, -2 for swap (`frame` is then the slot)."""

    node: int
    frame: int


class Process:
    """A process of a `Machine`; made by `Machine.spawn` and `fork`."""

    def __init__(self, machine: Machine, mm: int, pid: int) -> None:
        self.machine = machine
        self.mm = mm
        self.pid = pid
        self.alive = True
        self._pins: dict[int, list[int]] = {}
        self._locks: dict[int, list[int]] = {}

    def __repr__(self) -> str:
        return f"<Process {self.pid}{'' if self.alive else ' (exited)'}>"

    def _do(self, code: int, b: int = 0, c: int = 0, d: int = 0) -> int:
        self._check_alive()
        return self.machine._arena.run(doors.execute, code, self.mm, b, c, d)

    def _check_alive(self) -> None:
        if not self.alive:
            raise NoSuchProcess(f"process {self.pid} of this machine has exited")

    def mmap(self, pages: int, *, node: int | None = None, kind: Kind = "anonymous", at: int = 0) -> Area:
        """Map `pages` untouched pages, wanted on `node` (default: the process's own), at page number `at` if given."""
        if not 1 <= pages < arena.MAX_INDEX:
            raise UsageError(f"an area of {pages} pages cannot be; use 1 to {arena.MAX_INDEX - 1}")
        if kind not in KINDS:
            raise UsageError(f"kind {kind!r} is not known; use one of {', '.join(KINDS)}")
        if node is not None:
            self.machine.check_node(node)
        self._check_alive()
        least = int(self.machine.world.mms[self.mm]["next_vpn"])
        if at and not least <= at <= MAX_VPN:
            raise UsageError(
                f"address {at} is taken, passed or absurd; use {least} to {MAX_VPN}, or 0 for the next free one"
            )
        flags = 0 if kind == "anonymous" else layout.VMA_SHARED
        start = self._do(events.MAP, at, pages, flags * 65536 + (0 if node is None else node + 1))
        return Area(start, pages)

    def munmap(self, area: Area, first: int = 0, count: int | None = None) -> None:
        """Unmap `count` pages (default: the rest) of an area from its page `first`."""
        start, pages = area.span(first, count)
        self._do(events.UNMAP, start, pages)

    def write(self, area: Area, index: int, content: int) -> None:
        """Write a page: `content` (below 2**128, 0 is the zero page) stands for its bytes."""
        if not 0 <= content < 2**128:
            raise UsageError(f"content {content} does not fit; use 0 to 2**128 - 1")
        low, high = _signed(content & _LOW), _signed(content >> 64)
        self._check(self._do(events.WRITE, area.vpn(index), low, high), area, index)

    def load(self, area: Area, contents: npt.NDArray[np.void], nodes: npt.NDArray[np.int16] | None = None) -> None:
        """Write many pages from the area's first: records of (hi, lo), each on its node (-1: as the area wishes)."""
        self._check_alive()
        if len(contents) > area.pages:
            raise UsageError(f"{len(contents)} contents do not fit into an area of {area.pages} pages")
        nids = np.full(len(contents), -1, np.int16) if nodes is None else nodes
        if len(nids) != len(contents):
            raise UsageError(f"nodes are given for {len(nids)} pages, but there are {len(contents)} contents")
        if len(nids) and not -1 <= int(nids.min()) <= int(nids.max()) < self.machine.nodes:
            raise UsageError(f"nodes {nids.min()} to {nids.max()} do not exist; use -1 to {self.machine.nodes - 1}")
        status = self.machine._arena.run(doors.load, self.mm, area.start, contents.astype(layout.content), nids)
        if status == layout.NO_AREA:
            raise UsageError(
                f"pages {area.start} to {area.start + len(contents) - 1} are not mapped, or not as one area"
            )
        if status != len(contents):
            raise OutOfMemory(f"{len(contents)} pages do not fit into the machine; {max(status, 0)} did")

    def update(self, vpns: npt.NDArray[np.int64], contents: npt.NDArray[np.void], nodes: npt.NDArray[np.int16]) -> int:
        """Let pages, by ascending number, hold these contents; one that holds its own already is not touched, as if never written.

        Return how many were looked at before the first that is not mapped, or has no frame left.
        """
        self._check_alive()
        return self.machine._arena.run(doors.update, self.mm, vpns, contents, nodes)

    def refuse(self, vpns: npt.NDArray[np.int64]) -> int:
        """Undo the merge of pages, by ascending number, as if the process had just written them; return as `update` does."""
        self._check_alive()
        return self.machine._arena.run(doors.refuse, self.mm, vpns)

    def read(self, area: Area, index: int) -> int:
        """Return the content of a page; 0 for one that was never written."""
        pte = self._do(events.TOUCH, area.vpn(index))
        if pte == layout.ABSENT:
            return 0
        self._check(pte, area, index)
        world = self.machine.world
        content = world.contents[world.ptes[pte]["pfn"]]
        return int(content["hi"]) << 64 | int(content["lo"])

    def madvise(self, area: Area, advice: str, first: int = 0, count: int | None = None) -> None:
        """Advise `MERGEABLE` or `UNMERGEABLE`; the second breaks what is merged and may raise OutOfMemory."""
        if advice not in ("MERGEABLE", "UNMERGEABLE"):
            raise UsageError(f"advice {advice!r} is not known; use MERGEABLE or UNMERGEABLE")
        start, pages = area.span(first, count)
        if self._do(events.ADVISE, start, pages, int(advice == "MERGEABLE")) == layout.NO_MEMORY:
            raise OutOfMemory("no frame is left to unmerge into; what was unmerged stays so, the rest stays merged")

    def merge_any(self, on: bool) -> None:
        """Let all compatible memory of the process merge, now and in future, or end that (PR_SET_MEMORY_MERGE)."""
        if self._do(events.MERGE_ANY, int(on)) == layout.NO_MEMORY:
            raise OutOfMemory("no frame is left to unmerge into; what was unmerged stays so, the rest stays merged")

    def fork(self, node: int | None = None) -> Process:
        """Fork; the child shares all pages until one of the two writes."""
        if node is not None:
            self.machine.check_node(node)
        mm = self._do(events.FORK, -1 if node is None else node)
        if mm < 0:
            raise OutOfMemory("no frame is left for the pinned pages of the child; there is no child")
        return self.machine._adopt(mm)

    def exit(self) -> None:
        """End the process; its memory is free, its pins stay until they are released."""
        self._do(events.EXIT)
        self.alive = False

    def pin(self, area: Area, index: int) -> None:
        """Hold a long-term reference on a page, as a registered I/O buffer does."""
        vpn = area.vpn(index)
        self._pins.setdefault(vpn, []).append(self._check(self._do(events.PIN, vpn), area, index))

    def unpin(self, area: Area, index: int) -> None:
        """Release one pin of that page, wherever its frame is mapped now."""
        held = self._pins.get(area.vpn(index))
        if not held:
            raise UsageError(f"page {index} is not pinned by process {self.pid}")
        self.machine._arena.run(doors.execute, events.UNPIN, held.pop(), 0, 0, 0)

    def unpin_all(self) -> None:
        """Release every pin this process took."""
        for held in self._pins.values():
            while held:
                self.machine._arena.run(doors.execute, events.UNPIN, held.pop(), 0, 0, 0)

    def lock(self, area: Area, index: int) -> None:
        """Lock the page's frame as another user of it would."""
        vpn = area.vpn(index)
        self._locks.setdefault(vpn, []).append(self._check(self._do(events.LOCK, vpn), area, index))

    def unlock(self, area: Area, index: int) -> None:
        """Unlock the frame that `lock` locked last for that page."""
        held = self._locks.get(area.vpn(index))
        if not held:
            raise UsageError(f"page {index} was not locked by process {self.pid}")
        self.machine._arena.run(doors.execute, events.UNLOCK, held.pop(), 0, 0, 0)

    def move_pages(self, area: Area, wishes: Mapping[int, int]) -> dict[int, int]:
        """Move pages to nodes; per page the node where it is now, or a negative errno (move_pages, MPOL_MF_MOVE_ALL)."""
        answer = {}
        for index, node in wishes.items():
            status = self._do(events.MOVE, area.vpn(index), node)
            answer[index] = -_ERRNO[status] if status < 0 else node
        return answer

    def swap_out(self, area: Area, index: int) -> bool:
        """Swap a page out of every process that maps it; False if it is absent, held, or swap is full."""
        status = self._do(events.SWAP_OUT, area.vpn(index))
        if status == layout.NO_AREA:
            self._check(status, area, index)
        return status >= 0

    def ksm_stat(self) -> dict[str, int]:
        """Return the counters of /proc/PID/ksm_stat."""
        self._check_alive()
        record = self.machine.world.mms[self.mm]
        items, merging, zero = (int(record[k]) for k in ("ksm_rmap_items", "ksm_merging_pages", "ksm_zero_pages"))
        profit = (merging + zero) * layout.PAGE_SIZE - items * layout.RMAP_ITEM_BYTES
        return {
            "ksm_rmap_items": items,
            "ksm_zero_pages": zero,
            "ksm_merging_pages": merging,
            "ksm_process_profit": profit,
        }

    def pages(self) -> Iterator[tuple[int, Mapping_]]:
        """Yield (page number, where it is) of every page that is not absent."""
        world = self.machine.world
        vma = int(world.mms[self.mm]["vma_first"]) if self.alive else 0
        while vma:
            area = world.vmas[vma]
            for index in range(int(area["end"] - area["start"])):
                entry = world.ptes[int(area["pte_base"]) + index]
                vpn, pfn = int(area["start"]) + index, int(entry["pfn"])
                if entry["flags"] & layout.PTE_PRESENT:
                    yield vpn, Mapping_(int(world.frames[pfn]["nid"]), pfn)
                elif entry["flags"] & layout.PTE_ZERO:
                    yield vpn, Mapping_(-1, 0)
                elif entry["flags"] & layout.PTE_SWAPPED:
                    yield vpn, Mapping_(-2, pfn)
            vma = int(area["next"])

    def _check(self, status: int, area: Area, index: int) -> int:
        """Return a result, or raise what a negative status means."""
        if status >= 0:
            return status
        where = f"page {index} (number {area.start + index}) of process {self.pid}"
        if status == layout.NO_MEMORY:
            raise OutOfMemory(f"no frame is left for {where}; nothing was changed")
        if status == layout.BUSY:
            raise UsageError(f"{where} is locked already, or pinned too often")
        raise UsageError(f"{where} is {'not mapped' if status == layout.NO_AREA else 'not present'}")


class Machine:
    """A computer with NUMA nodes, each with so many frames, and a swap area.

    >>> machine = Machine(nodes=2, frames=64)
    >>> process = machine.spawn(node=1)
    >>> area = process.mmap(4)
    >>> process.write(area, 0, 7)
    >>> process.read(area, 0), dict(process.pages())[area.start].node
    (7, 1)
    """

    def __init__(
        self, nodes: int = 1, frames: int | Sequence[int] = 65536, swap: int = 1024, *, shadow: bool = False
    ) -> None:
        if not 1 <= nodes <= MAX_NODES:
            raise UsageError(f"a machine with {nodes} nodes cannot be; use 1 to {MAX_NODES}")
        per_node = [frames] * nodes if isinstance(frames, int) else list(frames)
        if len(per_node) != nodes:
            raise UsageError(f"frames are given for {len(per_node)} nodes, but there are {nodes}")
        if min(per_node) < 0 or swap < 0 or sum(per_node) + swap >= arena.MAX_INDEX:
            raise UsageError(f"{sum(per_node)} frames and {swap} swap slots cannot be; use 0 to {arena.MAX_INDEX - 1}")
        compiler.announce()
        self.nodes = nodes
        self._arena = arena.Arena(arena.new_world(per_node, swap, shadow=shadow))
        self.processes: list[Process] = []

    @property
    def world(self) -> World:
        """The arrays, as they are now; do not keep them."""
        return self._arena.world

    def check_node(self, node: int) -> None:
        """Raise UsageError if there is no such node."""
        if not 0 <= node < self.nodes:
            raise UsageError(f"node {node} does not exist; use 0 to {self.nodes - 1}")

    def is_online(self, node: int) -> bool:
        """Tell whether a node's memory is there, and not on its way out."""
        self.check_node(node)
        return bool(self.world.nodes[node]["online"])

    def spawn(self, node: int = 0) -> Process:
        """Start a process whose fresh pages are wanted on `node`."""
        self.check_node(node)
        return self._adopt(self._arena.run(doors.execute, events.SPAWN, node, 0, 0, 0))

    def _adopt(self, mm: int) -> Process:
        process = Process(self, mm, len(self.processes) + 1)
        self.processes.append(process)
        return process

    def add_memory(self, node: int, frames: int) -> None:
        """Hot-add frames to a node."""
        self.check_node(node)
        if not 0 <= frames < arena.MAX_INDEX - len(self.world.frames):
            most = arena.MAX_INDEX - len(self.world.frames) - 1
            raise UsageError(f"{frames} frames cannot be added; use 0 to {most}")
        self._arena.world = arena.add_frames(self.world, node, frames)

    def free_frames(self, node: int) -> int:
        """Return how many frames of a node are free."""
        self.check_node(node)
        return int(self.world.nodes[node]["free"])

    def offline_begin(self, node: int) -> None:
        """Begin to take a node's memory away: scanning, unmerging and knobs are busy until it is done."""
        self.check_node(node)
        if self.world.ctl[0]["offlining"]:
            raise KnobBusy("offline", f"node {int(self.world.ctl[0]['offlining']) - 1} is going offline already")
        if not self.world.nodes[node]["online"]:
            raise UsageError(f"node {node} is offline already")
        self.world.nodes[node]["online"] = 0
        self.world.ctl[0]["offlining"] = node + 1

    def offline_cancel(self) -> None:
        """Give the node back."""
        self.world.nodes[self._going()]["online"] = 1
        self.world.ctl[0]["offlining"] = 0

    def offline_finish(self) -> None:
        """Move every page off the node and forget its stable nodes; KnobBusy or OutOfMemory cancel and move nothing."""
        node = self._going()
        status = self._arena.run(doors.control, doors.TAKE_OFFLINE, node)
        if status < 0:
            self.offline_cancel()
            if status == layout.NO_MEMORY:
                raise OutOfMemory(f"the other nodes have no room for the pages of node {node}; it stays online")
            raise KnobBusy("offline", f"node {node} holds pages that are pinned, locked or referenced; it stays online")
        self.world.ctl[0]["offlining"] = 0

    def offline(self, node: int) -> None:
        """Take a node's memory away, in one go."""
        self.offline_begin(node)
        self.offline_finish()

    def online(self, node: int) -> None:
        """Give an offline node's memory back."""
        self.check_node(node)
        if self.world.ctl[0]["offlining"] == node + 1:
            raise UsageError(f"node {node} is going offline; cancel that instead")
        self.world.nodes[node]["online"] = 1

    def _going(self) -> int:
        node = int(self.world.ctl[0]["offlining"]) - 1
        if node < 0:
            raise UsageError("no node is going offline")
        return node


def _signed(half: int) -> int:
    """Return 64 bits as the signed integer with the same bits."""
    return half - 2**64 if half >= 2**63 else half
