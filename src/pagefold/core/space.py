"""Own address spaces: areas, and the runs of page-table entries they own.

Areas of an mm are a list by address. Runs of entries come from one array; free runs are a list by index whose neighbours
join. Must not know frames' contents or rules of merging.
"""

from __future__ import annotations

from pagefold.core import layout
from pagefold.core.arena import give_vma, take_vma
from pagefold.core.compiler import jit
from pagefold.core.layout import World


@jit
def take_ptes(world: World, count: int) -> int:
    """Return the first of `count` neighbouring empty entries (first fit), 0 if the array must grow."""
    ctl = world.ctl[0]
    before = 0
    run = ctl["ptes_free"]
    while run and world.ptes[run]["pfn"] < count:
        before = run
        run = world.ptes[run]["next"]
    if run == 0:
        run = ctl["ptes_used"]
        if run + count > len(world.ptes):
            return 0
        ctl["ptes_used"] = run + count
        return run
    rest = world.ptes[run]["pfn"] - count
    after = world.ptes[run]["next"]
    if rest:
        world.ptes[run + count]["pfn"] = rest
        world.ptes[run + count]["next"] = after
        after = run + count
    if before:
        world.ptes[before]["next"] = after
    else:
        ctl["ptes_free"] = after
    world.ptes[run]["pfn"] = 0
    world.ptes[run]["next"] = 0
    return run


@jit
def give_ptes(world: World, first: int, count: int) -> None:
    """Put a run of empty entries back and join it with free neighbours."""
    ctl = world.ctl[0]
    before = 0
    after = ctl["ptes_free"]
    while after and after < first:
        before = after
        after = world.ptes[after]["next"]
    if after and first + count == after:
        count += world.ptes[after]["pfn"]
        following = world.ptes[after]["next"]
        world.ptes[after]["pfn"] = 0
        world.ptes[after]["next"] = 0
        after = following
    if before and before + world.ptes[before]["pfn"] == first:
        world.ptes[before]["pfn"] += count
        world.ptes[before]["next"] = after
        return
    world.ptes[first]["pfn"] = count
    world.ptes[first]["next"] = after
    if before:
        world.ptes[before]["next"] = first
    else:
        ctl["ptes_free"] = first


@jit
def is_area_of(world: World, vma: int, mm: int, vpn: int) -> bool:
    """Tell whether area slot `vma` holds page `vpn` of `mm`; areas never overlap, so it is then the only one."""
    area = world.vmas[vma]
    return area["mm"] == mm and area["start"] <= vpn < area["end"]


@jit
def vma_from(world: World, mm: int, vpn: int) -> int:
    """Return the first area that ends after `vpn`, 0 if there is none."""
    vma = world.mms[mm]["vma_first"]
    while vma and world.vmas[vma]["end"] <= vpn:
        vma = world.vmas[vma]["next"]
    return vma


@jit
def find_vma(world: World, mm: int, vpn: int) -> int:
    """Return the area that holds `vpn`, 0 if none does."""
    vma = vma_from(world, mm, vpn)
    return vma if vma and world.vmas[vma]["start"] <= vpn else 0


@jit
def pte_of(world: World, vma: int, vpn: int) -> int:
    """Return the page-table entry of a page of the area."""
    return world.vmas[vma]["pte_base"] + vpn - world.vmas[vma]["start"]


@jit
def add_vma(world: World, mm: int, start: int, count: int, node: int, flags: int) -> int:
    """Make an area behind all others of the mm; return its slot or NEED_*, which changes nothing."""
    base = take_ptes(world, count)
    if base == 0:
        return layout.NEED_PTES
    vma = take_vma(world)
    if vma == 0:
        give_ptes(world, base, count)
        return layout.NEED_VMAS
    area = world.vmas[vma]
    area["start"] = start
    area["end"] = start + count
    area["pte_base"] = base
    area["mm"] = mm
    area["next"] = 0
    area["node"] = node
    area["flags"] = flags
    last = world.mms[mm]["vma_first"]
    if last == 0:
        world.mms[mm]["vma_first"] = vma
        return vma
    while world.vmas[last]["next"]:
        last = world.vmas[last]["next"]
    world.vmas[last]["next"] = vma
    return vma


@jit
def split_vma(world: World, vma: int, vpn: int) -> int:
    """Cut the area in two so that the second begins at `vpn`, inside it; return the second or NEED_VMAS."""
    second = take_vma(world)
    if second == 0:
        return layout.NEED_VMAS
    area = world.vmas[vma]
    behind = world.vmas[second]
    behind["start"] = vpn
    behind["end"] = area["end"]
    behind["pte_base"] = area["pte_base"] + vpn - area["start"]
    behind["mm"] = area["mm"]
    behind["next"] = area["next"]
    behind["node"] = area["node"]
    behind["flags"] = area["flags"]
    area["end"] = vpn
    area["next"] = second
    return second


@jit
def cut_vma(world: World, vma: int, start: int, end: int) -> int:
    """Split so that one area is exactly the overlap of `vma` with [start, end); return it or NEED_VMAS."""
    if world.vmas[vma]["start"] < start:
        vma = split_vma(world, vma, start)
        if vma < 0:
            return vma
    if world.vmas[vma]["end"] > end:
        behind = split_vma(world, vma, end)
        if behind < 0:
            return behind
    return vma


@jit
def drop_vma(world: World, vma: int) -> None:
    """Take an area whose entries are all empty off its mm, and give back its entries and its slot."""
    area = world.vmas[vma]
    mm = world.mms[area["mm"]]
    if mm["vma_first"] == vma:
        mm["vma_first"] = area["next"]
    else:
        before = mm["vma_first"]
        while world.vmas[before]["next"] != vma:
            before = world.vmas[before]["next"]
        world.vmas[before]["next"] = area["next"]
    give_ptes(world, area["pte_base"], area["end"] - area["start"])
    give_vma(world, vma)


@jit
def wished_node(world: World, vma: int) -> int:
    """Return the node on which fresh pages of the area are wanted (choices 1)."""
    node = world.vmas[vma]["node"]
    return node if node >= 0 else world.mms[world.vmas[vma]["mm"]]["node"]
