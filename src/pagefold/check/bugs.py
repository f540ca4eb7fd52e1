"""Own the planted bugs: one changed rule each, where it stands in the core, and the small world in which it is found.

The core that ships has none of this: `planted.py` makes a copy of it in which each change can be switched on. This is one list of data;
to split it would hide what belongs together. `python -m pagefold.check.hunt` finds them all and prints the table of docs/checking.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from pagefold.check.worlds import SmallWorld

_ONE = SmallWorld(
    mms=2, pages=1, contents=1, events=("migrate", "write"), inside=1, budget=4, ignore=("no-leak", "converges")
)


def _world(**other: object) -> SmallWorld:
    """Return a small world that differs from the usual one of bugs."""
    named = {name: getattr(_ONE, name) for name in SmallWorld.__dataclass_fields__}
    return SmallWorld(**{**named, **other})


@dataclass(frozen=True)
class Bug:
    """One planted bug: its name, what it does instead of what, the statements of the core that it replaces, and where it is found."""

    name: str
    what: str
    file: str
    old: str
    new: str
    invariant: str
    world: SmallWorld
    answers: int = 0  # the question of spec section 7 that it answers, 0: none


BUGS = (
    Bug(
        "no-node-check-at-match",
        "a page is merged onto a misplaced one: nodes are not compared at the match",
        "stable.py",
        """
    if nid_of(world, tree_page) == world.stables[dup]["nid"]:
        return tree_page
""",
        """
    return tree_page
""",
        "placement",
        _world(mms=3),
        answers=1,
    ),
    Bug(
        "node-check-before-lock",
        "nodes are compared at the match, before the page is locked and held",
        "stable.py",
        """
    checkpoint(world, GAP_MATCH)
""",
        """
    if nid_of(world, world.stables[dup]["kpfn"]) == world.stables[dup]["nid"]:
        checkpoint(world, GAP_MATCH)
        early_page = get_ksm_page(world, dup)
        return early_page if early_page else _AGAIN
""",
        "placement",
        _world(mms=3, knobs=(("max_page_sharing", 3),)),
    ),
    Bug(
        "displaced-node-nowhere",
        "a displaced node is not put on migrate_nodes",
        "stable.py",
        """
        migrate_add(world, dup)
""",
        """
        pass
""",
        "one-place",
        _world(mms=4, rules="classic", budget=4),
    ),
    Bug(
        "wrong-node-marked",
        "the node that took the place is put on migrate_nodes, not the one that was displaced",
        "stable.py",
        """
        migrate_add(world, dup)
""",
        """
        migrate_add(world, waiting)
""",
        "one-place",
        _world(mms=4, rules="classic", budget=4),
        answers=5,
    ),
    Bug(
        "exiled-but-in-its-tree",
        "a misplaced node is put on migrate_nodes without leaving its tree",
        "migrate.py",
        """
    detach(world, node)
""",
        """
    pass
""",
        "one-place",
        _world(),
    ),
    Bug(
        "slotted-in-with-old-nid",
        "a migrated node keeps its old nid when it is linked into the tree of its new node",
        "keyhole.py",
        """
    world.stables[node]["nid"] = nid
""",
        """
    pass
""",
        "one-place",
        _world(),
    ),
    Bug(
        "waits-for-ever",
        "a waiting node is not linked in where the search ended",
        "stable.py",
        """
    if waiting == 0:
        return 0
    detach(world, waiting)
""",
        """
    if waiting == 0 or world.ctl[0]["bug"]:
        return 0
""",
        "converges",
        _world(rules="pagefold", ignore=()),
        answers=2,
    ),
    Bug(
        "migrate-nodes-never-pruned",
        "nobody looks through the keyholes of migrate_nodes at the begin of a full scan",
        "migrate.py",
        """
    node = world.ctl[0]["migrate_head"]
""",
        """
    node = 0
""",
        "no-leak",
        _world(mms=3, rules="pagefold", inside=0, knobs=(("max_page_sharing", 3),), ignore=("converges",)),
        answers=3,
    ),
    Bug(
        "search-goes-on-below-a-stale-node",
        "after a stale node was unlinked, the search goes on where its children were, not at the root",
        "stable.py",
        """
        if tree_page == 0:
            return 0 if classic else _AGAIN
""",
        """
        if tree_page == 0:
            here = world.stables[here]["rb_right"]
            continue
