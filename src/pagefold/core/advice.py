"""Own madvise MERGEABLE / UNMERGEABLE and `merge_any` (spec section 8, choices 13 and 22)."""

from __future__ import annotations

from pagefold.core import layout
from pagefold.core.compiler import jit
from pagefold.core.frames import INTENTS_PER_PAGE, journal_room
from pagefold.core.layout import World
from pagefold.core.memory import break_page
from pagefold.core.ring import ksm_enter
from pagefold.core.space import cut_vma, vma_from


@jit
def unmerge_ksm_pages(world: World, vma: int, start: int, end: int) -> int:
    """Break every merged page of the area in [start, end); NO_MEMORY or NEED_JOURNAL leave the rest merged."""
    for vpn in range(max(start, world.vmas[vma]["start"]), min(end, world.vmas[vma]["end"])):
        if not journal_room(world, 1 + INTENTS_PER_PAGE):  # in the middle of a scan, what the scan counts on stays free
            return layout.NEED_JOURNAL
        status = break_page(world, vma, vpn)
        if status < 0:
            return status
    return layout.OK


@jit
def unmerge_range(world: World, mm: int, start: int, end: int) -> int:
    """Break every merged page in the MERGEABLE areas of [start, end), in address order; a status."""
    vma = vma_from(world, mm, start)
    while vma and world.vmas[vma]["start"] < end:
        if world.vmas[vma]["flags"] & layout.VMA_MERGEABLE:
            status = unmerge_ksm_pages(world, vma, start, end)
            if status < 0:
                return status
        vma = world.vmas[vma]["next"]
    return layout.OK


@jit
def advise(world: World, mm: int, start: int, count: int, mergeable: bool) -> int:
    """Carry the advice out for every part of an area in [start, start + count); a status."""
    end = start + count
    if not mergeable:
        status = unmerge_range(world, mm, start, end)
        if status < 0:
            return status
    vma = vma_from(world, mm, start)
    while vma and world.vmas[vma]["start"] < end:
        flags = world.vmas[vma]["flags"]
        if not flags & layout.VMA_SHARED and (flags & layout.VMA_MERGEABLE != 0) != mergeable:
            vma = cut_vma(world, vma, start, end)
            if vma < 0:
                return vma
            world.vmas[vma]["flags"] ^= layout.VMA_MERGEABLE
            world.ctl[0]["trees_changed"] = 1
            if mergeable:
                ksm_enter(world, mm)
        vma = world.vmas[vma]["next"]
    return layout.OK


@jit
def set_merge_any(world: World, mm: int, on: bool) -> int:
    """Make every compatible area of the mm MERGEABLE, now and in future; or break all and end that."""
    record = world.mms[mm]
    if (record["flags"] & layout.MM_MERGE_ANY != 0) == on:
        return layout.OK
    if not on:
        status = unmerge_range(world, mm, 0, record["next_vpn"])
        if status < 0:
            return status
    vma = record["vma_first"]
    while vma:
        area = world.vmas[vma]
        if not on:
            area["flags"] &= ~layout.VMA_MERGEABLE
            world.ctl[0]["trees_changed"] = 1
        elif not area["flags"] & layout.VMA_SHARED:
            area["flags"] |= layout.VMA_MERGEABLE
        vma = area["next"]
    if on:
        record["flags"] |= layout.MM_MERGE_ANY
        ksm_enter(world, mm)
    else:
        record["flags"] &= ~layout.MM_MERGE_ANY
    return layout.OK
