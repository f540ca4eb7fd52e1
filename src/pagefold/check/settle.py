"""Own the two promises about what follows when events stop: `no-leak` and `converges` (spec section 9).

Both are asked of every state that is explored: its memory is loaded once more, nothing happens beside the scanner from then on, and
what is left after so many full scans is looked at.
"""

from __future__ import annotations

from pagefold.check.bench import Bench, load_image
from pagefold.check.fingerprint import fingerprint
from pagefold.core import invariants, layout, memory, migration, rbtree
from pagefold.core.chain import has_room
from pagefold.core.compiler import jit
from pagefold.core.frames import content_order, is_idle, nid_of, swap_nid
from pagefold.core.layout import Records, World
from pagefold.core.migrate import is_misplaced
from pagefold.core.scan import scan_page

NO_LEAK = len(invariants.NAMES)
CONVERGES = NO_LEAK + 1
NAMES = (*invariants.NAMES, "no-leak", "converges")
ASK_NO_LEAK = 1  # bits of bench.promises
ASK_CONVERGES = 2


@jit
def finish_full_scan(bench: Bench) -> bool:
    """Scan to the end of this full scan; False if that takes more steps than there can be pages."""
    left = 2 * len(bench.world.rmaps) + 2
    while left and scan_page(bench.world) > 0:
        left -= 1
    return left > 0


@jit
def can_settle(world: World) -> bool:
    """Tell whether full scans can bring all to rest: smart scan leaves nothing out, and nobody holds a page."""
    if world.ctl[0]["smart_scan"]:
        return False
    held = 0
    for pfn in range(1, len(world.frames)):
        held += world.frames[pfn]["holds"]
    return held == 0


@jit
def let_all_go(world: World) -> None:
    """Release every pin and lock, and end every process."""
    for pfn in range(1, len(world.frames)):
        while migration.unpin_frame(world, pfn) == layout.OK:
            pass
        migration.unlock_frame(world, pfn)
    for mm in range(1, world.ctl[0]["mms_used"]):
        if world.mms[mm]["flags"] & layout.MM_LIVE:
            memory.exit_mm(world, mm)


@jit
def what_leaks(bench: Bench) -> int:
    """Return 0 if nothing is left once all processes are gone and two full scans are done, else 1 + an index of what is."""
    world = bench.world
    let_all_go(world)
    for _ in range(3):
        if not finish_full_scan(bench):
            return 1
    if world.ctl[0]["rmap_items"] or world.ctl[0]["migrate_head"]:
        return 1
    for node in range(layout.KSM_LONE + 1, world.ctl[0]["stables_used"]):
        if world.stables[node]["place"] != layout.FREE:
            return 1 + node
    for pfn in range(1, len(world.frames)):
        if not is_idle(world, pfn):
            return 1 + pfn
    return 0


@jit
def first_misplaced(world: World) -> int:
    """Return a stable node whose page is on another node than its tree, or that still waits for a place; 0: there is none."""
    waiting: int = world.ctl[0]["migrate_head"]
    if waiting:
        return waiting
    for nid in range(swap_nid(world)):
        root = world.nodes[nid]["stable_root"]
        place = rbtree.first_below(world.stables, root) if root else 0
        while place:
            chain = world.stables[place]["place"] == layout.CHAIN
            node = world.stables[place]["hlist"] if chain else place
            while node:
                kpfn = world.stables[node]["kpfn"]
                if world.frames[kpfn]["mapping"] == node and is_misplaced(world, node):
                    return node
                node = world.stables[node]["list_next"] if chain else 0
            place = rbtree.following(world.stables, place)
    return 0


@jit
def may_share(world: World, pfn: int) -> bool:
    """Tell whether a frame is mapped in a MERGEABLE area of a live process."""
    if is_idle(world, pfn) or world.frames[pfn]["nid"] == swap_nid(world):
        return False
    for mm in range(1, world.ctl[0]["mms_used"]):
        if not world.mms[mm]["flags"] & layout.MM_LIVE:
            continue
        vma = world.mms[mm]["vma_first"]
        while vma:
            area = world.vmas[vma]
            for index in range(area["end"] - area["start"]):
                entry = world.ptes[area["pte_base"] + index]
                mergeable = area["flags"] & layout.VMA_MERGEABLE and entry["flags"] & layout.PTE_PRESENT
                if mergeable and entry["pfn"] == pfn:
                    return True
            vma = area["next"]
    return False


@jit
def takes_one_more(world: World, pfn: int) -> bool:
    """Tell whether an equal page could merge with this one: it is anonymous, or a KSM page with room."""
    mapping = world.frames[pfn]["mapping"]
    return mapping <= layout.KSM_LONE or has_room(world, mapping, 0)


@jit
def first_apart(world: World) -> int:
    """Return a frame whose page has an equal that it could share with and does not; 0: there is none.

    Two KSM pages are no such pair: under mainline they are dups of one content, and stay that; under classic `order` forbids them.
    """
    for one in range(1, len(world.frames)):
        if world.frames[one]["mapping"] > layout.KSM_LONE or not may_share(world, one):
            continue
        for other in range(1, len(world.frames)):
            if other == one or is_idle(world, other) or nid_of(world, one) != nid_of(world, other):
                continue
            if content_order(world, one, other) or not may_share(world, other):
                continue
            if takes_one_more(world, other):
                return one
    return 0


@jit
def what_is_unsettled(bench: Bench) -> int:
    """Return 0 if full scans alone bring everything to rest, else 1 + an index of what is not."""
    world = bench.world
    for _ in range(1 + bench.settle_scans):
        if not finish_full_scan(bench):
            return 1
    if world.mms[0]["ring_next"] == 0:
        return 0  # with nobody left to scan there were no full scans
    node = first_misplaced(world)
    if node:
        return 1 + node
    pfn = first_apart(world)
    if pfn:
        return 1 + pfn
    before = fingerprint(bench)
    finish_full_scan(bench)
    return 0 if fingerprint(bench) == before else 1


@jit
def what_follows(bench: Bench, image: Records) -> tuple[int, int]:
    """Ask both promises of a state: (0, 0), or the number of the one that it breaks and what shows it."""
    load_image(bench, image)
    world = bench.world
    if bench.promises & ASK_CONVERGES and can_settle(world):
        where = what_is_unsettled(bench)
        if where:
            return CONVERGES, where - 1
    if bench.promises & ASK_NO_LEAK:
        load_image(bench, image)
        where = what_leaks(bench)
        if where:
            return NO_LEAK, where - 1
    broken, where = invariants.judge(world)
    return broken, where
