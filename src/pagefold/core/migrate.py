"""Own `migrate_nodes`: stable nodes whose page was found on another node than their tree.

Why nothing is lost while a node waits here: no search walks this list, so nothing is merged onto its page; its mappings
stay, and the scan finds the node again through any of them. Why it must be pruned: a node whose last mapping went
while it waited would be met by nobody, ever (spec section 7, question 3).
"""

from __future__ import annotations

from pagefold.core import layout, rbtree
from pagefold.core.compiler import jit
from pagefold.core.frames import nid_of, put_page, swap_nid
from pagefold.core.keyhole import detach, free_chain, get_ksm_page
from pagefold.core.layout import World
from pagefold.core.lists import migrate_add


@jit
def is_misplaced(world: World, node: int) -> bool:
    """Tell whether a placed stable node's page lives on another node than its tree."""
    entry = world.stables[node]
    return entry["place"] != layout.MIGRATING and nid_of(world, entry["kpfn"]) != entry["nid"]


@jit
def exile(world: World, node: int) -> None:
    """Take a misplaced node out of its tree or chain and put it on migrate_nodes."""
    detach(world, node)
    migrate_add(world, node)


@jit
def look_once(world: World, node: int) -> None:
    """Look through one keyhole, so that the node goes if it is stale."""
    page = get_ksm_page(world, node)
    if page:
        put_page(world, page)


@jit
def prune_migrate_nodes(world: World) -> None:
    """Look once through the keyhole of every waiting node, so that stale ones go."""
    node = world.ctl[0]["migrate_head"]
    while node:
        following = world.stables[node]["list_next"]
        look_once(world, node)
        node = following


@jit
def prune_all(world: World) -> None:
    """As `prune_migrate_nodes`, for the nodes in trees and chains too, and free chains that are empty (pagefold rules).

    A node whose rmap_items have all left it, for another page or with their processes, is otherwise met only by a search that
    happens to walk past it; and an empty chain likewise.
    """
    for nid in range(swap_nid(world)):
        root = world.nodes[nid]["stable_root"]
        place = rbtree.first_below(world.stables, root) if root else 0
        while place:
            following = rbtree.following(world.stables, place)  # what goes leaves all others where they are in order
            if world.stables[place]["place"] == layout.CHAIN:
                dup = world.stables[place]["hlist"]
                while dup:
                    next_dup = world.stables[dup]["list_next"]
                    look_once(world, dup)
                    dup = next_dup
                if world.stables[place]["hlist"] == 0:
                    free_chain(world, place)
            else:
                look_once(world, place)
            place = following
    prune_migrate_nodes(world)
