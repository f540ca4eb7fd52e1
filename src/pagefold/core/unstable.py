"""Own the unstable trees: calm pages that have no equal yet, forgotten at the start of every full scan.

Why a tree may be trusted though its pages change under it (spec section 6): it lives for one scan; only calm pages enter; it is
balanced by colour, so a wrong order cannot unbalance it; and a wrong turn costs a match, never data, because the bytes are
compared again under write protection. A page that moved to another node needs no repair: it is put where it belongs next time.
"""

from __future__ import annotations

from pagefold.core import layout, rbtree
from pagefold.core.checkpoint import checkpoint
from pagefold.core.compiler import jit
from pagefold.core.frames import content_key, content_order, get_page, nid_of
from pagefold.core.layout import GAP_UNSTABLE_NODE, World
from pagefold.core.rmap import mergeable_pte


@jit
def unstable_tree_search_insert(world: World, item: int, page: int) -> tuple[int, int]:
    """Find a partner for a calm page: return (rmap_item, its frame referenced), or insert the page and return zeros."""
    ctl = world.ctl[0]
    nid = nid_of(world, page)
    tree = world.nodes[nid]
    parent = 0
    right = 0
    key = content_key(world, page)
    here = tree["unstable_root"]
    while here:
        checkpoint(world, GAP_UNSTABLE_NODE)
        tree_key = world.rmaps[here]["key"]
        if tree_key != key and not ctl["trees_changed"]:
            # Since this scan began no page was written or went: what was noted at insertion is still what a look would find.
            parent = here
            right = 1 if key > tree_key else 0
            here = world.rmaps[here]["rb_right"] if right else world.rmaps[here]["rb_left"]
            continue
        pte = mergeable_pte(world, here)
        if pte == 0:
            return 0, 0
        tree_page = world.ptes[pte]["pfn"]
        if tree_page == page:  # inherited by fork
            return 0, 0
        order = content_order(world, page, tree_page)
        if order == 0:
            if nid_of(world, tree_page) != nid:
                return 0, 0
            get_page(world, tree_page)
            return here, tree_page
        parent = here
        right = 1 if order > 0 else 0
        here = world.rmaps[here]["rb_right"] if right else world.rmaps[here]["rb_left"]
    entry = world.rmaps[item]
    entry["flags"] |= layout.RMAP_UNSTABLE
    entry["seqnr"] = ctl["generation"] & 0xFF
    entry["nid"] = nid
    entry["key"] = key
    tree["unstable_root"] = rbtree.insert(world.rmaps, tree["unstable_root"], parent, right, item)
    ctl["pages_unshared"] += 1
    return 0, 0
