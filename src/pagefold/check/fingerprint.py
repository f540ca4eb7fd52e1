"""Own when two states are the same: a fingerprint that does not depend on names.

Names are given anew, in an order that follows from the state alone: processes by their place in the ring, pages by address,
frames by the first page that maps them, stable nodes by tree and place in it. So the numbers of frames, processes and slots do not
matter, nor does the order of what is free. Left out is also

1. what follows from the rest, because the judge checks that it does: counters, lengths, links back, the shadow of the data, hints, and
   whether the unstable trees' keys may be trusted;
2. what nothing can tell: the right to write a page that is the process's own (a write there takes it), the order of a stable node's
   list, how many full scans there were (only which unstable trees are this scan's counts);
3. of a stale node's frame everything but where it is and whether it is free, someone's page or a KSM page. A stale node stays stale,
   since only the frame that names a node can hand that on.
"""

from __future__ import annotations

import numpy as np

from pagefold.check.bench import Bench
from pagefold.core import layout, rbtree
from pagefold.core.compiler import jit
from pagefold.core.frames import is_idle, stable_node_of, swap_nid
from pagefold.core.layout import Records, World

FRAMES, STABLES, MMS = 0, 1, 2  # rows of bench.names
_SEED = np.uint64(0x9E3779B97F4A7C15)
_SPREAD = np.uint64(0xD6E8FEB86659FD93)
_HALF = np.uint64(32)


@jit
def mix(so_far: np.uint64, value: int) -> np.uint64:
    """Add a number to a fingerprint."""
    mixed = (so_far ^ np.uint64(value)) * _SPREAD
    return (mixed ^ (mixed >> _HALF)) * _SEED


@jit
def name_mms(bench: Bench) -> int:
    """Name the processes: those in the ring by their place, then the others; return how many there are.

    Row MMS holds the slot of each name in its first half and the name of each slot in its second.
    """
    world = bench.world
    row = bench.names[MMS]
    half = len(row) // 2
    count = 0
    for slot in range(world.ctl[0]["mms_used"]):
        row[half + slot] = 0
    mm = world.mms[0]["ring_next"]
    while mm:
        count += 1
        row[count] = mm
        row[half + mm] = count
        mm = world.mms[mm]["ring_next"]
    for mm in range(1, world.ctl[0]["mms_used"]):
        if row[half + mm] == 0 and world.mms[mm]["flags"] & (layout.MM_LIVE | layout.MM_EXITED):
            count += 1
            row[count] = mm
            row[half + mm] = count
    return count


@jit
def name_stables(bench: Bench) -> None:
    """Name the stable nodes and chains: tree by tree in order, dups behind their chain, then migrate_nodes."""
    world = bench.world
    row = bench.names[STABLES]
    for slot in range(world.ctl[0]["stables_used"]):
        row[slot] = 0
    count = 0
    for nid in range(swap_nid(world)):
        root = world.nodes[nid]["stable_root"]
        place = rbtree.first_below(world.stables, root) if root else 0
        while place:
            count += 1
            row[place] = count
            if world.stables[place]["place"] == layout.CHAIN:
                dup = world.stables[place]["hlist"]
                while dup:
                    count += 1
                    row[dup] = count
                    dup = world.stables[dup]["list_next"]
            place = rbtree.following(world.stables, place)
    node = world.ctl[0]["migrate_head"]
    while node:
        count += 1
        row[node] = count
        node = world.stables[node]["list_next"]


@jit
def add_frame(bench: Bench, so_far: np.uint64, pfn: int, count: int) -> tuple[np.uint64, int]:
    """Add a frame that is in use: by its name, and at its first mention also what it is. Return the count of names, too."""
    world = bench.world
    row = bench.names[FRAMES]
    if row[pfn]:
        return mix(so_far, row[pfn]), count
    count += 1
    row[pfn] = count
    frame = world.frames[pfn]
    node = stable_node_of(world, pfn)
    so_far = mix(so_far, 0x1000 + (bench.names[STABLES][node] if node else -frame["mapping"]))
    so_far = mix(so_far, frame["nid"] << 16 | frame["holds"])
    return mix(so_far, int(np.int64(world.contents[pfn]["hi"] ^ world.contents[pfn]["lo"]))), count


@jit
def add_keyhole(bench: Bench, so_far: np.uint64, node: int) -> np.uint64:
    """Add what a stable node looks at: its page; or, for a stale one, where that frame is and to whom it belongs now."""
    world = bench.world
    kpfn = world.stables[node]["kpfn"]
    frame = world.frames[kpfn]
    if frame["mapping"] == node:
        return mix(so_far, bench.names[FRAMES][kpfn])
    owner = 0 if is_idle(world, kpfn) else 1 + (frame["mapping"] > 0)
    return mix(so_far, 0x2000 + (frame["nid"] << 2 | owner))


@jit
def add_item(bench: Bench, so_far: np.uint64, item: int) -> np.uint64:
    """Add an rmap_item: what it remembers and what it hangs on."""
    world = bench.world
    entry = world.rmaps[item]
    flags = entry["flags"]
    so_far = mix(so_far, entry["vpn"] << 8 | flags)
    if flags & layout.RMAP_CALM_KNOWN:
        so_far = mix(so_far, entry["oldchecksum"])
    if flags & layout.RMAP_STABLE:
        so_far = mix(so_far, bench.names[STABLES][entry["head"]])
    elif flags & layout.RMAP_UNSTABLE:
        current = entry["seqnr"] == world.ctl[0]["generation"] & 0xFF
        so_far = mix(so_far, 1 + entry["nid"] if current else 0)
    if world.ctl[0]["smart_scan"]:
        so_far = mix(so_far, entry["age"] << 8 | entry["remaining_skips"])
    return so_far