""",
        "one-place",
        _world(mms=3, contents=2, pages=2, inside=0),
    ),
    Bug(
        "collapsed-chain-used",
        "a chain of one collapses, and the search goes on with the chain instead of what took its place",
        "chain.py",
        """
    return _tidy(world, place, held), held, held_page
""",
        """
    _tidy(world, place, held)
    return place, held, held_page
""",
        "one-place",
        _world(mms=4, contents=2, events=("write", "exit"), budget=3),
    ),
    Bug(
        "reused-frame-trusted",
        "the keyhole asks whether the frame is mapped, not whether it names this stable node",
        "keyhole.py",
        """
        if world.frames[kpfn]["mapping"] == node:
            get_page(world, kpfn)
            return kpfn
""",
        """
        if world.frames[kpfn]["mapcount"]:
            get_page(world, kpfn)
            return kpfn
""",
        "lists",
        _world(mms=3, contents=2, events=("write", "exit"), budget=4),
    ),
    Bug(
        "kpfn-after-back-pointer",
        "a migration moves the back pointer first, and kpfn at the next checkpoint only",
        "migration.py",
        """
            world.stables[frame["mapping"]]["kpfn"] = fresh
""",
        """
            world.ctl[0]["late_node"] = frame["mapping"]
            world.ctl[0]["late_pfn"] = fresh
""",
        "keyhole",
        _world(),
    ),
    Bug(
        "busy-item-stays",
        "an rmap_item keeps its place in an unstable tree when the search was busy",
        "scan.py",
        """
    remove_rmap_item_from_tree(world, item)
    if kpage == SEARCH_BUSY:
        return
""",
        """
    if kpage == SEARCH_BUSY:
        return
    remove_rmap_item_from_tree(world, item)
""",
        "unstable",
        _world(mms=3, rules="classic", contents=2, events=("write", "lock"), budget=3),
    ),
    Bug(
        "erased-from-an-earlier-tree",
        "an rmap_item of an earlier scan is erased from this scan's tree",
        "rmap.py",
        """
        if entry["seqnr"] == ctl["generation"] & 0xFF:
            tree = world.nodes[entry["nid"]]
            tree["unstable_root"] = rbtree.erase(world.rmaps, tree["unstable_root"], item)
""",
        """
        tree = world.nodes[entry["nid"]]
        tree["unstable_root"] = rbtree.erase(world.rmaps, tree["unstable_root"], item)
""",
        "red-black",
        _world(mms=3, contents=3, events=("write",)),
    ),
    Bug(
        "forked-page-counted-twice",
        "an rmap_item that hangs on its node already is appended to it again",
        "scan.py",
        """
        if hangs_here and world.stables[node]["place"] != layout.MIGRATING:
            return
""",
        """
        if hangs_here and world.stables[node]["place"] != layout.MIGRATING:
            stable_tree_append(world, item, node)
            return
""",
        "lists",
        _world(events=("fork",), budget=1),
    ),
    Bug(
        "not-broken-apart",
        "the first page stays a KSM page when its partner could not be merged",
        "merge.py",
        """
    break_cow(world, item)
    return False
""",
        """
    return False
""",
        "converges",
        _world(mms=2, contents=2, events=("write",), ignore=("no-leak",)),
    ),
    Bug(
        "pinned-page-write-protected",
        "references beyond the mappings are not looked at before write protection",
        "merge.py",
        """
    if not entry["flags"] & PTE_PRESENT or entry["pfn"] != page or frame["holds"] != _OURS:
        return False
""",
        """
    if not entry["flags"] & PTE_PRESENT or entry["pfn"] != page:
        return False
""",
        "refuse",
        _world(events=("pin",), budget=1),
    ),
    Bug(
        "compared-before-write-protection",
        "bytes are compared, and only then the right to write is taken",
        "merge.py",
        """
    merged = write_protect_page(world, pte, page)
""",
        """
    equal_before = kpage > 0 and content_order(world, page, kpage) == 0
    checkpoint(world, GAP_WRITE_PROTECTED)
    merged = write_protect_page(world, pte, page)
    if kpage > 0:
        if merged and equal_before:
            redirect(world, mm, vpn, pte, page, kpage)
        frame["holds"] &= layout.HOLD_COUNT
        return bool(merged and equal_before)
""",
        "data",
        _world(contents=2, events=("write",), budget=2),
    ),
    Bug(
        "change-of-mapping-missed",
        "whether the entry still maps the compared page is not looked at before it is redirected",
        "merge.py",
        """
    if not equal or entry["flags"] != PTE_PRESENT or entry["pfn"] != page:
        return False
