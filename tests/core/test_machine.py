"""Knock at every door of the simulated computer: what it does, and the one line it says when it cannot."""

from __future__ import annotations

import errno
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pagefold import Area, Engine, Machine, Process
from pagefold.core import layout
from pagefold.errors import KnobBusy, NoSuchProcess, OutOfMemory, PagefoldError, UsageError

Act = Callable[[Machine, Process, Area], Any]


def contents(*values: int) -> np.ndarray[Any, np.dtype[np.void]]:
    records = np.zeros(len(values), layout.content)
    records["lo"] = values
    return records


def exited(act: Callable[[Process, Area], Any]) -> Act:
    def gone(machine: Machine, process: Process, area: Area) -> Any:
        process.exit()
        return act(process, area)

    return gone


def full(act: Act) -> Act:
    """Fill the machine first."""

    def without_memory(machine: Machine, process: Process, area: Area) -> Any:
        other = machine.spawn()
        filler = other.mmap(sum(machine.free_frames(nid) for nid in range(machine.nodes)))
        for index in range(filler.pages):
            other.write(filler, index, 1000 + index)
        return act(machine, process, area)

    return without_memory


def merged(act: Act) -> Act:
    """Merge the area's first two pages first."""

    def after_merge(machine: Machine, process: Process, area: Area) -> Any:
        engine = Engine(machine, run=1)
        process.write(area, 0, 7)
        process.write(area, 1, 7)
        process.madvise(area, "MERGEABLE")
        engine.scan_full(2)
        assert engine.counters().pages_sharing == 1
        return act(machine, process, area)

    return after_merge


def pinned(act: Act) -> Act:
    def after_pin(machine: Machine, process: Process, area: Area) -> Any:
        process.pin(area, 0)
        return act(machine, process, area)

    return after_pin


