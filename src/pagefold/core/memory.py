"""Own what processes do to their pages: faults, fork, exit, and breaking a merged page.

Why a write can never reach another process's page:
1. A frame is written in place only through a writable entry, or when it is anonymous and this entry is its only claim.
2. An entry is writable only while its frame is anonymous and has no other entry: fork and the merger take the right away
   from every entry before a second one appears, and a KSM page has no writable entry.
3. Everything else gets a fresh frame, allocated before the old mapping is dropped: without memory nothing changes.
"""

from __future__ import annotations

import numpy as np

from pagefold.core import layout
from pagefold.core.arena import take_mm
from pagefold.core.compiler import jit
from pagefold.core.frames import (
    copy_content,
    map_page,
    take_frame,
    unmap_page,
    write_intent,
)
from pagefold.core.layout import PTE_PRESENT, PTE_SWAPPED, PTE_WRITABLE, PTE_ZERO, World
from pagefold.core.ring import ksm_enter, ksm_exit
from pagefold.core.space import add_vma, cut_vma, drop_vma, find_vma, pte_of, vma_from, wished_node


@jit
def drop_zero(world: World, mm: int, pte: int) -> None:
    """Empty an entry that maps the zero page on the merger's behalf."""
    world.ptes[pte]["flags"] = 0
    world.mms[mm]["ksm_zero_pages"] -= 1
    world.ctl[0]["ksm_zero_pages"] -= 1


@jit
def map_zero(world: World, mm: int, pte: int) -> None:
    """Let an empty entry map the zero page on the merger's behalf."""
    world.ptes[pte]["flags"] = PTE_ZERO
    world.mms[mm]["ksm_zero_pages"] += 1
    world.ctl[0]["ksm_zero_pages"] += 1


@jit
def zap_pte(world: World, mm: int, pte: int) -> None:
    """Empty an entry, whatever it holds."""
    flags = world.ptes[pte]["flags"]
    if flags & PTE_ZERO:
        drop_zero(world, mm, pte)
    elif flags:
        unmap_page(world, pte)
        world.ctl[0]["trees_changed"] = 1
    if world.ctl[0]["shadow_on"]:
        world.shadow[pte]["hi"] = 0
        world.shadow[pte]["lo"] = 0


@jit
def may_write_in_place(world: World, vma: int, pte: int) -> bool:
    """Tell whether a present page may be written where it is (argument 1 above)."""
    if world.vmas[vma]["flags"] & layout.VMA_SHARED or world.ptes[pte]["flags"] & PTE_WRITABLE:
        return True
    frame = world.frames[world.ptes[pte]["pfn"]]
    return frame["mapping"] == 0 and frame["mapcount"] == 1 and frame["holds"] & layout.HOLD_COUNT == 0


@jit
def own_page(world: World, vma: int, pte: int) -> int:
    """Make the page present, this entry's own and writable, with its content kept; NO_MEMORY changes nothing."""
    flags = world.ptes[pte]["flags"]
    if flags & PTE_PRESENT and may_write_in_place(world, vma, pte):
        world.ptes[pte]["flags"] |= PTE_WRITABLE
        return layout.OK
    fresh = take_frame(world, wished_node(world, vma))
    if fresh == 0:
        return layout.NO_MEMORY
    if flags & (PTE_PRESENT | PTE_SWAPPED):
        copy_content(world, fresh, world.ptes[pte]["pfn"])
        unmap_page(world, pte)
    else:
        world.contents[fresh]["hi"] = 0
        world.contents[fresh]["lo"] = 0
        if flags & PTE_ZERO:
            drop_zero(world, world.vmas[vma]["mm"], pte)
    map_page(world, pte, fresh, PTE_PRESENT | PTE_WRITABLE)
    return layout.OK


