"""Own the mirror: the engine over a machine whose processes are the clients and whose contents are the hashes of their pages.

What the engine merges there is only wanted; `Wish` says it in terms of regions, and what a client refuses comes back by `refuse`.
Must not know: sockets, /proc, the store.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pagefold.core import layout
from pagefold.engine import Engine
from pagefold.live.region import HOLE, Int64, Region
from pagefold.machine import Area, Machine, Process

_FIRST_FRAMES = 4096
_NOBODY = np.uint64(
    1 << 63
)  # contents of pages that shall not merge: counted up from here in the upper half, with a lower half of 1


@dataclass(frozen=True)
class Wish:
    """What the engine wants of one client: pages (`vpn`, ascending) and the frame each shall map: 0 its own, HOLE zeros."""

    mm: int
    vpns: Int64
    frames: Int64
    order: Int64  # when the engine decided, for pages that need a new slot: neighbours in order become neighbours in the store


class Mirror:
    """Hold the machine and its engine; areas and frames are added as clients advise memory."""

    def __init__(self, nodes: int, knobs: dict[str, int | str]) -> None:
        self.machine = Machine(nodes=nodes, frames=_FIRST_FRAMES, swap=0)
        self.engine = Engine(self.machine)
        for name, value in knobs.items():
            self.engine.set(name, value)
        self.engine.keep_journal()
        self._used = 0  # pages of all areas: as many frames may be needed
        self._nobody = 0
        self._areas: dict[tuple[int, int], int] = {}  # record of an area, by mm and first page

    @property
    def pages(self) -> int:
        """Pages of all areas."""
        return self._used

    @property
    def _ctl(self) -> layout.Records:
        record: layout.Records = self.machine.world.ctl[0]
        return record

    def set(self, knob: str, value: int | str) -> None:
        """Set a knob of the engine, with frames enough if that gives all pages frames of their own."""
        if knob == "run":
            merged = int(self._ctl["pages_sharing"]) + int(self._ctl["pages_shared"]) + int(self._ctl["ksm_zero_pages"])
            if merged > self._free():
                self._add_frames(0, merged - self._free())
        self.engine.set(knob, value)

    # --- what clients have ---------------------------------------------------------------------------------------------

    def attach(self) -> Process:
        """Begin a client without memory."""
        return self.machine.spawn()

    def detach(self, process: Process) -> None:
        """End a client and forget it."""
        world = self.machine.world
        areas = world.vmas[: int(self._ctl["vmas_used"])]
        mine = areas[areas["mm"] == process.mm]
        self._used -= int((mine["end"] - mine["start"]).sum())
        self._areas = {key: at for key, at in self._areas.items() if key[0] != process.mm}
        process.exit()
        self.machine.processes.remove(process)

    def map(self, process: Process, pages: int) -> int:
        """Make room for a region in the mirror; return its first page number."""
        area = process.mmap(pages)
        self._used += pages
        process.madvise(area, "MERGEABLE")
        return area.start

    def unmap(self, process: Process, region: Region) -> None:
        """Forget a region."""
        self._areas.pop((process.mm, region.vpn), None)
        process.munmap(Area(region.vpn, region.pages))
        self._used -= region.pages

    def update(
        self,
        process: Process,
        vpns: Int64,
        high: NDArray[np.uint64],
        low: NDArray[np.uint64],
        nodes: NDArray[np.int16] | None = None,
    ) -> bool:
        """Let pages (ascending) hold these hashes; those that do already stay as they are. Tell whether any did not."""
        contents = np.empty(len(vpns), layout.content)
        contents["hi"], contents["lo"] = high, low
        nids = np.zeros(len(vpns), np.int16) if nodes is None else nodes
        before = int(self._ctl["trees_changed"])
        self._ctl["trees_changed"] = 0
        done = 0
        while done < len(vpns):
            done += process.update(vpns[done:], contents[done:], nids[done:])
            if done < len(vpns):
                assert not self._free(), f"page {vpns[done]} is in no area of the mirror"
                self._add_frames(int(nids[done]), len(vpns) - done)
        changed = bool(self._ctl["trees_changed"])
        self._ctl["trees_changed"] = int(changed or before)
        return changed

    def hold(self, process: Process, vpns: Int64) -> None:
        """Let pages (ascending) be equal to nothing."""
        high = np.arange(len(vpns), dtype=np.uint64) + np.uint64(self._nobody) + _NOBODY
        self._nobody += len(vpns)
        self.update(process, vpns, high, np.ones(len(vpns), np.uint64))

    def refuse(self, process: Process, vpns: Int64) -> None:
        """Take merges back that the client did not carry out, as if it had just written those pages (ascending)."""
        done = 0
        while done < len(vpns):
            done += process.refuse(vpns[done:])
            if done < len(vpns):
                self._add_frames(0, len(vpns) - done)

    def frames_of(self, process: Process, region: Region) -> Int64:
        """Return the frame of each page of a region, 0 where none is present."""
        world = self.machine.world
        base = int(world.vmas[self._area(process.mm, region.vpn)]["pte_base"])
        entries = world.ptes[base : base + region.pages]
        return np.where(entries["flags"] & layout.PTE_PRESENT, entries["pfn"], 0).astype(np.int64)

    def _area(self, mm: int, vpn: int) -> int:
        """Return where the record of an area is; found once, it is where it was."""
        areas = self.machine.world.vmas
        at = self._areas.get((mm, vpn), 0)
        if not at or areas[at]["mm"] != mm or areas[at]["start"] != vpn:
            used = areas[: int(self._ctl["vmas_used"])]
            at = int(np.flatnonzero((used["mm"] == mm) & (used["start"] == vpn))[0])
            self._areas[mm, vpn] = at
        return at

    def move_frame(self, frame: int, node: int) -> int:
        """Let a frame be on another node, for everyone who maps it; return the new frame, 0 if it cannot go."""
        world = self.machine.world
        pte = int(world.frames[frame]["first_pte"])
        if pte == 0:
            return 0
        for process in self.machine.processes:
            vma = int(world.mms[process.mm]["vma_first"])
            while vma:
                area = world.vmas[vma]
                if 0 <= (at := pte - int(area["pte_base"])) < int(area["end"] - area["start"]):
                    moved = self.move(process, int(area["start"]) + at, node)
                    return int(self.machine.world.ptes[pte]["pfn"]) if moved else 0
                vma = int(area["next"])
        return 0

    def move(self, process: Process, vpn: int, node: int) -> bool:
        """Let the frame of a page be on another node, because the real one is; False if it cannot go."""
        if not self.machine.world.nodes[node]["free"]:
            self._add_frames(node, 1)
        return process.move_pages(Area(vpn, 1), {0: node})[0] == node

    def _add_frames(self, node: int, pages: int) -> None:
        self.machine.add_memory(node, max(pages, self._used // 2, _FIRST_FRAMES))

    def _free(self) -> int:
        return sum(self.machine.free_frames(node) for node in range(self.machine.nodes))

    # --- what the engine wants ---------------------------------------------------------------------------------------------

    @property
    def at_start(self) -> bool:
        """Tell whether the next scan begins a pass."""
        return int(self._ctl["cursor_mm"]) == 0

    @property
    def empty(self) -> bool:
        """Tell whether there is nothing to scan, not even a client that ended and is to be forgotten."""
        return int(self.machine.world.mms[0]["ring_next"]) == 0

    @property
    def passes(self) -> int:
        """Passes done so far."""
        return int(self._ctl["full_scans"])

    def wishes(self) -> Iterator[Wish]:
        """Yield what was decided since the last call, per client that still lives; of each page only the last word."""
        journal = self.engine.take_journal()
        if not len(journal):
            return
        world = self.machine.world
        journal = journal[world.mms["serial"][journal["mm"]] == journal["serial"]]
        target = np.where(journal["kind"] == layout.INTENT_ZERO, HOLE, journal["new_pfn"]).astype(np.int64)
        target[journal["kind"] == layout.INTENT_BREAK] = 0
        key = journal["mm"].astype(np.int64) << 44 | journal["vpn"]
        _, last = np.unique(key[::-1], return_index=True)
        last = len(key) - 1 - last
        mms = journal["mm"][last]
        for mm in np.unique(mms).tolist():
            mine = last[mms == mm]
            yield Wish(mm, journal["vpn"][mine], target[mine], mine)

    def is_ksm(self, frames: Int64) -> NDArray[np.bool_]:
        """Tell which frames are KSM pages now."""
        answer: NDArray[np.bool_] = self.machine.world.frames["mapping"][frames] != 0
        return answer

    def nodes_of(self, frames: Int64) -> NDArray[np.int16]:
        """Return the node of each frame."""
        answer: NDArray[np.int16] = self.machine.world.frames["nid"][frames]
        return answer

    def contents_of(self, frames: Int64) -> NDArray[np.void]:
        """Return the hash of each frame, records of (hi, lo)."""
        answer: NDArray[np.void] = self.machine.world.contents[frames]
        return answer

    def sharers_of(self, frames: Int64) -> NDArray[np.int32]:
        """Return how many pages map each frame."""
        answer: NDArray[np.int32] = self.machine.world.frames["mapcount"][frames]
        return answer

    def frame_count(self) -> int:
        """Return how many frames there are, of which 0 is none."""
        return len(self.machine.world.frames)


def warm_up() -> None:
    """Do everything once with a page or two, so that all that must be compiled is, before anyone waits for it."""
    mirror = Mirror(1, {"run": 1})
    crew = [mirror.attach() for _ in range(2)]
    one = np.ones(1, np.uint64)
    for process in crew:
        vpns = np.array([mirror.map(process, 1)])
        mirror.update(process, vpns, one, one)
        mirror.hold(process, vpns)
        mirror.update(process, vpns, one, one)
    mirror.engine.scan_full(3)
    for wish in list(mirror.wishes()):
        mirror.refuse(crew[0], wish.vpns)
    mirror.engine.set("run", 2)
    for process in crew:
        mirror.detach(process)