# What is done, the exception, and what its line must say: the value, and the remedy.
REFUSALS: dict[str, tuple[Act, type[PagefoldError], str]] = {
    "no nodes": (lambda *_: Machine(nodes=0), UsageError, "0 nodes .* use 1 to 1024"),
    "too many nodes": (lambda *_: Machine(nodes=1025), UsageError, "1025 nodes .* use 1 to 1024"),
    "frames for other nodes": (lambda *_: Machine(nodes=2, frames=[1]), UsageError, "for 1 nodes, but there are 2"),
    "negative frames": (lambda *_: Machine(frames=-1), UsageError, "-1 frames .* use 0 to"),
    "negative swap": (lambda *_: Machine(frames=1, swap=-1), UsageError, "-1 swap slots .* use 0 to"),
    "too many frames": (lambda *_: Machine(frames=2**40), UsageError, "1099511627776 frames .* use 0 to"),
    "spawn on no node": (lambda m, p, a: m.spawn(2), UsageError, "node 2 does not exist; use 0 to 1"),
    "spawn on node -1": (lambda m, p, a: m.spawn(-1), UsageError, "node -1 does not exist; use 0 to 1"),
    "fork to no node": (lambda m, p, a: p.fork(7), UsageError, "node 7 does not exist; use 0 to 1"),
    "free frames of no node": (lambda m, p, a: m.free_frames(9), UsageError, "node 9 does not exist; use 0 to 1"),
    "memory for no node": (lambda m, p, a: m.add_memory(9, 1), UsageError, "node 9 does not exist; use 0 to 1"),
    "offline no node": (lambda m, p, a: m.offline(9), UsageError, "node 9 does not exist; use 0 to 1"),
    "online no node": (lambda m, p, a: m.online(9), UsageError, "node 9 does not exist; use 0 to 1"),
    "map nothing": (lambda m, p, a: p.mmap(0), UsageError, "area of 0 pages .* use 1 to"),
    "map too much": (lambda m, p, a: p.mmap(2**31), UsageError, "2147483648 pages .* use 1 to"),
    "map a kind": (lambda m, p, a: p.mmap(1, kind="stack"), UsageError, "'stack' is not known; use one of anon"),  # type: ignore[arg-type]
    "map for no node": (lambda m, p, a: p.mmap(1, node=2), UsageError, "node 2 does not exist; use 0 to 1"),
    "map where something was": (lambda m, p, a: p.mmap(1, at=17), UsageError, "address 17 .* use 21 to [0-9]+, or 0"),
    "page beyond an area": (lambda m, p, a: p.write(a, 4, 1), UsageError, "page 4 .* of 4 pages; use 0 to 3"),
    "page before an area": (lambda m, p, a: p.read(a, -1), UsageError, "page -1 .* of 4 pages; use 0 to 3"),
    "negative content": (lambda m, p, a: p.write(a, 0, -1), UsageError, "content -1 .* use 0 to 2"),
    "too large content": (lambda m, p, a: p.write(a, 0, 2**128), UsageError, "content 3402823669.* use 0 to 2"),
    "unknown advice": (lambda m, p, a: p.madvise(a, "MERGE"), UsageError, "'MERGE' .* use MERGEABLE or UNMERGEABLE"),
    "advice beyond": (lambda m, p, a: p.madvise(a, "MERGEABLE", 2, 3), UsageError, "pages 2 to 4 .* of 4 pages"),
    "unmap nothing": (lambda m, p, a: p.munmap(a, 1, 0), UsageError, "pages 1 to 0 .* of 4 pages"),
    "unmap before": (lambda m, p, a: p.munmap(a, -1, 1), UsageError, "pages -1 to -1 .* of 4 pages"),
    "write the unmapped": (
        lambda m, p, a: (p.munmap(a), p.write(a, 1, 1)),
        UsageError,
        r"page 1 \(number 17\) of process 1 is not mapped",
    ),
    "read the unmapped": (lambda m, p, a: (p.munmap(a), p.read(a, 0)), UsageError, "page 0 .* is not mapped"),
    "pin the unmapped": (lambda m, p, a: (p.munmap(a), p.pin(a, 0)), UsageError, "page 0 .* is not mapped"),
    "lock the unmapped": (lambda m, p, a: (p.munmap(a), p.lock(a, 0)), UsageError, "page 0 .* is not mapped"),
    "swap the unmapped": (lambda m, p, a: (p.munmap(a), p.swap_out(a, 0)), UsageError, "page 0 .* is not mapped"),
    "lock the absent": (lambda m, p, a: p.lock(a, 3), UsageError, r"page 3 \(number 19\) .* is not present"),
    "lock twice": (
        lambda m, p, a: (p.write(a, 0, 1), p.lock(a, 0), p.lock(a, 0)),
        UsageError,
        "page 0 .* is locked already",
    ),
    "pin too often": (lambda m, p, a: [p.pin(a, 0) for _ in range(70_000)], UsageError, "page 0 .* pinned too often"),
    "unpin": (lambda m, p, a: p.unpin(a, 2), UsageError, "page 2 is not pinned by process 1"),
    "unlock": (lambda m, p, a: p.unlock(a, 2), UsageError, "page 2 was not locked by process 1"),
    "write without memory": (full(lambda m, p, a: p.write(a, 0, 1)), OutOfMemory, "no frame .* page 0 .* nothing was"),
    "pin without memory": (full(lambda m, p, a: p.pin(a, 2)), OutOfMemory, "no frame .* page 2 .* nothing was changed"),
    "load too much": (
        lambda m, p, a: p.load(p.mmap(99), contents(*range(99))),
        OutOfMemory,
        "99 pages do not fit into the machine; 64 did",
    ),
    "fork without memory": (pinned(full(lambda m, p, a: p.fork())), OutOfMemory, "no frame .* there is no child"),
    "unmerge without memory": (
        merged(full(lambda m, p, a: p.madvise(a, "UNMERGEABLE"))),
        OutOfMemory,
        "no frame .* the rest stays merged",
    ),
    "end merge_any without memory": (
        merged(full(lambda m, p, a: (p.merge_any(True), p.merge_any(False)))),
        OutOfMemory,
        "no frame .* the rest stays merged",
    ),
    "offline twice": (
        lambda m, p, a: (m.offline_begin(1), m.offline_begin(0)),
        KnobBusy,
        "node 1 is going offline already",
    ),
    "offline the offline": (lambda m, p, a: (m.offline(1), m.offline(1)), UsageError, "node 1 is offline already"),
    "online one on its way": (
        lambda m, p, a: (m.offline_begin(1), m.online(1)),
        UsageError,
        "node 1 is going offline; cancel that instead",
    ),
    "finish what never began": (lambda m, p, a: m.offline_finish(), UsageError, "no node is going offline"),
    "cancel what never began": (lambda m, p, a: m.offline_cancel(), UsageError, "no node is going offline"),
    "offline a pinned page": (
        pinned(lambda m, p, a: m.offline(0)),
        KnobBusy,
        "node 0 holds pages that are pinned, locked .* it stays online",
    ),
    "offline a full machine": (full(lambda m, p, a: m.offline(0)), OutOfMemory, "no room .* node 0; it stays online"),
    **{
        f"{name} after exit": (exited(act), NoSuchProcess, "process 1 .* has exited")
        for name, act in {
            "map": lambda p, a: p.mmap(1),
            "unmap": lambda p, a: p.munmap(a),
            "write": lambda p, a: p.write(a, 0, 1),
            "read": lambda p, a: p.read(a, 0),
            "advise": lambda p, a: p.madvise(a, "MERGEABLE"),
            "merge_any": lambda p, a: p.merge_any(True),
            "fork": lambda p, a: p.fork(),
            "exit": lambda p, a: p.exit(),
            "pin": lambda p, a: p.pin(a, 0),
            "lock": lambda p, a: p.lock(a, 0),
            "move": lambda p, a: p.move_pages(a, {0: 1}),
            "swap": lambda p, a: p.swap_out(a, 0),
            "ksm_stat": lambda p, a: p.ksm_stat(),
        }.items()
    },
}


