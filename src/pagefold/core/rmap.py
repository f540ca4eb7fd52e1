"""Own rmap_items: one per scanned virtual page, a list by address for each mm.

Must not know how trees are searched; taking an item off whatever it hangs on is here, because everyone does it.
"""

from __future__ import annotations

from pagefold.core import layout, rbtree
from pagefold.core.arena import give_rmap, take_rmap
from pagefold.core.compiler import jit
from pagefold.core.frames import put_page
from pagefold.core.keyhole import count_off, get_ksm_page
from pagefold.core.layout import World
from pagefold.core.lists import hlist_add, hlist_remove
from pagefold.core.space import find_vma, is_area_of, pte_of


@jit
def stable_tree_append(world: World, item: int, node: int) -> None:
    """Hang an rmap_item on a stable node: the first counts as shared, every further one as sharing."""
    ctl = world.ctl[0]
    if world.stables[node]["hlist"]:
        ctl["pages_sharing"] += 1
    else:
        ctl["pages_shared"] += 1
    hlist_add(world, node, item)
    world.rmaps[item]["flags"] |= layout.RMAP_STABLE
    world.mms[world.rmaps[item]["mm"]]["ksm_merging_pages"] += 1


@jit
def remove_rmap_item_from_tree(world: World, item: int) -> None:
    """Take an rmap_item off its stable node or its unstable tree, if it is on one."""
    ctl = world.ctl[0]
    entry = world.rmaps[item]
    if entry["flags"] & layout.RMAP_STABLE:
        kpfn = get_ksm_page(world, entry["head"])
        if kpfn == 0:
            return  # the node was stale and has dropped this item with all others
        hlist_remove(world, item)
        count_off(world, item, world.stables[entry["head"]]["hlist"])
        put_page(world, kpfn)
    elif entry["flags"] & layout.RMAP_UNSTABLE:
        # The tree of an earlier scan is gone: there is nothing to erase the item from.
        if entry["seqnr"] == ctl["generation"] & 0xFF:
            tree = world.nodes[entry["nid"]]
            tree["unstable_root"] = rbtree.erase(world.rmaps, tree["unstable_root"], item)
        ctl["pages_unshared"] -= 1
        entry["flags"] &= ~layout.RMAP_UNSTABLE
        entry["head"] = 0


@jit
def free_rmap_item(world: World, item: int) -> None:
    """Free an rmap_item that is off its tree and off its mm's list."""
    world.mms[world.rmaps[item]["mm"]]["ksm_rmap_items"] -= 1
    world.ctl[0]["rmap_items"] -= 1
    give_rmap(world, item)


@jit
def next_in_list(world: World, mm: int, after: int) -> int:
    """Return the mm's rmap_item behind `after` (0: the first)."""
    return world.rmaps[after]["rmap_next"] if after else world.mms[mm]["rmap_list"]


@jit
def link_in_list(world: World, mm: int, after: int, item: int) -> None:
    """Let `item` (or nothing) follow `after` (0: the list's head) in the mm's list."""
    if after:
        world.rmaps[after]["rmap_next"] = item
    else:
        world.mms[mm]["rmap_list"] = item


@jit
def drop_next(world: World, mm: int, after: int, item: int) -> None:
    """Take `item`, which follows `after`, off its tree and its list, and free it."""
    following = world.rmaps[item]["rmap_next"]
    remove_rmap_item_from_tree(world, item)
    link_in_list(world, mm, after, following)
    free_rmap_item(world, item)


@jit
def remove_trailing_rmap_items(world: World, mm: int, after: int) -> None:
    """Drop every rmap_item of the mm behind `after` (0: all of them)."""
    item = next_in_list(world, mm, after)
    while item:
        drop_next(world, mm, after, item)
        item = next_in_list(world, mm, after)


@jit
def get_next_rmap_item(world: World, mm: int, after: int, vpn: int) -> int:
    """Get or make the mm's rmap_item for `vpn`, dropping those passed on the way; 0 if the array must grow."""
    item = next_in_list(world, mm, after)
    while item and world.rmaps[item]["vpn"] < vpn:
        drop_next(world, mm, after, item)
        item = next_in_list(world, mm, after)
    if item and world.rmaps[item]["vpn"] == vpn:
        return item
    fresh = take_rmap(world)
    if fresh == 0:
        return 0
    entry = world.rmaps[fresh]
    entry["vpn"] = vpn
    entry["mm"] = mm
    entry["vma"] = 0
    entry["flags"] = 0
    entry["age"] = 0
    entry["remaining_skips"] = 0
    entry["head"] = 0
    entry["rmap_next"] = item
    link_in_list(world, mm, after, fresh)
    world.mms[mm]["ksm_rmap_items"] += 1
    world.ctl[0]["rmap_items"] += 1
    return fresh


@jit
def find_mergeable_vma(world: World, item: int) -> int:
    """Return the area of an rmap_item's page, 0 if its mm is exiting or the area is gone or not MERGEABLE."""
    entry = world.rmaps[item]
    if not world.mms[entry["mm"]]["flags"] & layout.MM_LIVE:
        return 0
    vma = entry["vma"]
    if not is_area_of(world, vma, entry["mm"], entry["vpn"]):
        vma = find_vma(world, entry["mm"], entry["vpn"])
        entry["vma"] = vma
    if vma == 0 or not world.vmas[vma]["flags"] & layout.VMA_MERGEABLE:
        return 0
    return vma


@jit
def mergeable_pte(world: World, item: int) -> int:
    """Return the page-table entry of an rmap_item whose page is present in a MERGEABLE area, else 0."""
    vma = find_mergeable_vma(world, item)
    if vma == 0:
        return 0
    pte = pte_of(world, vma, world.rmaps[item]["vpn"])
    return pte if world.ptes[pte]["flags"] & layout.PTE_PRESENT else 0
