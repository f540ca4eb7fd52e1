"""Own `migrate_nodes`: stable nodes whose page was found on another node than their tree.

Why nothing is lost while a node waits here: no search walks this list, so nothing is merged onto its page; its mappings
stay, and the scan finds the node again through any of them. Why it must be pruned: a node whose last mapping went
while it waited would be met by nobody, ever (spec section 7, question 3).
"""

from __future__ import annotations

from pagefold.core import layout
from pagefold.core.compiler import jit
from pagefold.core.frames import nid_of, put_page
from pagefold.core.keyhole import detach, get_ksm_page
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
def prune_migrate_nodes(world: World) -> None:
    """Look once through the keyhole of every waiting node, so that stale ones go."""
    node = world.ctl[0]["migrate_head"]
    while node:
        following = world.stables[node]["list_next"]
        page = get_ksm_page(world, node)
        if page:
            put_page(world, page)
        node = following