@jit
def write_page(world: World, mm: int, vpn: int, hi: np.uint64, lo: np.uint64) -> int:
    """Write content (hi, lo) to a page of a process; SAME if it held just that and stayed where it is."""
    vma = find_vma(world, mm, vpn)
    if vma == 0:
        return layout.NO_AREA
    pte = pte_of(world, vma, vpn)
    before = world.ptes[pte]["pfn"]
    status = own_page(world, vma, pte)
    if status < 0:
        return status
    now = world.contents[world.ptes[pte]["pfn"]]
    if before == world.ptes[pte]["pfn"] and now["hi"] == hi and now["lo"] == lo:
        return layout.SAME
    set_content(world, pte, hi, lo)
    return layout.OK


@jit
def set_content(world: World, pte: int, hi: np.uint64, lo: np.uint64) -> None:
    """Put a content into the frame of a page that is the process's own."""
    content = world.contents[world.ptes[pte]["pfn"]]
    content["hi"] = hi
    content["lo"] = lo
    world.ctl[0]["trees_changed"] = 1
    if world.ctl[0]["shadow_on"]:
        world.shadow[pte]["hi"] = hi
        world.shadow[pte]["lo"] = lo


@jit
def touch_page(world: World, mm: int, vpn: int) -> int:
    """Bring a swapped page in, as a read does; return its entry, ABSENT if there is nothing to read, or a status."""
    vma = find_vma(world, mm, vpn)
    if vma == 0:
        return layout.NO_AREA
    pte = pte_of(world, vma, vpn)
    flags = world.ptes[pte]["flags"]
    if flags & PTE_SWAPPED:
        status = own_page(world, vma, pte)
        if status < 0:
            return status
    elif not flags & PTE_PRESENT:
        return layout.ABSENT
    return pte


@jit
def is_merged(world: World, pte: int) -> bool:
    """Tell whether the entry maps a KSM page, or the zero page on the merger's behalf."""
    flags = world.ptes[pte]["flags"]
    if flags & PTE_ZERO:
        return True
    return flags & PTE_PRESENT != 0 and world.frames[world.ptes[pte]["pfn"]]["mapping"] != 0


@jit
def break_page(world: World, vma: int, vpn: int) -> int:
    """Give the process a private copy of a merged page; other pages are left alone."""
    pte = pte_of(world, vma, vpn)
    if not is_merged(world, pte):
        return layout.OK
    old = world.ptes[pte]["pfn"]
    status = own_page(world, vma, pte)
    if status >= 0:
        mm = world.vmas[vma]["mm"]
        write_intent(world, layout.INTENT_BREAK, mm, vpn, old, world.ptes[pte]["pfn"])
    return status


@jit
def spawn(world: World, node: int) -> int:
    """Make an empty process; return its mm or NEED_MMS."""
    mm = take_mm(world)
    if mm == 0:
        return layout.NEED_MMS
    record = world.mms[mm]
    world.ctl[0]["spawned"] += 1
    record["serial"] = world.ctl[0]["spawned"]
    record["next_vpn"] = 16
    record["ksm_rmap_items"] = 0
    record["ksm_merging_pages"] = 0
    record["ksm_zero_pages"] = 0
    record["vma_first"] = 0
    record["rmap_list"] = 0
    record["parent"] = 0
    record["node"] = node
    record["flags"] = layout.MM_LIVE
    return mm


@jit
def map_area(world: World, mm: int, start: int, count: int, node: int, flags: int) -> int:
    """Make an area of `count` pages at `start`, 0 for the next free address; return its first page or a status."""
    record = world.mms[mm]
    if start == 0:
        start = record["next_vpn"]
    merge_any = record["flags"] & layout.MM_MERGE_ANY and not flags & layout.VMA_SHARED
    vma = add_vma(world, mm, start, count, node, flags | (layout.VMA_MERGEABLE if merge_any else 0))
    if vma < 0:
        return vma
    if merge_any:
        ksm_enter(world, mm)
    record["next_vpn"] = start + count + 1
    return start


