"""Own the scan: the cursor, smart scan, and what is done with each page (spec sections 3 and 4)."""

from __future__ import annotations

import numpy as np

from pagefold.core import layout
from pagefold.core.arena import has_stables
from pagefold.core.checkpoint import checkpoint
from pagefold.core.compiler import entry, jit
from pagefold.core.frames import INTENTS_PER_PAGE, get_page, journal_room, put_page, stable_node_of, swap_nid
from pagefold.core.layout import GAP_MERGED, GAP_PAGE_CHOSEN, GAP_SEARCHED, World
from pagefold.core.merge import (
    ZERO_PAGE,
    break_cow,
    is_zero,
    try_to_merge_item,
    try_to_merge_two_pages,
    try_to_merge_with_ksm_page,
)
from pagefold.core.migrate import exile, is_misplaced, prune_all, prune_migrate_nodes
from pagefold.core.ring import leave_ring
from pagefold.core.rmap import (
    find_mergeable_vma,
    get_next_rmap_item,
    remove_rmap_item_from_tree,
    remove_trailing_rmap_items,
    stable_tree_append,
)
from pagefold.core.space import is_area_of, pte_of, vma_from
from pagefold.core.stable import SEARCH_BUSY, stable_tree_insert, stable_tree_search
from pagefold.core.unstable import unstable_tree_search_insert
from pagefold.core.warm import warm

_SHIFT = np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


@jit
def checksum_of(world: World, page: int) -> np.uint32:
    """Return 32 bits of the content, for the calm test; different for any two contents below 2**32."""
    mixed = world.contents[page]["hi"] ^ world.contents[page]["lo"]
    return np.uint32((mixed ^ (mixed >> _SHIFT)) & _LOW)


@jit
def skip_age(age: int) -> int:
    """Return how many scans a page of this age is left alone for (spec section 3)."""
    if age <= 3:
        return 1
    if age <= 5:
        return 2
    return 4 if age <= 8 else 8


@jit
def should_skip(world: World, item: int, page: int) -> bool:
    """Apply smart scan: tell whether this page is left alone this time, and if so take its item off its tree."""
    ctl = world.ctl[0]
    if not ctl["smart_scan"] or world.frames[page]["mapping"]:
        return False
    record = world.rmaps[item]
    age = record["age"]
    if age != 255:
        record["age"] = age + 1
    if age < 3:
        return False
    if record["remaining_skips"] == 0:
        record["remaining_skips"] = skip_age(age)
        return False
    ctl["pages_skipped"] += 1
    record["remaining_skips"] -= 1
    remove_rmap_item_from_tree(world, item)
    return True


@jit
def stand_on(world: World, mm: int) -> None:
    """Move the cursor to the beginning of an mm (0: the ring's head)."""
    ctl = world.ctl[0]
    ctl["cursor_mm"] = mm
    ctl["cursor_vpn"] = 0
    ctl["cursor_rmap"] = 0
    ctl["cursor_vma"] = 0
    ctl["warm_until"] = 0


@jit
def begin_full_scan(world: World) -> None:
    """Prune migrate_nodes, forget the unstable trees, and stand on the first mm.

    Trees are numbered by a count of their own and not by full_scans, which does not change when unmerging gives up half-way
    for lack of memory: items of the abandoned scan would be taken for members of the new, empty trees.
    """
    if world.ctl[0]["rules"] == layout.PAGEFOLD:
        prune_all(world)
    elif not world.ctl[0]["merge_across_nodes"]:
        prune_migrate_nodes(world)
    for nid in range(swap_nid(world)):
        world.nodes[nid]["unstable_root"] = 0
    world.ctl[0]["generation"] += 1
    world.ctl[0]["trees_changed"] = 0
    stand_on(world, world.mms[0]["ring_next"])


@jit
def next_in_mm(world: World, mm: int) -> int:
    """Find the next page of the mm to look at: return its rmap_item, 0 at the end, or NEED_RMAPS.

    The page is ctl.scan_page, referenced.
    """
    ctl = world.ctl[0]
    if not world.mms[mm]["flags"] & layout.MM_LIVE:
        stand_on(world, mm)
        return 0
    vma = ctl["cursor_vma"]
    if not is_area_of(world, vma, mm, ctl["cursor_vpn"]):
        vma = vma_from(world, mm, ctl["cursor_vpn"])
    while vma:
        area = world.vmas[vma]
        if area["flags"] & layout.VMA_MERGEABLE:
            ctl["cursor_vma"] = vma
            ctl["cursor_vpn"] = max(ctl["cursor_vpn"], area["start"])
            item = next_in_vma(world, mm, vma)
            if item:
                return item
        vma = area["next"]
    return 0


@jit
def next_in_vma(world: World, mm: int, vma: int) -> int:
    """As `next_in_mm`, for the rest of one MERGEABLE area."""
    ctl = world.ctl[0]
    area = world.vmas[vma]
    while ctl["cursor_vpn"] < area["end"]:
        if ctl["cursor_vpn"] >= ctl["warm_until"]:
            warm(world, vma)
        pte = pte_of(world, vma, ctl["cursor_vpn"])
        if not world.ptes[pte]["flags"] & layout.PTE_PRESENT:
            ctl["cursor_vpn"] += 1
            continue
        # Items passed on the way look through keyholes, where others may act: the page is referenced and the area held first.
        page = world.ptes[pte]["pfn"]
        get_page(world, page)
        world.mms[mm]["flags"] |= layout.MM_LOCKED
        item = get_next_rmap_item(world, mm, ctl["cursor_rmap"], ctl["cursor_vpn"])
        skipped = False
        if item:
            ctl["cursor_rmap"] = item
            ctl["cursor_vpn"] += 1
            world.rmaps[item]["vma"] = vma
            skipped = should_skip(world, item, page)
        world.mms[mm]["flags"] &= ~layout.MM_LOCKED
        if item and not skipped:
            ctl["scan_page"] = page
            return item
        put_page(world, page)
        if item == 0:
            return layout.NEED_RMAPS
    return 0


