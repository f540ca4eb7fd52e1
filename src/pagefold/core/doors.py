"""Own the functions that Python calls (with `scan.scan` and `invariants.check`): few, because each is compiled whole."""

from __future__ import annotations

from pagefold.core import layout
from pagefold.core.compiler import entry, jit
from pagefold.core.events import apply_event
from pagefold.core.frames import map_page, take_frame
from pagefold.core.layout import Records, World
from pagefold.core.memory import own_page, set_content
from pagefold.core.space import find_vma, is_area_of, pte_of, wished_node
from pagefold.core.unmerge import (
    set_max_page_sharing,
    set_merge_across_nodes,
    take_offline,
    unmerge_and_remove_all_rmap_items,
)

UNMERGE_ALL = 1
TAKE_OFFLINE = 2  # node
SET_MERGE_ACROSS_NODES = 3  # value
SET_MAX_PAGE_SHARING = 4  # value


@entry
def execute(world: World, code: int, a: int, b: int, c: int, d: int) -> int:
    """Apply one event of `events.py`; return what it made or a status."""
    return apply_event(world, code, a, b, c, d)


@jit
def apply_control(world: World, code: int, a: int) -> int:
    """As `control`."""
    if code == UNMERGE_ALL:
        return unmerge_and_remove_all_rmap_items(world)
    if code == TAKE_OFFLINE:
        return take_offline(world, a)
    if code == SET_MERGE_ACROSS_NODES:
        return set_merge_across_nodes(world, a)
    return set_max_page_sharing(world, a)


@entry
def control(world: World, code: int, a: int) -> int:
    """Do one of the merger's own big changes (the constants above); a status."""
    return apply_control(world, code, a)


@entry
def load(world: World, mm: int, vpn: int, contents: Records, nids: Records) -> int:
    """Fill neighbouring pages from `vpn`, one area, with given contents on given nodes (-1: the area's wish).

    Absent pages get a fresh frame; others are written. Return how many were filled, or a status if the first could not be.
    """
    vma = find_vma(world, mm, vpn)
    if vma == 0 or vpn + len(contents) > world.vmas[vma]["end"]:
        return layout.NO_AREA
    for index in range(len(contents)):
        pte = pte_of(world, vma, vpn + index)
        if world.ptes[pte]["flags"] == 0:
            pfn = take_frame(world, wished_node(world, vma) if nids[index] < 0 else nids[index])
            if pfn:
                map_page(world, pte, pfn, layout.PTE_PRESENT | layout.PTE_WRITABLE)
        elif own_page(world, vma, pte) < 0:
            pfn = 0
        else:
            pfn = world.ptes[pte]["pfn"]
        if pfn == 0:
            return index if index else layout.NO_MEMORY
        set_content(world, pte, contents[index]["hi"], contents[index]["lo"])
    return len(contents)


@entry
def share(world: World, mm: int, vpn: int, other_mm: int, other_vpn: int) -> int:
    """Let an absent page map the frame of another process's page, as a fork long ago would have; a status."""
    vma = find_vma(world, mm, vpn)
    other = find_vma(world, other_mm, other_vpn)
    if vma == 0 or other == 0:
        return layout.NO_AREA
    pte = pte_of(world, vma, vpn)
    source = pte_of(world, other, other_vpn)
    if world.ptes[pte]["flags"] or not world.ptes[source]["flags"] & layout.PTE_PRESENT:
        return layout.ABSENT
    world.ptes[source]["flags"] &= ~layout.PTE_WRITABLE
    world.ctl[0]["bypasses"] += 1
    map_page(world, pte, world.ptes[source]["pfn"], layout.PTE_PRESENT)
    if world.ctl[0]["shadow_on"]:
        world.shadow[pte]["hi"] = world.shadow[source]["hi"]
        world.shadow[pte]["lo"] = world.shadow[source]["lo"]
    return layout.OK


@entry
def update(world: World, mm: int, vpns: Records, contents: Records, nids: Records) -> int:
    """Let pages of an mm, by ascending number, hold what their process wrote to them; a page that holds it already is not touched.

    Return how many were looked at before one could not be had (no area, or no frame: grow and go on from there).
    """
    vma = 0
    for index in range(len(vpns)):
        vpn = vpns[index]
        if not is_area_of(world, vma, mm, vpn):
            vma = find_vma(world, mm, vpn)
            if vma == 0:
                return index
        pte = pte_of(world, vma, vpn)
        flags = world.ptes[pte]["flags"]
        if flags & layout.PTE_PRESENT:
            held = world.contents[world.ptes[pte]["pfn"]]
            if held["hi"] == contents[index]["hi"] and held["lo"] == contents[index]["lo"]:
                continue
        if flags == 0:
            pfn = take_frame(world, wished_node(world, vma) if nids[index] < 0 else nids[index])
            if pfn == 0:
                return index
            map_page(world, pte, pfn, layout.PTE_PRESENT | layout.PTE_WRITABLE)
        elif own_page(world, vma, pte) < 0:
            return index
        set_content(world, pte, contents[index]["hi"], contents[index]["lo"])
    return len(vpns)


@entry
def refuse(world: World, mm: int, vpns: Records) -> int:
    """Undo the merge of pages of an mm, by ascending number, as writes would; return how many until no frame was left."""
    item = world.mms[mm]["rmap_list"]
    vma = 0
    for index in range(len(vpns)):
        vpn = vpns[index]
        if not is_area_of(world, vma, mm, vpn):
            vma = find_vma(world, mm, vpn)
            if vma == 0:
                continue
        if own_page(world, vma, pte_of(world, vma, vpn)) < 0:
            return index
        while item and world.rmaps[item]["vpn"] < vpn:
            item = world.rmaps[item]["rmap_next"]
        if item and world.rmaps[item]["vpn"] == vpn:
            world.rmaps[item]["flags"] &= ~layout.RMAP_CALM_KNOWN
    return len(vpns)
