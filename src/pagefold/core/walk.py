"""Own the way from a KSM page to its mappings, as the kernel goes it when it moves the page: through the rmap_items of its stable node.

A KSM page has left the reverse map of the process that it came from. What leads to a mapping is an rmap_item of that process at that
address, or of a process that it was forked from. What nothing leads to cannot be redirected, so the page cannot move (choices 27).
"""

from __future__ import annotations

from pagefold.core import layout
from pagefold.core.compiler import jit
from pagefold.core.layout import PTE_PRESENT, World
from pagefold.core.space import find_vma, pte_of


@jit
def is_heir(world: World, mm: int, of: int) -> bool:
    """Tell whether an mm is `of`, or was forked from it, or from one that was, and so on."""
    while mm and mm != of:
        mm = world.mms[mm]["parent"]
    return bool(mm)


@jit
def mark(world: World, mm: int, vpn: int, pfn: int) -> int:
    """Mark the entry of one page if it names the frame; return 1 if that is new."""
    vma = find_vma(world, mm, vpn)
    if vma == 0:
        return 0
    entry = world.ptes[pte_of(world, vma, vpn)]
    if entry["pfn"] != pfn or not entry["flags"] & PTE_PRESENT or entry["flags"] & layout.PTE_MET:
        return 0
    entry["flags"] |= layout.PTE_MET
    return 1


@jit
def all_mappings_found(world: World, pfn: int) -> bool:
    """Tell whether the rmap_items of a frame's stable node lead to all of its mappings; O(rmap_items x forked processes)."""
    frame = world.frames[pfn]
    if frame["mapping"] == 0:
        return True  # an anonymous page has a reverse map of its own
    if frame["mapping"] == layout.KSM_LONE:
        return bool(frame["mapcount"] == 0)
    first = world.stables[frame["mapping"]]["hlist"]
    found = 0
    item = first
    while item:
        found += mark(world, world.rmaps[item]["mm"], world.rmaps[item]["vpn"], pfn)
        item = world.rmaps[item]["hlist_next"]
    item = first
    while item and found < frame["mapcount"]:
        for mm in range(1, world.ctl[0]["mms_used"]):
            if world.mms[mm]["flags"] & layout.MM_LIVE and is_heir(world, mm, world.rmaps[item]["mm"]):
                found += mark(world, mm, world.rmaps[item]["vpn"], pfn)
        item = world.rmaps[item]["hlist_next"]
    pte = frame["first_pte"]
    while pte:
        world.ptes[pte]["flags"] &= ~layout.PTE_MET
        pte = world.ptes[pte]["next"]
    return bool(found == frame["mapcount"])
