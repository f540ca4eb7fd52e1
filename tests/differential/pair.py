"""Run the engine and its twin side by side: every operation goes to both, and all that can be seen must be equal.

An operation is a name and small integers, which are folded into what exists at that moment, so that any draw is a valid one and a
sequence is replayed from its numbers alone.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from twin import Twin

from pagefold import Engine, Machine
from pagefold.errors import PagefoldError
from pagefold.machine import Area

KINDS = ("anonymous", "anonymous", "anonymous", "anonymous", "shared", "file")
KNOBS: dict[str, tuple[Any, ...]] = {
    "run": (0, 1, 1, 1, 2, 3),
    "merge_across_nodes": (0, 1, 2),
    "max_page_sharing": (2, 3, 4, 256, 1),
    "use_zero_pages": (0, 1),
    "smart_scan": (0, 1),
    "stable_node_chains_prune_millisecs": (0, 10, 2000),
    "advisor_mode": ("none", "scan-time", "fast"),
    "pages_to_scan": (5, 100, -1),
    "sleep_millisecs": (0, 20),
}
# Zero, contents that only their low halves tell apart, and contents that differ in the keys searches go by.
CONTENTS = (0, 1, 2, 5 << 96, (5 << 96) + 1, 9 << 120)
# How often each operation is drawn by the stress; Hypothesis draws them evenly and shrinks.
WEIGHTS = (
    dict(spawn=2, mmap=4, munmap=2, write=20, read=3, madvise=4, merge_any=2, fork=3, exit=2, pin=2, unpin=2)
    | dict(lock=2, unlock=2, move=8, swap_out=2, offline=2, set=2, scan=16, pass_time=1)
)  # fmt: skip
OPERATIONS = tuple(WEIGHTS)
STATUS = {True: "moved", False: "not"}


class Pair:
    """The engine and the twin on equal machines; `do` applies one operation to both and compares."""

    def __init__(self, nodes: int, frames: int, swap: int, rules: str, across: int = 1) -> None:
        self.start = (nodes, frames, swap, rules, across)
        self.machine = Machine(nodes=nodes, frames=frames, swap=swap, shadow=True)
        self.engine = Engine(self.machine, rules=rules)
        self.twin = Twin(nodes=nodes, frames=frames, swap=swap, rules=rules)
        self.areas: dict[int, list[Area]] = {}
        self.live: list[int] = []
        self.pins: list[tuple[int, Area, int, Any]] = []
        self.locks: list[tuple[int, Area, int, Any]] = []
        self.offline: int | None = None
        self.log: list[tuple[Any, ...]] = []
        self.both(
            lambda: self.engine.set("merge_across_nodes", across), lambda: self.twin.set("merge_across_nodes", across)
        )
        self.both(lambda: self.engine.set("run", 1), lambda: self.twin.set("run", 1))

    def both(self, one: Callable[[], Any], other: Callable[[], Any]) -> tuple[Any, Any] | None:
        """Do one thing on each side; the same kind of refusal, or None of them refuses. None means refused."""
        answers: list[Any] = []
        for act in (one, other):
            try:
                answers.append((True, act()))
            except PagefoldError as error:
                answers.append((False, type(error).__name__))
        (fine, mine), (twin_fine, its) = answers
        assert fine == twin_fine, f"engine: {mine!r}, twin: {its!r}"
        if not fine:
            assert mine == its
            return None
        return mine, its

    def process(self, number: int) -> Any:
        return self.machine.processes[number - 1]

    def pick(self, a: int) -> int:
        return self.live[a % len(self.live)]

    def page(self, a: int, b: int, c: int) -> tuple[int, Area, int] | None:
        """Choose a process, one of its areas and a page of it."""
        number = self.pick(a)
        if not self.areas[number]:
            return None
        area = self.areas[number][b % len(self.areas[number])]
        return number, area, c % area.pages

    def do(self, name: str, a: int, b: int, c: int, d: int) -> None:
        """Apply operation `name` to both sides, then compare all there is to see."""
        self.log.append((name, a, b, c, d))
        if self.live or name in ("spawn", "scan", "set", "pass_time", "offline"):
            getattr(self, f"do_{name}")(a, b, c, d)
        self.compare()

    # --- operations -----------------------------------------------------------------------------------------------

    def do_spawn(self, a: int, b: int, c: int, d: int) -> None:
        if len(self.live) < 6:
            node = a % self.machine.nodes
            answer = self.both(lambda: self.machine.spawn(node).pid, lambda: self.twin.spawn(node))
            self.born(answer, [])

    def born(self, answer: tuple[Any, Any] | None, areas: list[Area]) -> None:
        if answer is not None:
            assert answer[0] == answer[1]
            self.live.append(answer[0])
            self.areas[answer[0]] = list(areas)

    def do_mmap(self, a: int, b: int, c: int, d: int) -> None:
        number, pages, kind = self.pick(a), 1 + b % 6, KINDS[c % len(KINDS)]
        node = None if d % 3 else d % self.machine.nodes
        if len(self.areas[number]) >= 4:
            return
        mine = self.process(number)
        answer = self.both(
            lambda: mine.mmap(pages, node=node, kind=kind), lambda: self.twin.mmap(number, pages, node, kind)
        )
        assert answer is not None
        assert answer[0].start == answer[1]
        self.areas[number].append(answer[0])

    def do_munmap(self, a: int, b: int, c: int, d: int) -> None:
        if (where := self.page(a, b, c)) is not None:
            number, area, first = where
            count = 1 + d % (area.pages - first)
            self.both(
                lambda: self.process(number).munmap(area, first, count),
                lambda: self.twin.munmap(number, area.start + first, count),
            )

    def do_write(self, a: int, b: int, c: int, d: int) -> None:
        if (where := self.page(a, b, c)) is not None:
            number, area, index = where
            self.both(
                lambda: self.process(number).write(area, index, CONTENTS[d % len(CONTENTS)]),
                lambda: self.twin.write(number, area.start + index, CONTENTS[d % len(CONTENTS)]),
            )

    def do_read(self, a: int, b: int, c: int, d: int) -> None:
        if (where := self.page(a, b, c)) is not None:
            number, area, index = where
            answer = self.both(
                lambda: self.process(number).read(area, index), lambda: self.twin.read(number, area.start + index)
            )
            assert answer is None or answer[0] == answer[1]

    def do_madvise(self, a: int, b: int, c: int, d: int) -> None:
        if (where := self.page(a, b, 0)) is not None:
            number, area, _ = where
            first = 0 if c % 2 else c % area.pages
            count = area.pages - first if d % 4 else 1
            advice = "UNMERGEABLE" if d % 7 == 0 else "MERGEABLE"
            self.both(
                lambda: self.process(number).madvise(area, advice, first, count),
                lambda: self.twin.madvise(number, area.start + first, count, advice),
            )

    def do_merge_any(self, a: int, b: int, c: int, d: int) -> None:
        number, on = self.pick(a), b % 3 != 0
        self.both(lambda: self.process(number).merge_any(on), lambda: self.twin.merge_any(number, on))

    def do_fork(self, a: int, b: int, c: int, d: int) -> None:
        if len(self.live) < 6:
            number, node = self.pick(a), None if b % 2 else c % self.machine.nodes
            answer = self.both(lambda: self.process(number).fork(node).pid, lambda: self.twin.fork(number, node))
            self.born(answer, self.areas[number])

    def do_exit(self, a: int, b: int, c: int, d: int) -> None:
        number = self.pick(a)
        self.both(lambda: self.process(number).exit(), lambda: self.twin.exit(number))
        self.live.remove(number)

    def do_pin(self, a: int, b: int, c: int, d: int) -> None:
        if (where := self.page(a, b, c)) is not None and len(self.pins) < 4:
            number, area, index = where
            answer = self.both(
                lambda: self.process(number).pin(area, index), lambda: self.twin.pin(number, area.start + index)
            )
            if answer is not None:
                self.pins.append((number, area, index, answer[1]))

    def do_unpin(self, a: int, b: int, c: int, d: int) -> None:
        if self.pins:
            number, area, index, _ = self.pins[a % len(self.pins)]
            # The engine releases the newest pin of a page first.
            same = [i for i, pin in enumerate(self.pins) if pin[:3] == (number, area, index)]
            token = self.pins.pop(same[-1])[3]
            self.both(lambda: self.process(number).unpin(area, index), lambda: self.twin.unpin(token))

    def do_lock(self, a: int, b: int, c: int, d: int) -> None:
        if (where := self.page(a, b, c)) is None or len(self.locks) >= 3:
            return
        number, area, index = where
        vpn = area.start + index
        group = self.twin.observe().get((number, vpn), (-1, frozenset()))
        taken = {token for *_, token in self.locks}
        if group[0] < 0 or self.twin.mms[number].entries[vpn].frame in taken:
            return
        if any(lock[:3] == (number, area, index) for lock in self.locks):
            return
        answer = self.both(lambda: self.process(number).lock(area, index), lambda: self.twin.lock(number, vpn))
        assert answer is not None
        self.locks.append((number, area, index, answer[1]))

    def do_unlock(self, a: int, b: int, c: int, d: int) -> None:
        if self.locks:
            number, area, index, token = self.locks.pop(a % len(self.locks))
            self.both(lambda: self.process(number).unlock(area, index), lambda: self.twin.unlock(token))

    def do_move(self, a: int, b: int, c: int, d: int) -> None:
        if (where := self.page(a, b, c)) is not None:
            number, area, index = where
            node = d % (self.machine.nodes + 1)  # one too many now and then
            answer = self.both(
                lambda: self.process(number).move_pages(area, {index: node})[index],
                lambda: self.twin.move_page(number, area.start + index, node),
            )
            if answer is not None:
                words = {-2: "absent", -14: "fault", -16: "busy", -12: "no memory", -19: "no node"}
                assert words.get(answer[0], "there") == {"moved": "there", "same": "there"}.get(answer[1], answer[1])

    def do_swap_out(self, a: int, b: int, c: int, d: int) -> None:
        if (where := self.page(a, b, c)) is not None:
            number, area, index = where
            answer = self.both(
                lambda: self.process(number).swap_out(area, index),
                lambda: self.twin.swap_out(number, area.start + index),
            )
            assert answer is None or answer[0] == (answer[1] == "moved")

    def do_offline(self, a: int, b: int, c: int, d: int) -> None:
        """Begin, then finish or cancel, then bring back: whichever comes next for the node on its way."""
        nodes = self.machine.nodes
        if nodes == 1:
            return
        if self.twin.state.count("online") == nodes:
            self.both(lambda: self.machine.offline_begin(a % nodes), lambda: self.twin.offline_begin(a % nodes))
        elif "going" in self.twin.state:
            if b % 4 == 0 or not self.is_determined(self.twin.state.index("going")):
                self.both(self.machine.offline_cancel, self.twin.offline_cancel)
            else:
                self.both(self.finish_offline, self.twin.offline_finish)
        else:
            node = self.twin.state.index("offline")
            self.both(lambda: self.machine.online(node), lambda: self.twin.online(node))

    def is_determined(self, node: int) -> bool:
        """Tell whether all pages of the node fit on the next one, so that nothing depends on names of frames."""
        used = sum(frame.nid == node for frame in self.twin.used)
        return self.machine.nodes == 2 or used <= len(self.twin.free[(node + 1) % self.machine.nodes])

    def finish_offline(self) -> None:
        # The twin answers with a word where the machine raises; that both stayed online is compared next.
        with contextlib.suppress(PagefoldError):
            self.machine.offline_finish()

    def do_set(self, a: int, b: int, c: int, d: int) -> None:
        knob = tuple(KNOBS)[a % len(KNOBS)]
        value = KNOBS[knob][b % len(KNOBS[knob])]
        self.both(lambda: self.engine.set(knob, value), lambda: self.twin.set(knob, value))
        if knob == "run" and value != 1 and c % 4:  # do not stand still for long
            self.both(lambda: self.engine.set("run", 1), lambda: self.twin.set("run", 1))

    def do_scan(self, a: int, b: int, c: int, d: int) -> None:
        pages = 1 + a % 9 if b % 2 else 10_000
        self.both(lambda: self.engine.scan(pages), lambda: self.twin.scan(pages))

    def do_pass_time(self, a: int, b: int, c: int, d: int) -> None:
        self.engine.now_ms += a % 3000
        self.twin.now_ms = self.engine.now_ms

    # --- comparison -----------------------------------------------------------------------------------------------

    def observe(self) -> dict[tuple[int, int], tuple[int, frozenset[tuple[int, int]]]]:
        """Say of the engine's machine what the twin says of its own."""
        groups: dict[tuple[int, int], set[tuple[int, int]]] = {}
        where: dict[tuple[int, int], tuple[int, int]] = {}
        for number in self.live:
            for vpn, place in self.process(number).pages():
                key = (number, vpn)
                name = (place.node, place.frame) if place.node != -1 else (-1, len(where) + 1)
                groups.setdefault(name, set()).add(key)
                where[key] = name
        return {key: (name[0], frozenset(groups[name])) for key, name in where.items()}

    def compare(self) -> None:
        self.engine.validate()
        self.twin._check()
        equal("counters", asdict(self.engine.counters()), self.twin.counters())
        equal("pages", self.observe(), self.twin.observe())
        for number in self.live:
            equal(f"process {number}", self.process(number).ksm_stat(), self.twin.mm_counters(number))
        online = [bool(node["online"]) for node in self.machine.world.nodes[:-1]]
        assert online == [state == "online" for state in self.twin.state]
        free = [self.machine.free_frames(nid) for nid in range(self.machine.nodes)]
        assert free == [len(one) for one in self.twin.free]


def equal(what: str, mine: dict[Any, Any], its: dict[Any, Any]) -> None:
    """Compare key by key, so that a difference says where it is."""
    apart = [f"{k}: engine {mine.get(k)}, twin {its.get(k)}" for k in mine | its if mine.get(k) != its.get(k)]
    assert not apart, f"{what} differ: {'; '.join(apart)}"


SHAPES = ((1, 40, 6), (2, 24, 4), (2, 200, 8), (3, 16, 4), (4, 60, 8))


def random_pair(generator: random.Random) -> Pair:
    """Make a pair of a random shape and rule set."""
    rules = generator.choice(("classic", "mainline", "mainline"))
    return Pair(*generator.choice(SHAPES), rules=rules, across=generator.randrange(2))


def random_run(seed: int, length: int) -> Pair:
    """Run `length` random operations; whatever fails is replayed by the same seed and length."""
    generator = random.Random(seed)
    pair = random_pair(generator)
    names, weights = zip(*WEIGHTS.items(), strict=True)
    for name in generator.choices(names, weights, k=length):
        pair.do(name, *(generator.randrange(1 << 16) for _ in range(4)))
    return pair
