"""Judge the record: every step is the line that repeats it, every difference is found, an observation says who shares with whom."""

from __future__ import annotations

import random

import numpy as np
import pytest
from tests.conformance.test_random import MOVES, OFTEN

from pagefold.errors import NoSuchProcess, PagefoldError, UsageError
from pagefold.scenario.host import Observation, Place
from pagefold.scenario.random_play import KINDS, Player
from pagefold.scenario.record import Recorder, Step, as_scenario, first_difference
from pagefold.scenario.sim_host import SimHost

KNOBS: dict[str, int | str] = {"max_page_sharing": 2, "merge_across_nodes": 0}
IMPORTS = "import contextlib\nfrom pagefold.errors import PagefoldError\nfrom pagefold.machine import Area\n"


def played(host: SimHost, seed: int) -> list[Step]:
    host.begin(KNOBS)
    generator = random.Random(seed)
    kinds = generator.choices(KINDS, [OFTEN.get(kind, 1) for kind in KINDS], k=MOVES)
    recorder = Recorder(host)
    player = Player(recorder)
    player.begin(areas_on=range(host.nodes))
    player.play([(kind, *(generator.randrange(256) for _ in range(3))) for kind in kinds])
    recorder.observe()
    return recorder.steps


@pytest.mark.parametrize("seed", range(20))
def test_a_record_is_a_scenario_that_repeats_it(seed: int) -> None:
    host = SimHost(2)
    steps = played(host, seed)
    text = IMPORTS + "\n".join(as_scenario(steps, "again", "Again.", KNOBS)).replace("host: Host", "host")
    names: dict[str, object] = {}
    exec(compile(text, "again", "exec"), names)
    host.begin({})
    recorder = Recorder(host)
    names["scenario_again"](recorder)  # type: ignore[operator]
    recorder.observe()
    assert first_difference(steps, recorder.steps[len(KNOBS) :]) is None
    assert len(steps) > MOVES


@pytest.mark.parametrize("seed", range(5))
def test_any_change_of_a_record_is_a_difference(seed: int) -> None:
    steps = played(SimHost(2), seed)
    assert first_difference(steps, steps) is None
    for number, step in enumerate(steps):
        changed = (
            Step(step.line, "something else")
            if isinstance(step.outcome, str)
            else Step(step.line, off_by_one(step.outcome))
        )
        found = first_difference(steps, [*steps[:number], changed, *steps[number + 1 :]])
        assert found is not None and found[0] == number
        found = first_difference(steps, [*steps[:number], Step("host.elsewhere()", step.outcome), *steps[number + 1 :]])
        assert found == (number, [("step", step.line, "host.elsewhere()")])
    assert first_difference(steps, steps[:-1]) == (len(steps) - 1, [("step", steps[-1].line, "nothing")])
    assert first_difference(steps[:-1], steps) == (len(steps) - 1, [("step", "nothing", steps[-1].line)])


def off_by_one(seen: Observation) -> Observation:
    return Observation({**seen.counters, "pages_shared": seen["pages_shared"] + 1}, seen.processes, seen.pages)


def test_what_differs_of_two_observations() -> None:
    here = Observation.of(
        {"pages_shared": 1, "run": 0}, {1: {"ksm_rmap_items": 2}}, [(1, 16, 0, 70), (1, 17, 0, 70), (1, 18, -1, 0)]
    )
    there = Observation.of({"pages_shared": 2}, {2: {"ksm_rmap_items": 2}}, [(1, 16, 0, 5), (1, 17, 1, 6)])
    assert list(here.differences(there)) == [
        ("pages_shared", "1", "2"),  # run is not known there: it is not compared
        ("process 1 ksm_rmap_items", "2", "None"),
        ("process 2 ksm_rmap_items", "None", "2"),
        ("process 1 page 17", "node 0, group 1", "node 1, group 2"),
        ("process 1 page 18", "the zero page, group 2", "absent"),
    ]


def test_groups_do_not_depend_on_frames() -> None:
    pages = [(2, 16, 0, 9), (1, 16, 0, 7), (1, 17, 1, 9), (3, 16, -1, 0), (3, 17, -1, 5)]
    renamed = [(p, vpn, node, 100 - frame) for p, vpn, node, frame in reversed(pages)]
    one, other = Observation.of({}, {}, pages), Observation.of({}, {}, renamed)
    assert one == other
    assert one.pages[1, 16] == Place(0, 1)
    assert one.pages[3, 16] == one.pages[3, 17]  # the zero page is one group, whatever is said of its frame


def test_pages_in_an_observation_by_process_and_area() -> None:
    host = SimHost(1)
    p, q = host.spawn(), host.spawn()
    r = p.mmap(2)
    assert q.mmap(2) == r
    p.write(r, 0, 5)
    q.write(r, 0, 5)
    p.madvise(r, "MERGEABLE")
    q.madvise(r, "MERGEABLE")
    host.scan(2)
    seen = host.observe()
    assert seen.place(p, r, 0) == seen.place(q, r, 0) == Place(0, 1)
    assert seen.place(p, r, 1) is None
    assert (seen.sharers(p, r, 0), seen.sharers(p, r, 1)) == (2, 0)


def test_numbers_of_any_kind_are_plain_numbers() -> None:
    recorder = Recorder(SimHost(1))
    recorder.set("merge_across_nodes", False)
    process = recorder.spawn()
    area = process.mmap(np.int64(2))
    process.write(area, np.uint8(1), np.int32(7))
    assert process.read(area, True) == 7
    process.move_pages(area, {np.int64(1): np.int64(0)})
    lines = [step.line for step in recorder.steps]
    assert lines[0] == "host.set('merge_across_nodes', 0)"
    assert lines[2:] == ["r1 = p1.mmap(2)", "p1.write(r1, 1, 7)", "p1.read(r1, 1)", "p1.move_pages(r1, {1: 0})"]
    with pytest.raises(TypeError):
        process.write(area, 0, 1.5)  # type: ignore[arg-type]


def test_who_has_exited_does_nothing_more_on_any_host() -> None:
    recorder = Recorder(SimHost(1))
    process = recorder.spawn()
    area = process.mmap(1)
    process.pin(area, 0)
    process.exit()
    for call in (process.exit, process.fork, lambda: process.write(area, 0, 1), lambda: process.unpin(area, 0)):
        with pytest.raises(NoSuchProcess):
            call()


def test_errors_are_steps_and_the_recorder_checks_what_goes_in() -> None:
    recorder = Recorder(SimHost(1))
    process = recorder.spawn()
    area = process.mmap(1)
    with pytest.raises(PagefoldError):
        recorder.set("max_page_sharing", 1)
    with pytest.raises(OSError, match="run"):
        recorder.set("run", 3)
    process.munmap(area)
    with pytest.raises(UsageError):
        process.write(area, 0, 1)
    for content in (-1, 2**64):
        with pytest.raises(UsageError, match="does not fit"):
            process.write(area, 0, content)
    with pytest.raises(UsageError, match="0 full scans"):
        recorder.scan(0)
    assert [step.outcome for step in recorder.steps if "set(" in step.line or "write(" in step.line] == [
        "raises OSError EINVAL",
        "raises OSError EINVAL",
        "raises UsageError",
    ]
