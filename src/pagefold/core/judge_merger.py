"""Judge the merger's own structures: trees, chains, lists, and the counters that follow from them."""

from __future__ import annotations

from pagefold.core import layout, rbtree
from pagefold.core.compiler import jit
from pagefold.core.frames import content_key, swap_nid
from pagefold.core.layout import Records, World
from pagefold.core.space import find_vma, pte_of

ONE_PLACE, ORDER, RED_BLACK, LISTS, COUNTERS, KEYHOLE = 1, 2, 3, 4, 5, 6  # indices of invariants.NAMES
UNSTABLE = 13


@jit
def tree_is_sound(a: Records, root: int) -> int:
    """Return the number of nodes of a red-black tree, or -1 if its links, colours or black heights are wrong.

    Walks by parent links without a stack: `black` is the number of black nodes from the root to `node`.
    """
    if root == 0:
        return 0
    if a[root]["rb_red"] or a[root]["rb_parent"]:
        return -1
    limit = len(a)
    count = 0
    height = -1
    node = root
    came = 0  # the child we came up from; 0: we came from above
    black = 1
    steps = 0
    while node:
        steps += 1
        if steps > 3 * limit:
            return -1
        left = a[node]["rb_left"]
        right = a[node]["rb_right"]
        if came == 0:
            count += 1
            for kid in (left, right):
                if kid < 0 or kid >= limit or (kid and a[kid]["rb_parent"] != node):
                    return -1
                if kid and a[node]["rb_red"] and a[kid]["rb_red"]:
                    return -1
                if kid == 0:
                    if height < 0:
                        height = black
                    if height != black:
                        return -1
            if left == right and left:
                return -1
        down = 0
        if came == 0 and left:
            down = left
        elif right and came != right:
            down = right
        if down:
            node = down
            black += 0 if a[node]["rb_red"] else 1
            came = 0
        else:
            came = node
            black -= 0 if a[node]["rb_red"] else 1
            node = a[node]["rb_parent"]
    return count


@jit
def rmap_list_length(world: World, node: int) -> int:
    """Return the length of a stable node's list of rmap_items, or -1 if a link or a member is wrong."""
    length = 0
    before = 0
    item = world.stables[node]["hlist"]
    while item:
        if item < 0 or item >= world.ctl[0]["rmaps_used"] or length > world.ctl[0]["rmaps_used"]:
            return -1
        entry_ = world.rmaps[item]
        if not entry_["flags"] & layout.RMAP_STABLE or entry_["head"] != node or entry_["hlist_prev"] != before:
            return -1
        length += 1
        before = item
        item = entry_["hlist_next"]
    return length


@jit
def dup_list_length(world: World, chain: int, first: int, place: int) -> int:
    """Return the length of a list of stable nodes (dups of a chain, or migrate_nodes), or -1 if it is wrong."""
    length = 0
    before = 0
    node = first
    while node:
        if node < 0 or node >= world.ctl[0]["stables_used"] or length > world.ctl[0]["stables_used"]:
            return -1
        entry_ = world.stables[node]
        if entry_["place"] != place or entry_["list_prev"] != before or entry_["chain"] != chain:
            return -1
        if chain and entry_["nid"] != world.stables[chain]["nid"]:
            return -1
        length += 1
        before = node
        node = entry_["list_next"]
    return length


@jit
def page_of_place(world: World, place: int) -> int:
    """Return the frame of a living stable node at a tree place, 0 if all there are stale."""
    node = world.stables[place]["hlist"] if world.stables[place]["place"] == layout.CHAIN else place
    while node:
        kpfn = world.stables[node]["kpfn"]
        if world.frames[kpfn]["mapping"] == node:
            return kpfn
        node = world.stables[node]["list_next"] if world.stables[node]["place"] == layout.IN_CHAIN else 0
    return 0


@jit
def compare(world: World, one: int, other: int) -> int:
    """Compare two frames' contents as the engine does."""
    a = world.contents[one]
    b = world.contents[other]
    if a["hi"] != b["hi"]:
        return -1 if a["hi"] < b["hi"] else 1
    return 0 if a["lo"] == b["lo"] else (-1 if a["lo"] < b["lo"] else 1)


