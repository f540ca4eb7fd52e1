"""Own the arrays of a world: how they are made, how they grow, and the slots of the small ones.

Indices stay valid for ever; arrays are replaced when they grow, so nobody outside keeps a reference to one.
Growth is by half (amortised constant); untouched capacity costs no memory, since it is never written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pagefold.core import layout
from pagefold.core.compiler import jit
from pagefold.core.layout import Records, World
from pagefold.errors import OutOfMemory

MAX_INDEX = 2**31 - 1
_GROWS = {
    layout.NEED_MMS: ("mms",),
    layout.NEED_VMAS: ("vmas",),
    layout.NEED_PTES: ("ptes", "shadow"),
    layout.NEED_RMAPS: ("rmaps",),
    layout.NEED_STABLES: ("stables",),
    layout.NEED_JOURNAL: ("journal",),
}


@jit
def take_rmap(world: World) -> int:
    """Return a free rmap_item slot, 0 if the array is full."""
    ctl = world.ctl[0]
    slot = ctl["rmaps_free"]
    if slot:
        ctl["rmaps_free"] = world.rmaps[slot]["rmap_next"]
    elif ctl["rmaps_used"] < len(world.rmaps):
        slot = ctl["rmaps_used"]
        ctl["rmaps_used"] = slot + 1
    return slot


@jit
def give_rmap(world: World, slot: int) -> None:
    """Put an rmap_item slot back."""
    ctl = world.ctl[0]
    world.rmaps[slot]["flags"] = 0
    world.rmaps[slot]["mm"] = 0
    world.rmaps[slot]["rmap_next"] = ctl["rmaps_free"]
    ctl["rmaps_free"] = slot


@jit
def has_stables(world: World, wanted: int) -> bool:
    """Tell whether `wanted` (1 or 2) stable node slots can be taken."""
    ctl = world.ctl[0]
    free = ctl["stables_free"]
    if free and (wanted == 1 or world.stables[free]["hlist"]):
        return True
    return ctl["stables_used"] + wanted <= len(world.stables)


@jit
def take_stable(world: World) -> int:
    """Return a free stable node slot; the caller asked `has_stables` before."""
    ctl = world.ctl[0]
    slot = ctl["stables_free"]
    if slot:
        ctl["stables_free"] = world.stables[slot]["hlist"]
    else:
        slot = ctl["stables_used"]
        ctl["stables_used"] = slot + 1
    return slot


@jit
def give_stable(world: World, slot: int) -> None:
    """Put a stable node slot back."""
    ctl = world.ctl[0]
    world.stables[slot]["place"] = layout.FREE
    world.stables[slot]["hlist"] = ctl["stables_free"]
    ctl["stables_free"] = slot


@jit
def take_vma(world: World) -> int:
    """Return a free area slot, 0 if the array is full."""
    ctl = world.ctl[0]
    slot = ctl["vmas_free"]
    if slot:
        ctl["vmas_free"] = world.vmas[slot]["next"]
    elif ctl["vmas_used"] < len(world.vmas):
        slot = ctl["vmas_used"]
        ctl["vmas_used"] = slot + 1
    return slot


@jit
def give_vma(world: World, slot: int) -> None:
    """Put an area slot back."""
    ctl = world.ctl[0]
    world.vmas[slot]["mm"] = 0
    world.vmas[slot]["next"] = ctl["vmas_free"]
    ctl["vmas_free"] = slot


@jit
def take_mm(world: World) -> int:
    """Return a free address-space slot, 0 if the array is full."""
    ctl = world.ctl[0]
    slot = ctl["mms_free"]
    if slot:
        ctl["mms_free"] = world.mms[slot]["ring_next"]
    elif ctl["mms_used"] < len(world.mms):
        slot = ctl["mms_used"]
        ctl["mms_used"] = slot + 1
    return slot


@jit
def give_mm(world: World, slot: int) -> None:
    """Put an address-space slot back; what was forked from it is its parent's now."""
    ctl = world.ctl[0]
    for mm in range(1, ctl["mms_used"]):
        if world.mms[mm]["parent"] == slot:
            world.mms[mm]["parent"] = world.mms[slot]["parent"]
    world.mms[slot]["parent"] = 0
    world.mms[slot]["flags"] = 0
    world.mms[slot]["ring_next"] = ctl["mms_free"]
    ctl["mms_free"] = slot


