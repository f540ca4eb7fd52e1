"""Own what takes merging apart as a whole: `run` = 2, the knobs that need an empty forest, memory offline."""

from __future__ import annotations

from pagefold.core import layout, rbtree
from pagefold.core.advice import unmerge_range
from pagefold.core.compiler import jit
from pagefold.core.frames import forget_stable_node, put_page, swap_nid
from pagefold.core.keyhole import free_chain, get_ksm_page, remove_node_from_stable_tree
from pagefold.core.layout import World
from pagefold.core.migration import empty_node
from pagefold.core.ring import leave_ring
from pagefold.core.rmap import remove_trailing_rmap_items
from pagefold.core.scan import stand_on


@jit
def remove_stable_node(world: World, node: int) -> int:
    """Remove a stable node whose page nobody maps; BUSY while it is mapped."""
    page = get_ksm_page(world, node)
    if page == 0:
        return layout.OK  # it was stale and is gone
    status = layout.BUSY
    if world.frames[page]["mapcount"] == 0:
        forget_stable_node(world, page)
        remove_node_from_stable_tree(world, node)
        status = layout.OK
    put_page(world, page)
    return status


@jit
def remove_tree_place(world: World, place: int) -> int:
    """Remove a plain node, or a chain with all its dups; BUSY as soon as one is mapped."""
    if world.stables[place]["place"] != layout.CHAIN:
        return remove_stable_node(world, place)
    while world.stables[place]["hlist"]:
        status = remove_stable_node(world, world.stables[place]["hlist"])
        if status < 0:
            return status
    free_chain(world, place)
    return layout.OK


@jit
def remove_all_stable_nodes(world: World) -> int:
    """Remove all stable nodes, those on migrate_nodes too; BUSY if any is still mapped."""
    result = layout.OK
    for nid in range(swap_nid(world)):
        while world.nodes[nid]["stable_root"]:
            if remove_tree_place(world, world.nodes[nid]["stable_root"]) < 0:
                result = layout.BUSY
                break
    node = world.ctl[0]["migrate_head"]
    while node:
        following = world.stables[node]["list_next"]
        if remove_stable_node(world, node) < 0:
            result = layout.BUSY
        node = following
    return result


@jit
def empty_forest(world: World) -> int:
    """Remove all stable nodes, so that a knob may change by which they were placed; BUSY if anything is merged or mapped."""
    return layout.BUSY if world.ctl[0]["pages_shared"] else remove_all_stable_nodes(world)


@jit
def set_merge_across_nodes(world: World, value: int) -> int:
    """Change which trees there are; BUSY changes nothing."""
    status = empty_forest(world)
    if status >= 0:
        world.ctl[0]["merge_across_nodes"] = value
    return status


@jit
def set_max_page_sharing(world: World, value: int) -> int:
    """Change how many may share a page; BUSY changes nothing."""
    status = empty_forest(world)
    if status >= 0:
        world.ctl[0]["max_page_sharing"] = value
    return status


@jit
def unmerge_and_remove_all_rmap_items(world: World) -> int:
    """Undo all merging (`run` = 2, choices 23); NO_MEMORY or NEED_JOURNAL leave the rest merged."""
    stand_on(world, 0)
    mm = world.mms[0]["ring_next"]
    while mm:
        following = world.mms[mm]["ring_next"]
        live = world.mms[mm]["flags"] & layout.MM_LIVE
        if live:
            status = unmerge_range(world, mm, 0, world.mms[mm]["next_vpn"])
            if status < 0:
                return status
        remove_trailing_rmap_items(world, mm, 0)
        if not live:
            leave_ring(world, mm)
        mm = following
    remove_all_stable_nodes(world)
    world.ctl[0]["full_scans"] = 0
    return layout.OK


@jit
def lies_on(world: World, node: int, nid: int) -> bool:
    """Tell whether a stable node's frame number lies in the memory of node `nid`."""
    return world.frames[world.stables[node]["kpfn"]]["nid"] == nid


@jit
def forget_place(world: World, place: int, nid: int) -> None:
    """Remove what at one tree place lies in offline memory, and a chain that is empty then."""
    if world.stables[place]["place"] != layout.CHAIN:
        if lies_on(world, place, nid):
            remove_node_from_stable_tree(world, place)
        return
    dup = world.stables[place]["hlist"]
    while dup:
        following = world.stables[dup]["list_next"]
        if lies_on(world, dup, nid):
            remove_node_from_stable_tree(world, dup)
        dup = following
    if world.stables[place]["hlist"] == 0:
        free_chain(world, place)


@jit
def forget_offline_nodes(world: World, nid: int) -> None:
    """Remove every stable node whose frame went offline, without touching the frame: trees, chains, migrate_nodes."""
    for tree in range(swap_nid(world)):
        place = 0
        if world.nodes[tree]["stable_root"]:
            place = rbtree.first_below(world.stables, world.nodes[tree]["stable_root"])
        while place:
            following = rbtree.following(
                world.stables, place
            )  # erasing a node leaves all others where they are in order
            forget_place(world, place, nid)
            place = following
    node = world.ctl[0]["migrate_head"]
    while node:
        following = world.stables[node]["list_next"]
        if lies_on(world, node, nid):
            remove_node_from_stable_tree(world, node)
        node = following


@jit
def take_offline(world: World, nid: int) -> int:
    """Empty a node that is no longer allocated from and forget its stable nodes; a status if it cannot be emptied."""
    status = empty_node(world, nid)
    if status >= 0:
        forget_offline_nodes(world, nid)
    return status