@jit
def lasting_flags(world: World, entry: Records) -> int:
    """Return an entry's flags, but not whether a page that is the process's own may be written: a write there makes it so."""
    frame = world.frames[entry["pfn"]]
    own = frame["mapcount"] == 1 and frame["mapping"] == 0 and frame["holds"] == 0
    return int(entry["flags"] & ~layout.PTE_WRITABLE if own else entry["flags"])


@jit
def add_mm(bench: Bench, so_far: np.uint64, mm: int, count: int) -> tuple[np.uint64, int]:
    """Add a process: its areas, its pages and its rmap_items."""
    world = bench.world
    record = world.mms[mm]
    half = len(bench.names[MMS]) // 2
    so_far = mix(so_far, record["flags"] << 16 | record["node"] << 8 | bench.names[MMS][half + record["parent"]])
    vma = record["vma_first"]
    while vma:
        area = world.vmas[vma]
        so_far = mix(so_far, area["start"] << 32 | area["end"] << 16 | (area["node"] & 0xFF) << 8 | area["flags"])
        for index in range(area["end"] - area["start"]):
            entry = world.ptes[area["pte_base"] + index]
            so_far = mix(so_far, lasting_flags(world, entry))
            if entry["pfn"]:
                so_far, count = add_frame(bench, so_far, entry["pfn"], count)
        vma = area["next"]
    item = record["rmap_list"]
    while item:
        so_far = add_item(bench, so_far, item)
        item = world.rmaps[item]["rmap_next"]
    return so_far, count


@jit
def add_unstable_trees(bench: Bench, so_far: np.uint64) -> np.uint64:
    """Add the shape of this scan's unstable trees, each item by process and address."""
    world = bench.world
    half = len(bench.names[MMS]) // 2
    for nid in range(swap_nid(world)):
        root = world.nodes[nid]["unstable_root"]
        so_far = mix(so_far, nid)
        item = rbtree.first_below(world.rmaps, root) if root else 0
        while item:
            entry = world.rmaps[item]
            above = world.rmaps[entry["rb_parent"]]
            so_far = mix(so_far, entry["vpn"] << 8 | bench.names[MMS][half + entry["mm"]] << 1 | entry["rb_red"])
            if entry["rb_parent"]:
                so_far = mix(so_far, above["vpn"] << 8 | bench.names[MMS][half + above["mm"]])
            item = rbtree.following(world.rmaps, item)
    return so_far


@jit
def add_stable_nodes(bench: Bench, so_far: np.uint64) -> np.uint64:
    """Add the shape of the stable trees, chains and migrate_nodes, and what each node looks at."""
    world = bench.world
    row = bench.names[STABLES]
    for nid in range(swap_nid(world)):
        root = world.nodes[nid]["stable_root"]
        so_far = mix(so_far, nid << 1 | world.nodes[nid]["online"])
        place = rbtree.first_below(world.stables, root) if root else 0
        while place:
            entry = world.stables[place]
            so_far = mix(so_far, row[entry["rb_parent"]] << 8 | entry["place"] << 1 | entry["rb_red"])
            if entry["place"] == layout.CHAIN:
                dup = entry["hlist"]
                while dup:
                    so_far = add_keyhole(bench, so_far, dup)
                    dup = world.stables[dup]["list_next"]
            else:
                so_far = add_keyhole(bench, so_far, place)
            place = rbtree.following(world.stables, place)
    node = world.ctl[0]["migrate_head"]
    while node:
        so_far = add_keyhole(bench, mix(so_far, 0x4000 + world.stables[node]["nid"]), node)
        node = world.stables[node]["list_next"]
    return so_far


@jit
def add_merger(bench: Bench, so_far: np.uint64) -> np.uint64:
    """Add the cursor, and the knobs that moves can change."""
    world: World = bench.world
    ctl = world.ctl[0]
    half = len(bench.names[MMS]) // 2
    so_far = mix(so_far, ctl["cursor_vpn"] << 8 | bench.names[MMS][half + ctl["cursor_mm"]])
    so_far = mix(so_far, world.rmaps[ctl["cursor_rmap"]]["vpn"] if ctl["cursor_rmap"] else 0)
    bypassed = ctl["rules"] != layout.CLASSIC and ctl["bypasses"] > 0
    so_far = mix(so_far, ctl["merge_across_nodes"] << 1 | bypassed)
    return mix(so_far, ctl["max_page_sharing"])


@jit
def fingerprint(bench: Bench) -> np.uint64:
    """Return 64 bits that are equal for states that differ only in names, and for others hardly ever; never 0."""
    world = bench.world
    names = name_mms(bench)
    name_stables(bench)
    for pfn in range(len(world.frames)):
        bench.names[FRAMES][pfn] = 0
    so_far = _SEED
    count = 0
    for name in range(1, names + 1):
        so_far, count = add_mm(bench, so_far, bench.names[MMS][name], count)
    for pfn in range(1, len(world.frames)):
        if bench.names[FRAMES][pfn] == 0 and not is_idle(world, pfn):
            so_far, count = add_frame(bench, so_far, pfn, count)
    so_far = add_unstable_trees(bench, add_stable_nodes(bench, so_far))
    so_far = mix(add_merger(bench, so_far), bench.made[0])
    return so_far if so_far else _SEED
