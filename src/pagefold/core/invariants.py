"""Own the judge: every invariant of spec section 9 that can be seen in a state, checked by walking all structures.

`check` returns the number of the first invariant that is broken and the index of what breaks it; `NAMES` has the spec's
names. It only reads, and trusts nothing: every walk is bounded, so that a corrupt link cannot hang it.
"""

from __future__ import annotations

from pagefold.core.compiler import entry, jit
from pagefold.core.judge_memory import check_frames, check_ring, check_spaces
from pagefold.core.judge_merger import (
    check_lists,
    check_looked_at,
    check_order,
    check_places,
    check_sharing_limit,
    check_trusted_keys,
    check_unstable,
)
from pagefold.core.layout import World

NAMES = (
    *("", "one-place", "order", "red-black", "lists", "counters", "keyhole", "data", "placement", "refuse"),
    *("frames", "page-tables", "ring", "unstable"),
)
PLACEMENT, REFUSE = 8, 9


@jit
def judge(world: World) -> tuple[int, int]:
    """Return (0, 0), or the first broken invariant's number and the index of what breaks it; O(size of the world)."""
    ctl = world.ctl[0]
    if ctl["placement_broken"]:
        return PLACEMENT, 0
    if ctl["refuse_broken"]:
        return REFUSE, 0
    broken, where = check_places(world)
    if broken == 0:
        broken, where = check_order(world)
    if broken == 0:
        broken, where = check_unstable(world)
    if broken == 0:
        broken, where = check_lists(world)
    if broken == 0:
        broken, where = check_sharing_limit(world)
    if broken == 0:
        broken, where = check_frames(world)
    if broken == 0:
        broken, where = check_spaces(world)
    if broken == 0:
        broken, where = check_trusted_keys(world)
    if broken == 0:
        broken, where = check_ring(world)
    if broken == 0:
        broken, where = check_looked_at(world)
    return broken, where


@entry
def check(world: World) -> tuple[int, int]:
    """Judge a world, for Python."""
    return judge(world)
