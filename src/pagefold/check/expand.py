"""Own what is explored of a state: every move, and every step with every choice of moves at its checkpoints.

How many checkpoints a step passes depends on what happens inside it, so each step is made first without, then with one move at
each checkpoint that it passed, then with a further one at that or a later checkpoint, and so on. A move that changes nothing is not
followed by others: the same step without it is explored anyway.
"""

from __future__ import annotations

import numpy as np

from pagefold.check.bench import (
    ACROSS,
    MOST_CHECKPOINTS,
    MOST_INSIDE,
    MOVE,
    ONLINE,
    SHARING,
    STEP,
    Bench,
    Found,
    how_of,
    kind_of,
    load_image,
    pair_of,
    with_inside,
)
from pagefold.check.fingerprint import fingerprint
from pagefold.check.settle import what_follows
from pagefold.check.transitions import go, live_processes
from pagefold.check.visited import is_in, put_in
from pagefold.core import events, layout
from pagefold.core.compiler import entry, jit
from pagefold.core.events import is_live
from pagefold.core.invariants import judge
from pagefold.core.layout import Records

DONE = 0
FULL = 1  # no room for more new states (or in the worker's set): empty it and go on
BROKEN = 2  # an invariant is: tally says which and how
TOO_SMALL = 3  # the world has fewer records than its moves need
_NO_HOW = np.uint64(0)


@jit
def note(bench: Bench, how: np.uint64, parent: int, seen: Records, own: Records, found: Found, tally: Records) -> int:
    """Judge the present state and write it out if it is new; DONE, FULL or BROKEN."""
    ctl = bench.world.ctl[0]
    broken = ctl["broken"]
    where = ctl["broken_where"]
    if broken == 0:
        broken, where = judge(bench.world)
    if broken:
        tally["broken"] = broken
        tally["where"] = where
        tally["how"] = how
        return BROKEN
    print_ = fingerprint(bench)
    if is_in(seen, print_) or is_in(own, print_):
        return DONE
    place = tally["found"]
    if place == len(found.parents) or 4 * tally["seen"] >= 3 * len(own):
        return FULL
    put_in(own, print_)
    tally["seen"] += 1
    tally["found"] = place + 1
    found.parents[place] = parent
    found.hows[place] = how
    found.prints[place] = print_
    for index in range(len(bench.image)):
        found.images[place, index] = bench.image[index]
    return DONE


@jit
def changed_something(code: int, status: int) -> bool:
    """Tell from its status whether a move did anything."""
    if code in (events.WRITE, events.MOVE, ONLINE, ACROSS, SHARING):
        return status == layout.OK
    return status > 0 if code == events.UNMAP else status >= 0


@jit
def is_new_way(bench: Bench, how: np.uint64, status: int) -> bool:
    """Tell whether the last move of a transition did anything, and count what happened: else the same is reached without it."""
    if kind_of(how) == MOVE:
        _, number = pair_of(how, 0)
        if not changed_something(bench.moves[number]["code"], status):
            return False
        bench.made[0] += bench.budget > 0
        return True
    happened = 0
    for place in range(bench.inside):
        _, number = pair_of(how, place)
        if number:
            if not changed_something(bench.moves[number]["code"], bench.world.schedule[place]["status"]):
                return False
            happened += 1
    if bench.budget:
        bench.made[0] += happened
    return True


@jit
def attempt(
    bench: Bench, image: Records, how: np.uint64, parent: int, seen: Records, own: Records, found: Found, tally: Records
) -> tuple[int, int]:
    """Make one transition from a state: return DONE, FULL, BROKEN or TOO_SMALL, and what `go` returned."""
    load_image(bench, image)
    passed = go(bench, how)
    if passed <= layout.NEED_MMS:
        return TOO_SMALL, passed
    tally["transitions"] += 1
    if not is_new_way(bench, how, passed):
        return DONE, passed
    return note(bench, how, parent, seen, own, found, tally), passed


@jit
def live_mask(bench: Bench) -> int:
    """Return the present state's live processes as bits."""
    mask = 0
    for mm in range(1, bench.world.ctl[0]["mms_used"]):
        if is_live(bench.world, mm):
            mask |= 1 << mm
    return mask


@jit
def can_happen(bench: Bench, number: int, living: int, room: int) -> bool:
    """Tell whether a move inside may do anything: its process is one of those living, and there is `room` for a child."""
    move = bench.moves[number]
    code = move["code"]
    if not move["inside"] or (code == events.FORK and room == 0):
        return False
    return code in (events.UNPIN, events.UNLOCK) or living >> move["args"][0] & 1 == 1


