"""Own the merger's typed door: knobs, scans, counters, the journal, and a picture of the trees.

Must not know where pages come from: it is given a `Machine`, whose arrays are a simulation or a mirror of real memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from pagefold import settings
from pagefold.advisor import Advisor
from pagefold.core import arena, doors, events, invariants, layout
from pagefold.core.scan import scan as scan_pages
from pagefold.errors import (
    CorruptionError,
    EngineStopped,
    KnobBusy,
    KnobInvalid,
    OutOfMemory,
    UnknownKnob,
    UsageError,
)
from pagefold.machine import Machine, Process

IntentKind = Literal["protect", "redirect", "zero", "break"]
_KINDS: tuple[IntentKind, ...] = ("protect", "redirect", "zero", "break")
_CORE_KNOBS = {
    "merge_across_nodes": "merge_across_nodes",
    "max_page_sharing": "max_page_sharing",
    "use_zero_pages": "use_zero_pages",
    "smart_scan": "smart_scan",
    "stable_node_chains_prune_millisecs": "chains_prune_millisecs",
}

_MOST = 2**31 - 1  # of a knob, in the core


@dataclass(frozen=True)
class Counters:
    """The merger's counters, by the kernel's names (pages, scans, nodes; `general_profit` in bytes)."""

    pages_shared: int
    pages_sharing: int
    pages_unshared: int
    pages_volatile: int
    full_scans: int
    pages_scanned: int
    pages_skipped: int
    ksm_zero_pages: int
    stable_node_chains: int
    stable_node_dups: int
    general_profit: int


@dataclass(frozen=True)
class Intent:
    """One mapping change of the engine: page `vpn` of an mm, from `old_frame` to `new_frame` (0: none).

    `serial` tells the mm from one that has its number later.
    """

    kind: IntentKind
    mm: int
    serial: int
    vpn: int
    old_frame: int
    new_frame: int


@dataclass(frozen=True)
class UnstablePage:
    """A page in an unstable tree: `tree` is that of the node where it was when it entered."""

    tree: int
    mm: int
    vpn: int
    content: int | None  # None: it cannot be had any more
    frame_node: int


@dataclass(frozen=True)
class StableNode:
    """A stable node as the drawing shows it; `frame` is 0 and `content` None when it is stale."""

    place: Literal["tree", "dup", "migrating"]
    tree: int
    depth: int
    content: int | None
    frame: int
    frame_node: int
    sharers: tuple[tuple[int, int], ...]  # (mm, vpn) of its rmap_items


class Engine:
    """The merger over a machine's memory. A machine has one: a second engine made over it takes over, with its own knobs.

    >>> machine = Machine(frames=64)
    >>> engine = Engine(machine, run=1)
    >>> for _ in range(2):
    ...     process = machine.spawn()
    ...     area = process.mmap(1)
    ...     process.write(area, 0, 7)
    ...     process.madvise(area, "MERGEABLE")
    >>> engine.scan_full(2)
    >>> engine.counters().pages_shared, engine.counters().pages_sharing
    (1, 1)
    """

    def __init__(self, machine: Machine, rules: str = "mainline", **knobs: int | str) -> None:
        self.machine = machine
        self.rules = settings.check_rules(rules)
        self.now_ms = 0  # set before a scan; times of chains and of the advisor are taken from it
        self.cpu_ms = 0  # CPU time the scanner has used, for the advisor
        self._knobs = {name: knob.default for name, knob in settings.KNOBS.items()}
        self._advisor: Advisor | None = None
        self._scan_began: tuple[int, int] | None = None
        ctl = self._ctl
        ctl["rules"] = layout.RULES[self.rules]
        for name, field in _CORE_KNOBS.items():
            known = self.rules != "classic" or settings.KNOBS[name].classic
            ctl[field] = self._knobs[name] if known else 0
        for name, value in knobs.items():
            self.set(name, value)

    @property
    def _arena(self) -> arena.Arena:
        return self.machine._arena

    @property
    def _ctl(self) -> layout.Records:
        record: layout.Records = self.machine.world.ctl[0]
        return record

    # --- knobs ----------------------------------------------------------------------------------------------------

    def set(self, knob: str, value: int | str) -> None:
        """Set a knob as the kernel's file would; KnobInvalid and KnobBusy say why not, and change nothing."""
        known = settings.find(knob, self.rules)
        number = settings.parse(known, value)
        if knob == "pages_to_scan" and self._knobs["advisor_mode"]:
            raise KnobInvalid(knob, "the advisor sets it; set advisor_mode to none first")
        if knob in ("run", "merge_across_nodes", "max_page_sharing"):
            self._check_not_offlining(knob)
        if number == self._knobs[knob]:
            return
        if knob in ("merge_across_nodes", "max_page_sharing"):
            self._set_in_empty_forest(knob, min(number, _MOST))
        self._knobs[knob] = number
        if knob in _CORE_KNOBS:
            self._ctl[_CORE_KNOBS[knob]] = min(number, _MOST)
        elif knob == "advisor_mode":
            self._switch_advisor(number)
        elif knob == "run":
            self._ctl["unmerging"] = int(number == 2)
            if number == 2:
                self._unmerge_all()

    def get(self, name: str) -> int | str:
        """Return a knob or a counter by the kernel's name."""
        if name in settings.KNOBS:
            settings.find(name, self.rules)
            value = self._knobs[name]
            if name == "run":
                return value | (4 if self._ctl["offlining"] else 0)
            return settings.ADVISOR_MODES[value] if name == "advisor_mode" else value
        counters = asdict(self.counters())
        if name not in counters:
            raise UnknownKnob(f"there is no knob or counter {name!r}")
        return int(counters[name])

    def _check_not_offlining(self, knob: str) -> None:
        if self._ctl["offlining"]:
            raise KnobBusy(
                knob, f"node {int(self._ctl['offlining']) - 1} is going offline; finish or cancel that first"
            )

    def _set_in_empty_forest(self, knob: str, value: int) -> None:
        """Change a knob by which stable nodes are placed, or raise KnobBusy."""
        code = doors.SET_MERGE_ACROSS_NODES if knob == "merge_across_nodes" else doors.SET_MAX_PAGE_SHARING
        if self._arena.run(doors.control, code, value) >= 0:
            return
        if self._ctl["pages_shared"]:
            raise KnobBusy(knob, f"{self._ctl['pages_shared']} merged pages exist; set run to 2 first")
        raise KnobBusy(knob, "a merged page is still mapped; set run to 2, or wait until it is gone")

    def _switch_advisor(self, mode: int) -> None:
        self._advisor = Advisor() if mode else None
        self._scan_began = None
        default = settings.KNOBS["pages_to_scan"].default
        self._knobs["pages_to_scan"] = self._knobs["advisor_min_pages_to_scan"] if mode else default

    def _unmerge_all(self) -> None:
        if self._arena.run(doors.control, doors.UNMERGE_ALL, 0) == layout.NO_MEMORY:
            self._knobs["run"] = 0
            self._ctl["unmerging"] = 0
            raise OutOfMemory("no frame is left to unmerge into; run is 0 now, and the rest stays merged")

    # --- scanning ---------------------------------------------------------------------------------------------------

    def scan(self, pages: int | None = None) -> int:
        """Look at up to `pages` pages (default: pages_to_scan); ends early when a full scan does. Return how many."""
        self._check_running()
        budget = self._knobs["pages_to_scan"] if pages is None else pages
        if budget < 0:
            raise UsageError(f"{budget} pages cannot be scanned; use 0 or more")
        ctl = self._ctl
        if ctl["cursor_mm"] == 0:
            self._scan_began = (self.now_ms, self.cpu_ms)
        ctl["now"] = self.now_ms
        before, seqnr = int(ctl["pages_scanned"]), int(ctl["full_scans"])
        budget = min(budget, 2**62)
        while True:
            left = budget - (int(self._ctl["pages_scanned"]) - before)
            status = int(scan_pages(self.machine.world, left))
            if status >= 0:
                break
            self._arena.world = arena.grow(self.machine.world, status)
        if int(self._ctl["full_scans"]) != seqnr:
            self._advise()
        return int(self._ctl["pages_scanned"]) - before

    def scan_full(self, passes: int = 1) -> None:
        """Scan until that many more full scans are done; returns at once when there is nothing to scan."""
        self._check_running()
        goal = int(self._ctl["full_scans"]) + passes
        while int(self._ctl["full_scans"]) < goal and self.machine.world.mms[0]["ring_next"]:
            self.scan(2**62)

    def _check_running(self) -> None:
        self._check_not_offlining("scan")
        if self._knobs["run"] != 1:
            raise EngineStopped(f"run is {self._knobs['run']}: nothing is scanned; set run to 1")

    def _advise(self) -> None:
        """Let the advisor set pages_to_scan after a full scan."""
        if self._advisor is None or self._scan_began is None:
            return
        seconds = max((self.now_ms - self._scan_began[0]) // 1000, 1)
        cpu_percent = (self.cpu_ms - self._scan_began[1]) * 100 // (seconds * 1000)
        self._knobs["pages_to_scan"] = self._advisor.advise(
            self._knobs["pages_to_scan"],
            seconds,
            cpu_percent,
            target=self._knobs["advisor_target_scan_time"],
            max_cpu=self._knobs["advisor_max_cpu"],
            max_pages=self._knobs["advisor_max_pages_to_scan"],
        )

    # --- what it knows ------------------------------------------------------------------------------------------------

    def counters(self) -> Counters:
        """Return all counters (spec section 2)."""
        ctl = self._ctl
        names = (
            *("pages_shared", "pages_sharing", "pages_unshared", "full_scans", "pages_scanned", "pages_skipped"),
            *("ksm_zero_pages", "stable_node_chains", "stable_node_dups"),
        )
        values = {name: int(ctl[name]) for name in names}
        known = values["pages_shared"] + values["pages_sharing"] + values["pages_unshared"]
        saved = (values["pages_sharing"] + values["ksm_zero_pages"]) * layout.PAGE_SIZE
        return Counters(
            pages_volatile=max(int(ctl["rmap_items"]) - known, 0),
            general_profit=saved - int(ctl["rmap_items"]) * layout.RMAP_ITEM_BYTES,
            **values,
        )

    def sharing_groups(self) -> dict[int, list[tuple[Process, int]]]:
        """Return, per frame that several pages map, the (process, page number) of each."""
        groups: dict[int, list[tuple[Process, int]]] = {}
        for process in self.machine.processes:
            for vpn, where in process.pages():
                if where.node >= 0:
                    groups.setdefault(where.frame, []).append((process, vpn))
        return {frame: members for frame, members in groups.items() if len(members) > 1}

    def stable_nodes(self) -> Iterator[StableNode]:
        """Yield every stable node: tree by tree in content order, then those on migrate_nodes."""
        world = self.machine.world
        for nid in range(self.machine.nodes):
            for place, depth in _in_order(world.stables, int(world.nodes[nid]["stable_root"])):
                chain = world.stables[place]["place"] == layout.CHAIN
                node = int(world.stables[place]["hlist"]) if chain else place
                while node:
                    yield self._describe(node, "dup" if chain else "tree", nid, depth)
                    node = int(world.stables[node]["list_next"]) if chain else 0
        node = int(world.ctl[0]["migrate_head"])
        while node:
            yield self._describe(node, "migrating", int(world.stables[node]["nid"]), 0)
            node = int(world.stables[node]["list_next"])

    def unstable_pages(self) -> Iterator[UnstablePage]:
        """Yield the pages in the unstable trees of the last scan begun, tree by tree, left to right."""
        world = self.machine.world
        places = {(p.mm, vpn): where for p in self.machine.processes if p.alive for vpn, where in p.pages()}
        for nid in range(self.machine.nodes):
            for item, _ in _in_order(world.rmaps, int(world.nodes[nid]["unstable_root"])):
                mm, vpn = int(world.rmaps[item]["mm"]), int(world.rmaps[item]["vpn"])
                where = places.get((mm, vpn))
                if where is None or where.node < 0:
                    yield UnstablePage(nid, mm, vpn, None, -1)
                else:
                    yield UnstablePage(nid, mm, vpn, self._content(where.frame), where.node)

    def _content(self, frame: int) -> int:
        content = self.machine.world.contents[frame]
        return int(content["hi"]) << 64 | int(content["lo"])

    def _describe(self, node: int, place: Literal["tree", "dup", "migrating"], tree: int, depth: int) -> StableNode:
        world = self.machine.world
        frame = int(world.stables[node]["kpfn"])
        alive = int(world.frames[frame]["mapping"]) == node
        sharers = []
        item = int(world.stables[node]["hlist"])
        while item:
            sharers.append((int(world.rmaps[item]["mm"]), int(world.rmaps[item]["vpn"])))
            item = int(world.rmaps[item]["hlist_next"])
        return StableNode(
            place=place,
            tree=tree,
            depth=depth,
            content=self._content(frame) if alive else None,
            frame=frame if alive else 0,
            frame_node=int(world.frames[frame]["nid"]) if alive else -1,
            sharers=tuple(sorted(sharers)),
        )

    # --- the journal --------------------------------------------------------------------------------------------------

    def keep_journal(self, on: bool = True) -> None:
        """Write every mapping change down from now on (or stop, and forget what was written)."""
        self._ctl["journal_on"] = int(on)
        self._ctl["journal_used"] = 0

    def take_intents(self) -> list[Intent]:
        """Return the mapping changes since the last call, in order, and forget them."""
        return [
            Intent(_KINDS[int(one["kind"]) - 1], *(int(one[k]) for k in ("mm", "serial", "vpn", "old_pfn", "new_pfn")))
            for one in self.take_journal()
        ]

    def take_journal(self) -> layout.Records:
        """As `take_intents`, in the records of `layout.intent`: for many."""
        world = self.machine.world
        written = world.journal[: int(world.ctl[0]["journal_used"])].copy()
        world.ctl[0]["journal_used"] = 0
        return written

    def refuse(self, intent: Intent) -> bool:
        """Take back one intent that a client could not carry out: as if the process had just written that page.

        False if the process or the page is gone meanwhile: then there is nothing to take back.
        """
        status = self._arena.run(doors.execute, events.REFUSE, intent.mm, intent.vpn, intent.serial, 0)
        if status == layout.NO_MEMORY:
            raise OutOfMemory(f"no frame is left for page {intent.vpn} of mm {intent.mm}; it stays merged")
        return status >= 0

    # --- its judge ------------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Raise CorruptionError if any invariant is broken (spec section 9); O(size of the machine)."""
        broken, where = invariants.check(self.machine.world)
        if broken:
            raise CorruptionError(invariants.NAMES[broken], f"at index {where}; counters {self.counters()}")


def _in_order(records: layout.Records, root: int) -> Iterator[tuple[int, int]]:
    """Yield (node, depth) of a tree from left to right."""
    above: list[tuple[int, int]] = []
    node, depth = root, 0
    while above or node:
        while node:
            above.append((node, depth))
            node, depth = int(records[node]["rb_left"]), depth + 1
        node, depth = above.pop()
        yield node, depth
        node, depth = int(records[node]["rb_right"]), depth + 1
