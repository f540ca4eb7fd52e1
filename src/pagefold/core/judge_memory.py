"""Judge the memory under the merger: frames and their back pointers, page tables, data, and the ring."""

from __future__ import annotations

from pagefold.core import layout
from pagefold.core.compiler import jit
from pagefold.core.frames import content_key, is_idle, swap_nid
from pagefold.core.layout import World

COUNTERS, KEYHOLE, DATA, REFUSE = 5, 6, 7, 9  # indices of invariants.NAMES
FRAMES, PAGE_TABLES, RING = 10, 11, 12


@jit
def check_frames(world: World) -> tuple[int, int]:
    """Check mapping lists, back pointers (keyhole) and free lists of all frames."""
    ctl = world.ctl[0]
    for pfn in range(1, len(world.frames)):
        frame = world.frames[pfn]
        if is_idle(world, pfn):
            if frame["mapping"]:
                return KEYHOLE, pfn
            continue
        mapping = frame["mapping"]
        if mapping > layout.KSM_LONE:
            if mapping >= ctl["stables_used"] or world.stables[mapping]["kpfn"] != pfn:
                return KEYHOLE, pfn
            if world.stables[mapping]["place"] in (layout.FREE, layout.CHAIN):
                return KEYHOLE, pfn
            if world.stables[mapping]["key"] != content_key(world, pfn):
                return KEYHOLE, pfn
        count = 0
        before = 0
        pte = frame["first_pte"]
        while pte:
            entry_ = world.ptes[pte]
            if entry_["pfn"] != pfn or entry_["prev"] != before or count > frame["mapcount"] or not entry_["flags"]:
                return FRAMES, pfn
            if entry_["flags"] & layout.PTE_WRITABLE and mapping:
                return REFUSE, pfn  # a KSM page that can be written in place
            count += 1
            before = pte
            pte = entry_["next"]
        if count != frame["mapcount"]:
            return FRAMES, pfn
    for nid in range(len(world.nodes)):
        node = world.nodes[nid]
        count = 0
        pfn = node["free_head"]
        while pfn:
            if not is_idle(world, pfn) or world.frames[pfn]["nid"] != nid or count > node["free"]:
                return FRAMES, pfn
            count += 1
            pfn = world.frames[pfn]["first_pte"]
        if count != node["free"]:
            return FRAMES, 0
    return 0, 0


@jit
def check_page(world: World, mm: int, vma: int, pte: int) -> tuple[int, int]:
    """Check one page-table entry: what it names, its counters' share, and the data against the shadow copy."""
    entry_ = world.ptes[pte]
    flags = entry_["flags"]
    hi = world.contents[entry_["pfn"]]["hi"]
    lo = world.contents[entry_["pfn"]]["lo"]
    shared = world.vmas[vma]["flags"] & layout.VMA_SHARED  # others write such pages too: no shadow can follow them
    if flags & (layout.PTE_PRESENT | layout.PTE_SWAPPED):
        if entry_["pfn"] <= 0 or entry_["pfn"] >= len(world.frames):
            return PAGE_TABLES, pte
        on_swap = world.frames[entry_["pfn"]]["nid"] == swap_nid(world)
        if on_swap != (flags & layout.PTE_SWAPPED != 0):
            return PAGE_TABLES, pte
        if flags & layout.PTE_WRITABLE and world.frames[entry_["pfn"]]["mapcount"] > 1 and not shared:
            return PAGE_TABLES, pte
    elif entry_["pfn"] or flags & ~layout.PTE_ZERO:
        return PAGE_TABLES, pte
    else:
        hi = world.contents[0]["hi"]
        lo = world.contents[0]["lo"]
    if world.ctl[0]["shadow_on"] and not shared and (world.shadow[pte]["hi"] != hi or world.shadow[pte]["lo"] != lo):
        return DATA, pte
    return 0, 0


@jit
def check_spaces(world: World) -> tuple[int, int]:
    """Check areas, page tables, data and zero counters of every mm."""
    ctl = world.ctl[0]
    mapped = 0
    for mm in range(1, ctl["mms_used"]):
        record = world.mms[mm]
        if not record["flags"] & layout.MM_LIVE:
            continue
        zeros = 0
        end = 0
        vma = record["vma_first"]
        while vma:
            area = world.vmas[vma]
            if area["mm"] != mm or area["start"] < end or area["end"] <= area["start"]:
                return PAGE_TABLES, vma
            if area["flags"] & layout.VMA_MERGEABLE and not record["flags"] & layout.MM_REGISTERED:
                return RING, mm
            end = area["end"]
            for index in range(area["end"] - area["start"]):
                pte = area["pte_base"] + index
                broken, where = check_page(world, mm, vma, pte)
                if broken:
                    return broken, where
                zeros += 1 if world.ptes[pte]["flags"] & layout.PTE_ZERO else 0
                mapped += 1 if world.ptes[pte]["pfn"] else 0
            vma = area["next"]
        if zeros != record["ksm_zero_pages"]:
            return COUNTERS, mm
    for pfn in range(1, len(world.frames)):
        mapped -= world.frames[pfn]["mapcount"]
    return (FRAMES if mapped else 0), 0


@jit
def check_ring(world: World) -> tuple[int, int]:
    """Check that the ring holds exactly the registered mms, and the cursor one of them or the head."""
    ctl = world.ctl[0]
    count = 0
    found = ctl["cursor_mm"] == 0
    before = 0
    mm = world.mms[0]["ring_next"]
    while mm:
        if mm < 0 or mm >= ctl["mms_used"] or count > ctl["mms_used"] or world.mms[mm]["ring_prev"] != before:
            return RING, mm
        if not world.mms[mm]["flags"] & layout.MM_REGISTERED:
            return RING, mm
        found = found or mm == ctl["cursor_mm"]
        count += 1
        before = mm
        mm = world.mms[mm]["ring_next"]
    if world.mms[0]["ring_prev"] != before or not found:
        return RING, 0
    for mm in range(1, ctl["mms_used"]):
        count -= 1 if world.mms[mm]["flags"] & layout.MM_REGISTERED else 0
    return (RING if count else 0), 0
