"""Own the three kinds of list a stable node takes part in, as bare links.

`hlist`: the rmap_items of a stable node. `dups`: the stable nodes of a chain. `migrate_nodes`: those waiting for a
place. Must not know counters or rules: callers count.
"""

from __future__ import annotations

from pagefold.core import layout
from pagefold.core.compiler import jit
from pagefold.core.layout import World


@jit
def hlist_add(world: World, node: int, item: int) -> None:
    """Put an rmap_item at the front of a stable node's list."""
    first = world.stables[node]["hlist"]
    world.rmaps[item]["hlist_next"] = first
    world.rmaps[item]["hlist_prev"] = 0
    if first:
        world.rmaps[first]["hlist_prev"] = item
    world.stables[node]["hlist"] = item
    world.rmaps[item]["head"] = node
    world.stables[node]["rmap_hlist_len"] += 1


@jit
def hlist_remove(world: World, item: int) -> None:
    """Take an rmap_item off its stable node's list."""
    node = world.rmaps[item]["head"]
    before = world.rmaps[item]["hlist_prev"]
    after = world.rmaps[item]["hlist_next"]
    if before:
        world.rmaps[before]["hlist_next"] = after
    else:
        world.stables[node]["hlist"] = after
    if after:
        world.rmaps[after]["hlist_prev"] = before
    world.stables[node]["rmap_hlist_len"] -= 1


@jit
def dup_add(world: World, chain: int, node: int) -> None:
    """Put a stable node at the front of a chain's dups."""
    first = world.stables[chain]["hlist"]
    dup = world.stables[node]
    dup["list_next"] = first
    dup["list_prev"] = 0
    dup["chain"] = chain
    dup["place"] = layout.IN_CHAIN
    if first:
        world.stables[first]["list_prev"] = node
    world.stables[chain]["hlist"] = node


@jit
def _bypass(world: World, node: int) -> None:
    """Link the list neighbours of a stable node to each other."""
    before = world.stables[node]["list_prev"]
    after = world.stables[node]["list_next"]
    if before:
        world.stables[before]["list_next"] = after
    if after:
        world.stables[after]["list_prev"] = before


@jit
def dup_remove(world: World, node: int) -> None:
    """Take a stable node off its chain."""
    dup = world.stables[node]
    if dup["list_prev"] == 0:
        world.stables[dup["chain"]]["hlist"] = dup["list_next"]
    _bypass(world, node)


@jit
def migrate_add(world: World, node: int) -> None:
    """Put a stable node at the front of migrate_nodes."""
    ctl = world.ctl[0]
    first = ctl["migrate_head"]
    entry = world.stables[node]
    entry["list_next"] = first
    entry["list_prev"] = 0
    entry["chain"] = 0
    entry["place"] = layout.MIGRATING
    if first:
        world.stables[first]["list_prev"] = node
    ctl["migrate_head"] = node


@jit
def migrate_remove(world: World, node: int) -> None:
    """Take a stable node off migrate_nodes."""
    if world.stables[node]["list_prev"] == 0:
        world.ctl[0]["migrate_head"] = world.stables[node]["list_next"]
    _bypass(world, node)
