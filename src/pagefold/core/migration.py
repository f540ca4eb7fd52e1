"""Own what the machine does to frames under its processes: migration, swap, pins, locks, and emptying a node.

Why a migration is safe at any moment:
1. It is refused while anybody holds the frame beyond its mappings: a pin, a lock, or the merger's own reference.
2. Every entry that names the frame is on its list, so all mappings move together.
3. The stable node's `kpfn` is changed before the old frame forgets the node: at every moment one of the two looks true.
"""

from __future__ import annotations

from pagefold.core import layout
from pagefold.core.compiler import jit
from pagefold.core.frames import copy_content, forget_stable_node, free_if_idle, swap_nid, take_frame, take_frame_on
from pagefold.core.layout import PTE_PRESENT, PTE_SWAPPED, PTE_ZERO, World
from pagefold.core.memory import own_page
from pagefold.core.space import find_vma, pte_of
from pagefold.core.walk import all_mappings_found


@jit
def is_held(world: World, pfn: int) -> bool:
    """Tell whether somebody holds the frame beyond its mappings, so that it may not move or be replaced."""
    return world.frames[pfn]["holds"] != 0


@jit
def can_move(world: World, pfn: int) -> bool:
    """Tell whether nobody holds the frame, and all its mappings can be found."""
    return not is_held(world, pfn) and all_mappings_found(world, pfn)


@jit
def migrate_frame(world: World, pfn: int, fresh: int, entry_flags: int) -> None:
    """Move a frame's content and all its mappings to `fresh`, each entry keeping its flags or getting `entry_flags`.

    The order is the kernel's: mappings, then the stable node's kpfn, and only then does the old frame forget its
    stable node. Between the last two both frames name it, and `kpfn` says which one counts.
    """
    if is_held(world, pfn):
        world.ctl[0]["refuse_broken"] += 1
    copy_content(world, fresh, pfn)
    frame = world.frames[pfn]
    target = world.frames[fresh]
    pte = frame["first_pte"]
    while pte:
        entry = world.ptes[pte]
        entry["pfn"] = fresh
        if entry_flags:
            entry["flags"] = entry_flags
        pte = entry["next"]
    target["first_pte"] = frame["first_pte"]
    target["mapcount"] = frame["mapcount"]
    if not entry_flags:
        target["mapping"] = frame["mapping"]
        if frame["mapping"] > layout.KSM_LONE:
            world.stables[frame["mapping"]]["kpfn"] = fresh
            world.ctl[0]["bypasses"] += 1
        frame["mapping"] = 0
    frame["first_pte"] = 0
    frame["mapcount"] = 0
    forget_stable_node(world, pfn)
    free_if_idle(world, pfn)


@jit
def present_frame(world: World, mm: int, vpn: int) -> int:
    """Return the frame of a present page, ABSENT, THE_ZERO_PAGE or NO_AREA."""
    vma = find_vma(world, mm, vpn)
    if vma == 0:
        return layout.NO_AREA
    entry = world.ptes[pte_of(world, vma, vpn)]
    if entry["flags"] & PTE_ZERO:
        return layout.THE_ZERO_PAGE
    return entry["pfn"] if entry["flags"] & PTE_PRESENT else layout.ABSENT


@jit
def move_page(world: World, mm: int, vpn: int, nid: int) -> int:
    """Move one page to a node with all its mappings (move_pages with MPOL_MF_MOVE_ALL); choices 10."""
    if nid < 0 or nid >= swap_nid(world) or not world.nodes[nid]["online"]:
        return layout.NO_NODE
    pfn = present_frame(world, mm, vpn)
    if pfn < 0:
        return pfn
    if world.frames[pfn]["nid"] == nid:
        return layout.SAME
    if not can_move(world, pfn):
        return layout.BUSY
    fresh = take_frame_on(world, nid)
    if fresh == 0:
        return layout.NO_MEMORY
    migrate_frame(world, pfn, fresh, 0)
    return layout.OK


@jit
def swap_out(world: World, mm: int, vpn: int) -> int:
    """Swap one page out of every process that maps it; a KSM page thereby loses its stable node (choices 11)."""
    pfn = present_frame(world, mm, vpn)
    if pfn < 0:
        return pfn
    if not can_move(world, pfn):
        return layout.BUSY
    slot = take_frame_on(world, swap_nid(world))
    if slot == 0:
        return layout.NO_MEMORY
    migrate_frame(world, pfn, slot, PTE_SWAPPED)
    world.ctl[0]["trees_changed"] = 1
    return layout.OK


@jit
def pin_page(world: World, mm: int, vpn: int) -> int:
    """Pin a page for long, as a registered I/O buffer is; return its frame or a status (choices 8)."""
    vma = find_vma(world, mm, vpn)
    if vma == 0:
        return layout.NO_AREA
    pte = pte_of(world, vma, vpn)
    status = own_page(world, vma, pte)
    if status < 0:
        return status
    frame = world.frames[world.ptes[pte]["pfn"]]
    if frame["holds"] & layout.HOLD_PINS == layout.HOLD_PINS:
        return layout.BUSY
    frame["holds"] += layout.HOLD_PIN
    return world.ptes[pte]["pfn"]


@jit
def unpin_frame(world: World, pfn: int) -> int:
    """Drop a pin of a frame."""
    if world.frames[pfn]["holds"] & layout.HOLD_PINS == 0:
        return layout.ABSENT
    world.frames[pfn]["holds"] -= layout.HOLD_PIN
    free_if_idle(world, pfn)
    return layout.OK


@jit
def lock_frame(world: World, mm: int, vpn: int) -> int:
    """Lock the frame of a present page, as some other user of it would; return the frame or a status."""
    pfn = present_frame(world, mm, vpn)
    if pfn < 0:
        return pfn
    if world.frames[pfn]["holds"] & layout.HOLD_LOCK:
        return layout.BUSY
    world.frames[pfn]["holds"] |= layout.HOLD_LOCK
    return pfn


@jit
def unlock_frame(world: World, pfn: int) -> int:
    """Drop a frame's lock."""
    if not world.frames[pfn]["holds"] & layout.HOLD_LOCK:
        return layout.ABSENT
    world.frames[pfn]["holds"] ^= layout.HOLD_LOCK
    free_if_idle(world, pfn)
    return layout.OK


@jit
def empty_node(world: World, nid: int) -> int:
    """Move every used frame of a node that takes no part in allocation elsewhere; BUSY or NO_MEMORY move none."""
    nodes = swap_nid(world)
    used = world.nodes[nid]["total"] - world.nodes[nid]["free"]
    room = 0
    for other in range(nodes):
        room += world.nodes[other]["free"] if world.nodes[other]["online"] else 0
    for pfn in range(1, len(world.frames)):
        if world.frames[pfn]["nid"] == nid and not can_move(world, pfn):
            return layout.BUSY
    if room < used:
        return layout.NO_MEMORY
    for pfn in range(1, len(world.frames)):
        if world.frames[pfn]["nid"] == nid and world.frames[pfn]["mapcount"]:
            migrate_frame(world, pfn, take_frame(world, (nid + 1) % nodes), 0)
    return layout.OK
