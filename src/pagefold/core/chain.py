"""Own chains: tree nodes that stand for one content and hold several stable nodes (dups) of it (mainline rules).

A chain exists because one KSM page may have at most `max_page_sharing` mappings, which bounds the work of whoever must
walk all mappings of a page. Choices 18 says which dup is taken.
"""

from __future__ import annotations

from pagefold.core import layout
from pagefold.core.arena import give_stable, take_stable
from pagefold.core.compiler import jit
from pagefold.core.frames import put_page
from pagefold.core.keyhole import free_chain, get_ksm_page, replace_in_tree
from pagefold.core.layout import World
from pagefold.core.lists import dup_add, dup_remove

_TIME_MASK = 0x7FFFFFFF  # chain_prune_time keeps the low 31 bits of a time in ms; differences are taken modulo that


@jit
def has_room(world: World, node: int, more: int) -> bool:
    """Tell whether a KSM page has at least one mapping and can take one more besides `more` (0 or 1) others."""
    if world.ctl[0]["rules"] == layout.CLASSIC:
        return True
    length = world.stables[node]["rmap_hlist_len"]
    return length > 0 and length + more < world.ctl[0]["max_page_sharing"]


@jit
def make_chain(world: World, node: int) -> int:
    """Put a new chain in the place of a plain tree node, which becomes its first dup; return the chain.

    The caller asked `has_stables` before.
    """
    ctl = world.ctl[0]
    chain = take_stable(world)
    replace_in_tree(world, node, chain)
    entry = world.stables[chain]
    entry["place"] = layout.CHAIN
    entry["hlist"] = 0
    entry["key"] = layout.KEY_LOOK  # walking past a chain prunes it
    entry["chain_prune_time"] = ctl["now"] & _TIME_MASK
    ctl["stable_node_chains"] += 1
    add_dup(world, chain, node)
    return chain


@jit
def add_dup(world: World, chain: int, node: int) -> None:
    """Hang a stable node on a chain."""
    dup_add(world, chain, node)
    world.stables[node]["nid"] = world.stables[chain]["nid"]
    world.ctl[0]["stable_node_dups"] += 1


@jit
def hang_beside(world: World, place: int, node: int) -> None:
    """Hang a stable node beside the one content at `place`, a chain or a plain tree node that becomes one."""
    add_dup(world, place if world.stables[place]["place"] == layout.CHAIN else make_chain(world, place), node)


@jit
def prune_is_due(world: World, chain: int) -> bool:
    """Tell whether the prune time of a chain has passed."""
    ctl = world.ctl[0]
    passed = (ctl["now"] - world.stables[chain]["chain_prune_time"]) & _TIME_MASK
    return passed >= ctl["chains_prune_millisecs"]


@jit
def pick_dup(world: World, place: int, may_prune: bool) -> tuple[int, int, int]:
    """Find the stable node to use at a tree node: return (what is at that place now, dup, its frame referenced).

    Frame 0: what was there was stale or empty and is gone, and the tree may have been rebalanced.
    """
    if world.stables[place]["place"] != layout.CHAIN:
        return place, place, get_ksm_page(world, place)
    walk_all = may_prune and prune_is_due(world, place)
    if walk_all:
        world.stables[place]["chain_prune_time"] = world.ctl[0]["now"] & _TIME_MASK
    held = 0
    held_page = 0
    dup = world.stables[place]["hlist"]
    while dup:
        following = world.stables[dup]["list_next"]
        page = get_ksm_page(world, dup)
        if page:
            if held == 0 or _is_better(world, dup, held):
                if held:
                    put_page(world, held_page)
                held = dup
                held_page = page
                if not walk_all and has_room(world, held, 0):
                    break
            else:
                put_page(world, page)
        dup = following
    if held == 0:
        free_chain(world, place)
        return 0, 0, 0
    return _tidy(world, place, held), held, held_page


@jit
def _is_better(world: World, dup: int, held: int) -> bool:
    """Tell whether `dup` is to be held instead: it has room, and the held one has none or a shorter list."""
    if not has_room(world, dup, 0):
        return False
    if not has_room(world, held, 0):
        return True
    return world.stables[dup]["rmap_hlist_len"] > world.stables[held]["rmap_hlist_len"]


@jit
def _tidy(world: World, chain: int, held: int) -> int:
    """Collapse a chain of one, or bring a dup with room for two to the front; return what is in the tree now."""
    ctl = world.ctl[0]
    first = world.stables[chain]["hlist"]
    if first == held and world.stables[held]["list_next"] == 0:
        dup_remove(world, held)
        replace_in_tree(world, chain, held)
        give_stable(world, chain)
        ctl["stable_node_chains"] -= 1
        ctl["stable_node_dups"] -= 1
        return held
    if first != held and has_room(world, held, 1):
        dup_remove(world, held)
        dup_add(world, chain, held)
    return chain
