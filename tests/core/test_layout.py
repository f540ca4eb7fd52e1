"""Hold the records to what their comments promise: sizes, reserved indices, and which fields share bytes."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from pagefold import Engine, Machine
from pagefold.core import events, layout
from tests.conftest import scaled

DTYPES = {
    name: getattr(layout, name)
    for name in ("ctl", "node", "frame", "content", "pte", "vma", "mm", "rmap", "stable", "intent", "event")
}
# The fields that may lie over each other; the comment of each record says which one is valid when.
UNIONS: dict[str, set[frozenset[str]]] = {
    "rmap": {
        frozenset(pair) for pair in (("rb_left", "hlist_next"), ("rb_right", "hlist_prev"), ("rb_parent", "head"))
    },
    "stable": {
        frozenset(pair)
        for pair in (
            ("kpfn", "chain_prune_time"),
            ("rb_left", "list_next"),
            ("rb_right", "list_prev"),
            ("rb_parent", "chain"),
        )
    },
}


def extents(dtype: np.dtype[Any]) -> dict[str, range]:
    assert dtype.fields is not None
    return {name: range(at[1], at[1] + at[0].itemsize) for name, at in dtype.fields.items()}


@pytest.mark.parametrize("name", DTYPES)
def test_fields_overlap_only_where_the_layout_says_so(name: str) -> None:
    dtype = DTYPES[name]
    fields = extents(dtype)
    overlapping = {
        frozenset((one, other))
        for one, other in combinations(fields, 2)
        if fields[one].start < fields[other].stop and fields[other].start < fields[one].stop
    }
    assert overlapping == UNIONS.get(name, set())
    assert all(extent.stop <= dtype.itemsize for extent in fields.values())


@pytest.mark.parametrize("name", DTYPES)
def test_every_field_is_aligned(name: str) -> None:
    dtype = DTYPES[name]
    for field, (form, offset) in ((k, v[:2]) for k, v in dtype.fields.items()):
        size = (form.subdtype[0] if form.subdtype else form).itemsize
        assert offset % size == 0, field
        assert dtype.itemsize % min(size, 4) == 0, field


def test_sizes_per_tracked_page_and_per_frame() -> None:
    assert layout.rmap.itemsize + layout.pte.itemsize <= 64
    assert layout.frame.itemsize + layout.content.itemsize + layout.stable.itemsize <= 64
    assert layout.rmap.itemsize <= layout.RMAP_ITEM_BYTES


def settled(pages: int) -> tuple[Machine, Engine]:
    """Make a machine where half of the pages are alone, a third are pairs, the rest copies of a few; scan until it settles."""
    processes = 4
    each = pages // processes
    machine = Machine(frames=each * processes)
    engine = Engine(machine, run=1, smart_scan=0, max_page_sharing=8)
    content = np.arange(1, each * processes + 1, dtype=np.uint64)
    content[content % 6 == 1] -= 1  # equal to the one before
    content[content % 6 == 3] = content[content % 6 == 3] // 600 + np.uint64(2**32)  # about 100 copies of each
    records = np.zeros(len(content), layout.content)
    records["lo"] = content
    for number in range(processes):
        process = machine.spawn()
        area = process.mmap(each)
        process.load(area, records[number * each : (number + 1) * each])
        process.madvise(area, "MERGEABLE")
    engine.scan_full(3)
    return machine, engine


def test_measured_bytes_per_tracked_page_and_per_frame() -> None:
    pages = scaled(200_000)
    machine, engine = settled(pages)
    world, ctl = machine.world, machine.world.ctl[0]
    counters = engine.counters()
    assert ctl["rmap_items"] == pages
    assert min(counters.pages_shared, counters.pages_sharing, counters.pages_unshared) > pages // 20
    used = {name: int(ctl[f"{name}_used"]) for name in ("rmaps", "ptes", "stables")}
    page_bytes = (used["rmaps"] - 1) * world.rmaps.itemsize + (used["ptes"] - 1) * world.ptes.itemsize
    assert page_bytes / pages <= 64
    frame_bytes = (len(world.frames) - 1) * world.frames.itemsize + (len(world.contents) - 1) * world.contents.itemsize
    frame_bytes += (used["stables"] - 1 - layout.KSM_LONE) * world.stables.itemsize
    assert frame_bytes / (len(world.frames) - 1) <= 64
    engine.validate()


def test_index_0_means_none_and_stable_slot_1_is_never_handed_out() -> None:
    machine, engine = settled(4000)
    first, *others = machine.processes
    for vpn in range(16, 116):  # come back, swap and break too
        first._do(events.SWAP_OUT, vpn)
    engine.scan_full(2)
    for process in others:
        process.exit()
    engine.scan_full(2)
    engine.set("run", 2)
    world = machine.world
    for name in ("frames", "contents", "ptes", "rmaps", "stables", "vmas", "journal", "schedule"):
        array = getattr(world, name)
        assert array[0].tobytes() == bytes(array.itemsize), name
    assert int(world.ctl[0]["stables_used"]) > 10
    assert world.stables[layout.KSM_LONE].tobytes() == bytes(world.stables.itemsize)
    engine.validate()