@jit
def unmap_area(world: World, mm: int, start: int, count: int) -> int:
    """Unmap [start, start + count) of a process; return how many pages of areas that were, or NEED_VMAS."""
    unmapped = 0
    vma = vma_from(world, mm, start)
    while vma and world.vmas[vma]["start"] < start + count:
        vma = cut_vma(world, vma, start, start + count)
        if vma < 0:
            return vma
        area = world.vmas[vma]
        following = area["next"]
        pages = area["end"] - area["start"]
        for index in range(pages):
            zap_pte(world, mm, area["pte_base"] + index)
        drop_vma(world, vma)
        unmapped += pages
        vma = following
    return unmapped


@jit
def exit_mm(world: World, mm: int) -> None:
    """End a process: it is marked exiting, its pages and areas go, and the ring lets go of it or keeps its slot."""
    world.mms[mm]["flags"] = world.mms[mm]["flags"] & ~layout.MM_LIVE | layout.MM_EXITED
    while world.mms[mm]["vma_first"]:
        vma = world.mms[mm]["vma_first"]
        unmap_area(world, mm, world.vmas[vma]["start"], world.vmas[vma]["end"] - world.vmas[vma]["start"])
    ksm_exit(world, mm)


@jit
def copy_entry(world: World, parent_pte: int, child_vma: int, child_pte: int) -> int:
    """Give a forked child one entry of its parent (choices 6)."""
    entry = world.ptes[parent_pte]
    child = world.vmas[child_vma]
    if world.ctl[0]["shadow_on"]:
        world.shadow[child_pte]["hi"] = world.shadow[parent_pte]["hi"]
        world.shadow[child_pte]["lo"] = world.shadow[parent_pte]["lo"]
    flags = entry["flags"]
    if flags & PTE_ZERO:
        map_zero(world, child["mm"], child_pte)
    elif flags & PTE_SWAPPED or (flags and child["flags"] & layout.VMA_SHARED):
        map_page(world, child_pte, entry["pfn"], flags)
    elif flags & PTE_PRESENT:
        if world.frames[entry["pfn"]]["holds"] & layout.HOLD_PINS:
            fresh = take_frame(world, wished_node(world, child_vma))
            if fresh == 0:
                return layout.NO_MEMORY
            copy_content(world, fresh, entry["pfn"])
            map_page(world, child_pte, fresh, PTE_PRESENT | PTE_WRITABLE)
        else:
            entry["flags"] = flags & ~PTE_WRITABLE
            map_page(world, child_pte, entry["pfn"], flags & ~PTE_WRITABLE)
    return layout.OK


@jit
def fork(world: World, parent: int, node: int) -> int:
    """Fork a process onto `node` (-1: its parent's); return the child's mm, or a status that leaves no child."""
    mm = spawn(world, world.mms[parent]["node"] if node < 0 else node)
    if mm < 0:
        return mm
    child = world.mms[mm]
    child["parent"] = parent
    child["next_vpn"] = world.mms[parent]["next_vpn"]
    child["flags"] |= world.mms[parent]["flags"] & layout.MM_MERGE_ANY
    status = layout.OK
    vma = world.mms[parent]["vma_first"]
    while vma and status >= 0:
        area = world.vmas[vma]
        pages = area["end"] - area["start"]
        status = add_vma(world, mm, area["start"], pages, area["node"], area["flags"])
        twin = status
        if status > 0:
            status = layout.OK
            for index in range(pages):
                to = world.vmas[twin]["pte_base"] + index
                status = copy_entry(world, area["pte_base"] + index, twin, to)
                if status < 0:
                    break
        vma = area["next"]
    if status < 0:
        exit_mm(world, mm)
        return status
    world.ctl[0]["bypasses"] += 1
    if world.mms[parent]["flags"] & layout.MM_REGISTERED:
        ksm_enter(world, mm)
    return mm
