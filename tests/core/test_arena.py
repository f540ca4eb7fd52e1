"""Let arrays grow while they are used, and follow the runs of page-table entries: nothing moves, nothing is lost."""

from __future__ import annotations

import contextlib
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagefold import Area, Engine, Machine, Process
from pagefold.core import arena, layout
from pagefold.errors import OutOfMemory, UsageError
from tests.conftest import scaled
from tests.core.worlds import entries, free_runs


def machine_with_room(pages: int) -> Machine:
    """Make a machine whose arrays begin with room for so many pages."""
    machine = Machine(nodes=2, frames=1)
    machine._arena.world = arena.new_world([3000, 3000], 16, shadow=True, pages=pages)
    return machine


def lengths(machine: Machine) -> dict[str, int]:
    return {name: len(array) for name, array in machine.world._asdict().items()}


def play(machine: Machine, seed: int) -> tuple[list[object], list[tuple[Process, Area]]]:
    """Run one long random history; return all there is to see of it, and the handles."""
    generator = random.Random(seed)
    engine = Engine(machine, run=1, smart_scan=0, merge_across_nodes=0, max_page_sharing=3, use_zero_pages=1)
    engine.keep_journal()
    seen: list[object] = []
    handles: list[tuple[Process, Area]] = []
    for number in range(30):
        process = machine.spawn(number % 2)
        area = process.mmap(generator.randrange(1, 40))
        handles.append((process, area))
        for index in range(area.pages):
            process.write(area, index, generator.randrange(60))
        process.madvise(area, "MERGEABLE")
        process.madvise(area, "UNMERGEABLE", area.pages // 2, 1)  # three areas of one
        if number % 7 == 0:
            handles.append((process.fork(), area))
        engine.scan(200)
        seen.append([(i.kind, i.mm, i.vpn) for i in engine.take_intents()])
    engine.scan_full(3)
    engine.validate()
    seen += [engine.counters(), [process.ksm_stat() for process, _ in handles]]
    seen += [list(process.pages()) for process, _ in handles]
    seen += list(engine.stable_nodes())
    return seen, handles


@pytest.mark.parametrize("seed", range(3))
def test_arrays_that_grow_while_scanning_change_nothing(seed: int) -> None:
    tiny, ample = machine_with_room(1), machine_with_room(50_000)
    begin = lengths(tiny), lengths(ample)
    (grown, handles), (large, _) = play(tiny, seed), play(ample, seed)
    assert grown == large
    end = lengths(tiny), lengths(ample)
    bigger = {name for name in end[0] if end[0][name] > begin[0][name]}
    assert bigger == {"ptes", "shadow", "vmas", "mms", "rmaps", "stables", "journal"}
    assert {name for name in end[1] if end[1][name] > begin[1][name]} == {"vmas", "mms", "journal"}
    for number, (process, area) in enumerate(handles):  # made before the arrays grew
        process.write(area, 0, 1000 + number)
    assert [process.read(area, 0) for process, area in handles] == [1000 + n for n in range(len(handles))]


def test_an_area_larger_than_half_of_all_is_mapped_at_once() -> None:
    machine = machine_with_room(1)
    process = machine.spawn()
    area = process.mmap(5000)
    process.write(area, 4999, 7)
    assert process.read(area, 4999) == 7
    assert len(machine.world.shadow) == len(machine.world.ptes) > 5000


def test_growth_keeps_what_was_there_and_says_when_it_is_too_much() -> None:
    world = arena.new_world([4], 0, shadow=False, pages=1)
    world.rmaps[1]["vpn"] = 77
    bigger = arena.grow(world, layout.NEED_RMAPS)
    assert len(bigger.rmaps) > 2
    assert bigger.rmaps[1]["vpn"] == 77
    assert not bigger.rmaps[2:].tobytes().strip(b"\0")
    more = arena.grow(world, layout.NEED_PTES, 100)
    assert len(more.ptes) >= 102
    assert len(more.shadow) == len(world.shadow), "no shadow: it stays one record"
    with pytest.raises(OutOfMemory, match=f"{arena.MAX_INDEX + 3} vmas"):
        arena.grow(world, layout.NEED_VMAS, arena.MAX_INDEX + 3 - len(world.vmas))


# --- page-table runs ----------------------------------------------------------------------------------------------------


def check_runs(machine: Machine) -> None:
    """Free runs are ordered, never touch, are empty inside, and with the areas' runs make up all entries ever used."""
    world = machine.world
    runs = free_runs(world)
    for (first, length), (following, _) in pairwise(runs):
        assert first + length < following
    taken = [pte for *_, pte in entries(world)]
    free = [first + index for first, length in runs for index in range(length)]
    assert sorted(taken + free) == list(range(1, int(world.ctl[0]["ptes_used"])))
    for first, length in runs:
        assert not world.ptes[first : first + length]["flags"].any()
        assert not world.ptes[first + 1 : first + length].tobytes().strip(b"\0")


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("mmap", "mmap", "munmap", "munmap", "write", "fork", "exit")), *[st.integers(0, 50)] * 3
    ),
    max_size=40,
)


@settings(max_examples=scaled(150), deadline=None, derandomize=True, database=None)
@given(steps=STEPS)
def test_no_sequence_of_maps_and_unmaps_leaks_an_entry(steps: list[tuple[str, int, int, int]]) -> None:
    machine = Machine(frames=4000)
    machine._arena.world = arena.new_world([4000], 4, shadow=True, pages=1)
    engine = Engine(machine)
    live: list[tuple[Process, list[Area]]] = [(machine.spawn(), [])]
    for name, a, b, c in steps:
        process, areas = live[a % len(live)]
        area = areas[b % len(areas)] if areas else None
        if name == "mmap":
            areas.append(process.mmap(1 + b))
        elif name == "fork" and len(live) < 6:
            live.append((process.fork(), list(areas)))
        elif name == "exit" and len(live) > 1:
            process.exit()
            live.remove((process, areas))
        elif name == "munmap" and area:
            process.munmap(area, c % area.pages, 1 + (a + b) % (area.pages - c % area.pages))
        elif name == "write" and area:
            with contextlib.suppress(UsageError):  # it may be unmapped
                process.write(area, c % area.pages, b)
        check_runs(machine)
    engine.validate()
    for process, _ in live:
        process.exit()
    used = int(machine.world.ctl[0]["ptes_used"])
    assert free_runs(machine.world) == ([(1, used - 1)] if used > 1 else [])
    assert machine.free_frames(0) == 4000
    engine.validate()
