"""Own the points at which others may act while the merger works.

`checkpoint(world, gap)` stands at every gap of spec section 10. In normal use it reads one field. When a schedule is
armed it applies the events that are due (events.py), with whatever the locks of that moment allow; when it is armed to be
judged, every invariant is checked after each of them (invariants.py), so that what breaks and mends itself within a step is seen.
"""

from __future__ import annotations

from pagefold.core.compiler import jit
from pagefold.core.events import apply_event
from pagefold.core.invariants import judge
from pagefold.core.layout import JUDGED, World


@jit
def run_schedule(world: World, gap: int) -> None:
    """Apply the events that are due at this checkpoint, in their order, and note where and how they ended."""
    ctl = world.ctl[0]
    ctl["checkpoints"] += 1
    while ctl["schedule_next"] < ctl["schedule_used"]:
        event = world.schedule[ctl["schedule_next"]]
        if event["at"] > ctl["checkpoints"]:
            break
        ctl["schedule_next"] += 1
        args = event["args"]
        event["gap"] = gap
        event["status"] = apply_event(world, event["code"], args[0], args[1], args[2], args[3])
        if ctl["armed"] == JUDGED and ctl["broken"] == 0:
            ctl["broken"], ctl["broken_where"] = judge(world)


@jit
def checkpoint(world: World, gap: int) -> None:
    """Let others act here if a schedule is armed."""
    if world.ctl[0]["armed"]:
        run_schedule(world, gap)
