"""Own the transitions: making one move, or one page step of the scanner with moves at its checkpoints.

Events obey the locks of spec section 10, because the core's own events do. A memory offline takes the merger's mutex, and so
does a knob: they happen between steps only.
"""

from __future__ import annotations

import numpy as np

from pagefold.check.bench import ACROSS, MOVE, OFFLINE, ONLINE, UNMERGE, Bench, kind_of, pair_of
from pagefold.core import events, layout
from pagefold.core.compiler import jit
from pagefold.core.doors import SET_MAX_PAGE_SHARING, SET_MERGE_ACROSS_NODES, TAKE_OFFLINE, UNMERGE_ALL, apply_control
from pagefold.core.frames import swap_nid
from pagefold.core.layout import World
from pagefold.core.scan import scan_page


@jit
def live_processes(world: World) -> int:
    """Return how many processes live."""
    count = 0
    for mm in range(1, world.ctl[0]["mms_used"]):
        count += 1 if world.mms[mm]["flags"] & layout.MM_LIVE else 0
    return count


@jit
def take_offline(world: World, nid: int) -> int:
    """Take a node's memory away, unless it is the last that is online; a status that changes nothing says why not."""
    online = 0
    for one in range(swap_nid(world)):
        online += world.nodes[one]["online"]
    if not world.nodes[nid]["online"] or online == 1:
        return layout.NO_NODE
    world.nodes[nid]["online"] = 0
    status = apply_control(world, TAKE_OFFLINE, nid)
    if status < 0:
        world.nodes[nid]["online"] = 1
    return status


@jit
def make_move(bench: Bench, number: int) -> int:
    """Make a move between two steps; a negative status (or SAME) says that nothing was changed."""
    world = bench.world
    code = bench.moves[number]["code"]
    args = bench.moves[number]["args"]
    if code == events.FORK and live_processes(world) >= bench.most_live:
        return layout.BUSY
    if code < OFFLINE:
        return events.apply_event(world, code, args[0], args[1], args[2], args[3])
    if code == OFFLINE:
        return take_offline(world, args[0])
    if code == ONLINE:
        if world.nodes[args[0]]["online"]:
            return layout.SAME
        world.nodes[args[0]]["online"] = 1
        return layout.OK
    if code == UNMERGE:
        return apply_control(world, UNMERGE_ALL, 0)
    if code == ACROSS:
        same = world.ctl[0]["merge_across_nodes"] == args[0]
        return layout.SAME if same else apply_control(world, SET_MERGE_ACROSS_NODES, args[0])
    same = world.ctl[0]["max_page_sharing"] == args[0]
    return layout.SAME if same else apply_control(world, SET_MAX_PAGE_SHARING, args[0])


@jit
def arm(bench: Bench, how: np.uint64) -> None:
    """Arm the moves that are to happen inside the next step, each to be judged."""
    world = bench.world
    ctl = world.ctl[0]
    count = 0
    for place in range(bench.inside):
        at, number = pair_of(how, place)
        if number:
            record = world.schedule[count]
            record["at"] = at
            record["code"] = bench.moves[number]["code"]
            record["gap"] = 0
            record["status"] = layout.BLOCKED
            for index in range(4):
                record["args"][index] = bench.moves[number]["args"][index]
            count += 1
    ctl["schedule_used"] = count
    ctl["schedule_next"] = 0
    ctl["checkpoints"] = 0
    ctl["armed"] = layout.JUDGED


@jit
def go(bench: Bench, how: np.uint64) -> int:
    """Make a transition; return a status (negative: nothing was changed), or for a step how many checkpoints it passed.

    What the moves inside a step did is in the schedule's records. NEED_* says that the small world is too small for itself.
    """
    if kind_of(how) == MOVE:
        _, number = pair_of(how, 0)
        return make_move(bench, number)
    ctl = bench.world.ctl[0]
    arm(bench, how)
    status = scan_page(bench.world)
    passed = ctl["checkpoints"]
    ctl["armed"] = 0
    ctl["schedule_used"] = 0
    ctl["schedule_next"] = 0
    ctl["checkpoints"] = 0
    return status if status < 0 else passed
