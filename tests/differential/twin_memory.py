"""Own the simulated memory of the twin: nodes, frames, swap slots, processes, areas and mappings.

Knows frames that are marked KSM and what that means for writing, forking and moving; knows nothing of trees,
scans or knobs. A freed `Frame` object is never used again, so "the back pointer names this stable node" can
be asked of a dead frame too. Free frames of a node are handed out lowest number first; this shows only in
the order in which `offline_finish` moves them.
"""

from __future__ import annotations

from typing import Any

from pagefold.errors import KnobBusy, OutOfMemory, UsageError

KINDS = ("anonymous", "shared", "file", "hugetlb", "pfnmap", "io")
FIRST_VPN = 16
ZERO = "zero"  # a mapping of the zero page made by the merger


class Frame:
    """One physical page; `ksm` with `stable_node` None is a lone KSM page."""

    def __init__(self, pfn: int, nid: int, content: int) -> None:
        self.pfn = pfn
        self.nid = nid
        self.content = content
        self.mappings: set[tuple[int, int]] = set()
        self.pins = 0
        self.locked = False
        self.ksm = False
        self.stable_node: Any = None


class Slot:
    """One swap slot, counted by the mappings that refer to it."""

    def __init__(self, content: int) -> None:
        self.content = content
        self.mappings: set[tuple[int, int]] = set()


class Mapped:
    """A present page-table entry."""

    def __init__(self, frame: Frame, writable: bool) -> None:
        self.frame = frame
        self.writable = writable


class Area:
    """A run of pages [start, end) with one kind, one binding and one advice."""

    def __init__(self, start: int, end: int, node: int | None, kind: str, mergeable: bool) -> None:
        self.start = start
        self.end = end
        self.node = node
        self.kind = kind
        self.mergeable = mergeable

    @property
    def compatible(self) -> bool:
        return self.kind == "anonymous"

    def part(self, start: int, end: int) -> Area:
        return Area(start, end, self.node, self.kind, self.mergeable)


class Mm:
    """One process; `items`, `merging` and `zero_pages` are what the merger keeps for it."""

    def __init__(self, number: int, node: int) -> None:
        self.number = number
        self.node = node
        self.areas: list[Area] = []
        self.entries: dict[int, Mapped | Slot | str] = {}
        self.mark = FIRST_VPN
        self.merge_any = False
        self.exited = False
        self.parent: Mm | None = None
        self.items: dict[int, Any] = {}
        self.merging = 0
        self.zero_pages = 0

    def area(self, vpn: int) -> Area | None:
        for area in self.areas:
            if area.start <= vpn < area.end:
                return area
        return None

    def mergeable_area(self, vpn: int) -> Area | None:
        area = self.area(vpn)
        return area if area is not None and area.mergeable else None


