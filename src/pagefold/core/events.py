"""Own what processes and the kernel may do to a world, as numbered events: one code and up to four integers.

The same events serve the typed door (`machine.py`), and the schedule that a checkpoint applies in the middle of a scan. Locks of
that moment are obeyed: what needs an mm's mmap lock for writing is BLOCKED while the merger holds it for reading.
"""

from __future__ import annotations

import numpy as np

from pagefold.core import layout, memory, migration
from pagefold.core.advice import advise, set_merge_any
from pagefold.core.compiler import jit
from pagefold.core.layout import World
from pagefold.core.space import find_vma, pte_of

SPAWN = 1  # node
MAP = 2  # mm, start (0: next free), count, flags * 65536 + node + 1
UNMAP = 3  # mm, start, count
WRITE = 4  # mm, vpn, lo, hi
TOUCH = 5  # mm, vpn
FORK = 6  # mm, node or -1
EXIT = 7  # mm
ADVISE = 8  # mm, start, count, 1 mergeable or 0
MERGE_ANY = 9  # mm, 1 or 0
PIN = 10  # mm, vpn
UNPIN = 11  # frame
LOCK = 12  # mm, vpn
UNLOCK = 13  # frame
MOVE = 14  # mm, vpn, node
SWAP_OUT = 15  # mm, vpn
REFUSE = 16  # mm, vpn, serial: as if the process had just written the page

NAMES = (
    *("", "spawn", "map", "unmap", "write", "touch", "fork", "exit", "advise", "merge_any"),
    *("pin", "unpin", "lock", "unlock", "move", "swap_out", "refuse"),
)


@jit
def is_live(world: World, mm: int) -> bool:
    """Tell whether `mm` names a live process."""
    return 0 < mm < world.ctl[0]["mms_used"] and world.mms[mm]["flags"] & layout.MM_LIVE != 0


@jit
def apply_event(world: World, code: int, a: int, b: int, c: int, d: int) -> int:
    """Apply one event; return what it made (an mm, an address, a frame, an entry) or a status."""
    if code == SPAWN:
        return memory.spawn(world, a)
    if code == UNPIN:
        return migration.unpin_frame(world, a)
    if code == UNLOCK:
        return migration.unlock_frame(world, a)
    if not is_live(world, a):
        return layout.NO_PROCESS
    if code == WRITE:
        return memory.write_page(world, a, b, np.uint64(np.int64(d)), np.uint64(np.int64(c)))
    if code == TOUCH:
        return memory.touch_page(world, a, b)
    if code == PIN:
        return migration.pin_page(world, a, b)
    if code == LOCK:
        return migration.lock_frame(world, a, b)
    if code == MOVE:
        return migration.move_page(world, a, b, c)
    if code == SWAP_OUT:
        return migration.swap_out(world, a, b)
    if code == REFUSE:
        return refuse_page(world, a, b) if world.mms[a]["serial"] == c else layout.NO_PROCESS
    if world.mms[a]["flags"] & layout.MM_LOCKED:
        return layout.BLOCKED
    return apply_writing_event(world, code, a, b, c, d)


@jit
def apply_writing_event(world: World, code: int, a: int, b: int, c: int, d: int) -> int:
    """Apply an event that takes the mmap lock of live mm `a` for writing."""
    if code == MAP:
        return memory.map_area(world, a, b, c, d % 65536 - 1, d // 65536)
    if code == UNMAP:
        return memory.unmap_area(world, a, b, c)
    if code == FORK:
        return memory.fork(world, a, b)
    if code == ADVISE:
        return advise(world, a, b, c, d != 0)
    if code == MERGE_ANY:
        return set_merge_any(world, a, b != 0)
    memory.exit_mm(world, a)
    return layout.OK


@jit
def refuse_page(world: World, mm: int, vpn: int) -> int:
    """Undo the merge of one page as a write would, and let it pass the calm test anew."""
    vma = find_vma(world, mm, vpn)
    if vma == 0:
        return layout.NO_AREA
    status = memory.own_page(world, vma, pte_of(world, vma, vpn))
    if status < 0:
        return status
    item = world.mms[mm]["rmap_list"]
    while item and world.rmaps[item]["vpn"] < vpn:
        item = world.rmaps[item]["rmap_next"]
    if item and world.rmaps[item]["vpn"] == vpn:
        world.rmaps[item]["flags"] &= ~layout.RMAP_CALM_KNOWN
    return layout.OK