@jit
def check_places(world: World) -> tuple[int, int]:
    """Check one-place and the shape of the stable trees."""
    plain = chains = dups = 0
    for nid in range(swap_nid(world)):
        root = world.nodes[nid]["stable_root"]
        count = tree_is_sound(world.stables, root)
        if count < 0:
            return RED_BLACK, nid
        if root and nid and world.ctl[0]["merge_across_nodes"]:
            return ONE_PLACE, root  # no search goes there
        node = rbtree.first_below(world.stables, root) if root else 0
        while node:
            entry_ = world.stables[node]
            if entry_["nid"] != nid:
                return ONE_PLACE, node
            if entry_["place"] == layout.CHAIN:
                chains += 1
                length = dup_list_length(world, node, entry_["hlist"], layout.IN_CHAIN)
                if length < 0:
                    return ONE_PLACE, node
                dups += length
            elif entry_["place"] == layout.IN_TREE:
                plain += 1
            else:
                return ONE_PLACE, node
            node = rbtree.following(world.stables, node)
    migrating = dup_list_length(world, 0, world.ctl[0]["migrate_head"], layout.MIGRATING)
    if migrating < 0:
        return ONE_PLACE, world.ctl[0]["migrate_head"]
    for node in range(layout.KSM_LONE + 1, world.ctl[0]["stables_used"]):
        place = world.stables[node]["place"]
        plain -= 1 if place == layout.IN_TREE else 0
        chains -= 1 if place == layout.CHAIN else 0
        dups -= 1 if place == layout.IN_CHAIN else 0
        migrating -= 1 if place == layout.MIGRATING else 0
    if plain or chains or dups or migrating:
        return ONE_PLACE, 0
    return 0, 0


@jit
def check_order(world: World) -> tuple[int, int]:
    """Check that the living pages of each stable tree are strictly ordered and those of a chain equal."""
    for nid in range(swap_nid(world)):
        root = world.nodes[nid]["stable_root"]
        place = rbtree.first_below(world.stables, root) if root else 0
        before = 0
        while place:
            page = page_of_place(world, place)
            if page and before and compare(world, before, page) >= 0:
                return ORDER, place
            if page and world.stables[place]["place"] == layout.CHAIN:
                dup = world.stables[place]["hlist"]
                while dup:
                    kpfn = world.stables[dup]["kpfn"]
                    if world.frames[kpfn]["mapping"] == dup and compare(world, page, kpfn):
                        return ORDER, dup
                    dup = world.stables[dup]["list_next"]
            before = page if page else before
            place = rbtree.following(world.stables, place)
    return 0, 0


@jit
def key_is_true(world: World, item: int) -> bool:
    """Tell whether an rmap_item's page can be had, and still is what it was when it entered its unstable tree."""
    vma = find_vma(world, world.rmaps[item]["mm"], world.rmaps[item]["vpn"])
    if vma == 0 or not world.vmas[vma]["flags"] & layout.VMA_MERGEABLE:
        return False
    entry_ = world.ptes[pte_of(world, vma, world.rmaps[item]["vpn"])]
    return entry_["flags"] & layout.PTE_PRESENT != 0 and content_key(world, entry_["pfn"]) == world.rmaps[item]["key"]


@jit
def check_unstable(world: World) -> tuple[int, int]:
    """Check the shape (not the order) of the unstable trees, and that exactly this scan's items are in them."""
    ctl = world.ctl[0]
    inside = 0
    for nid in range(swap_nid(world)):
        count = tree_is_sound(world.rmaps, world.nodes[nid]["unstable_root"])
        if count < 0:
            return RED_BLACK, nid
        inside += count
    for item in range(1, ctl["rmaps_used"]):
        entry_ = world.rmaps[item]
        if entry_["mm"] and entry_["flags"] & layout.RMAP_UNSTABLE and entry_["seqnr"] == ctl["generation"] & 0xFF:
            inside -= 1
    return (RED_BLACK if inside else 0), 0


@jit
def check_trusted_keys(world: World) -> tuple[int, int]:
    """Check that keys in the unstable trees are true as long as the merger trusts them; page tables must be sound."""
    ctl = world.ctl[0]
    if ctl["trees_changed"]:
        return 0, 0
    for item in range(1, ctl["rmaps_used"]):
        entry_ = world.rmaps[item]
        if entry_["mm"] and entry_["flags"] & layout.RMAP_UNSTABLE and entry_["seqnr"] == ctl["generation"] & 0xFF:
            if not key_is_true(world, item):
                return KEYHOLE, item
    return 0, 0


@jit
def is_of_an_earlier_scan(world: World, item: int) -> bool:
    """Tell whether an rmap_item says that it is in an unstable tree that is no more."""
    entry_ = world.rmaps[item]
    return entry_["flags"] & layout.RMAP_UNSTABLE != 0 and entry_["seqnr"] != world.ctl[0]["generation"] & 0xFF


