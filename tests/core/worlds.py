"""Own the worlds that several tests of the core start from, and plain walks over their records."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from pagefold import Engine, Machine
from pagefold.core import layout
from pagefold.core.layout import World


def copy_of(world: World) -> World:
    """Return the same world in arrays of its own."""
    return World(*(array.copy() for array in world))


def used_frames(world: World) -> list[int]:
    """Return the frames (swap slots too) that anybody has a claim on."""
    return [int(pfn) for pfn in np.flatnonzero((world.frames["mapcount"] != 0) | held(world)) if pfn]


def held(world: World) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Tell of every frame whether anybody references, pins or locks it."""
    return world.frames["holds"] != 0


def held_for_a_moment(world: World) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Tell of every frame whether anybody references or locks it, pins apart."""
    return world.frames["holds"] & ~np.uint16(layout.HOLD_PINS) != 0


def stable_slots(world: World, *places: int) -> list[int]:
    """Return the stable nodes in any of the places (default: wherever they are)."""
    used = range(layout.KSM_LONE + 1, int(world.ctl[0]["stables_used"]))
    where = {node: int(world.stables[node]["place"]) for node in used}
    return [node for node, place in where.items() if (place in places if places else place != layout.FREE)]


def rmap_slots(world: World, flag: int) -> list[int]:
    """Return the rmap_items that have the flag."""
    used = world.rmaps[: int(world.ctl[0]["rmaps_used"])]
    return [int(item) for item in np.flatnonzero((used["mm"] != 0) & (used["flags"] & flag != 0))]


def entries(world: World) -> Iterator[tuple[int, int, int, int]]:
    """Yield (mm, vma, vpn, pte) for every page of every area."""
    for vma in range(1, int(world.ctl[0]["vmas_used"])):
        area = world.vmas[vma]
        if area["mm"]:
            for index in range(int(area["end"] - area["start"])):
                yield int(area["mm"]), vma, int(area["start"]) + index, int(area["pte_base"]) + index


def free_runs(world: World) -> list[tuple[int, int]]:
    """Return the free runs of page-table entries, (first, length), in list order."""
    runs, run = [], int(world.ctl[0]["ptes_free"])
    while run:
        runs.append((run, int(world.ptes[run]["pfn"])))
        run = int(world.ptes[run]["next"])
        assert len(runs) < len(world.ptes), "the free list is a ring"
    return runs


CHAINED, PAIRS, MOVED, ALONE, LAST = 1, range(2, 8), 8, range(20, 30), 99


def rich_world() -> tuple[Machine, Engine]:
    """Make a healthy machine in the middle of a scan that has something of everything.

    Two nodes, not merged across; a chain of two full dups, six plain tree nodes, one node on migrate_nodes, occupied
    unstable trees, a zero mapping, a swapped page, a pinned one, an absent one, and a free frame on each node.
    Process 1 (scanned first) has pages of its own, process 2 the merged ones.
    """
    machine = Machine(nodes=2, frames=64, swap=8, shadow=True)
    engine = Engine(machine, run=1, smart_scan=0, merge_across_nodes=0, max_page_sharing=2, use_zero_pages=1)
    early, late = machine.spawn(), machine.spawn()
    own = early.mmap(len(ALONE) + 6)
    for index, content in enumerate(ALONE):
        early.write(own, index, content)
    early.madvise(own, "MERGEABLE")
    merged = late.mmap(4 + 2 * len(PAIRS) + 2)
    for index, content in enumerate([CHAINED] * 4 + [c for c in PAIRS for _ in range(2)] + [MOVED] * 2):
        late.write(merged, index, content)
    late.madvise(merged, "MERGEABLE")
    early.write(own, 11, 0)
    engine.scan_full(3)
    assert early.swap_out(own, 1)
    early.pin(own, 2)
    early.write(own, len(ALONE), MOVED)
    last = merged.pages - 1
    late.write(merged, last, LAST)  # leaves room beside the other page of MOVED
    engine.scan_full(1)
    assert late.move_pages(merged, {last - 1: 1}) == {last - 1: 1}
    while not machine.world.ctl[0]["migrate_head"]:
        engine.scan(1)
    engine.validate()
    return machine, engine
