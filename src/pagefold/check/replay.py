"""Own paths: making one again, step by step, and saying it in words a kernel engineer reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagefold.check import settle
from pagefold.check.bench import CODE_NAMES, MOST_INSIDE, MOVE, STEP
from pagefold.check.engines import SHIPPED, Explored
from pagefold.check.worlds import SmallWorld, new_bench
from pagefold.core import events, invariants, layout
from pagefold.engine import Engine
from pagefold.errors import UsageError
from pagefold.machine import Machine

_WHY_NOT = {
    layout.SAME: "nothing to do",
    layout.ABSENT: "no page there",
    layout.BUSY: "busy",
    layout.NO_MEMORY: "no frame left",
    layout.NO_AREA: "not mapped",
    layout.NO_NODE: "no such node",
    layout.BLOCKED: "waits for the mmap lock",
    layout.NO_PROCESS: "gone",
    layout.THE_ZERO_PAGE: "the zero page",
}
_FIRST_VPN = 16


@dataclass(frozen=True)
class Stage:
    """One transition of a path: what it was in words, the trees' engine after it, and what it broke ('': nothing)."""

    how: int
    words: str
    broken: str
    where: int


class Replay:
    """A small world that is led along a path. `engine` shows its present trees and counters."""

    def __init__(self, small: SmallWorld, explored: Explored = SHIPPED, bug: int = 0) -> None:
        self.small = small
        self.explored = explored
        self.bench: Any = new_bench(small, explored, bug)

    def engine(self) -> Engine:
        """Return the present state as an engine, to be looked at and not to be changed."""
        world = self.bench.world
        machine = Machine(nodes=self.small.nodes, frames=1, swap=0)
        engine = Engine(machine, "classic" if self.small.rules == "classic" else "mainline")
        engine.set("merge_across_nodes", int(world.ctl[0]["merge_across_nodes"]))
        shown = layout.World(*(array.copy() for array in world))
        shown.contents["hi"] = 0  # leaves the contents' numbers: 1, 2 ...
        machine._arena.world = shown
        for mm in range(1, int(world.ctl[0]["mms_used"])):
            machine._adopt(mm).alive = bool(world.mms[mm]["flags"] & layout.MM_LIVE)
        return engine

    def go(self, how: int) -> Stage:
        """Make one transition."""
        kind, pairs = _parts(how)
        if kind not in (MOVE, STEP):
            raise UsageError(f"step {how:#x} of the path is not one; use the line that a violation printed")
        numbers = [number for _, number in pairs if number]
        if len(numbers) > max(self.small.inside, 1) or max(numbers, default=0) >= len(self.bench.moves):
            raise UsageError(
                f"step {how:#x} of the path has a move that this world does not know; give the world's options, too"
            )
        status = int(self.explored.expand.replay(self.bench, np.uint64(how)))
        words = self._move(numbers[0], status) if kind == MOVE else self._step(numbers)
        ctl = self.bench.world.ctl[0]
        broken, where = int(ctl["broken"]), int(ctl["broken_where"])
        if not broken:
            broken, where = (int(one) for one in self.explored.invariants.check(self.bench.world))
        return Stage(how, words, invariants.NAMES[broken], where)

    def ask(self) -> tuple[str, int]:
        """Ask the present state what follows if nothing happens any more: the promise it breaks ('': none), and what shows it."""
        image = self.bench.image.copy()
        broken, where = self.explored.expand.ask(self.bench, image)
        self.bench.image[:] = image
        return settle.NAMES[int(broken)], int(where)

    def _move(self, number: int, status: int) -> str:
        """Say a move, and how it ended if it could not be made."""
        move = self.bench.moves[number]
        code, args = int(move["code"]), [int(one) for one in move["args"]]
        said = _say(code, args)
        if code == events.FORK and status > 0:
            return f"{said}: child p{status}"
        if status in _WHY_NOT and (status < 0 or code in (events.MOVE, events.WRITE)):
            return f"{said}: {_WHY_NOT[status]}"
        return said

    def _step(self, numbers: Sequence[int]) -> str:
        """Say a step of the scanner, and what happened inside it."""
        world = self.bench.world
        ctl = world.ctl[0]
        item = int(ctl["cursor_rmap"])
        if int(ctl["cursor_mm"]) == 0:
            said = "scan: the full scan ends"
        else:
            page = int(world.rmaps[item]["vpn"]) - _FIRST_VPN if item else -1
            said = f"scan: p{int(ctl['cursor_mm'])} page {page}"
        inside = []
        for place, number in enumerate(numbers):
            record = world.schedule[place]
            inside.append(f"at {layout.GAP_NAMES[int(record['gap'])]}: {self._move(number, int(record['status']))}")
        return "; ".join([said, *inside])


def _say(code: int, args: Sequence[int]) -> str:
    """Say a move in words: processes are p1, p2 …, pages count from 0, contents from 1."""
    who, page = f"p{args[0]}", f"page {args[1] - _FIRST_VPN}"
    match code:
        case events.WRITE:
            return f"{who} writes content {args[2]} to {page}"
        case events.MOVE:
            return f"{who} {page} migrates to node {args[2]}"
        case events.EXIT:
            return f"{who} exits"
        case events.FORK:
            return f"{who} forks"
        case events.UNMAP:
            return f"{who} unmaps {page}"
        case events.ADVISE:
            return f"{who} advises {page} {'MERGEABLE' if args[3] else 'UNMERGEABLE'}"
        case events.PIN:
            return f"{who} pins {page}"
        case events.UNPIN:
            return f"frame f{args[0]} is unpinned"
        case events.LOCK:
            return f"{who} {page} is locked"
        case events.UNLOCK:
            return f"frame f{args[0]} is unlocked"
        case events.SWAP_OUT:
            return f"{who} {page} is swapped out"
        case events.TOUCH:
            return f"{who} reads {page}"
    name = CODE_NAMES[code]
    return {
        "offline": f"node {args[0]} goes offline",
        "online": f"node {args[0]} comes online",
        "unmerge": "run = 2, then 1",
        "across": f"merge_across_nodes = {args[0]}",
        "sharing": f"max_page_sharing = {args[0]}",
    }[name]


def _parts(how: int) -> tuple[int, list[tuple[int, int]]]:
    """Return what `bench.how_of` and `bench.with_inside` put together: the kind, and pairs of (checkpoint, move)."""
    pairs = [how >> 4 + 20 * place & 0xFFFFF for place in range(MOST_INSIDE)]
    return how & 0xF, [(pair & 0xFF, pair >> 8) for pair in pairs]


def encode(path: Sequence[int]) -> str:
    """Return a path as one word: hexadecimal numbers, divided by dots."""
    return ".".join(f"{how:x}" for how in path)


def decode(word: str) -> tuple[int, ...]:
    """Return the path that `encode` wrote."""
    try:
        path = tuple(int(part, 16) for part in word.split("."))
    except ValueError:
        path = (-1,)
    if not all(0 <= how < 2**64 for how in path):
        raise UsageError(f"{word!r} is not a path; use the line that a violation printed")
    return path


def stages(replay: Replay, path: Sequence[int]) -> Iterator[Stage]:
    """Lead a replay along a path, to its end or the first broken invariant."""
    for how in path:
        stage = replay.go(how)
        yield stage
        if stage.broken:
            return