@jit
def check_looked_at(world: World) -> tuple[int, int]:
    """Check, between two steps, that no rmap_item the scan has passed still says it is in a tree of an earlier scan.

    Only low bits of the scan's number are kept: 256 scans later such an item would be erased from a tree that it is not in.
    """
    ctl = world.ctl[0]
    if ctl["armed"] or ctl["cursor_mm"] == 0:
        return 0, 0
    mm = world.mms[0]["ring_next"]
    while mm:
        item = world.mms[mm]["rmap_list"]
        if mm == ctl["cursor_mm"] and ctl["cursor_rmap"] == 0:
            return 0, 0
        while item:
            if is_of_an_earlier_scan(world, item):
                return UNSTABLE, item
            if mm == ctl["cursor_mm"] and item == ctl["cursor_rmap"]:
                return 0, 0
            item = world.rmaps[item]["rmap_next"]
        mm = 0 if mm == ctl["cursor_mm"] else world.mms[mm]["ring_next"]
    return 0, 0


@jit
def check_lists(world: World) -> tuple[int, int]:
    """Check the rmap lists of stable nodes and of mms, and the counters that follow from them."""
    ctl = world.ctl[0]
    shared = sharing = unshared = stable_items = hung = items = chains = dups = 0
    for node in range(layout.KSM_LONE + 1, ctl["stables_used"]):
        place = world.stables[node]["place"]
        chains += 1 if place == layout.CHAIN else 0
        dups += 1 if place == layout.IN_CHAIN else 0
        if place in (layout.FREE, layout.CHAIN):
            continue
        nid = world.frames[world.stables[node]["kpfn"]]["nid"]
        if not world.nodes[nid]["online"] and ctl["offlining"] != nid + 1:
            return KEYHOLE, node  # that memory is no longer there to be looked at
        trusted = not world.stables[node]["key"] & layout.KEY_LOOK
        if trusted and world.frames[world.stables[node]["kpfn"]]["mapping"] != node:
            return KEYHOLE, node
        length = rmap_list_length(world, node)
        if length != world.stables[node]["rmap_hlist_len"]:
            return LISTS, node
        shared += 1 if length else 0
        sharing += length - 1 if length else 0
        hung += length
    zero = 0
    for mm in range(1, ctl["mms_used"]):
        record = world.mms[mm]
        if not record["flags"] & (layout.MM_LIVE | layout.MM_EXITED):
            continue
        count = merging = 0
        vpn = -1
        item = record["rmap_list"]
        while item:
            entry_ = world.rmaps[item]
            if entry_["mm"] != mm or entry_["vpn"] <= vpn or count > ctl["rmaps_used"]:
                return LISTS, item
            vpn = entry_["vpn"]
            count += 1
            both = entry_["flags"] & (layout.RMAP_STABLE | layout.RMAP_UNSTABLE)
            if both == layout.RMAP_STABLE | layout.RMAP_UNSTABLE:
                return LISTS, item
            merging += 1 if both == layout.RMAP_STABLE else 0
            unshared += 1 if both == layout.RMAP_UNSTABLE else 0
            item = entry_["rmap_next"]
        if count != record["ksm_rmap_items"] or merging != record["ksm_merging_pages"]:
            return COUNTERS, mm
        if count and not record["flags"] & layout.MM_REGISTERED:
            return LISTS, mm
        items += count
        stable_items += merging
        zero += record["ksm_zero_pages"]
    if hung != stable_items:
        return LISTS, 0
    if shared != ctl["pages_shared"] or sharing != ctl["pages_sharing"] or unshared != ctl["pages_unshared"]:
        return COUNTERS, 0
    if items != ctl["rmap_items"] or zero != ctl["ksm_zero_pages"]:
        return COUNTERS, 0
    if chains != ctl["stable_node_chains"] or dups != ctl["stable_node_dups"]:
        return COUNTERS, 0
    return 0, 0


@jit
def check_sharing_limit(world: World) -> tuple[int, int]:
    """Check that no list is longer than max_page_sharing unless a fork or a migration let it (spec 4.1)."""
    ctl = world.ctl[0]
    if ctl["rules"] == layout.CLASSIC:
        return 0, 0
    for node in range(layout.KSM_LONE + 1, ctl["stables_used"]):
        entry_ = world.stables[node]
        if entry_["place"] in (layout.FREE, layout.CHAIN) or entry_["rmap_hlist_len"] <= ctl["max_page_sharing"]:
            continue
        if not ctl["bypasses"]:
            return LISTS, node
    return 0, 0