""",
        """
    if not equal:
        return False
""",
        "data",
        _world(contents=2, events=("write",), budget=2),
    ),
    Bug(
        "writable-ksm-page",
        "write protection leaves the right to write",
        "merge.py",
        """
    entry["flags"] &= ~PTE_WRITABLE
""",
        """
    pass
""",
        "refuse",
        _world(),
    ),
    Bug(
        "slot-freed-under-the-cursor",
        "an exiting process leaves the ring at once though the cursor stands on it",
        "ring.py",
        """
    if not world.mms[mm]["flags"] & layout.MM_REGISTERED:
        give_mm(world, mm)
    elif ctl["cursor_mm"] != mm:
        if world.mms[mm]["rmap_list"] == 0:
            leave_ring(world, mm)
        else:
            unlink(world, mm)
            link_before(world, mm, world.mms[ctl["cursor_mm"]]["ring_next"])
""",
        """
    if not world.mms[mm]["flags"] & layout.MM_REGISTERED:
        give_mm(world, mm)
    elif world.mms[mm]["rmap_list"] == 0 or ctl["cursor_mm"] == mm:
        leave_ring(world, mm)
    else:
        unlink(world, mm)
        link_before(world, mm, world.mms[ctl["cursor_mm"]]["ring_next"])
""",
        "counters",
        _world(events=("exit",), budget=1),
    ),
    Bug(
        "offline-forgets-migrate-nodes",
        "stable nodes on migrate_nodes whose frames went offline are not removed",
        "unmerge.py",
        """
        if lies_on(world, node, nid):
            remove_node_from_stable_tree(world, node)
        node = following
""",
        """
        node = following
""",
        "keyhole",
        _world(mms=2, contents=2, events=("migrate", "write", "offline"), budget=5),
    ),
    Bug(
        "knob-changed-while-nodes-remain",
        "merge_across_nodes changes though stable nodes exist",
        "unmerge.py",
        """
    return layout.BUSY if world.ctl[0]["pages_shared"] else remove_all_stable_nodes(world)
""",
        """
    return layout.OK
""",
        "one-place",
        _world(events=("migrate", "knob"), budget=3),
    ),
    Bug(
        "unstable-match-on-another-node",
        "the node of a match in the unstable tree is not compared",
        "unstable.py",
        """
            if nid_of(world, tree_page) != nid:
                return 0, 0
""",
        """
            pass
""",
        "placement",
        _world(),
        answers=4,
    ),
    Bug(
        "one-sharer-too-many",
        "max_page_sharing is off by one",
        "chain.py",
        """
    return length > 0 and length + more < world.ctl[0]["max_page_sharing"]
""",
        """
    return length > 0 and length + more <= world.ctl[0]["max_page_sharing"]
""",
        "lists",
        _world(mms=3, events=("write",), budget=1),
    ),
    Bug(
        "counters-swapped",
        "the last but one rmap_item that leaves a node is counted as the last, and the last as a further one",
        "keyhole.py",
        """
    if others:
        world.ctl[0]["pages_sharing"] -= 1
    else:
        world.ctl[0]["pages_shared"] -= 1
""",
        """
    if not others:
        world.ctl[0]["pages_sharing"] -= 1
    else:
        world.ctl[0]["pages_shared"] -= 1
""",
        "counters",
        _world(mms=3, events=("write",), budget=1, knobs=(("max_page_sharing", 3),)),
    ),
    Bug(
        "freed-frame-keeps-its-node",
        "a frame that is freed does not forget its stable node",
        "frames.py",
        """
        forget_stable_node(world, pfn)
        frame["first_pte"] = node["free_head"]
""",
        """
        frame["first_pte"] = node["free_head"]
""",
        "keyhole",
        _world(events=("exit",), budget=2),
    ),
    Bug(
        "fork-leaves-a-page-writable",
        "fork does not take the parent's right to write a page that is now shared",
        "memory.py",
        """
            entry["flags"] = flags & ~PTE_WRITABLE
""",
        """
            pass
""",
        "page-tables",
        _world(events=("fork", "exit"), budget=2),
    ),
    Bug(
        "stale-node-keeps-its-items",
        "a stale node is freed with its rmap_items still on it",
        "keyhole.py",
        """
    item = world.stables[node]["hlist"]
""",
        """
    item = 0
""",
        "lists",
        _world(mms=3, events=("exit", "write"), budget=3, contents=2),
    ),
)
