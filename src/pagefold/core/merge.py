"""Own the merge itself: write protection, the last comparison, redirection of a mapping (spec 4.6 and 4.7).

Why a merge never loses or mixes data:
1. The frame is locked and nobody but us holds it beyond its mappings: no pin, no I/O, no migration under way.
2. The right to write is taken from the entry; from here a write faults and makes a copy, which changes the entry.
3. Contents are compared now, when neither page can change: the KSM page has no writable entry either.
4. The entry is redirected only if it still is what we made of it. Any failure leaves the process's memory as it was.
"""

from __future__ import annotations

from pagefold.core import layout
from pagefold.core.checkpoint import checkpoint
from pagefold.core.compiler import jit
from pagefold.core.frames import content_order, forget_stable_node, map_page, unmap_page, write_intent
from pagefold.core.layout import (
    GAP_FIRST_MERGED,
    GAP_WRITE_PROTECTED,
    KSM_LONE,
    PTE_PRESENT,
    PTE_WRITABLE,
    World,
)
from pagefold.core.memory import break_page, map_zero
from pagefold.core.rmap import find_mergeable_vma, remove_rmap_item_from_tree
from pagefold.core.space import pte_of

MAKE_KSM = 0  # as `kpage`: mark the page itself
ZERO_PAGE = -1  # as `kpage`: map the zero page
_OURS = layout.HOLD_LOCK | layout.HOLD_REF  # what holds a page in the middle of a merge: our lock and our reference


@jit
def write_protect_page(world: World, pte: int, page: int) -> bool:
    """Take the right to write from the entry; refused if anyone holds a reference beyond mappings and our own one.

    Mainline: a KSM page is refused too. It has left the reverse map of the process it came from, by which the kernel looks for the
    entry: so a lone KSM page that forked processes still map, and a migrated one that meets its equal, never merge (choices 26).
    The pagefold rules go to the entry by the rmap_item's own address, and may.
    """
    frame = world.frames[page]
    entry = world.ptes[pte]
    if frame["mapping"] and world.ctl[0]["rules"] == layout.MAINLINE:
        return False
    if not entry["flags"] & PTE_PRESENT or entry["pfn"] != page or frame["holds"] != _OURS:
        return False
    entry["flags"] &= ~PTE_WRITABLE
    return True


@jit
def redirect(world: World, mm: int, vpn: int, pte: int, page: int, kpage: int) -> None:
    """Let the entry map the KSM page (or the zero page) instead, and note any promise this would break."""
    ctl = world.ctl[0]
    if world.frames[page]["holds"] != _OURS:
        ctl["refuse_broken"] += 1
    unmap_page(world, pte)
    if kpage == ZERO_PAGE:
        map_zero(world, mm, pte)
        write_intent(world, layout.INTENT_ZERO, mm, vpn, page, 0)
        return
    if not ctl["merge_across_nodes"] and world.frames[page]["nid"] != world.frames[kpage]["nid"]:
        ctl["placement_broken"] += 1
    map_page(world, pte, kpage, PTE_PRESENT)
    write_intent(world, layout.INTENT_REDIRECT, mm, vpn, page, kpage)


@jit
def is_zero(world: World, page: int) -> bool:
    """Tell whether the frame holds a page of zeroes."""
    return world.contents[page]["hi"] == 0 and world.contents[page]["lo"] == 0


@jit
def replace_page(world: World, mm: int, vpn: int, pte: int, page: int, kpage: int) -> bool:
    """Compare and redirect a page that is locked and write-protected."""
    checkpoint(world, GAP_WRITE_PROTECTED)
    equal = is_zero(world, page) if kpage == ZERO_PAGE else content_order(world, page, kpage) == 0
    entry = world.ptes[pte]
    if not equal or entry["flags"] != PTE_PRESENT or entry["pfn"] != page:
        return False
    redirect(world, mm, vpn, pte, page, kpage)
    return True


@jit
def try_to_merge_one_page(world: World, mm: int, vpn: int, pte: int, page: int, kpage: int) -> bool:
    """Merge a mapping of `page`, which we hold one reference on, with `kpage`, MAKE_KSM or ZERO_PAGE."""
    if page == kpage:  # inherited by fork
        return True
    frame = world.frames[page]
    if frame["holds"] & layout.HOLD_LOCK:
        return False
    frame["holds"] |= layout.HOLD_LOCK
    merged = write_protect_page(world, pte, page)
    if merged and kpage == MAKE_KSM:
        forget_stable_node(world, page)  # it has one if its search gave nothing: that node goes stale
        frame["mapping"] = KSM_LONE
        write_intent(world, layout.INTENT_PROTECT, mm, vpn, page, page)
    elif merged:
        merged = replace_page(world, mm, vpn, pte, page, kpage)
    frame["holds"] &= layout.HOLD_COUNT
    return merged


@jit
def try_to_merge_item(world: World, item: int, page: int, kpage: int) -> bool:
    """As `try_to_merge_one_page`, with the mmap lock of the item's mm held for reading; False if its area is gone."""
    vma = find_mergeable_vma(world, item)
    if vma == 0:
        return False
    mm = world.rmaps[item]["mm"]
    vpn = world.rmaps[item]["vpn"]
    world.mms[mm]["flags"] |= layout.MM_LOCKED
    merged = try_to_merge_one_page(world, mm, vpn, pte_of(world, vma, vpn), page, kpage)
    world.mms[mm]["flags"] &= ~layout.MM_LOCKED
    return merged


@jit
def try_to_merge_with_ksm_page(world: World, item: int, page: int, kpage: int) -> bool:
    """Merge with a KSM page (or MAKE_KSM); on success the item is off its tree, ready to be appended."""
    if not try_to_merge_item(world, item, page, kpage):
        return False
    remove_rmap_item_from_tree(world, item)
    return True


@jit
def break_cow(world: World, item: int) -> None:
    """Break a KSM page that got no stable node back into an anonymous one; without memory it stays, harmless."""
    vma = find_mergeable_vma(world, item)
    if vma:
        break_page(world, vma, world.rmaps[item]["vpn"])


@jit
def try_to_merge_two_pages(world: World, item: int, page: int, tree_item: int, tree_page: int) -> bool:
    """Make `page` a KSM page and merge its partner with it; if the partner fails, nothing is merged."""
    if not try_to_merge_with_ksm_page(world, item, page, MAKE_KSM):
        return False
    checkpoint(world, GAP_FIRST_MERGED)
    if try_to_merge_with_ksm_page(world, tree_item, tree_page, page):
        return True
    break_cow(world, item)
    return False