@jit
def leave_mm(world: World) -> None:
    """End the mm under the cursor: drop what is left of its items, let it leave the ring if it has no area, go on.

    Its mmap lock is held until it has left: items look through keyholes, and it must not be advised MERGEABLE meanwhile.
    """
    ctl = world.ctl[0]
    mm = ctl["cursor_mm"]
    world.mms[mm]["flags"] |= layout.MM_LOCKED
    remove_trailing_rmap_items(world, mm, ctl["cursor_rmap"])
    world.mms[mm]["flags"] &= ~layout.MM_LOCKED
    leaves = ctl["cursor_vpn"] == 0
    stand_on(world, world.mms[mm]["ring_next"])
    if leaves:
        leave_ring(world, mm)


@jit
def scan_get_next_rmap_item(world: World) -> int:
    """Find the next page of the ring: as `next_in_mm`; 0 also means that a full scan ended, or that the ring is empty."""
    ctl = world.ctl[0]
    if world.mms[0]["ring_next"] == 0:
        if world.ctl[0]["rules"] == layout.PAGEFOLD:
            prune_all(world)
        return 0
    if ctl["cursor_mm"] == 0:
        begin_full_scan(world)
    while ctl["cursor_mm"]:
        item = next_in_mm(world, ctl["cursor_mm"])
        if item:
            return item
        leave_mm(world)
    ctl["full_scans"] += 1
    return 0


@jit
def is_calm(world: World, item: int, page: int) -> bool:
    """Tell whether the page is as it was at the last look, and remember how it is now."""
    record = world.rmaps[item]
    checksum = checksum_of(world, page)
    if record["flags"] & layout.RMAP_CALM_KNOWN and record["oldchecksum"] == checksum:
        return True
    record["oldchecksum"] = checksum
    record["flags"] |= layout.RMAP_CALM_KNOWN
    return False


@jit
def goes_to_zero_page(world: World, item: int, page: int) -> bool:
    """Try to map the zero page instead of a page of zeroes; True if nothing is left to do with this page."""
    if not world.ctl[0]["use_zero_pages"] or not is_zero(world, page):
        return False
    return find_mergeable_vma(world, item) == 0 or try_to_merge_item(world, item, page, ZERO_PAGE)


@jit
def cmp_and_merge_page(world: World, item: int, page: int) -> None:
    """Do with one page what spec section 4 says; we hold a reference on it."""
    mainline = world.ctl[0]["rules"] != layout.CLASSIC
    record = world.rmaps[item]
    checkpoint(world, GAP_PAGE_CHOSEN)
    node = stable_node_of(world, page)
    if node:
        if is_misplaced(world, node):
            exile(world, node)
        hangs_here = record["flags"] & layout.RMAP_STABLE and record["head"] == node
        if hangs_here and world.stables[node]["place"] != layout.MIGRATING:
            return
    elif mainline:
        remove_rmap_item_from_tree(world, item)
        if not is_calm(world, item, page) or goes_to_zero_page(world, item, page):
            return
    kpage = stable_tree_search(world, page)
    hangs_here = node and record["flags"] & layout.RMAP_STABLE and record["head"] == node
    if kpage == page and hangs_here:
        put_page(world, kpage)
        return
    remove_rmap_item_from_tree(world, item)
    if kpage == SEARCH_BUSY:
        return
    checkpoint(world, GAP_SEARCHED)
    if kpage:
        if try_to_merge_with_ksm_page(world, item, page, kpage):
            checkpoint(world, GAP_MERGED)
            stable_tree_append(world, item, stable_node_of(world, kpage))
        put_page(world, kpage)
        return
    if node or mainline or is_calm(world, item, page):
        merge_with_unstable(world, item, page)


@jit
def merge_with_unstable(world: World, item: int, page: int) -> None:
    """Look for a partner among the calm pages and merge the two into a new KSM page (spec 4.5)."""
    tree_item, tree_page = unstable_tree_search_insert(world, item, page)
    if tree_item == 0:
        return
    checkpoint(world, GAP_SEARCHED)
    merged = try_to_merge_two_pages(world, item, page, tree_item, tree_page)
    put_page(world, tree_page)
    if not merged:
        return
    checkpoint(world, GAP_MERGED)
    node = stable_tree_insert(world, page)
    if node:
        stable_tree_append(world, tree_item, node)
        stable_tree_append(world, item, node)
    else:
        break_cow(world, tree_item)
        break_cow(world, item)


@jit
def scan_page(world: World) -> int:
    """Look at the next page: return its rmap_item, 0 if the full scan ended (or the ring is empty), or NEED_*."""
    ctl = world.ctl[0]
    if not has_stables(world, 2):
        return layout.NEED_STABLES
    if not journal_room(world, INTENTS_PER_PAGE):
        return layout.NEED_JOURNAL
    item = scan_get_next_rmap_item(world)
    if item > 0:
        page = ctl["scan_page"]
        cmp_and_merge_page(world, item, page)
        put_page(world, page)
        ctl["pages_scanned"] += 1
    return item


@entry
def scan(world: World, pages: int) -> int:
    """Look at up to `pages` pages; return OK (budget used, full scan ended, or ring empty) or NEED_*.

    After NEED_* grow and call again with what is left of the budget: ctl.pages_scanned tells.
    """
    for _ in range(pages):
        item = scan_page(world)
        if item <= 0:
            return item
    return layout.OK
