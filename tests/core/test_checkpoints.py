"""Let things happen in the middle of a scan: every gap of spec section 10 is real, and nothing that happens there does harm."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
import pytest

from pagefold import Area, Engine, Machine
from pagefold.core import arena, doors, events, layout
from tests.conftest import scaled
from tests.core.worlds import held_for_a_moment, stable_slots

Event = tuple[int, int, int, int, int, int]  # checkpoint, code, four arguments
NOTHING = (events.TOUCH, 0, 0, 0, 0)  # nobody's page: an event that only says where it happened


def arm(machine: Machine, schedule: Sequence[Event]) -> None:
    """Arm a schedule, ordered by checkpoint; the count of checkpoints begins anew."""
    records = np.zeros(len(schedule) + 1, layout.event)
    for index, (at, code, *args) in enumerate(sorted(schedule, key=lambda event: event[0])):
        records[index]["at"] = at
        records[index]["code"] = code
        records[index]["args"] = args
    machine._arena.world = machine.world._replace(schedule=records)
    ctl = machine.world.ctl[0]
    ctl["armed"], ctl["schedule_next"], ctl["schedule_used"], ctl["checkpoints"] = 1, 0, len(schedule), 0


def disarm(machine: Machine) -> list[tuple[int, int, int]]:
    """Disarm; return (gap, code, status) of every event that happened."""
    ctl = machine.world.ctl[0]
    ctl["armed"] = 0
    happened = machine.world.schedule[: int(ctl["schedule_next"])]
    return [(int(one["gap"]), int(one["code"]), int(one["status"])) for one in happened]


# --- (a) every gap is passed ------------------------------------------------------------------------------------------


def gap_world(rules: str) -> tuple[Machine, Engine, int]:
    """Make a machine whose next full scan passes all gaps; return it, and an mm that nobody scans with one page."""
    machine = Machine(nodes=2, frames=64, shadow=True)
    engine = Engine(machine, rules=rules, run=1, merge_across_nodes=0)
    if rules == "mainline":
        engine.set("smart_scan", 0)
    process = machine.spawn()
    area = process.mmap(12)
    process.madvise(area, "MERGEABLE")
    for index, content in enumerate((1, 1, 2, 2, 3)):
        process.write(area, index, content)
    engine.scan_full(2)
    for index, content in enumerate((1, 9, 9, 3, 4), start=5):  # one more for a tree, a new pair, one for a lone page
        process.write(area, index, content)
    engine.scan_full(1)
    for index, content in enumerate((5, 5), start=10):
        process.write(area, index, content)
    process.write(area, 5, 2)
    bystander = machine.spawn()
    bystander.write(bystander.mmap(1), 0, 7)
    return machine, engine, bystander.mm


def gaps_of_two_scans(rules: str, schedule: Sequence[Event]) -> list[tuple[int, int, int]]:
    machine, engine, _ = gap_world(rules)
    arm(machine, schedule)
    engine.scan_full(2)
    engine.validate()
    return disarm(machine)


@pytest.mark.parametrize("rules", ["classic", "mainline"])
def test_every_gap_is_passed_and_an_event_there_happens(rules: str) -> None:
    seen = gaps_of_two_scans(rules, [(at, *NOTHING) for at in range(1, 1000)])
    assert {status for _, _, status in seen} == {layout.NO_PROCESS}
    first = {gap: 1 + [one[0] for one in seen].index(gap) for gap in {one[0] for one in seen}}
    assert {layout.GAP_NAMES[gap] for gap in first} == set(layout.GAP_NAMES) - {""}
    for gap, at in first.items():
        machine, engine, mm = gap_world(rules)
        arm(machine, [(at, events.WRITE, mm, 16, 8, 0)])
        engine.scan_full(2)
        assert disarm(machine) == [(gap, events.WRITE, layout.OK)], layout.GAP_NAMES[gap]
        assert machine.processes[1].read(Area(16, 1), 0) == 8
        engine.validate()


def test_events_that_are_due_together_happen_in_order_at_one_gap() -> None:
    machine, engine, mm = gap_world("mainline")
    arm(machine, [(3, events.WRITE, mm, 16, content, 0) for content in (4, 5, 6)])
    engine.scan_full()
    happened = disarm(machine)
    assert len(happened) == 3
    assert len({gap for gap, *_ in happened}) == 1
    assert machine.processes[1].read(Area(16, 1), 0) == 6


def test_an_event_after_the_last_checkpoint_does_not_happen() -> None:
    machine, engine, mm = gap_world("mainline")
    arm(machine, [(10**9, events.EXIT, mm, 0, 0, 0)])
    engine.scan_full()
    assert disarm(machine) == []


def checkpoint_of(gap: int, nth: int = 1) -> int:
    """Return the number of the nth time the mainline world above passes a gap."""
    seen = gaps_of_two_scans("mainline", [(at, *NOTHING) for at in range(1, 1000)])
    return [at for at, one in enumerate(seen, start=1) if one[0] == gap][nth - 1]


def test_a_page_that_a_search_holds_cannot_move_and_its_reader_waits() -> None:
    """At `locked` the tree page is referenced (busy); at `write-protected` the mm is locked for those who change it."""
    for gap, code, status in (
        (layout.GAP_LOCKED, events.MOVE, layout.BUSY),
        (layout.GAP_WRITE_PROTECTED, events.EXIT, layout.BLOCKED),
        (layout.GAP_WRITE_PROTECTED, events.FORK, layout.BLOCKED),
        (layout.GAP_WRITE_PROTECTED, events.UNMAP, layout.BLOCKED),
        (layout.GAP_WRITE_PROTECTED, events.ADVISE, layout.BLOCKED),
    ):
        machine, engine, _ = gap_world("mainline")
        at = checkpoint_of(gap)
        vpns = range(16, 28) if code == events.MOVE else (16,)
        arm(machine, [(at, code, 1, vpn, 1, 0) for vpn in vpns])
        engine.scan_full(2)
        answers = {one[2] for one in disarm(machine)}
        assert status in answers, layout.GAP_NAMES[gap]
        engine.validate()


def test_a_node_that_migrates_under_the_keyhole_is_looked_at_again() -> None:
    """Between the two looks `kpfn` changes: the node is not taken for stale, and its page is found where it went."""
    machine = Machine(nodes=2, frames=32, shadow=True)
    engine = Engine(machine, run=1, smart_scan=0)
    process = machine.spawn()
    area = process.mmap(3)
    for index in range(2):
        process.write(area, index, 7)
    process.madvise(area, "MERGEABLE")
    engine.scan_full(2)
    process.write(area, 2, 7)
    engine.scan_full(1)
    node = stable_slots(machine.world)[0]
    arm(machine, [(at, events.MOVE, process.mm, 16, at % 2, 0) for at in range(1, 40)])
    engine.scan_full(1)
    moved = [one for one in disarm(machine) if one[0] == layout.GAP_KEYHOLE and one[2] == layout.OK]
    assert moved
    assert stable_slots(machine.world) == [node]
    assert engine.counters().pages_sharing == 2
    engine.validate()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (events.EXIT, layout.BLOCKED),
        (events.UNMAP, layout.BLOCKED),
        (events.ADVISE, layout.BLOCKED),
        (events.SWAP_OUT, layout.BUSY),
        (events.MOVE, layout.BUSY),
    ],
)
def test_the_page_being_chosen_is_safe_while_items_before_it_are_dropped(code: int, status: int) -> None:
    machine = Machine(nodes=2, frames=32, shadow=True)
    engine = Engine(machine, run=1, smart_scan=0, merge_across_nodes=0)
    process = machine.spawn()
    area = process.mmap(4)
    for index, content in enumerate((7, 7, 7, 9)):
        process.write(area, index, content)
    process.madvise(area, "MERGEABLE")
    engine.scan_full(2)
    process.munmap(area, 0, 1)
    arm(machine, [(1, code, process.mm, 17, 1, 0)])  # page 17 is looked at, the item of page 16 is dropped
    engine.scan_full()
    assert disarm(machine) == [(layout.GAP_KEYHOLE, code, status)]
    engine.validate()
    assert machine.world.frames[0].tobytes() == bytes(layout.frame.itemsize), "frame 0 means none"


# --- (b) race fuzz ----------------------------------------------------------------------------------------------------

MIDDLE = (
    *(events.WRITE, events.WRITE, events.WRITE, events.EXIT, events.FORK, events.UNMAP, events.ADVISE),
    *(events.PIN, events.UNPIN, events.MOVE, events.MOVE, events.MOVE, events.SWAP_OUT, events.TOUCH),
)
CONTENTS = ((0, 0), (1, 0), (0, 5 << 32))  # (low, high half): zero, one beside it, one far away
PAGES = 8


class Race:
    """A random world whose processes act at random checkpoints; only the world is looked at, never Process objects."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.generator = draw = random.Random(seed)
        nodes = draw.randrange(1, 4)
        self.machine = Machine(nodes=nodes, frames=draw.choice((40, 100)), swap=8, shadow=True)
        self.engine = Engine(self.machine, rules=draw.choice(("classic", "mainline")), run=1)
        self.engine.set("merge_across_nodes", draw.randrange(2))
        if self.engine.rules == "mainline":
            self.engine.set("smart_scan", draw.randrange(2))
            self.engine.set("use_zero_pages", draw.randrange(2))
            self.engine.set("max_page_sharing", draw.choice((2, 3, 256)))
            self.engine.set("stable_node_chains_prune_millisecs", draw.choice((0, 2000)))
        for need in (layout.NEED_MMS, layout.NEED_VMAS, layout.NEED_PTES):
            self.machine._arena.world = arena.grow(self.machine.world, need, 300)
        for _ in range(draw.randrange(2, 5)):
            self.spawn()

    def do(self, code: int, *args: int) -> int:
        return int(doors.execute(self.machine.world, code, *args, *(0,) * (4 - len(args))))

    def spawn(self) -> None:
        mm = self.do(events.SPAWN, self.generator.randrange(self.machine.nodes))
        start = self.do(events.MAP, mm, 0, PAGES, 0)
        assert mm > 0
        assert start == 16
        for vpn in range(start, start + PAGES):
            self.do(events.WRITE, mm, vpn, *self.generator.choice(CONTENTS))
        self.do(events.ADVISE, mm, start, PAGES, 1)

    def event(self) -> tuple[int, int, int, int, int]:
        draw = self.generator
        code, mm = draw.choice(MIDDLE), draw.randrange(1, int(self.machine.world.ctl[0]["mms_used"]) + 1)
        vpn, count = 16 + draw.randrange(PAGES), draw.randrange(1, 4)
        if code == events.EXIT and draw.random() < 0.5:
            code = events.WRITE
        if code == events.UNPIN:
            return code, draw.randrange(1, len(self.machine.world.frames)), 0, 0, 0
        if code == events.FORK:
            return code, mm, draw.randrange(-1, self.machine.nodes), 0, 0
        if code == events.MOVE:
            return code, mm, vpn, draw.randrange(self.machine.nodes), 0
        if code == events.WRITE:
            return code, mm, vpn, *draw.choice(CONTENTS)
        if code == events.ADVISE:
            return code, mm, vpn, count, draw.randrange(2)
        return code, mm, vpn, count, 0

    def live(self) -> int:
        return int((self.machine.world.mms["flags"] & layout.MM_LIVE != 0).sum())

    def step(self) -> list[tuple[int, int, int]]:
        """Change something, scan some or all pages with events in the middle, and let the judge look."""
        draw = self.generator
        for _ in range(draw.randrange(4)):
            self.do(*self.event())
        while self.live() < 2:
            self.spawn()
        self.engine.now_ms += draw.choice((0, 0, 3000))
        often = draw.choice((3, 10, 100))
        ats = [draw.randrange(1, often * 12) for _ in range(12)]
        if self.live() > 8:
            ats.clear()  # forks must not win for ever
            self.do(events.EXIT, draw.choice(np.flatnonzero(self.machine.world.mms["flags"] & layout.MM_LIVE).tolist()))
        self.schedule = [(at, *self.event()) for at in ats]
        arm(self.machine, self.schedule)
        if draw.randrange(3):
            self.engine.scan_full()
        else:
            self.engine.scan(draw.randrange(1, 20))
        happened = disarm(self.machine)
        self.engine.validate()
        world = self.machine.world
        assert not held_for_a_moment(world).any(), "a reference or a lock is left"
        assert not (world.mms["flags"] & layout.MM_LOCKED).any(), "an mmap lock is left"
        return happened


