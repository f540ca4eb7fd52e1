"""Judge the mirror and its slots: what clients hold goes in, what shall merge comes out, and nothing is kept of who left."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from tests.conftest import scaled
from tests.live.clients import Buffer, random_pages

from pagefold.errors import KnobBusy
from pagefold.live.daemon import DEFAULTS
from pagefold.live.knobs import MAX_CPU_PERCENT
from pagefold.live.messages import PAGE
from pagefold.live.mirror import Mirror
from pagefold.live.region import HOLE, SHIFT, Int64, Region
from pagefold.live.slots import Slots, Source, hashes
from pagefold.live.store import Store
from pagefold.machine import Process
from pagefold.sources.memory_reader import MemoryReader

PLAIN: dict[str, int | str] = {name: value for name, value in DEFAULTS.items() if name != MAX_CPU_PERCENT}


class Twin:
    """A mirror, and what clients would have if they did at once what it wants."""

    def __init__(self, **knobs: int | str) -> None:
        self.mirror = Mirror(1, {**PLAIN, **knobs})
        self.processes: dict[int, Process] = {}
        self.regions: dict[int, Region] = {}
        self.contents: dict[int, Int64] = {}

    def join(self, pages: int) -> Process:
        process = self.mirror.attach()
        vpn = self.mirror.map(process, pages)
        self.processes[process.mm] = process
        self.regions[process.mm] = Region(1, 0x1000, pages, tracked=False, quiet=False, vpn=vpn)
        self.contents[process.mm] = np.zeros(pages, np.int64)
        return process

    def leave(self, process: Process) -> None:
        for things in (self.processes, self.regions, self.contents):
            things.pop(process.mm)
        self.mirror.detach(process)

    def put(self, process: Process, index: Int64, values: Int64) -> bool:
        """Let pages hold contents (0: zeros). What holds it already, and is there, is not touched."""
        where = self.regions[process.mm].where
        where[index[(self.contents[process.mm][index] != values) | (where[index] <= 0)]] = 0
        self.contents[process.mm][index] = values
        low = values.astype(np.uint64)
        return self.mirror.update(process, self.regions[process.mm].vpn + index, np.zeros(len(index), np.uint64), low)

    def scan(self, passes: int) -> None:
        for _ in range(passes):
            self.mirror.engine.scan_full(1)
            self.carry_out()

    def carry_out(self) -> int:
        done = 0
        for wish in self.mirror.wishes():
            region = self.regions[wish.mm]
            region.where[wish.vpns - region.vpn] = wish.frames
            done += len(wish.vpns)
        return done

    def everywhere(self) -> Counter[tuple[int, int]]:
        """Count the pages of each (content, frame)."""
        return Counter(
            (int(content), int(frame))
            for mm, contents in self.contents.items()
            for content, frame in zip(contents, self.regions[mm].where, strict=True)
        )


def pages(*values: int) -> Int64:
    return np.array(values, np.int64)


def test_what_is_equal_goes_to_one_frame_and_zeros_to_none() -> None:
    twin = Twin()
    one, two = twin.join(4), twin.join(3)
    assert twin.put(one, pages(0, 1, 2, 3), pages(7, 8, 0, 5))
    assert twin.put(two, pages(0, 1, 2), pages(8, 7, 9))
    twin.scan(3)
    seven, eight = (twin.regions[one.mm].where[at] for at in (0, 1))
    assert twin.regions[one.mm].where.tolist() == [seven, eight, HOLE, 0]
    assert twin.regions[two.mm].where.tolist() == [eight, seven, 0]
    assert seven != eight
    assert min(seven, eight) > 0
    twin.mirror.engine.validate()


def test_the_same_again_changes_nothing() -> None:
    twin = Twin()
    one, two = twin.join(2), twin.join(2)
    for process in (one, two):
        twin.put(process, pages(0, 1), pages(5, 6))
    twin.scan(3)
    before = {mm: region.where.copy() for mm, region in twin.regions.items()}
    for process in (one, two):
        vpn = twin.regions[process.mm].vpn
        zero, low = np.zeros(2, np.uint64), np.array([5, 6], np.uint64)
        assert not twin.mirror.update(process, pages(vpn, vpn + 1), zero, low), "it says that something changed"
    twin.scan(3)
    assert all((twin.regions[mm].where == where).all() for mm, where in before.items())


def test_what_is_held_is_equal_to_nothing() -> None:
    twin = Twin()
    one, two = twin.join(3), twin.join(3)
    for process in (one, two):
        twin.put(process, pages(0, 1, 2), pages(5, 5, 5))
        twin.mirror.hold(process, twin.regions[process.mm].vpn + pages(0, 2))
    twin.scan(4)
    assert (twin.regions[one.mm].where > 0).tolist() == [False, True, False]
    assert twin.mirror.engine.counters().pages_unshared == 4
    twin.put(one, pages(0, 2), pages(5, 5))
    twin.scan(4)
    assert len(set(twin.regions[one.mm].where.tolist())) == 1


def test_a_refusal_is_taken_back_and_tried_again() -> None:
    twin = Twin()
    one, two = twin.join(2), twin.join(2)
    for process in (one, two):
        twin.put(process, pages(0, 1), pages(5, 0))
    twin.scan(3)
    for process in (one, two):
        twin.mirror.refuse(process, twin.regions[process.mm].vpn + pages(0, 1))
        twin.regions[process.mm].where[:] = 0
        frames = twin.mirror.frames_of(process, twin.regions[process.mm])
        assert (frames > 0).all()
        assert not twin.mirror.is_ksm(frames).any()
    assert twin.mirror.engine.counters().ksm_zero_pages == 0
    twin.scan(4)
    assert twin.regions[one.mm].where[0] == twin.regions[two.mm].where[0] > 0
    assert twin.regions[one.mm].where[1] == HOLE


def test_only_the_last_word_on_a_page_is_a_wish() -> None:
    twin = Twin()
    one, two = twin.join(1), twin.join(1)
    for process in (one, two):
        twin.put(process, pages(0), pages(5))
    for _ in range(3):
        twin.mirror.engine.scan_full(1)
    twin.mirror.set("run", 2)
    assert twin.carry_out() == 2
    assert twin.everywhere() == {(5, 0): 2}


def test_wishes_of_clients_that_are_gone_are_nobodys() -> None:
    twin = Twin()
    one, two = twin.join(1), twin.join(1)
    for process in (one, two):
        twin.put(process, pages(0), pages(5))
    for _ in range(3):
        twin.mirror.engine.scan_full(1)
    old = one.mm
    twin.leave(one)
    for _ in range(3):
        twin.mirror.engine.scan_full(1)
    new = twin.join(1)
    while new.mm != old:  # until somebody has the number of the one who left
        new = twin.join(1)
    assert {wish.mm for wish in twin.mirror.wishes()} == {two.mm}


def test_neighbours_come_in_the_order_of_the_decision() -> None:
    twin = Twin()
    for _ in range(2):
        process = twin.join(50)
        twin.put(process, np.arange(50), np.arange(1, 51))
    for _ in range(3):
        twin.mirror.engine.scan_full(1)
    wishes = list(twin.mirror.wishes())
    assert all((np.diff(wish.vpns) == 1).all() for wish in wishes)
    assert all((np.diff(wish.order) > 0).all() for wish in wishes)


def test_frames_are_there_when_needed() -> None:
    twin = Twin()
    count = 10_000
    for _ in range(3):
        process = twin.join(count)
        twin.put(process, np.arange(count), np.arange(1, count + 1))
    twin.scan(3)
    assert twin.mirror.engine.counters().pages_sharing == 2 * count
    assert twin.mirror.pages == 3 * count


def test_taking_everything_apart_finds_frames() -> None:
    """The frames of pages that merged long ago serve others since."""
    twin = Twin()
    for _ in range(12):
        process = twin.join(3000)
        twin.put(process, np.arange(3000), np.arange(1, 3001))
        twin.scan(3)
    assert twin.mirror.frame_count() < 36_000
    twin.mirror.set("run", 2)
    twin.carry_out()
    assert not any(region.where.any() for region in twin.regions.values())
    assert twin.mirror.engine.counters().pages_shared == 0
    twin.mirror.engine.validate()


def test_who_leaves_takes_everything_along() -> None:
    twin = Twin()
    stays = twin.join(10)
    twin.put(stays, np.arange(10), np.arange(1, 11))
    frames = 0
    for turn in range(60):
        process = twin.join(2000)
        twin.put(process, np.arange(2000), np.arange(1, 2001))
        twin.scan(2)
        twin.leave(process)
        twin.scan(1)
        assert twin.mirror.pages == 10
        frames = frames or twin.mirror.frame_count()
        assert twin.mirror.frame_count() == frames, f"turn {turn}: it grows with those who left"
    assert len(twin.mirror.machine.processes) == 1


def test_regions_come_and_go() -> None:
    mirror = Mirror(1, PLAIN)
    process = mirror.attach()
    regions = []
    for number in range(1, 40):
        vpn = mirror.map(process, number)
        regions.append(Region(number, 0x1000, number, tracked=False, quiet=False, vpn=vpn))
        mirror.update(process, vpn + np.arange(number), np.full(number, number, np.uint64), np.ones(number, np.uint64))
    for region in regions[::3]:
        mirror.unmap(process, region)
    rest = [region for region in regions if region not in regions[::3]]
    assert mirror.pages == sum(region.pages for region in rest)
    for region in rest:
        frames = mirror.frames_of(process, region)
        assert len(frames) == region.pages
        assert (mirror.contents_of(frames)["hi"] == region.number).all()
    mirror.engine.validate()


def test_a_page_that_is_nowhere_is_a_fault_of_ours_and_no_endless_growth() -> None:
    mirror = Mirror(1, PLAIN)
    process = mirror.attach()
    vpn = mirror.map(process, 2)
    frames = mirror.frame_count()
    with pytest.raises(AssertionError, match="no area"):
        mirror.update(process, pages(vpn, vpn + 2), np.zeros(2, np.uint64), np.ones(2, np.uint64))
    assert mirror.frame_count() == frames


def test_knobs_refuse_as_the_kernel_does() -> None:
    twin = Twin()
    for _ in range(2):
        twin.put(twin.join(1), pages(0), pages(5))
    twin.scan(3)
    with pytest.raises(KnobBusy):
        twin.mirror.set("max_page_sharing", 8)
    twin.mirror.set("run", 2)
    twin.mirror.set("max_page_sharing", 8)


@pytest.mark.parametrize("seed", range(scaled(12)))
def test_at_rest_it_is_what_anybody_would_say(seed: int) -> None:
    """Whatever was written, joined, left and refused: when memory is still, equal pages map one frame, single ones none."""
    chance = random.Random(seed)
    smart = seed % 2
    twin = Twin(smart_scan=smart, max_page_sharing=1000)
    for _ in range(3):
        twin.join(chance.randint(5, 40))
    for _ in range(60):
        mm = chance.choice(list(twin.processes))
        process, count = twin.processes[mm], twin.regions[mm].pages
        index = pages(*sorted(chance.sample(range(count), chance.randint(1, min(count, 9)))))
        act = chance.choice(["put", "put", "put", "scan", "refuse", "hold", "come", "go"])
        if act == "put":
            twin.put(process, index, np.array([chance.randrange(12) for _ in index]))
        elif act == "scan":
            twin.mirror.engine.scan(chance.choice([3, 1000]))
            twin.carry_out()
        elif act == "refuse":
            twin.mirror.refuse(process, twin.regions[mm].vpn + index)
            twin.regions[mm].where[index] = 0
        elif act == "hold":
            twin.mirror.hold(process, twin.regions[mm].vpn + index)
            twin.regions[mm].where[index] = 0
            twin.contents[mm][index] = [-chance.randrange(1, 1 << 60) for _ in index]
        elif act == "come":
            twin.join(chance.randint(5, 40))
        elif len(twin.processes) > 2:
            twin.leave(process)
        twin.mirror.engine.validate()
    for mm, process in twin.processes.items():  # what was never written is not there; now everything is
        twin.put(process, np.arange(twin.regions[mm].pages), twin.contents[mm] % 9)
    twin.scan(30 if smart else 4)
    everywhere = twin.everywhere()
    times = Counter({content: 0 for content, _ in everywhere})
    for (content, _), count in everywhere.items():
        times[content] += count
    for content, count in times.items():
        frames = {frame for one, frame in everywhere if one == content}
        if content == 0:
            assert frames == {HOLE}
        elif count > 1:
            assert len(frames) == 1, f"content {content} has frames {frames}"
            assert frames.isdisjoint({0, HOLE})
    merged = [frame for content, frame in everywhere if frame > 0]
    assert len(merged) == len(set(merged)), "two contents have one frame"


# --- slots ----------------------------------------------------------------------------------------------------------------


class Shelf:
    """A mirror with a store, for pages of this process."""

    def __init__(self, seed: int, count: int) -> None:
        self.mirror = Mirror(1, PLAIN)
        self.store = Store(1, 64)
        self.slots = Slots(self.store, self.mirror)
        self.reader = MemoryReader(os.open("/proc/self/mem", os.O_RDONLY), living=True)
        self.buffer = Buffer(random_pages(seed, count))
        self.regions = []
        found = hashes(self.buffer.pages)
        for _ in range(2):
            process = self.mirror.attach()
            vpn = self.mirror.map(process, count)
            self.regions.append((process, Region(1, 0x1000, count, tracked=False, quiet=False, vpn=vpn)))
            self.mirror.update(process, vpn + np.arange(count), found[:, 0], found[:, 1])
        self.mirror.engine.scan_full(3)
        self.frames = self.mirror.frames_of(*self.regions[0])
        self.addresses = self.buffer.address + np.arange(count) * PAGE

    def fill(self) -> None:
        self.slots.fill([Source(self.reader, self.frames, self.addresses)])

    def bytes_of(self, slot: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        return np.array(self.store[slot >> SHIFT].memory[slot & 0xFFFFFFFF])

    def close(self) -> None:
        os.close(self.reader.fd)
        self.store.close()
        self.buffer.unmap()


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    made = Shelf(3, 150)
    yield made
    made.close()


def test_slots_hold_the_bytes_in_their_order(shelf: Shelf) -> None:
    shelf.fill()
    slots = shelf.slots.of(shelf.frames)
    assert all((shelf.bytes_of(slot) == page).all() for slot, page in zip(slots, shelf.buffer.pages, strict=True))
    assert int(np.count_nonzero(np.diff(slots) != 1)) == 2, "150 pages are three runs of slots in extents of 64"
    assert shelf.slots.frames_of(slots).tolist() == shelf.frames.tolist()
    assert shelf.slots.frames_of(pages(1 << SHIFT | 63, 77 << SHIFT))[1] == 0


def test_what_changed_since_gets_no_slot(shelf: Shelf) -> None:
    shelf.buffer.write(3, 1)
    shelf.buffer.write(149, 1)
    shelf.fill()
    slots = shelf.slots.of(shelf.frames)
    assert np.flatnonzero(slots == 0).tolist() == [3, 149]
    assert shelf.store.live_pages() == 148, "and takes none"
    shelf.buffer.pages[[3, 149]] = random_pages(3, 150)[[3, 149]]
    shelf.slots.fill([Source(shelf.reader, shelf.frames[[3, 149]], shelf.addresses[[3, 149]])])
    assert (shelf.slots.of(shelf.frames) > 0).all()


def test_what_cannot_be_read_gets_no_slot(shelf: Shelf) -> None:
    shelf.slots.fill([Source(shelf.reader, shelf.frames, shelf.addresses + (1 << 46))])
    assert not shelf.slots.of(shelf.frames).any()
    assert shelf.store.live_pages() == 0


def test_a_slot_dies_with_its_frame(shelf: Shelf) -> None:
    shelf.fill()
    for process, region in shelf.regions:
        shelf.mirror.hold(process, region.vpn + np.arange(10))
    assert shelf.slots.sweep() == 10
    assert shelf.store.live_pages() == 140
    assert not shelf.slots.of(shelf.frames[:10]).any()
    assert shelf.slots.sweep() == 0


def test_a_frame_that_comes_back_as_another_page_has_no_slot_yet(shelf: Shelf) -> None:
    shelf.fill()
    before = shelf.frames
    old = shelf.slots.of(before)[:10]
    shelf.buffer.pages[:10] = random_pages(4, 10)
    found = hashes(shelf.buffer.pages[:10])
    for process, region in shelf.regions:
        shelf.mirror.update(process, region.vpn + np.arange(10), found[:, 0], found[:, 1])
    shelf.mirror.engine.scan_full(3)
    shelf.frames = shelf.mirror.frames_of(*shelf.regions[0])
    assert set(shelf.frames[:10]) & set(before[:10]), "a frame was taken again, and nobody has swept"
    assert not shelf.slots.of(shelf.frames[:10]).any()
    shelf.slots.fill([Source(shelf.reader, shelf.frames[:10], shelf.addresses[:10])])
    new = shelf.slots.of(shelf.frames[:10])
    assert all((shelf.bytes_of(slot) == page).all() for slot, page in zip(new, shelf.buffer.pages, strict=False))
    assert not set(new) & set(old), "a slot is never written again"
    shelf.slots.sweep()
    assert shelf.store.live_pages() == 150, "what nobody has is dead"


def test_the_living_move_out_of_an_extent(shelf: Shelf) -> None:
    shelf.fill()
    for process, region in shelf.regions:
        shelf.mirror.hold(process, region.vpn + np.arange(5, 64))
    shelf.slots.sweep()
    before = shelf.slots.of(shelf.frames)
    extent = shelf.store[int(before[0]) >> SHIFT]
    moved = shelf.slots.relocate(extent)
    after = shelf.slots.of(shelf.frames)
    assert extent.live == 0
    assert [moved[before[at] & 0xFFFFFFFF] for at in range(5)] == after[:5].tolist()
    assert np.count_nonzero(moved) == 5
    assert (before[64:] == after[64:]).all()
    assert all((shelf.bytes_of(after[at]) == shelf.buffer.pages[at]).all() for at in [*range(5), *range(64, 150)])
    assert shelf.store.free_extents() == [extent.number]


def test_zeros_have_the_hash_of_zeros() -> None:
    assert hashes(np.zeros((2, PAGE), np.uint8)).tolist() == [[0, 0], [0, 0]]
    found = hashes(random_pages(1, 3))
    assert len({*map(tuple, found.tolist())}) == 3
    assert (found != 0).any()
