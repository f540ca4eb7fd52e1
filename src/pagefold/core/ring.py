"""Own the ring of mm_slots and the rules of entering and leaving it (choices 13, 14).

Record 0 of `mms` is the ring's head. The cursor is the slot the scanner stands on, 0 for the head.
"""

from __future__ import annotations

from pagefold.core import layout
from pagefold.core.arena import give_mm
from pagefold.core.compiler import jit
from pagefold.core.layout import World


@jit
def link_before(world: World, mm: int, place: int) -> None:
    """Link a slot into the ring before `place`."""
    before = world.mms[place]["ring_prev"]
    world.mms[mm]["ring_prev"] = before
    world.mms[mm]["ring_next"] = place
    world.mms[before]["ring_next"] = mm
    world.mms[place]["ring_prev"] = mm


@jit
def unlink(world: World, mm: int) -> None:
    """Take a slot out of the ring's links."""
    before = world.mms[mm]["ring_prev"]
    after = world.mms[mm]["ring_next"]
    world.mms[before]["ring_next"] = after
    world.mms[after]["ring_prev"] = before


@jit
def ksm_enter(world: World, mm: int) -> None:
    """Register an mm: just before the cursor, so that it is reached last; while unmerging, at the end."""
    if world.mms[mm]["flags"] & layout.MM_REGISTERED:
        return
    world.mms[mm]["flags"] |= layout.MM_REGISTERED
    ctl = world.ctl[0]
    link_before(world, mm, 0 if ctl["unmerging"] else ctl["cursor_mm"])


@jit
def leave_ring(world: World, mm: int) -> None:
    """Take an mm that has no rmap_items out of the ring; free its record if the process is gone."""
    unlink(world, mm)
    world.mms[mm]["flags"] &= ~layout.MM_REGISTERED
    if world.mms[mm]["flags"] & layout.MM_EXITED:
        give_mm(world, mm)


@jit
def ksm_exit(world: World, mm: int) -> None:
    """Tell the ring that an mm is exiting: it leaves at once if nothing hangs on it, else the scanner frees it.

    The mm is marked EXITED already. One that is at the cursor stays there: the cursor must not stand on a free slot.
    """
    ctl = world.ctl[0]
    if not world.mms[mm]["flags"] & layout.MM_REGISTERED:
        give_mm(world, mm)
    elif ctl["cursor_mm"] != mm:
        if world.mms[mm]["rmap_list"] == 0:
            leave_ring(world, mm)
        else:
            unlink(world, mm)
            link_before(world, mm, world.mms[ctl["cursor_mm"]]["ring_next"])
