"""Own how a stable node finds its page again, and how a node that cannot is taken apart.

Why no page is trusted that is not ours (spec section 2):
1. A stable node holds no reference; its frame may be freed and given to anybody at any time.
2. A frame names its stable node (`mapping`) only while it is that node's KSM page; whoever frees it clears that.
3. So the frame is ours if and only if `frames[kpfn].mapping` names this node; the look and the reference are one step.
4. If it does not, either the page migrated between our two reads (then `kpfn` has changed: look again), or the
   page is gone for good: the node is stale, and whoever notices unlinks it and takes its rmap_items off it.
"""

from __future__ import annotations

from pagefold.core import layout, rbtree
from pagefold.core.arena import give_stable
from pagefold.core.checkpoint import checkpoint
from pagefold.core.compiler import jit
from pagefold.core.frames import get_page
from pagefold.core.layout import GAP_KEYHOLE, World
from pagefold.core.lists import dup_remove, migrate_remove


@jit
def detach(world: World, node: int) -> None:
    """Unlink a stable node from the one place where it is: tree, chain or migrate_nodes. The caller places or frees it."""
    entry = world.stables[node]
    place = entry["place"]
    if place == layout.IN_CHAIN:
        dup_remove(world, node)
        world.ctl[0]["stable_node_dups"] -= 1
    elif place == layout.MIGRATING:
        migrate_remove(world, node)
    else:
        tree = world.nodes[entry["nid"]]
        tree["stable_root"] = rbtree.erase(world.stables, tree["stable_root"], node)


@jit
def link_in_tree(world: World, node: int, nid: int, parent: int, right: int) -> None:
    """Hang a stable node (or chain) at a free place of the stable tree of `nid`."""
    tree = world.nodes[nid]
    tree["stable_root"] = rbtree.insert(world.stables, tree["stable_root"], parent, right, node)
    world.stables[node]["nid"] = nid
    world.stables[node]["place"] = layout.IN_TREE


@jit
def replace_in_tree(world: World, old: int, new: int) -> None:
    """Let `new` take the very place of `old` in its tree; `old` is then nowhere."""
    tree = world.nodes[world.stables[old]["nid"]]
    tree["stable_root"] = rbtree.replace(world.stables, tree["stable_root"], old, new)
    world.stables[new]["nid"] = world.stables[old]["nid"]
    world.stables[new]["place"] = layout.IN_TREE


@jit
def count_off(world: World, item: int, others: int) -> None:
    """Let an rmap_item that was taken off its stable node's list be STABLE no more; `others` are still on that list."""
    if others:
        world.ctl[0]["pages_sharing"] -= 1
    else:
        world.ctl[0]["pages_shared"] -= 1
    entry = world.rmaps[item]
    world.mms[entry["mm"]]["ksm_merging_pages"] -= 1
    entry["flags"] &= ~layout.RMAP_STABLE
    entry["head"] = 0


@jit
def remove_node_from_stable_tree(world: World, node: int) -> None:
    """Take all rmap_items off a stable node, unlink it and free it. Its frame is not touched."""
    item = world.stables[node]["hlist"]
    while item:
        following = world.rmaps[item]["hlist_next"]
        count_off(world, item, following)
        item = following
    detach(world, node)
    give_stable(world, node)


@jit
def get_ksm_page(world: World, node: int) -> int:
    """Look through the keyhole: return the node's frame, referenced; or 0, and the node was stale and is gone."""
    while True:
        kpfn = world.stables[node]["kpfn"]
        checkpoint(world, GAP_KEYHOLE)
        if world.frames[kpfn]["mapping"] == node:
            get_page(world, kpfn)
            return kpfn
        if world.stables[node]["kpfn"] == kpfn:
            remove_node_from_stable_tree(world, node)
            return 0


@jit
def free_chain(world: World, chain: int) -> None:
    """Take a chain without dups out of its tree and free it."""
    tree = world.nodes[world.stables[chain]["nid"]]
    tree["stable_root"] = rbtree.erase(world.stables, tree["stable_root"], chain)
    world.ctl[0]["stable_node_chains"] -= 1
    give_stable(world, chain)