@jit
def go_deeper(bench: Bench, depth: int, passed: int) -> None:
    """Prepare the choices that follow the one at `depth`: who lives is known from what it was, since no step makes or ends a process."""
    here = bench.choices[depth]
    below = bench.choices[depth + 1]
    move = bench.moves[here["number"]]
    below["at"] = here["at"]
    below["number"] = 0
    below["passed"] = passed
    below["living"] = here["living"]
    below["room"] = here["room"]
    if move["code"] == events.FORK:
        below["living"] |= 1 << bench.world.schedule[depth]["status"]
        below["room"] -= 1
    elif move["code"] == events.EXIT:
        below["living"] &= ~(1 << move["args"][0])
        below["room"] += 1


@jit
def moves_left(bench: Bench, image: Records) -> int:
    """Return how many more events the budget allows behind a state."""
    return bench.budget - int(np.int64(image[len(image) - 1])) if bench.budget else MOST_INSIDE


@jit
def expand_steps(
    bench: Bench, image: Records, parent: int, seen: Records, own: Records, found: Found, tally: Records
) -> int:
    """Make the next step of the scanner in every way, with up to `bench.inside` moves inside."""
    load_image(bench, image)
    choices = bench.choices
    choices[0]["living"] = live_mask(bench)
    choices[0]["room"] = bench.most_live - live_processes(bench.world)
    choices[0]["at"] = 1
    choices[0]["number"] = 0
    choices[0]["how"] = how_of(STEP, 0, 0)
    status, passed = attempt(bench, image, choices[0]["how"], parent, seen, own, found, tally)
    most = min(bench.inside, moves_left(bench, image))
    if status or most == 0:
        return status
    choices[0]["passed"] = passed
    depth = 0
    while depth >= 0:
        choice = choices[depth]
        choice["number"] += 1
        if choice["number"] == len(bench.moves):
            choice["number"] = 1
            choice["at"] += 1
        if choice["at"] > choice["passed"]:
            depth -= 1
            continue
        if not can_happen(bench, choice["number"], choice["living"], choice["room"]):
            continue
        how = with_inside(choice["how"], depth, choice["at"], choice["number"])
        status, passed = attempt(bench, image, how, parent, seen, own, found, tally)
        if status:
            return status
        done = bench.world.schedule[depth]["status"]
        if done <= layout.NEED_MMS or passed > MOST_CHECKPOINTS:
            return TOO_SMALL
        tally["checkpoints"] = max(tally["checkpoints"], passed)
        if depth + 1 < most and changed_something(bench.moves[choice["number"]]["code"], done):
            go_deeper(bench, depth, passed)
            depth += 1
            choices[depth]["how"] = how
    return DONE


@jit
def expand_state(
    bench: Bench, image: Records, parent: int, seen: Records, own: Records, found: Found, tally: Records
) -> int:
    """Ask a state what follows if nothing happens any more, then make every transition from it."""
    broken, where = what_follows(bench, image)
    if broken:
        tally["broken"] = broken
        tally["where"] = where
        tally["how"] = _NO_HOW
        return BROKEN
    for number in range(1, len(bench.moves) if moves_left(bench, image) else 1):
        status, _ = attempt(bench, image, how_of(MOVE, 0, number), parent, seen, own, found, tally)
        if status:
            return status
    return expand_steps(bench, image, parent, seen, own, found, tally)


@entry
def expand(
    bench: Bench, images: Records, last: int, seen: Records, own: Records, found: Found, tallies: Records
) -> int:
    """Expand the states from tally.next to `last` (excluded): DONE, or FULL, BROKEN, TOO_SMALL at tally.next.

    After FULL, empty `found` (set tally.found to 0; its states stay in `own`), or grow `own`, and call again.
    """
    tally = tallies[0]
    while tally["next"] < last:
        transitions = tally["transitions"]
        index = tally["next"]
        status = expand_state(bench, images[index], index, seen, own, found, tally)
        if status:
            if status == FULL:
                tally["transitions"] = transitions
            return status
        tally["next"] += 1
    return DONE


@entry
def replay(bench: Bench, how: np.uint64) -> int:
    """Make one transition from the present state; as `go`."""
    return go(bench, how)


@entry
def ask(bench: Bench, image: Records) -> tuple[int, int]:
    """Ask a state what follows if nothing happens any more (settle.py); the present state is lost."""
    return what_follows(bench, image)


@entry
def print_of(bench: Bench) -> np.uint64:
    """Return the fingerprint of the present state."""
    return fingerprint(bench)
