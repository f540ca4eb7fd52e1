"""Judge the doors through which a mirror is kept: many pages at once must be what one page after the other is."""

from __future__ import annotations

import random
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from pagefold import Area, Engine, Intent, Machine, Process
from pagefold.core import layout
from tests.conftest import scaled

PAGES = 12


class World:
    """A machine with some processes that are advised."""

    def __init__(self, frames: int = 400, nodes: int = 1, **knobs: int) -> None:
        self.machine = Machine(nodes=nodes, frames=frames)
        self.engine = Engine(self.machine, run=1, **{"smart_scan": 0, "use_zero_pages": 1, **knobs})
        self.engine.keep_journal()
        self.processes: list[Process] = []
        self.areas: list[list[Area]] = []
        for _ in range(3):
            self.join()

    def join(self) -> None:
        process = self.machine.spawn()
        self.processes.append(process)
        self.areas.append([process.mmap(PAGES) for _ in range(2)])
        for area in self.areas[-1]:
            process.madvise(area, "MERGEABLE")

    def seen(self) -> list[Any]:
        """Return all that can be seen."""
        living = [process for process in self.processes if process.alive]
        return [
            [sorted(process.pages()) for process in living],
            [[process.read(area, at) for at in range(PAGES)] for process, areas in self.pairs() for area in areas],
            [process.ksm_stat() for process in living],
            asdict(self.engine.counters()),
            sorted(map(repr, self.engine.stable_nodes())),
            self.engine.take_intents(),
        ]

    def pairs(self) -> list[tuple[Process, list[Area]]]:
        return [pair for pair in zip(self.processes, self.areas, strict=True) if pair[0].alive]


def records(contents: list[int]) -> np.ndarray[Any, np.dtype[np.void]]:
    answer = np.zeros(len(contents), layout.content)
    answer["lo"] = contents
    return answer


def nodes_of(vpns: list[int], node: int = 0) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.full(len(vpns), node, np.int16)


@pytest.mark.parametrize("knobs", [{}, {"smart_scan": 1}, {"max_page_sharing": 2}])
def test_many_at_once_are_one_after_the_other(knobs: dict[str, int]) -> None:
    done = {"update": 0, "refuse": 0, "merged": 0}
    for seed in range(scaled(30)):
        chance = random.Random(seed)
        many, single = World(**knobs), World(**knobs)
        for _ in range(25):
            which = chance.choice([at for at, process in enumerate(many.processes) if process.alive])
            areas = many.areas[which]
            vpns = sorted(
                chance.sample([area.start + at for area in areas for at in range(PAGES)], chance.randint(1, 9))
            )
            act = chance.choice(["update", "update", "scan", "scan", "refuse", "exit"])
            if act == "update":
                contents = [chance.randrange(5) for _ in vpns]
                assert many.processes[which].update(np.array(vpns), records(contents), nodes_of(vpns)) == len(vpns)
                process = single.processes[which]
                for vpn, content in zip(vpns, contents, strict=True):
                    area = next(one for one in areas if one.start <= vpn < one.start + PAGES)
                    known = dict(process.pages()).get(vpn)
                    if known is None or known.node < 0 or process.read(area, vpn - area.start) != content:
                        process.write(area, vpn - area.start, content)
            elif act == "refuse":
                present = [vpn for vpn in vpns if vpn in dict(many.processes[which].pages())]
                assert many.processes[which].refuse(np.array(present, np.int64)) == len(present)
                merger = single.engine
                mm = single.processes[which].mm
                serial = int(single.machine.world.mms[mm]["serial"])
                for vpn in present:
                    assert merger.refuse(Intent("redirect", mm, serial, vpn, 0, 0))
            elif act == "scan":
                pages = chance.choice([1, 7, 100])
                assert many.engine.scan(pages) == single.engine.scan(pages)
            elif len(many.pairs()) > 2:
                for world in (many, single):
                    world.processes[which].exit()
                    world.join()
            done[act] = done.get(act, 0) + 1
            seen = many.seen()
            assert seen == single.seen(), f"seed {seed}, after {act}"
            done["merged"] += int(seen[3]["pages_sharing"])
            many.engine.validate()
    assert all(done.values()), f"nothing was tried: {done}"


def test_a_page_that_holds_its_content_is_not_touched() -> None:
    """Else every look at a client would take its merged pages apart."""
    world = World()
    for process, areas in world.pairs():
        process.update(np.array([areas[0].start]), records([7]), nodes_of([0]))
    world.engine.scan_full(3)
    before = world.seen()
    assert world.engine.counters().pages_sharing == 2
    for process, areas in world.pairs():
        assert process.update(np.array([areas[0].start]), records([7]), nodes_of([0])) == 1
    after = world.seen()
    assert before[:5] == after[:5]
    assert after[5] == [], "something was merged or broken"


def test_without_frames_they_say_how_far_they_came() -> None:
    world = World(frames=8)
    process, areas = world.pairs()[0]
    vpns = np.arange(areas[0].start, areas[0].start + PAGES)
    assert process.update(vpns, records([*range(1, PAGES + 1)]), nodes_of([0] * PAGES)) == 8
    world.machine.add_memory(0, 4)
    assert process.update(vpns[8:], records([*range(9, PAGES + 1)]), nodes_of([0] * 4)) == 4
    assert [process.read(areas[0], at) for at in range(PAGES)] == [*range(1, PAGES + 1)]
    world.engine.validate()


def test_refusing_without_frames_says_how_far_it_came() -> None:
    world = World(frames=4)
    process, areas = world.pairs()[0]
    vpns = np.arange(areas[0].start, areas[0].start + 4)
    process.update(vpns, records([7] * 4), nodes_of([0] * 4))
    world.engine.scan_full(3)
    assert world.machine.free_frames(0) == 3
    other, its = world.pairs()[1]
    other.update(np.array([its[0].start]), records([9]), nodes_of([0]))
    assert process.refuse(vpns) == 2, "two frames were left"
    world.machine.add_memory(0, 2)
    assert process.refuse(vpns[2:]) == 2
    own = {where.frame for _, where in process.pages()}
    assert len(own) == 4, "each page has a frame again"
    assert dict(other.pages())[its[0].start].frame not in own
    world.engine.validate()


def test_what_is_not_mapped() -> None:
    world = World()
    process, areas = world.pairs()[0]
    gap = areas[0].start + PAGES
    vpns = np.array([gap - 1, gap, gap + 1])
    assert process.update(vpns, records([1, 2, 3]), nodes_of([0] * 3)) == 1, "it stops before the gap"
    assert process.refuse(vpns) == 3, "what is gone need not be taken back"
    assert process.refuse(np.array([], np.int64)) == 0
    world.engine.validate()


def test_fresh_pages_are_on_the_node_that_is_said() -> None:
    world = World(nodes=2)
    process, areas = world.pairs()[0]
    vpns = np.arange(areas[0].start, areas[0].start + 4)
    process.update(vpns, records([1, 2, 3, 4]), np.array([1, 0, -1, 1], np.int16))
    assert [where.node for _, where in sorted(process.pages())] == [1, 0, 0, 1]
    process.update(vpns, records([5, 6, 7, 8]), np.array([0, 0, 0, 0], np.int16))
    assert [where.node for _, where in sorted(process.pages())] == [1, 0, 0, 1], "a write does not move a page"
