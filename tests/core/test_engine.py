"""Knock at every door of the merger: knobs, scans, the journal, the advisor, and what becomes of merged pages."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twin import DEFAULTS, Twin

from pagefold import Area, Engine, Machine, Process, settings
from pagefold.core import events, layout
from pagefold.errors import (
    EngineStopped,
    KnobBusy,
    KnobInvalid,
    OutOfMemory,
    PagefoldError,
    UnknownKnob,
    UsageError,
)
from tests.conftest import scaled
from tests.core.worlds import entries, stable_slots

KERNEL = Path("/sys/kernel/mm/ksm")


def merging(
    *contents: int, nodes: int = 1, frames: int = 64, rules: str = "mainline", **knobs: Any
) -> tuple[Engine, Process, Area]:
    """Make a process with these pages, MERGEABLE, and an engine that runs."""
    machine = Machine(nodes=nodes, frames=frames, swap=8, shadow=True)
    if rules == "mainline":
        knobs = {"smart_scan": 0, **knobs}
    engine = Engine(machine, rules, run=1, **knobs)
    process = machine.spawn()
    area = process.mmap(len(contents))
    for index, content in enumerate(contents):
        process.write(area, index, content)
    process.madvise(area, "MERGEABLE")
    return engine, process, area


def shared(engine: Engine) -> tuple[int, int]:
    engine.validate()
    counters = engine.counters()
    return counters.pages_shared, counters.pages_sharing


# --- refusals -----------------------------------------------------------------------------------------------------------


def refuse_in_full(engine: Engine) -> None:
    engine.keep_journal()
    engine.scan_full(2)
    fill(engine.machine)
    engine.refuse(engine.take_intents()[0])


def fill(machine: Machine) -> None:
    other = machine.spawn()
    filler = other.mmap(sum(machine.free_frames(nid) for nid in range(machine.nodes)))
    for index in range(filler.pages):
        other.write(filler, index, 1000 + index)


Act = Callable[[Engine], Any]
REFUSALS: dict[str, tuple[Act, type[PagefoldError], str]] = {
    "rules": (lambda e: Engine(e.machine, "modern"), UsageError, "'modern' .* use one of classic, mainline, pagefold"),
    "a knob": (lambda e: e.set("speed", 1), UnknownKnob, "'speed'; the knobs are run, pages_to_scan"),
    "a knob at once": (lambda e: Engine(e.machine, speed=1), UnknownKnob, "'speed'; the knobs are run"),
    "a name": (lambda e: e.get("speed"), UnknownKnob, "no knob or counter 'speed'"),
    "a word": (lambda e: e.set("run", "fast"), KnobInvalid, "run: 'fast' is not a whole number"),
    "too low": (lambda e: e.set("max_page_sharing", 1), KnobInvalid, "max_page_sharing: 1 .* use 2 to"),
    "too high": (lambda e: e.set("merge_across_nodes", 2), KnobInvalid, "merge_across_nodes: 2 .* use 0 to 1"),
    "no run": (lambda e: e.set("run", 3), KnobInvalid, "run: 3 is out of range; use 0 to 2"),
    "a mode": (lambda e: e.set("advisor_mode", 1), KnobInvalid, "1 is not a mode; use none or scan-time"),
    "the advisor's": (
        lambda e: (e.set("advisor_mode", "scan-time"), e.set("pages_to_scan", 7)),
        KnobInvalid,
        "pages_to_scan: the advisor sets it; set advisor_mode to none first",
    ),
    "not classic": (
        lambda e: Engine(e.machine, "classic", smart_scan=0),
        KnobInvalid,
        "smart_scan: the classic rules .* use rules='mainline'",
    ),
    "merged pages": (
        lambda e: (e.scan_full(2), e.set("merge_across_nodes", 0)),
        KnobBusy,
        "merge_across_nodes: 1 merged pages exist; set run to 2 first",
    ),
    "a mapped node": (lambda e: still_mapped(e).set("max_page_sharing", 9), KnobBusy, "still mapped; set run to 2"),
    **{
        f"{knob} going offline": (
            lambda e, knob=knob: (e.machine.offline_begin(0), e.set(knob, 0)),  # type: ignore[misc]
            KnobBusy,
            f"{knob}: node 0 is going offline; finish or cancel that first",
        )
        for knob in ("run", "merge_across_nodes")
    },
    "sharing going offline": (
        lambda e: (e.machine.offline_begin(0), e.set("max_page_sharing", 9)),
        KnobBusy,
        "node 0 is going offline",
    ),
    "scan going offline": (lambda e: (e.machine.offline_begin(0), e.scan()), KnobBusy, "scan: node 0 is going offline"),
    "stopped": (lambda e: (e.set("run", 0), e.scan()), EngineStopped, "run is 0: .*; set run to 1"),
    "unmerged": (lambda e: (e.set("run", 2), e.scan()), EngineStopped, "run is 2: .*; set run to 1"),
    "negative scan": (lambda e: e.scan(-1), UsageError, "-1 pages cannot be scanned; use 0 or more"),
    "unmerge without memory": (
        lambda e: (e.scan_full(2), fill(e.machine), e.set("run", 2)),
        OutOfMemory,
        "no frame .* run is 0 now, and the rest stays merged",
    ),
    "refuse without memory": (refuse_in_full, OutOfMemory, "no frame is left for page 1[67] of mm 1; it stays merged"),
}


def still_mapped(engine: Engine) -> Engine:
    """Leave a stable node without rmap_items whose page a child of the sharers still maps."""
    engine.scan_full(2)
    process = engine.machine.processes[0]
    process.fork()
    for index in (0, 1):
        process.write(Area(16, 2), index, 100 + index)
    while engine.counters().pages_shared:
        engine.scan(1)
    return engine


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_line_and_changes_nothing(name: str) -> None:
    act, error, says = REFUSALS[name]
    engine, _, _ = merging(7, 7)
    with pytest.raises(error, match=says) as caught:
        act(engine)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    if isinstance(caught.value, KnobBusy | KnobInvalid):
        assert caught.value.errno == {KnobBusy: errno.EBUSY, KnobInvalid: errno.EINVAL}[error]
        assert caught.value.knob
    engine.validate()


@pytest.mark.parametrize("value", [1.5, None])
def test_a_knob_takes_whole_numbers_only(value: Any) -> None:
    engine, _, _ = merging(7)
    with pytest.raises(KnobInvalid):
        engine.set("use_zero_pages", value)


# --- knobs --------------------------------------------------------------------------------------------------------------


def test_knobs_begin_at_the_documented_values() -> None:
    engine = Engine(Machine(frames=4))
    assert {name: engine.get(name) for name in settings.KNOBS} == DEFAULTS
    told = dict(run=0, pages_to_scan=100, sleep_millisecs=20, merge_across_nodes=1, max_page_sharing=256)
    told |= dict(stable_node_chains_prune_millisecs=2000, use_zero_pages=0, smart_scan=1, advisor_mode="none")
    assert {name: engine.get(name) for name in told} == told


@pytest.mark.parametrize("name", [name for name in settings.KNOBS if name not in ("advisor_mode", "run")])
def test_limits_are_inclusive_and_strings_are_numbers(name: str) -> None:
    engine = Engine(Machine(frames=4))
    knob = settings.KNOBS[name]
    kept = (
        settings.UINT_MAX if name == "advisor_max_cpu" else settings.ULONG_MAX
    )  # the kernel takes 64 bits of it, and keeps 32
    for value in (knob.low, str(knob.high)):
        engine.set(name, value)
        assert engine.get(name) == int(value) & kept
    for value in (knob.low - 1, knob.high + 1):
        with pytest.raises(KnobInvalid, match=f"{value} is out of range; use {knob.low} to {knob.high}"):
            engine.set(name, value)
    assert engine.get(name) == knob.high & kept


@pytest.mark.skipif(not KERNEL.is_dir(), reason="this kernel has no KSM")
def test_names_are_those_of_the_running_kernel() -> None:
    """Only names: values belong to whoever runs this machine. Not every kernel has all of them."""
    files = {path.name for path in KERNEL.iterdir()}
    engine = Engine(Machine(frames=4))
    for name in files:
        engine.get(name)
    if "advisor_mode" in files:
        counters = set(engine.counters().__dataclass_fields__)
        assert files == set(settings.KNOBS) | counters


def test_run_0_stops_and_keeps_run_2_unmerges_and_forgets() -> None:
    engine, process, area = merging(7, 7, 7, 8)
    engine.scan_full(2)
    assert shared(engine) == (1, 2)
    engine.set("run", 0)
    assert shared(engine) == (1, 2)
    engine.set("run", 2)
    assert shared(engine) == (0, 0)
    assert (engine.counters().full_scans, engine.counters().pages_volatile, engine.counters().pages_unshared) == (
        0,
        0,
        0,
    )
    assert [process.read(area, index) for index in range(4)] == [7, 7, 7, 8]
    assert stable_slots(engine.machine.world) == []
    assert len({where.frame for _, where in process.pages()}) == 4
    late = engine.machine.spawn()
    late.madvise(late.mmap(1), "MERGEABLE")
    assert engine.machine.world.mms[0]["ring_prev"] == late.mm, "while unmerging a new mm enters at the end"
    engine.set("run", 1)
    engine.scan_full(2)
    assert shared(engine) == (1, 2)


def test_run_2_without_memory_keeps_what_it_cannot_break() -> None:
    engine, process, area = merging(7, 7, 7, 7)
    engine.scan_full(2)
    fill(engine.machine)
    engine.machine.processes[1].munmap(Area(16, 1))
    with pytest.raises(OutOfMemory):
        engine.set("run", 2)
    assert engine.get("run") == 0
    engine.validate()
    assert [process.read(area, index) for index in range(4)] == [7] * 4
    engine.machine.processes[1].exit()
    engine.set("run", 2)
    assert shared(engine) == (0, 0)


def test_offline_is_bit_4_of_run_and_cancel_clears_it() -> None:
    engine, _, _ = merging(7, 7, nodes=2)
    engine.machine.offline_begin(1)
    assert engine.get("run") == 5
    engine.machine.offline_cancel()
    assert engine.get("run") == 1
    engine.scan_full(2)
    engine.machine.offline(0)
    assert engine.get("run") == 1
    assert shared(engine) == (1, 1)


def test_a_scan_takes_its_budget_and_ends_with_the_full_scan() -> None:
    engine, _, _ = merging(*range(1, 11))
    assert [engine.scan(4) for _ in range(4)] == [4, 4, 2, 4]
    assert engine.get("full_scans") == 1
    assert engine.scan(0) == 0
    assert engine.scan(10**30) == 6
    engine.set("pages_to_scan", 3)
    assert engine.scan() == 3
    assert engine.counters().pages_scanned == 23


def test_an_empty_ring_is_no_full_scan() -> None:
    engine = Engine(Machine(frames=4), run=1)
    engine.scan_full(3)
    assert engine.scan(10) == 0
    assert engine.counters().full_scans == 0


# --- the journal ----------------------------------------------------------------------------------------------------------


def page_tables(machine: Machine) -> dict[tuple[int, int], int]:
    """Return the frame of every present page, 0 for the zero page."""
    world, answer = machine.world, {}
    for mm, _, vpn, pte in entries(world):
        flags = int(world.ptes[pte]["flags"])
        if flags & (layout.PTE_PRESENT | layout.PTE_ZERO):
            answer[mm, vpn] = int(world.ptes[pte]["pfn"])
    return answer


@pytest.mark.parametrize("seed", range(scaled(20)))
def test_intents_replayed_on_a_copy_give_the_same_mapping(seed: int) -> None:
    generator = random.Random(seed)
    machine = Machine(nodes=2, frames=200, swap=8, shadow=True)
    limit = 3 if seed % 2 else 256
    engine = Engine(machine, run=1, smart_scan=0, merge_across_nodes=seed % 2, max_page_sharing=limit, use_zero_pages=1)
    engine.keep_journal()
    kinds = set()
    for number in range(4):
        process = machine.spawn(number % 2)
        process.madvise(process.mmap(12), "MERGEABLE")
    for step in range(30):
        for process in machine.processes:
            process.write(Area(16, 12), generator.randrange(12), generator.randrange(4))
        if step % 5 == 4:
            generator.choice(machine.processes).move_pages(Area(16, 12), {generator.randrange(12): step % 2})
        assert engine.take_intents() == [], "processes and moves write no intents"
        copy = page_tables(machine)
        if step % 10 == 9:
            generator.choice(machine.processes).madvise(Area(16, 12), "UNMERGEABLE", 2, 5)
        if step == 28:
            engine.set("run", 2)
            engine.set("run", 1)
        engine.scan_full(2)
        for intent in engine.take_intents():
            kinds.add(intent.kind)
            where = intent.mm, intent.vpn
            assert copy[where] == intent.old_frame, intent
            if intent.kind == "protect":
                assert intent.new_frame == intent.old_frame
            copy[where] = intent.new_frame
        assert copy == page_tables(machine)
    engine.validate()
    assert kinds == {"protect", "redirect", "zero", "break"}
    engine.keep_journal(False)
    engine.scan_full(2)
    assert engine.take_intents() == []


def test_a_refused_intent_is_a_private_copy_and_a_new_calm_test() -> None:
    engine, process, area = merging(7, 7, 7)
    engine.keep_journal()
    engine.scan_full(2)
    intents = engine.take_intents()
    assert [intent.kind for intent in intents] == ["protect", "redirect", "redirect"]
    assert len({where.frame for _, where in process.pages()}) == 1
    engine.refuse(intents[2])
    assert len({where.frame for _, where in process.pages()}) == 2
    assert [process.read(area, index) for index in range(3)] == [7] * 3
    engine.scan_full()
    assert shared(engine) == (1, 1), "it is not calm yet"
    engine.scan_full()
    assert shared(engine) == (1, 2)
    refused = engine.take_intents()
    assert [(intent.kind, intent.vpn) for intent in refused] == [("redirect", intents[2].vpn)]
    process.munmap(area)
    engine.refuse(refused[0])  # gone meanwhile: nothing to take back
    process.exit()
    engine.refuse(refused[0])
    engine.validate()


# --- the advisor ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10))
def test_the_advisor_advises_as_the_twin_does(seed: int) -> None:
    generator = random.Random(seed)
    engine, _, _ = merging(1)
    twin = Twin()
    for knob, value in (
        ("advisor_mode", "scan-time"),
        ("advisor_max_cpu", generator.choice((5, 70, 100))),
        ("advisor_target_scan_time", generator.choice((1, 200, 5000))),
        ("advisor_max_pages_to_scan", generator.choice((600, 30000))),
    ):
        engine.set(knob, value)
        twin.set(knob, value)
    assert engine.get("pages_to_scan") == twin.get("pages_to_scan") == 500
    for _ in range(12):
        seconds, cpu_ms = generator.choice((0, 1, 30, 200, 1000)), generator.randrange(100_000)
        engine.scan(1)  # the full scan has begun
        engine.now_ms += seconds * 1000 + generator.randrange(1000)
        engine.cpu_ms += cpu_ms
        engine.scan(1)  # and is over
        twin.advise(seconds, cpu_ms * 100 // (max(seconds, 1) * 1000))
        assert engine.get("pages_to_scan") == twin.get("pages_to_scan")
    engine.set("advisor_mode", "none")
    assert engine.get("pages_to_scan") == 100


# --- what becomes of merged pages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", ["classic", "mainline"])
def test_swapping_out_and_in_breaks_sharing_and_it_is_found_again(rules: str) -> None:
    engine, process, area = merging(7, 7, 7, rules=rules)
    engine.scan_full(2)
    assert shared(engine) == (1, 2)
    assert process.swap_out(area, 0)
    assert engine.machine.free_frames(0) == 64
    engine.validate()
    assert [process.read(area, index) for index in range(3)] == [7] * 3
    assert len({where.frame for _, where in process.pages()}) == 3
    engine.scan_full(3)
    assert shared(engine) == (1, 2)
    assert len(stable_slots(engine.machine.world)) == 1, "the stale node is gone"


@pytest.mark.parametrize("rules", ["classic", "mainline"])
@pytest.mark.parametrize("heir", ["same content", "other content", "merged again"])
def test_a_frame_that_is_reused_is_not_trusted(rules: str, heir: str) -> None:
    """Free a KSM frame, let another page have it, and search: the old stable node looks through its keyhole and is stale."""
    engine, process, area = merging(7, 7, 8, rules=rules, frames=8)
    engine.scan_full(2)
    node = stable_slots(engine.machine.world)[0]
    frame = next(iter(engine.stable_nodes())).frame
    process.munmap(area, 0, 2)
    other = engine.machine.spawn()
    fresh = other.mmap(2)
    other.write(fresh, 0, 9 if heir == "other content" else 7)
    assert dict(other.pages())[fresh.start].frame == frame, "the frame was reused"
    other.write(fresh, 1, 7)
    engine.validate()
    assert [(one.frame, one.content) for one in engine.stable_nodes()] == [(0, None)]
    if heir == "merged again":
        other.madvise(fresh, "MERGEABLE")
    else:
        other.madvise(fresh, "MERGEABLE", 1, 1)
    engine.scan_full(2 if rules == "mainline" else 3)
    engine.validate()
    assert other.read(fresh, 0) == (9 if heir == "other content" else 7)
    merged = heir == "merged again"
    assert shared(engine) == ((1, 1) if merged else (0, 0))
    if not merged:
        assert stable_slots(engine.machine.world) == []
        assert dict(other.pages())[fresh.start + 1].frame != frame, "nothing was merged onto the stranger"
    assert engine.machine.world.stables[node]["place"] == (layout.IN_TREE if merged else layout.FREE)


def test_groups_and_stable_nodes_tell_the_same() -> None:
    engine, process, _ = merging(7, 7, 8, 8, 8, 9)
    engine.scan_full(2)
    nodes = list(engine.stable_nodes())
    assert [(node.place, node.content, node.tree) for node in nodes] == [("tree", 7, 0), ("tree", 8, 0)]
    groups = {frame: {(p.mm, vpn) for p, vpn in members} for frame, members in engine.sharing_groups().items()}
    assert groups == {node.frame: set(node.sharers) for node in nodes}
    assert process.ksm_stat() == {
        "ksm_rmap_items": 6,
        "ksm_zero_pages": 0,
        "ksm_merging_pages": 5,
        "ksm_process_profit": 5 * 4096 - 6 * 64,
    }
    assert engine.counters().general_profit == 3 * 4096 - 6 * 64
    assert engine.get("general_profit") == engine.counters().general_profit


def test_zero_pages_cost_no_frame_and_come_back_when_written() -> None:
    engine, process, area = merging(0, 0, 7, use_zero_pages=1)
    engine.scan_full(2)
    assert engine.counters().ksm_zero_pages == process.ksm_stat()["ksm_zero_pages"] == 2
    assert engine.machine.free_frames(0) == 63
    child = process.fork()
    assert engine.counters().ksm_zero_pages == 4
    child.write(area, 0, 5)
    assert (process.read(area, 0), child.read(area, 0)) == (0, 5)
    assert engine.counters().ksm_zero_pages == 3
    process.madvise(area, "UNMERGEABLE")
    assert engine.counters().ksm_zero_pages == 1
    engine.validate()


def test_a_pinned_page_is_never_merged_until_it_is_released() -> None:
    engine, process, area = merging(7, 7)
    process.pin(area, 0)
    engine.scan_full(4)
    assert shared(engine) == (0, 0)
    process.unpin(area, 0)
    engine.scan_full(2)
    assert shared(engine) == (1, 1)


def test_every_event_has_a_name() -> None:
    codes = {name: value for name, value in vars(events).items() if name.isupper() and isinstance(value, int)}
    assert {value: name.lower() for name, value in codes.items()} == dict(enumerate(events.NAMES[1:], start=1))