def test_race_fuzz() -> None:
    """Run at least 2000 scans (compiled) of random worlds with random events in the middle of each."""
    scans, seed = 0, 0
    effects: set[tuple[int, int]] = set()
    goal = scaled(2400)
    while scans < goal:
        race = Race(seed)
        for number in range(12):
            try:
                happened = race.step()
            except Exception as error:
                raise AssertionError(f"seed {seed}, scan {number}: {error!r}") from error
            effects |= {(gap, code) for gap, code, status in happened if status >= 0}
            scans += 1
        seed += 1
    assert scans >= goal
    if goal >= 2000:
        gaps = set(range(1, len(layout.GAP_NAMES)))
        for code in set(MIDDLE) - {events.UNPIN}:
            # What changes an mm waits while the merger holds that mm's lock; of another mm it happens there too.
            assert {gap for gap, one in effects if one == code} == gaps, events.NAMES[code]


# --- (c) checkpoints change nothing by themselves -----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(scaled(40)))
def test_an_empty_schedule_changes_nothing(seed: int) -> None:
    races = Race(seed), Race(seed)
    passed = 0
    for _ in range(6):
        while races[0].live() < 2:
            for race in races:
                race.spawn()
        for race, armed in zip(races, (False, True), strict=True):
            for _ in range(6):
                race.do(*race.event())
            if armed:
                arm(race.machine, [])
            race.engine.scan(1 + race.generator.randrange(40))
        one, other = races
        assert asdict(one.engine.counters()) == asdict(other.engine.counters())
        assert list(one.engine.stable_nodes()) == list(other.engine.stable_nodes())
        assert one.machine.world.ptes.tobytes() == other.machine.world.ptes.tobytes()
        assert one.machine.world.ctl[0]["checkpoints"] == 0
        passed += int(other.machine.world.ctl[0]["checkpoints"])
    assert passed > 0