class Memory:
    """The machine without its merger; `Twin` adds the rest."""

    def __init__(self, nodes: int, frames: int, swap: int) -> None:
        if nodes < 1 or frames < 1 or swap < 0:
            raise UsageError("a machine has at least one node, one frame a node and no negative swap")
        self.nodes = nodes
        self.free = [set(range(nid * frames, (nid + 1) * frames)) for nid in range(nodes)]
        self.used: set[Frame] = set()
        self.state = ["online"] * nodes  # or "going", "offline"
        self.free_slots = swap
        self.mms: dict[int, Mm] = {}  # the living ones
        self.created = 0
        self.zero_pages = 0

    # frames, slots, mappings --------------------------------------------------------------------------------

    def _room_on(self, nid: int) -> bool:
        return self.state[nid] == "online" and bool(self.free[nid])

    def _allocate(self, wish: int, content: int) -> Frame:
        """Take a frame on the wished node or the next one with room; it is not mapped yet."""
        for step in range(self.nodes):
            nid = (wish + step) % self.nodes
            if self._room_on(nid):
                frame = Frame(min(self.free[nid]), nid, content)
                self.free[nid].remove(frame.pfn)
                self.used.add(frame)
                return frame
        raise OutOfMemory("no free frame on any node; free some memory first")

    def _release(self, frame: Frame) -> None:
        """Free the frame if nothing holds it any more."""
        if not frame.mappings and not frame.pins and not frame.locked:
            self.used.remove(frame)
            self.free[frame.nid].add(frame.pfn)
            frame.ksm = False
            frame.stable_node = None

    def _map(self, mm: Mm, vpn: int, frame: Frame, writable: bool) -> None:
        mm.entries[vpn] = Mapped(frame, writable)
        frame.mappings.add((mm.number, vpn))

    def _map_slot(self, mm: Mm, vpn: int, slot: Slot) -> None:
        mm.entries[vpn] = slot
        slot.mappings.add((mm.number, vpn))

    def _map_zero(self, mm: Mm, vpn: int) -> None:
        mm.entries[vpn] = ZERO
        mm.zero_pages += 1
        self.zero_pages += 1

    def _drop(self, mm: Mm, vpn: int) -> None:
        """Forget what is mapped at vpn, if anything; frees what nobody else holds."""
        entry = mm.entries.pop(vpn, None)
        if isinstance(entry, Mapped):
            entry.frame.mappings.remove((mm.number, vpn))
            self._release(entry.frame)
        elif isinstance(entry, Slot):
            entry.mappings.remove((mm.number, vpn))
            if not entry.mappings:
                self.free_slots += 1
        elif entry == ZERO:
            mm.zero_pages -= 1
            self.zero_pages -= 1

    def _fresh(self, mm: Mm, vpn: int, content: int) -> Frame:
        """Map a fresh writable frame in place of what is there; it is allocated before that is dropped."""
        area = mm.area(vpn)
        frame = self._allocate(mm.node if area.node is None else area.node, content)
        self._drop(mm, vpn)
        self._map(mm, vpn, frame, writable=True)
        return frame

    def _find(self, number: int) -> Mm:
        if number not in self.mms:
            raise UsageError(f"there is no process {number}; spawn or fork it first")
        return self.mms[number]

    def _at(self, number: int, vpn: int) -> tuple[Mm, Any]:
        """Find the process and what is mapped at vpn (None when absent)."""
        mm = self._find(number)
        if mm.area(vpn) is None:
            raise UsageError(f"page {vpn} of process {number} is in no area; map it first")
        return mm, mm.entries.get(vpn)

    def _node(self, nid: int) -> int:
        if not 0 <= nid < self.nodes:
            raise UsageError(f"node {nid} does not exist; the machine has {self.nodes}")
        return nid

    # processes and areas ------------------------------------------------------------------------------------

    def spawn(self, node: int = 0) -> int:
        self._node(node)
        self.created += 1
        self.mms[self.created] = Mm(self.created, node)
        return self.created

    def mmap(self, mm: int, pages: int, node: int | None = None, kind: str = "anonymous") -> int:
        proc = self._find(mm)
        if pages < 1 or kind not in KINDS:
            raise UsageError(f"cannot map {pages} pages of kind {kind!r}; kinds are {', '.join(KINDS)}")
        if node is not None:
            self._node(node)
        start = proc.mark
        proc.areas.append(Area(start, start + pages, node, kind, mergeable=False))
        proc.mark = start + pages + 1
        return start

    def munmap(self, mm: int, vpn: int, count: int) -> None:
        proc = self._find(mm)
        gone = self._split(proc, vpn, vpn + count)
        for area in gone:
            for page in range(area.start, area.end):
                self._drop(proc, page)
        proc.areas = [area for area in proc.areas if area not in gone]

    def _split(self, mm: Mm, start: int, end: int) -> list[Area]:
        """Split areas at both borders and return those that lie inside [start, end)."""
        parts: list[Area] = []
        for area in mm.areas:
            low = min(max(start, area.start), area.end)
            high = max(min(end, area.end), low)
            cuts = [(area.start, low), (low, high), (high, area.end)]
            parts += [area.part(a, b) for a, b in cuts if a < b] if low < high else [area]
        mm.areas = parts
        return [area for area in parts if start <= area.start and area.end <= end]

    def fork(self, mm: int, node: int | None = None) -> int:
        parent = self._find(mm)
        child = Mm(self.created + 1, parent.node if node is None else self._node(node))
        child.areas = [area.part(area.start, area.end) for area in parent.areas]
        child.mark = parent.mark
        child.parent = parent
        child.merge_any = parent.merge_any
        copies: dict[int, Frame] = {}
        for vpn, entry in sorted(parent.entries.items()):
            area = child.area(vpn)
            if isinstance(entry, Mapped) and entry.frame.pins and area.compatible:
                try:
                    wish = child.node if area.node is None else area.node
                    copies[vpn] = self._allocate(wish, entry.frame.content)
                except OutOfMemory:
                    for frame in copies.values():
                        self._release(frame)
                    raise
        self.created += 1
        self.mms[child.number] = child
        for vpn, entry in parent.entries.items():
            if vpn in copies:
                self._map(child, vpn, copies[vpn], writable=True)
            elif isinstance(entry, Mapped):
                entry.writable = entry.writable and not child.area(vpn).compatible
                self._map(child, vpn, entry.frame, entry.writable)
            elif isinstance(entry, Slot):
                self._map_slot(child, vpn, entry)
            else:
                self._map_zero(child, vpn)
        return child.number

    def exit(self, mm: int) -> None:
        proc = self._find(mm)
        for vpn in list(proc.entries):
            self._drop(proc, vpn)
        proc.areas = []
        proc.exited = True
        del self.mms[mm]

    # what a process does to its pages -----------------------------------------------------------------------

    def write(self, mm: int, vpn: int, content: int) -> None:
        if content < 0:
            raise UsageError(f"content {content} is not a page; contents are counted from 0")
        self._at(mm, vpn)
        self._own(mm, vpn, content)

    def _own(self, number: int, vpn: int, content: int) -> Frame:
        """Write: make the page present and the process's own, holding `content`."""
        mm, entry = self._at(number, vpn)
        if isinstance(entry, Slot):
            self._swap_in(mm, vpn, entry)
            entry = mm.entries[vpn]
        if isinstance(entry, Mapped):
            frame = entry.frame
            alone = not frame.ksm and len(frame.mappings) == 1 and not frame.pins
            if entry.writable or alone or not mm.area(vpn).compatible:
                entry.writable = True
                frame.content = content
                return frame
        return self._fresh(mm, vpn, content)

    def read(self, mm: int, vpn: int) -> int:
        proc, entry = self._at(mm, vpn)
        if isinstance(entry, Slot):
            return self._swap_in(proc, vpn, entry).content
        return entry.frame.content if isinstance(entry, Mapped) else 0

    def _swap_in(self, mm: Mm, vpn: int, slot: Slot) -> Frame:
        return self._fresh(mm, vpn, slot.content)

    def pin(self, mm: int, vpn: int) -> Frame:
        frame = self._own(mm, vpn, self.read(mm, vpn))
        frame.pins += 1
        return frame

    def unpin(self, token: Frame) -> None:
        if not token.pins:
            raise UsageError("this page is not pinned any more; unpin each pin once")
        token.pins -= 1
        self._release(token)

    def lock(self, mm: int, vpn: int) -> Frame | None:
        _, entry = self._at(mm, vpn)
        if not isinstance(entry, Mapped):
            return None
        entry.frame.locked = True
        return entry.frame

    def unlock(self, token: Frame) -> None:
        token.locked = False
        self._release(token)

    # what the kernel does to frames -------------------------------------------------------------------------

    def move_page(self, mm: int, vpn: int, node: int) -> str:
        process = self._find(mm)
        entry = process.entries.get(vpn)
        if not 0 <= node < self.nodes or self.state[node] != "online":
            return "no node"
        if entry == ZERO or process.area(vpn) is None:
            return "fault"
        if not isinstance(entry, Mapped):
            return "absent"
        if entry.frame.nid == node:
            return "same"
        if self._stays(entry.frame):
            return "busy"
        if not self._room_on(node):
            return "no memory"
        self._migrate(entry.frame, node)
        return "moved"

    def _stays(self, frame: Frame) -> bool:
        """A frame cannot move while it is held, or (KSM) when some mapping is neither an item's nor inherited from one's mm."""
        if frame.locked or frame.pins:
            return True
        items = frame.stable_node.items if frame.stable_node is not None else []
        return frame.ksm and not all(
            any(item.vpn == vpn and self._descends(self.mms[number], item.mm) for item in items)
            for number, vpn in frame.mappings
        )

    @staticmethod
    def _descends(mm: Mm | None, ancestor: Mm) -> bool:
        while mm is not None and mm is not ancestor:
            mm = mm.parent
        return mm is not None

    def _migrate(self, frame: Frame, nid: int) -> None:
        """Move content, mappings, KSM mark and back pointer: here the object stays and its number changes."""
        self.free[frame.nid].add(frame.pfn)
        frame.nid = nid
        frame.pfn = min(self.free[nid])
        self.free[nid].remove(frame.pfn)

    def swap_out(self, mm: int, vpn: int) -> str:
        _, entry = self._at(mm, vpn)
        if not isinstance(entry, Mapped):
            return "absent"
        if self._stays(entry.frame):
            return "busy"
        if not self.free_slots:
            return "no memory"
        self.free_slots -= 1
        slot = Slot(entry.frame.content)
        for number, page in sorted(entry.frame.mappings):
            self._drop(self.mms[number], page)
            self._map_slot(self.mms[number], page, slot)
        return "moved"

    def _going(self) -> int | None:
        return self.state.index("going") if "going" in self.state else None

    def offline_begin(self, node: int) -> None:
        if self.state[self._node(node)] == "offline":
            raise UsageError(f"node {node} is offline already")
        if self._going() is not None:
            raise KnobBusy("run", "a node is going offline already; finish or cancel that first")
        self.state[node] = "going"

    def offline_finish(self) -> str:
        """Move every used frame of the leaving node, or none if one must stay or there is no room."""
        node = self._must_go()
        leaving = sorted((f for f in self.used if f.nid == node), key=lambda f: f.pfn)
        room = sum(len(self.free[nid]) for nid in range(self.nodes) if self.state[nid] == "online")
        if any(self._stays(frame) for frame in leaving):
            self.offline_cancel()
            return "busy"
        if room < len(leaving):
            self.offline_cancel()
            return "no memory"
        for frame in leaving:
            targets = [(node + step) % self.nodes for step in range(1, self.nodes)]
            self._migrate(frame, next(nid for nid in targets if self._room_on(nid)))
        self.state[node] = "offline"
        return "offline"

    def offline_cancel(self) -> None:
        self.state[self._must_go()] = "online"

    def _must_go(self) -> int:
        node = self._going()
        if node is None:
            raise UsageError("no node is going offline; begin first")
        return node

    def online(self, node: int) -> None:
        if self.state[self._node(node)] == "going":
            raise UsageError(f"node {node} is going offline; finish or cancel that first")
        self.state[node] = "online"

    # what a test looks at -----------------------------------------------------------------------------------

    def observe(self) -> dict[tuple[int, int], tuple[int, frozenset[tuple[int, int]]]]:
        """Say for every mapping where it lives (-1 zero page, -2 swapped) and who shares it."""
        seen = {}
        for mm in self.mms.values():
            for vpn, entry in mm.entries.items():
                key = (mm.number, vpn)
                if isinstance(entry, Mapped):
                    seen[key] = (entry.frame.nid, frozenset(entry.frame.mappings))
                elif isinstance(entry, Slot):
                    seen[key] = (-2, frozenset(entry.mappings))
                else:
                    seen[key] = (-1, frozenset({key}))
        return seen

    def _check_memory(self) -> None:
        """Assert that frames, slots and zero pages are held by exactly those that say so."""
        held: dict[Frame, set[tuple[int, int]]] = {}
        zero_pages = 0
        for mm in self.mms.values():
            zeroes = 0
            for vpn, entry in mm.entries.items():
                assert mm.area(vpn) is not None
                if isinstance(entry, Mapped):
                    held.setdefault(entry.frame, set()).add((mm.number, vpn))
                    assert not (entry.frame.ksm and entry.writable)
                elif isinstance(entry, Slot):
                    assert (mm.number, vpn) in entry.mappings
                else:
                    zeroes += 1
            assert zeroes == mm.zero_pages
            zero_pages += zeroes
        assert zero_pages == self.zero_pages
        assert set(held) | {f for f in self.used if f.pins or f.locked} == self.used
        for frame in self.used:
            assert held.get(frame, set()) == frame.mappings
            assert frame.pfn not in self.free[frame.nid]
        assert len({frame.pfn for frame in self.used}) == len(self.used)
