"""Own the stable trees: the search that is safe while pages migrate, and insertion (spec section 5).

Why nothing is ever merged onto a page of another node:
1. A content match with T is only a hint: T's page may have moved since it was put into this tree.
2. T's page is locked once. A migration takes the lock too, so either it has finished, and `kpfn` is where the page is now, or
   it has not begun, and will be refused because we hold a reference.
3. Only then is the page's node compared with T's tree. If they differ T goes to migrate_nodes and is not returned.
4. The reference is held until the merge is done, so what was compared stays true.
"""

from __future__ import annotations

from pagefold.core import layout
from pagefold.core.arena import take_stable
from pagefold.core.chain import hang_beside, has_room, pick_dup
from pagefold.core.checkpoint import checkpoint
from pagefold.core.compiler import jit
from pagefold.core.frames import content_key, content_order, get_page, nid_of, put_page, stable_node_of
from pagefold.core.keyhole import detach, get_ksm_page, link_in_tree, replace_in_tree
from pagefold.core.layout import GAP_LOCKED, GAP_MATCH, GAP_STABLE_NODE, World
from pagefold.core.lists import migrate_add
from pagefold.core.migrate import exile

SEARCH_BUSY = -1  # instead of a frame: the matching page is locked by someone else
_AGAIN = -2


@jit
def stable_tree_search(world: World, page: int) -> int:
    """Find the KSM page to merge `page` with: return its frame, referenced (may be `page` itself), 0 or SEARCH_BUSY.

    O(log n) looks through keyholes; begins again whenever one of them was stale (classic: gives up).
    """
    waiting = stable_node_of(world, page)
    if waiting and world.stables[waiting]["place"] != layout.MIGRATING:
        get_page(world, page)  # inherited by fork
        return page
    nid = nid_of(world, page)
    while True:
        answer = _descend(world, page, waiting, nid)
        if answer != _AGAIN:
            return answer


@jit
def _descend(world: World, page: int, waiting: int, nid: int) -> int:
    """Go down the tree once; as `stable_tree_search`, or _AGAIN when the tree may have been rebalanced."""
    classic = world.ctl[0]["rules"] == layout.CLASSIC
    parent = 0
    right = 0
    key = content_key(world, page)
    here = world.nodes[nid]["stable_root"]
    while here:
        checkpoint(world, GAP_STABLE_NODE)
        tree_key = world.stables[here]["key"]
        if not tree_key & layout.KEY_LOOK and tree_key != key:
            # Neither stale nor a chain, and not equal: its key alone says where to go. Touching one record per level and not three
            # is what makes the search twice as fast (benchmarks/engine_scan.py).
            parent = here
            right = 1 if key > tree_key else 0
            here = world.stables[here]["rb_right"] if right else world.stables[here]["rb_left"]
            continue
        place, dup, tree_page = pick_dup(world, here, True)
        if tree_page == 0:
            return 0 if classic else _AGAIN
        order = content_order(world, page, tree_page)
        put_page(world, tree_page)
        if order == 0:
            return _matched(world, page, waiting, place, dup)
        parent = place
        right = 1 if order > 0 else 0
        here = world.stables[place]["rb_right"] if right else world.stables[place]["rb_left"]
    if waiting == 0:
        return 0
    detach(world, waiting)
    link_in_tree(world, waiting, nid, parent, right)
    return _placed(world, page, waiting)


@jit
def _placed(world: World, page: int, node: int) -> int:
    """Return the page of a node that has just found its place, referenced; 0 (mainline) if it has no room, so that the item leaves it."""
    if not has_room(world, node, 0):
        return 0
    get_page(world, page)
    return page


@jit
def stays_apart(world: World, page: int, dup: int) -> bool:
    """Tell whether a waiting KSM page becomes a dup of its equal instead of merging with it.

    Mainline: when several pages map it. There a single one that meets a full dup waits for ever; not so by the pagefold rules.
    """
    rules = world.ctl[0]["rules"]
    shared = rules != layout.CLASSIC and world.frames[page]["mapcount"] > 1
    return shared or (rules == layout.PAGEFOLD and not has_room(world, dup, 0))


@jit
def _matched(world: World, page: int, waiting: int, place: int, dup: int) -> int:
    """Decide at a content match (spec 5.2 to 5.4): as `_descend`."""
    mainline = world.ctl[0]["rules"] != layout.CLASSIC
    if waiting and stays_apart(world, page, dup):
        detach(world, waiting)
        hang_beside(world, place, waiting)
        return _placed(world, page, waiting)
    if not has_room(world, dup, 0):
        return 0
    checkpoint(world, GAP_MATCH)
    tree_page = get_ksm_page(world, dup)
    if tree_page == 0:
        return _AGAIN if waiting or mainline else 0
    if world.frames[tree_page]["holds"] & layout.HOLD_LOCK:
        put_page(world, tree_page)
        return SEARCH_BUSY
    checkpoint(world, GAP_LOCKED)
    if nid_of(world, tree_page) == world.stables[dup]["nid"]:
        return tree_page
    put_page(world, tree_page)
    return _displace(world, page, waiting, place, dup)


@jit
def _displace(world: World, page: int, waiting: int, place: int, dup: int) -> int:
    """Exile misplaced `dup`; `waiting`, if any, takes its place. As `_descend`."""
    if waiting == 0:
        exile(world, dup)
        return 0
    detach(world, waiting)
    if place == dup:
        replace_in_tree(world, dup, waiting)
        migrate_add(world, dup)
    else:
        exile(world, dup)
        hang_beside(world, place, waiting)
    return _placed(world, page, waiting)


@jit
def stable_tree_insert(world: World, kpage: int) -> int:
    """Make a stable node for a new KSM page and put it into the tree of its node; return it, 0 if it may not be.

    The caller asked `has_stables(world, 2)` before the step, so that a chain can be made too.
    """
    nid = nid_of(world, kpage)
    again = True
    parent = 0
    right = 0
    equal = 0
    while again:
        again = False
        parent = 0
        equal = 0
        here = world.nodes[nid]["stable_root"]
        while here and not equal and not again:
            checkpoint(world, GAP_STABLE_NODE)
            place, _, tree_page = pick_dup(world, here, False)
            if tree_page == 0:
                again = True
                continue
            order = content_order(world, kpage, tree_page)
            put_page(world, tree_page)
            parent = place
            if order == 0:
                equal = place
            right = 1 if order > 0 else 0
            here = world.stables[place]["rb_right"] if right else world.stables[place]["rb_left"]
    if equal and world.ctl[0]["rules"] == layout.CLASSIC:
        return 0
    node = take_stable(world)
    entry = world.stables[node]
    entry["kpfn"] = kpage
    entry["hlist"] = 0
    entry["rmap_hlist_len"] = 0
    entry["nid"] = nid
    entry["key"] = content_key(world, kpage)
    world.frames[kpage]["mapping"] = node
    if equal:
        hang_beside(world, equal, node)
    else:
        link_in_tree(world, node, nid, parent, right)
    return node