def new_world(frames: Sequence[int], swap: int, *, shadow: bool, pages: int = 64) -> World:
    """Make the arrays of a machine with `frames[nid]` frames on node nid and `swap` swap slots.

    `pages` is how many pages to be ready for at first; the arrays grow as needed.
    """
    total = 1 + sum(frames) + swap
    world = World(
        ctl=np.zeros(1, layout.ctl),
        nodes=np.zeros(len(frames) + 1, layout.node),
        frames=np.zeros(total, layout.frame),
        contents=np.zeros(total, layout.content),
        ptes=np.zeros(pages + 1, layout.pte),
        shadow=np.zeros(pages + 1 if shadow else 1, layout.content),
        vmas=np.zeros(16, layout.vma),
        mms=np.zeros(16, layout.mm),
        rmaps=np.zeros(pages + 1, layout.rmap),
        stables=np.zeros(max(pages // 4, 8), layout.stable),
        journal=np.zeros(1, layout.intent),
        schedule=np.zeros(1, layout.event),
    )
    ctl = world.ctl[0]
    for field in ("mms_used", "vmas_used", "ptes_used", "rmaps_used"):
        ctl[field] = 1
    ctl["stables_used"] = layout.KSM_LONE + 1
    ctl["shadow_on"] = int(shadow)
    first = 1
    for nid, count in enumerate([*frames, swap]):
        _link_free(world, first, count, nid)
        world.nodes[nid]["online"] = 1
        first += count
    return world


def _link_free(world: World, first: int, count: int, nid: int) -> None:
    """Put `count` new frames from `first` on node nid's free list, lowest first."""
    if count == 0:
        return
    block = world.frames[first : first + count]
    block["nid"] = nid
    block["first_pte"] = np.arange(first + 1, first + count + 1)
    block["first_pte"][-1] = world.nodes[nid]["free_head"]
    world.nodes[nid]["free_head"] = first
    world.nodes[nid]["free"] += count
    world.nodes[nid]["total"] += count


def _grown(array: Records, wanted: int) -> Records:
    """Return a longer copy; the tail is zero and not yet backed by memory."""
    bigger = np.zeros(wanted, array.dtype)
    bigger[: len(array)] = array
    return bigger


def add_frames(world: World, nid: int, count: int) -> World:
    """Hot-add `count` frames to node nid (the last index is the swap); return the world with longer arrays."""
    first = len(world.frames)
    _check_index(first + count, "frames")
    world = world._replace(frames=_grown(world.frames, first + count), contents=_grown(world.contents, first + count))
    _link_free(world, first, count, nid)
    return world


def _check_index(length: int, what: str) -> None:
    """Refuse lengths that a 31-bit index cannot name."""
    if length > MAX_INDEX:
        raise OutOfMemory(f"{length} {what} are more than one machine can hold; stay below {MAX_INDEX}")


def grow(world: World, need: int, at_least: int = 0) -> World:
    """Return the world with the arrays that status `need` names grown by half, or by `at_least` more records."""
    if (
        need == layout.NEED_RMAPS
    ):  # there will not be more items than page-table entries: grow once and not twenty times
        at_least = max(at_least, int(world.ctl[0]["ptes_used"]) - len(world.rmaps))
    for name in _GROWS[need]:
        array = getattr(world, name)
        if name == "shadow" and not world.ctl[0]["shadow_on"]:
            continue
        _check_index(len(array) + max(at_least, 1), name)
        length = min(max(len(array) + len(array) // 2 + 16, len(array) + at_least), MAX_INDEX)
        world = world._replace(**{name: _grown(array, length)})
    return world


class Arena:
    """Hold the world that a machine and its engine share, and grow it when a compiled function asks for more.

    Callers keep indices, never arrays: `world` is another one after a call that made it grow.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def run(self, function: Callable[..., int], *args: object) -> int:
        """Call `function(world, *args)` until it no longer asks for room; return what it returned."""
        while True:
            status = int(function(self.world, *args))
            if status not in _GROWS:
                return status
            # An area's entries are one run: its length is known, and the first retry must fit.
            need = int(args[3]) if status == layout.NEED_PTES and len(args) > 3 else 0  # type: ignore[call-overload]
            self.world = grow(self.world, status, need)