def small() -> tuple[Machine, Process, Area]:
    machine = Machine(nodes=2, frames=32, swap=4, shadow=True)
    process = machine.spawn()
    return machine, process, process.mmap(4)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_line_that_names_the_value_and_the_remedy(name: str) -> None:
    act, error, says = REFUSALS[name]
    machine, process, area = small()
    with pytest.raises(PagefoldError) as caught:
        act(machine, process, area)
    assert type(caught.value) is error
    assert re.search(says, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    Engine(machine).validate()


def test_load_into_an_exited_process_is_refused() -> None:
    machine, process, area = small()
    process.exit()
    heir = machine.spawn()  # has the slot of the one that is gone
    heirs = heir.mmap(4)
    heir.write(heirs, 0, 5)
    with pytest.raises(NoSuchProcess):
        process.load(area, contents(1))
    assert heir.read(heirs, 0) == 5


@pytest.mark.parametrize(
    ("act", "error"),
    [
        (lambda m, p, a: p.load(a, contents(1, 2, 3, 4, 5)), UsageError),
        (lambda m, p, a: p.load(a, contents(1, 2), np.zeros(1, np.int16)), UsageError),
        (lambda m, p, a: p.load(a, contents(1), np.full(1, 9, np.int16)), UsageError),  # node 9 of 2
        (lambda m, p, a: m.add_memory(0, -5), UsageError),
        (lambda m, p, a: m.add_memory(0, 2**31), UsageError),
        (lambda m, p, a: p.mmap(1, at=2**63), UsageError),
    ],
)
def test_absurd_values_are_refused(act: Act, error: type[PagefoldError]) -> None:
    with pytest.raises(error):
        act(*small())


def test_locking_a_page_again_after_a_copy_loses_no_lock() -> None:
    machine, process, area = small()
    process.write(area, 0, 1)
    process.lock(area, 0)
    child = process.fork()
    process.write(area, 0, 2)  # another frame now
    process.lock(area, 0)
    process.unlock(area, 0)
    process.unlock(area, 0)
    child.exit()
    process.exit()
    assert machine.free_frames(0) == 32


# --- what the doors do ---------------------------------------------------------------------------------------------------


def node_of(process: Process, area: Area, index: int) -> int:
    return dict(process.pages())[area.start + index].node


def test_pages_go_where_they_are_wished_and_then_round() -> None:
    machine = Machine(nodes=3, frames=[1, 2, 3])
    process = machine.spawn(1)
    area = process.mmap(6)
    for index in range(6):
        process.write(area, index, index + 1)
    assert [node_of(process, area, index) for index in range(6)] == [1, 1, 2, 2, 2, 0]


@pytest.mark.parametrize(
    "content",
    [0, 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**126, 2**128 - 1],
)
def test_contents_of_128_bits_come_back(content: int) -> None:
    _, process, area = small()
    process.write(area, 0, content)
    assert process.read(area, 0) == content
    assert process.read(area, 1) == 0


def test_areas_never_touch_and_addresses_are_not_used_twice() -> None:
    _, process, area = small()
    process.munmap(area)
    second = process.mmap(2)
    assert (area.start, second.start, process.mmap(1, at=100).start) == (16, 21, 100)
    assert process.mmap(1).start == 102


def test_fork_shares_until_one_writes() -> None:
    machine, process, area = small()
    process.write(area, 0, 5)
    child = process.fork(node=1)
    assert machine.free_frames(0) + machine.free_frames(1) == 63
    child.write(area, 0, 6)
    assert (process.read(area, 0), child.read(area, 0), node_of(child, area, 0)) == (5, 6, 1)
    assert repr(child) == "<Process 2>"
    child.exit()
    assert repr(child) == "<Process 2 (exited)>"
    assert list(child.pages()) == []


def test_move_pages_answers_as_the_system_call_does() -> None:
    machine, process, area = small()
    for index in range(3):
        process.write(area, index, index + 1)
    process.pin(area, 1)
    assert process.swap_out(area, 2)
    answer = process.move_pages(area, {0: 1, 1: 1, 2: 1, 3: 1})
    assert answer == {0: 1, 1: -errno.EBUSY, 2: -errno.ENOENT, 3: -errno.ENOENT}
    assert process.move_pages(area, {0: 1}) == {0: 1}
    assert process.move_pages(area, {0: 2}) == {0: -errno.ENODEV}
    other = machine.spawn(0)
    filler = other.mmap(machine.free_frames(0))
    for index in range(filler.pages):
        other.write(filler, index, 9)
    assert process.move_pages(area, {0: 0}) == {0: -errno.ENOMEM}
    process.munmap(area, 3, 1)
    assert process.move_pages(area, {3: 0}) == {3: -errno.EFAULT}


def test_swap_out_and_in() -> None:
    _, process, area = small()
    for index in range(4):
        process.write(area, index, index + 1)
    child = process.fork()
    assert process.swap_out(area, 0)
    assert not process.swap_out(area, 0), "it is out already"
    assert dict(process.pages())[area.start].node == -2
    assert (process.read(area, 0), child.read(area, 0)) == (1, 1)
    assert dict(process.pages())[area.start].frame != dict(child.pages())[area.start].frame
    process.lock(area, 1)
    assert not process.swap_out(area, 1)
    process.unlock(area, 1)
    lonely = Machine(frames=4, swap=0)
    alone = lonely.spawn()
    page = alone.mmap(1)
    alone.write(page, 0, 1)
    assert not alone.swap_out(page, 0), "there is no slot"


def test_a_pin_outlives_its_process() -> None:
    machine, process, area = small()
    process.pin(area, 0)
    process.pin(area, 0)
    process.exit()
    assert machine.free_frames(0) == 31
    process.unpin(area, 0)
    assert machine.free_frames(0) == 31
    process.unpin(area, 0)
    assert machine.free_frames(0) == 32


def test_load_is_many_writes() -> None:
    machine, process, area = small()
    process.write(area, 1, 77)
    child = process.fork()
    process.load(area, contents(1, 2, 3, 4), np.array([0, 0, 1, -1], np.int16))
    assert [process.read(area, index) for index in range(4)] == [1, 2, 3, 4]
    assert [node_of(process, area, index) for index in range(4)] == [0, 0, 1, 0]
    assert child.read(area, 1) == 77
    Engine(machine).validate()


def test_added_memory_is_used() -> None:
    machine = Machine(nodes=2, frames=[1, 0], shadow=True)
    process = machine.spawn(1)
    area = process.mmap(3)
    process.write(area, 0, 1)
    with pytest.raises(OutOfMemory):
        process.write(area, 1, 2)
    machine.add_memory(1, 2)
    process.write(area, 1, 2)
    process.write(area, 2, 3)
    assert [node_of(process, area, index) for index in range(3)] == [0, 1, 1]
    assert (machine.free_frames(1), int(machine.world.nodes[1]["total"])) == (0, 2)
    machine.add_memory(0, 0)
    engine = Engine(machine)
    engine.validate()
    process.exit()
    engine.validate()
    assert machine.free_frames(1) == 2


def test_offline_moves_everything_and_online_brings_it_back() -> None:
    machine, process, area = small()
    engine = Engine(machine, run=1, merge_across_nodes=0)
    for index in range(4):
        process.write(area, index, 1 + index % 2)
    process.madvise(area, "MERGEABLE")
    engine.scan_full(2)
    assert engine.counters().pages_shared == 2
    machine.offline(0)
    assert engine.counters().pages_shared == 2
    assert {where.node for _, where in process.pages()} == {1}
    engine.validate()
    engine.scan_full(2)
    assert {node.tree for node in engine.stable_nodes()} == {1}
    process.write(area, 0, 9)
    assert node_of(process, area, 0) == 1
    machine.online(0)
    process.write(area, 1, 9)
    assert node_of(process, area, 1) == 0
    machine.offline_begin(1)
    machine.offline_cancel()
    engine.scan_full(2)
    engine.validate()


def test_offline_forgets_the_stable_nodes_that_lie_there() -> None:
    """A stale node of the node that goes is removed by the number of its frame, for nobody would look at it again."""
    machine, process, area = small()
    engine = Engine(machine, run=1)
    process.write(area, 0, 7)
    process.write(area, 1, 7)
    process.madvise(area, "MERGEABLE")
    engine.scan_full(2)
    process.write(area, 0, 1)
    process.write(area, 1, 2)
    assert [node.frame for node in engine.stable_nodes()] == [0], "stale, and nobody has noticed"
    machine.offline(0)
    assert list(engine.stable_nodes()) == []
    engine.validate()
