"""Own the search: breadth first over all states of a small world, on several cores, until nothing is new, or a bound or a violation is met.

The states of one distance are expanded in blocks, each block by all workers side by side; what they found is then put into the set of
all states in the order of the states it came from. So every count, and the path to a violation, is the same for any number of workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pagefold.check import settle
from pagefold.check.bench import tally as tally_dtype
from pagefold.check.engines import SHIPPED, Explored
from pagefold.check.expand import BROKEN, DONE, FULL
from pagefold.check.worlds import SmallWorld, new_bench
from pagefold.core.layout import Records
from pagefold.errors import PagefoldError

BYTES_PER_STATE = 32  # fingerprint (8, in a table that is at most half full), how (8), the state it came from (8)
_BLOCK = 2048  # states expanded between two looks at what is new
_ROOM = 1 << 14  # new states a worker writes out at once


@dataclass(frozen=True)
class Progress:
    """How far the search is."""

    states: int
    frontier: int
    transitions: int
    depth: int
    seconds: float


@dataclass(frozen=True)
class Violation:
    """A broken invariant: its name, the path to it from the first state, and the index of what shows it."""

    invariant: str
    path: tuple[int, ...]
    where: int


@dataclass(frozen=True)
class Result:
    """What the search found. `exhausted`: every state that can be reached was explored."""

    world: SmallWorld
    states: int
    transitions: int
    depth: int
    exhausted: bool
    violation: Violation | None
    checkpoints: int
    seconds: float
    image_bytes: int

    @property
    def chance_of_a_miss(self) -> float:
        """Bound the chance that two different states had the same fingerprint, so that one was left out."""
        return self.states**2 / 2.0**65


class _Worker:
    """One bench, and the room for what it finds."""

    def __init__(self, small: SmallWorld, engine: Explored, bug: int) -> None:
        self.engine = engine
        self.bench = new_bench(small, engine, bug)
        self.tallies = np.zeros(1, tally_dtype)
        self.own = np.zeros(1 << 16, np.uint64)
        words = len(self.bench.image)
        self.room = engine.bench.Found(
            images=np.zeros((_ROOM, words), np.uint64),
            parents=np.zeros(_ROOM, np.int32),
            hows=np.zeros(_ROOM, np.uint64),
            prints=np.zeros(_ROOM, np.uint64),
        )
        self.found: list[tuple[Records, Records, Records, Records]] = []

    def expand(self, images: Records, first: int, last: int, seen: Records) -> int:
        """Expand states first to last (excluded); what is new is in `found`."""
        self.own[:] = 0
        self.found = []
        tally = self.tallies[0]
        tally["next"], tally["found"], tally["seen"], tally["transitions"] = first, 0, 0, 0
        while True:
            status = int(self.engine.expand.expand(self.bench, images, last, seen, self.own, self.room, self.tallies))
            count = int(tally["found"])
            if count:
                self.found.append(tuple(part[:count].copy() for part in self.room))
                tally["found"] = 0
            if status != FULL:
                return status
            if 4 * int(tally["seen"]) >= 3 * len(self.own):
                self.own = _grown(self.own, self.engine)


def _grown(table: Records, engine: Explored) -> Records:
    """Return a set of fingerprints with twice the places."""
    bigger = np.zeros(2 * len(table), np.uint64)
    prints = table[table != 0]
    engine.visited.keep_new(bigger, prints, np.zeros(len(prints), np.int64))
    return bigger


class _Seen:
    """All states found: their fingerprints, and how each was reached."""

    def __init__(self, engine: Explored) -> None:
        self.engine = engine
        self.table = np.zeros(1 << 16, np.uint64)
        self.parents = [np.zeros(1, np.int64)]
        self.hows = [np.zeros(1, np.uint64)]
        self.count = 0

    def add(self, prints: Records, parents: Records, hows: Records) -> Records:
        """Add states; return the indices of those that were new."""
        while 2 * (self.count + len(prints)) > len(self.table):
            self.table = _grown(self.table, self.engine)
        kept = np.zeros(len(prints), np.int64)
        kept = kept[: self.engine.visited.keep_new(self.table, prints, kept)]
        if self.count:
            self.parents.append(parents[kept])
            self.hows.append(hows[kept])
        self.count += len(kept)
        return kept

    def path(self, index: int) -> list[int]:
        """Return how state `index` is reached from the first one."""
        parents, hows = np.concatenate(self.parents), np.concatenate(self.hows)
        steps = []
        while index:
            steps.append(int(hows[index]))
            index = int(parents[index])
        return steps[::-1]


def explore(
    small: SmallWorld,
    *,
    depth: int | None = None,
    states: int | None = None,
    workers: int = 1,
    engine: Explored = SHIPPED,
    bug: int = 0,
    show: Callable[[Progress], None] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> Result:
    """Explore a small world, breadth first; stop at `depth` transitions from the first state, or once there are `states`, if given."""
    return _Search(small, workers, engine, bug, show, clock).run(depth, states)


@dataclass
class _Search:
    small: SmallWorld
    workers: int
    engine: Explored
    bug: int
    show: Callable[[Progress], None]
    clock: Callable[[], float]
    transitions: int = 0
    frontier: Records = field(default_factory=lambda: np.zeros((0, 0), np.uint64))
    first_index: int = 0  # of the frontier's first state

    def __post_init__(self) -> None:
        self.benches = [_Worker(self.small, self.engine, self.bug) for _ in range(self.workers)]
        self.seen = _Seen(self.engine)

    def run(self, depth: int | None, states: int | None) -> Result:
        bench = self.benches[0].bench
        image = bench.image.copy()
        self.benches[0].expand(image[np.newaxis, :], 0, 0, self.seen.table)  # compiles
        began = self.clock()
        start = np.array([self.engine.expand.print_of(bench)], np.uint64)
        self.seen.add(start, np.zeros(1, np.int64), np.zeros(1, np.uint64))
        self.frontier = image[np.newaxis, :]
        distance = 0
        violation = None
        stopped = False
        with ThreadPoolExecutor(self.workers) as pool:
            while len(self.frontier) and not violation:
                if (depth is not None and distance >= depth) or (states is not None and self.seen.count >= states):
                    stopped = True
                    break
                fresh: list[Records] = []
                before = self.seen.count
                for first in range(0, len(self.frontier), _BLOCK * self.workers):
                    violation = self._block(pool, first, fresh)
                    left = len(self.frontier) - first + sum(map(len, fresh))
                    self.show(Progress(self.seen.count, left, self.transitions, distance, self.clock() - began))
                    if violation:
                        break
                self.first_index = before
                self.frontier = np.concatenate(fresh) if fresh else self.frontier[:0]
                distance += 1
        return Result(
            world=self.small,
            states=self.seen.count,
            transitions=self.transitions,
            depth=len(violation.path) if violation else distance - (0 if stopped else 1),
            exhausted=not stopped and violation is None,
            violation=violation,
            checkpoints=max(int(worker.tallies[0]["checkpoints"]) for worker in self.benches),
            seconds=self.clock() - began,
            image_bytes=bench.image.nbytes,
        )

    def _block(self, pool: ThreadPoolExecutor, first: int, fresh: list[Records]) -> Violation | None:
        """Expand one block of the frontier, by all workers; add what is new to `fresh`."""
        last = min(first + _BLOCK * self.workers, len(self.frontier))
        share = -(-(last - first) // self.workers)
        jobs = []
        for number, worker in enumerate(self.benches):
            begin = min(first + number * share, last)
            end = min(begin + share, last)
            jobs.append(pool.submit(worker.expand, self.frontier, begin, end, self.seen.table))
        for worker, job in zip(self.benches, jobs, strict=True):
            status = job.result()
            tally = worker.tallies[0]
            self.transitions += int(tally["transitions"])
            if status == BROKEN:
                return self._violation(tally)
            if status != DONE:
                raise PagefoldError(
                    f"the small world has no room for a move in it (status {status}); this is a defect of pagefold"
                )
            for images, parents, hows, prints in worker.found:
                kept = self.seen.add(prints, parents.astype(np.int64) + self.first_index, hows)
                if len(kept):
                    fresh.append(images[kept])
        return None

    def _violation(self, tally: Any) -> Violation:
        path = self.seen.path(self.first_index + int(tally["next"]))
        if int(tally["how"]):
            path.append(int(tally["how"]))
        return Violation(settle.NAMES[int(tally["broken"])], tuple(path), int(tally["where"]))
