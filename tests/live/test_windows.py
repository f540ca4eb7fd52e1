"""Judge the windows of the agent: every status, every kind of mapping, forks, limits, faults, and writers of every kind."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import mmap
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from window_driver import (
    FILE,
    PAGE,
    PRESENT,
    Memory,
    Pin,
    Region,
    Slots,
    Status,
    Target,
    Windows,
    build_driver,
    build_library,
    content,
    libc,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd for kernel faults needs root here")

ZEROS = Target(extent=0)
RUNS = 64
MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_MERGEABLE, MAP_NORESERVE = 14, 15, 12, 0x4000
VMA_HUGEPAGE, VMA_NOHUGEPAGE, VMA_NORESERVE, VMA_MERGEABLE = 1, 2, 4, 8


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_library(tmp_path_factory.mktemp("windows"))


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def windows(library: Path) -> Iterator[Windows]:
    made = Windows(library)
    assert made.open() == (0, "")
    yield made
    made.kit_close()


class Advised:
    """Memory that is managed, filled with content 0, 1, 2 ..., and slots with the same."""

    def __init__(self, windows: Windows, pages: int = RUNS, memory: Memory | None = None, vma: int = 0) -> None:
        self.windows, self.pages = windows, pages
        self.memory = memory or Memory(pages)
        for page in range(pages):
            self.memory[page] = content(page)
        self.expected = [content(page) for page in range(pages)]
        self.slots = Slots(self.expected)
        self.before = self.memory.mappings()
        self.region = windows.region_add(self.memory.start, pages * PAGE, 0, vma)
        assert self.region > 0
        assert windows.track(self.memory.start, pages * PAGE) == 1

    def write(self, page: int, data: bytes) -> None:
        self.memory[page] = data
        self.expected[page] = data + self.expected[page][len(data) :]

    def swap(self, first: int, pages: int, target: Target | None = None, plain: int = 0) -> list[Status]:
        target = self.slots.at(first) if target is None else target
        return self.windows.swap(self.region, self.memory.at(first), pages, target, plain)

    def restore(self, plain: int = 0) -> int:
        return self.windows.restore(self.memory.start, self.pages, plain)

    def files(self) -> list[int]:
        """Pages that are slots."""
        return [page for page, entry in enumerate(self.memory.entries()) if entry & FILE and entry & PRESENT]

    def check(self) -> None:
        """All bytes are right; nobody would wait anywhere; merged pages are not registered, and all others are."""
        for page in range(self.pages):
            assert self.memory[page] == self.expected[page], page
        for first, pages, about, flags in self.memory.mappings():
            assert "um" not in flags.split(), "left missing"
            where = self.windows.where(self.region, self.pages)[first : first + pages]
            if "memfd" in about:
                assert all(where)
                assert "uw" not in flags.split()
            else:
                assert not any(where)
                assert "uw" in flags.split()

    def end(self) -> None:
        self.windows.restore(self.memory.start, self.pages, 0)
        assert self.windows.region_remove(self.region) == 0
        self.memory.free()


@pytest.fixture
def advised(windows: Windows) -> Iterator[Advised]:
    made = Advised(windows)
    yield made
    made.check()
    made.end()


def in_child(action: Callable[[], None]) -> None:
    """Run it in a forked child, through the C library's fork, and expect no error there."""
    child = os.fork()
    if not child:
        status = 1
        try:
            action()
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


# --- windows ---------------------------------------------------------------------------------------------------------


def test_equal_pages_become_the_slots(advised: Advised) -> None:
    assert advised.swap(0, RUNS) == [Status.MERGED] * RUNS
    advised.check()
    assert advised.files() == list(range(RUNS))
    assert [about for _, _, about, _ in advised.memory.mappings()] == ["rw-p /memfd:slots (deleted)"]
    assert {where >> 32 for where in advised.windows.where(advised.region, RUNS)} == {1}
    advised.write(3, b"mine")
    assert os.pread(advised.slots.fd, PAGE, 3 * PAGE) == content(3)
    assert 3 not in advised.files()


def _replace(start: int, length: int) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10  # MAP_FIXED
    assert libc.mmap(start, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == start
    ctypes.memset(start, 7, length)


BROKEN_PROMISES: dict[str, tuple[Callable[[int, int], object], bytes | None]] = {
    "unmapped": (libc.munmap, None),
    "replaced": (_replace, b"\7" * PAGE),
    "protected": (lambda start, length: libc.mprotect(start, length, mmap.PROT_READ), b""),
    "locked": (
        lambda start, length: libc.syscall(325, ctypes.c_void_p(start), ctypes.c_size_t(length), 1),
        b"",
    ),  # mlock2
    "discarded": (lambda start, length: libc.madvise(start, length, mmap.MADV_DONTNEED), b""),
}


@pytest.mark.parametrize("promise", BROKEN_PROMISES)
def test_an_owner_that_breaks_his_promise_in_a_window_loses_no_other_page(windows: Windows, promise: str) -> None:
    """What `act` did to pages 3 and 4 while all were in scratch: all others go back, and these too if they still may."""
    act, after = BROKEN_PROMISES[promise]
    advised = Advised(windows)
    for page in range(RUNS):
        advised.write(page, b"other")
    called = []
    plan = windows.at_fault(0, 4, lambda: called.append(act(advised.memory.at(3), 2 * PAGE)))
    statuses = advised.swap(0, 16)
    plan.kind = -1
    assert len(called) == 1
    for page in (page for page in range(RUNS) if page not in (3, 4) or after == b""):
        assert advised.memory[page] == advised.expected[page], (page, statuses)
    if after:
        assert advised.memory[3] == advised.memory[4] == after, "what is not ours was left alone"
    assert statuses[0] == statuses[15] == (Status.DIFFERS if after == b"" else Status.UNMANAGED)
    assert windows.region_remove(advised.region) == 0
    advised.memory.free()


def test_a_mapping_that_fails_and_leaves_a_hole_is_made_again(advised: Advised) -> None:
    """As kernels before 6.12 fail for want of a little memory; in windows, moves to other slots, plain swaps, and giving back."""
    for page in (3, 7):
        advised.write(page, b"other")
    others = Slots([content(page) for page in range(RUNS)], extent=2)
    for swap in (
        lambda: advised.swap(0, 16),
        lambda: advised.swap(0, 16, others.at(0)),
    ):
        left = advised.windows.fail_maps(5)
        assert swap() == [Status.DIFFERS if page in (3, 7) else Status.MERGED for page in range(16)]
        assert left.value == 0
        advised.check()
    left = advised.windows.fail_maps(7)
    assert advised.restore() == 0
    assert left.value == 0
    advised.check()
    assert not advised.files()


def test_a_place_that_stays_a_hole_is_given_up(windows: Windows) -> None:
    """Its pages are lost, as the place is; all others are as they were."""
    advised = Advised(windows)
    left = windows.fail_maps(1 << 20)
    assert advised.swap(0, 4) == [Status.UNMANAGED] * 4, "there is no place to put them back to"
    assert left.value < (1 << 20) - 100, "it is tried again and again"
    left.value = 0
    assert all(advised.memory[page] == advised.expected[page] for page in range(4, RUNS))
    assert advised.swap(4, 4) == [Status.MERGED] * 4
    assert windows.region_remove(advised.region) == 0
    advised.memory.free()


def test_runs_that_meet_share_a_mapping(advised: Advised) -> None:
    for first in range(0, RUNS, 4):
        assert advised.swap(first, 4) == [Status.MERGED] * 4
    assert len(advised.memory.mappings()) == 1


def test_each_page_of_a_run_has_its_own_fate(advised: Advised) -> None:
    for page in (2, 3, 9):
        advised.write(page, b"other")
    libc.madvise(advised.memory.at(5), PAGE, mmap.MADV_DONTNEED)
    advised.expected[5] = bytes(PAGE)
    pin = Pin(advised.memory.at(7), 1)
    got = advised.swap(0, 16)
    pin.end()
    fates = {2: Status.DIFFERS, 3: Status.DIFFERS, 9: Status.DIFFERS, 5: Status.ABSENT, 7: Status.PINNED}
    assert got == [fates.get(page, Status.MERGED) for page in range(16)]
    assert not advised.memory.entries()[5] & PRESENT  # looking at it would have touched it
    advised.check()
    assert advised.swap(7, 1) == [Status.MERGED]


def test_what_differs_goes_back_untouched(advised: Advised) -> None:
    frames = advised.memory.entries()
    assert advised.swap(0, 16, advised.slots.at(16)) == [Status.DIFFERS] * 16
    assert [a & 0xFFFFFFFFFFFFF for a in frames] == [b & 0xFFFFFFFFFFFFF for b in advised.memory.entries()]
    assert len(advised.memory.mappings()) == 1


def test_runs_of_zeros_become_holes(advised: Advised) -> None:
    for page in range(8, 16):
        advised.write(page, bytes(PAGE))
    libc.madvise(advised.memory.at(10), PAGE, mmap.MADV_DONTNEED)
    assert advised.memory[10] == bytes(PAGE)  # reading maps the kernel's page of zeros: no memory is to be saved
    libc.madvise(advised.memory.at(11), PAGE, mmap.MADV_DONTNEED)
    got = advised.swap(6, 12, ZEROS)
    fates = dict.fromkeys((6, 7, 16, 17), Status.DIFFERS) | {10: Status.ABSENT, 11: Status.ABSENT}
    assert got == [fates.get(page, Status.MERGED) for page in range(6, 18)]
    entries = advised.memory.entries()
    assert not any(entries[page] & PRESENT for page in range(8, 16))
    assert len(advised.memory.mappings()) == 1
    advised.check()


def test_merged_again_is_already(advised: Advised) -> None:
    advised.swap(0, 8)
    advised.write(2, b"x")
    assert advised.swap(0, 8) == [Status.BROKEN if page == 2 else Status.ALREADY for page in range(8)]
    assert advised.swap(0, 8, ZEROS) == [Status.BROKEN if page == 2 else Status.UNSUITABLE for page in range(8)]


def test_pages_that_a_child_shares_are_merged_and_the_child_keeps_its_own(advised: Advised) -> None:
    go = os.pipe()
    child = os.fork()
    if not child:
        os.read(go[0], 1)
        right = all(advised.memory[page] == content(page) for page in range(RUNS))
        advised.memory[0] = b"the child's"
        os._exit(0 if right else 1)
    advised.write(5, b"other")
    assert advised.swap(0, 16) == [Status.DIFFERS if page == 5 else Status.MERGED for page in range(16)]
    os.write(go[1], b"x")
    assert os.waitpid(child, 0)[1] == 0
    advised.check()
    assert advised.swap(16, 48) == [Status.MERGED] * 48  # not exclusive, although the child is gone
    for end in go:
        os.close(end)


def test_a_pinned_page_is_left_until_it_is_unpinned(advised: Advised) -> None:
    pin = Pin(advised.memory.at(4), 2)
    assert advised.swap(4, 2) == [Status.PINNED] * 2
    assert advised.swap(0, 8, ZEROS)[4:6] == [Status.PINNED] * 2
    pin.end()
    assert advised.swap(4, 2) == [Status.MERGED] * 2


def test_huge_pages_are_split_as_needed(windows: Windows) -> None:
    memory = Memory(1024, align=512 * PAGE)
    libc.madvise(memory.start, 1024 * PAGE, MADV_HUGEPAGE)
    advised = Advised(windows, 1024, memory, VMA_HUGEPAGE)
    for first in range(0, 1024, 128):
        assert advised.swap(first, 16) == [Status.MERGED] * 16
    advised.check()
    assert advised.restore() == 0
    advised.check()
    assert len(memory.mappings()) == 1
    advised.end()


@pytest.mark.parametrize("pages", [1, 2, 255, 256])
def test_any_length_up_to_the_most(windows: Windows, pages: int) -> None:
    advised = Advised(windows, 256)
    for _ in range(6):  # scratch is used up and dropped on the way
        assert advised.swap(0, pages) == [Status.MERGED] * pages
        advised.check()
        assert advised.restore() == 0
    advised.end()


def test_nonsense_and_strangers_are_refused(advised: Advised) -> None:
    slots, windows = advised.slots, advised.windows
    assert set(advised.swap(0, 257)) == {Status.BAD}
    assert windows.swap(advised.region, advised.memory.start + 1, 1, slots.at(0)) == [Status.BAD]
    assert windows.swap(advised.region + 1, advised.memory.start, 1, slots.at(0)) == [Status.UNMANAGED]
    assert advised.swap(RUNS - 1, 2, slots.at(0)) == [Status.UNMANAGED] * 2
    assert advised.swap(-1, 2, slots.at(0)) == [Status.UNMANAGED] * 2
    assert windows.swap(advised.region, 0, 1, slots.at(0)) == [Status.UNMANAGED]
    assert advised.swap(0, 4, Target(1, 0, 12345, slots.view, 0)) == [Status.BAD] * 4  # no such descriptor
    advised.check()
    assert windows.region_close(advised.region) == 0
    assert advised.swap(0, 4) == [Status.UNMANAGED] * 4


def _shared() -> Memory:
    return Memory(16, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)


def _file() -> Memory:
    fd = os.memfd_create("file")
    os.ftruncate(fd, 64 * PAGE)
    return Memory(16, mmap.MAP_PRIVATE, fd)


def _watched() -> Memory:
    memory = Memory(16)
    memory.userfaultfd = libc.syscall(323, os.O_CLOEXEC | os.O_NONBLOCK)  # type: ignore[attr-defined]
    fcntl.ioctl(memory.userfaultfd, 0xC018AA3F, (0xAA).to_bytes(24, "little"))  # type: ignore[attr-defined]
    register = b"".join(value.to_bytes(8, "little") for value in (memory.start, 16 * PAGE, 2, 0))
    fcntl.ioctl(memory.userfaultfd, 0xC020AA00, register)  # type: ignore[attr-defined]
    return memory


def _read_only() -> Memory:
    memory = Memory(16)
    memory[0] = content(0)
    libc.mprotect(memory.start, 16 * PAGE, mmap.PROT_READ)
    return memory


def _gap() -> Memory:
    memory = Memory(16)
    libc.munmap(memory.at(5), PAGE)
    return memory


def _locked() -> Memory:
    memory = Memory(16)
    assert libc.mlock(memory.at(3), PAGE) == 0
    return memory


def _advised_by(advice: int) -> Callable[[], Memory]:
    def make() -> Memory:
        memory = Memory(16)
        assert libc.madvise(memory.start, 16 * PAGE, advice) == 0
        return memory

    return make


@pytest.mark.parametrize("make", [_shared, _file, _watched, _read_only, _gap])
def test_a_mapping_that_cannot_be_swapped_is_left_alone(windows: Windows, make: Callable[[], Memory]) -> None:
    memory = make()
    first = memory[0]
    region = windows.region_add(memory.start, 16 * PAGE, 0, 0)
    before = memory.mappings()
    slots = Slots([first] * 16)
    got = windows.swap(region, memory.start, 16, slots.at(0))
    merged = {page for page, status in enumerate(got) if status == Status.MERGED}
    assert merged <= {0} if make is _gap else not merged
    assert Status.UNSUITABLE in got or make is _gap
    assert memory[0] == first
    assert windows.restore(memory.start, 16, 0) == 0
    assert memory.mappings() == before
    assert windows.region_remove(region) == 0
    if make is _watched:
        os.close(memory.userfaultfd)  # type: ignore[attr-defined]
    memory.free()


SUITABLE: list[tuple[Callable[[], Memory], int, str]] = [
    (lambda: Memory(16), 0, ""),
    (lambda: Memory(16, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE), VMA_NORESERVE, ""),
    (_advised_by(MADV_HUGEPAGE), VMA_HUGEPAGE, ""),
    (_advised_by(MADV_NOHUGEPAGE), VMA_NOHUGEPAGE, ""),
    (_advised_by(MADV_MERGEABLE), VMA_MERGEABLE, ""),
    (_shared, -errno.EOPNOTSUPP, "shared"),
    (_file, -errno.EOPNOTSUPP, "a file's"),
    (_watched, -errno.EOPNOTSUPP, "userfaultfd"),
    (_read_only, -errno.EOPNOTSUPP, "not readable and writable"),
    (_gap, -errno.ENOMEM, "not mapped"),
    (_locked, -errno.EOPNOTSUPP, "mlock"),
    (_advised_by(10), -errno.EOPNOTSUPP, "DONTFORK"),
    (_advised_by(16), -errno.EOPNOTSUPP, "DONTDUMP"),
    (_advised_by(18), -errno.EOPNOTSUPP, "WIPEONFORK"),
]


@pytest.mark.parametrize(("make", "answer", "why"), SUITABLE)
def test_what_can_be_merged_is_known_before(
    windows: Windows, make: Callable[[], Memory], answer: int, why: str
) -> None:
    memory = make()
    got = windows.suitable(memory.start, 16)
    assert got[0] == answer
    assert why in got[1] if why else not got[1]
    memory.free()
    assert windows.suitable(memory.start, 16)[0] == -errno.ENOMEM


# --- from slot to slot -----------------------------------------------------------------------------------------------


def test_merged_pages_move_to_other_slots(advised: Advised) -> None:
    advised.swap(0, 16)
    advised.write(3, b"broken")
    others = [content(page) for page in range(16)]
    others[7] = content(99)
    other = Slots(others, extent=2)
    fates = {3: Status.BROKEN, 7: Status.DIFFERS}
    assert advised.swap(0, 16, other.at(0)) == [fates.get(page, Status.MERGED) for page in range(16)]
    extents = [where >> 32 for where in advised.windows.where(advised.region, RUNS)]
    assert (extents.count(1), extents.count(2)) == (2, 14)
    advised.check()
    advised.write(5, b"written")
    assert os.pread(other.fd, PAGE, 5 * PAGE) == content(5)


def test_a_run_of_every_kind_at_once(advised: Advised) -> None:
    advised.swap(0, 8)
    second = Slots([content(page) for page in range(RUNS)], extent=2)
    advised.swap(8, 8, second.at(8))
    advised.write(1, b"broken")
    advised.write(20, b"differs")
    got = advised.swap(0, 24)
    fates = {1: Status.BROKEN, 20: Status.DIFFERS}
    assert got == [fates.get(page, Status.ALREADY if page < 8 else Status.MERGED) for page in range(24)]


# --- giving back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("marks", [0, VMA_HUGEPAGE, VMA_NOHUGEPAGE, VMA_NORESERVE, VMA_MERGEABLE])
def test_given_back_it_is_as_if_nothing_had_happened(windows: Windows, marks: int) -> None:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | (MAP_NORESERVE if marks & VMA_NORESERVE else 0)
    memory = Memory(512, flags)
    for mark, advice in (
        (VMA_HUGEPAGE, MADV_HUGEPAGE),
        (VMA_NOHUGEPAGE, MADV_NOHUGEPAGE),
        (VMA_MERGEABLE, MADV_MERGEABLE),
    ):
        if marks & mark:
            libc.madvise(memory.start, 512 * PAGE, advice)
    chance = random.Random(marks)
    for page in range(512):
        memory[page] = content(page)
    assert windows.suitable(memory.start, 512) == (marks, "")
    advised = Advised(windows, 512, memory, marks)
    for _ in range(40):
        first = chance.randrange(1, 500)
        advised.swap(first, chance.randrange(1, 12))
        advised.write(chance.randrange(512), chance.randbytes(8))
    advised.check()
    assert advised.restore() == 0
    advised.check()
    assert not advised.files()
    windows.untrack(memory.start, 512 * PAGE)
    assert memory.mappings() == advised.before
    assert windows.track(memory.start, 512 * PAGE) == 1
    assert Status.MERGED in advised.swap(0, 256)
    advised.end()


def test_broken_and_pinned_pages_stay_and_all_others_come_back(advised: Advised) -> None:
    advised.swap(0, 16)
    advised.write(2, b"broken")
    pin = Pin(advised.memory.at(8), 1)  # breaks it, too
    assert advised.restore() == 1
    assert [bool(where) for where in advised.windows.where(advised.region, 16)] == [page == 8 for page in range(16)]
    advised.check()
    pin.end()
    assert advised.restore() == 0


def test_pages_shared_with_a_child_come_back(advised: Advised) -> None:
    advised.swap(0, 32)
    for page in range(0, 32, 3):
        advised.write(page, b"broken")
    go = os.pipe()
    child = os.fork()
    if not child:
        os.read(go[0], 1)
        os._exit(0 if [advised.memory[page] for page in range(RUNS)] == advised.expected else 1)
    assert advised.restore() == 0
    advised.write(0, b"after")
    os.write(go[1], b"x")
    assert os.waitpid(child, 0)[1] == 0
    for end in go:
        os.close(end)


@pytest.mark.parametrize("closed", [False, True])
def test_memory_that_is_abandoned_between_two_batches_is_given_back_no_further(windows: Windows, closed: bool) -> None:
    """Also if somebody else, who gives it back, had closed the region."""
    pages = 1024
    advised = Advised(windows, pages)
    for first in range(0, pages, 64):
        assert advised.swap(first, 64) == [Status.MERGED] * 64
    if closed:
        assert windows.region_close(advised.region) == 0
        assert windows.region_close(advised.region) == -errno.ENOENT
    called = []

    def abandon() -> None:
        called.append(windows.region_abandon(advised.region))
        _replace(advised.memory.start, pages * PAGE)

    plan = windows.at_fault(2, 10, abandon)
    assert advised.restore() == 0
    plan.kind = -1
    assert called == [-errno.ENOENT if closed else 0]
    assert all(advised.memory[page] == b"\7" * PAGE for page in range(pages)), "it is another's by now"
    assert any(windows.where(advised.region, pages)), "there was something left to give back"
    assert windows.region_remove(advised.region) == 0
    advised.memory.free()


def test_without_descriptors_memory_still_comes_back(advised: Advised) -> None:
    advised.swap(0, 16)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        kept = advised.restore()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert kept == 0
    assert not advised.files()


def test_without_a_child_private_pages_stay(advised: Advised) -> None:
    """No descriptor for the twin's pipe: then nobody can know whether a private page is pinned."""
    advised.swap(0, 16)
    advised.write(4, b"broken")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        kept = advised.restore()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert kept == 1
    advised.check()
    assert advised.restore() == 0


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_forked_child_has_the_regions_and_opens_a_kit_of_its_own(advised: Advised) -> None:
    advised.swap(0, 8)
    windows = advised.windows
    forks = windows.counts().forks

    def child() -> None:
        about = Region()
        assert not windows.kit_ready()
        assert windows.counts().windows == 0
        assert windows.region_get(advised.region, ctypes.byref(about))
        assert about.tracked == 0
        assert advised.swap(8, 8) == [Status.OFF] * 8
        assert windows.open() == (0, "")
        assert windows.track(advised.memory.start, RUNS * PAGE) == 1
        assert advised.swap(0, 16) == [Status.ALREADY] * 8 + [Status.MERGED] * 8
        advised.write(1, b"the child's")
        assert advised.restore() == 0
        advised.check()

    in_child(child)
    assert windows.counts().forks == forks + 1
    advised.check()
    assert advised.files() == list(range(8))


def test_a_region_that_was_ending_at_a_fork_has_ended_in_the_child(windows: Windows) -> None:
    """Whoever was ending it is not there to go on; the memory, right as it is, can be advised again."""
    ending, staying = Advised(windows), Advised(windows)
    ending.swap(0, 16)
    assert windows.region_close(ending.region) == 0

    def child() -> None:
        about = Region()
        assert not windows.region_get(ending.region, ctypes.byref(about))
        assert not windows.region_at(ending.memory.start, ctypes.byref(about))
        assert windows.region_get(staying.region, ctypes.byref(about))
        assert windows.region_remove(ending.region) == -errno.ENOENT
        assert windows.region_add(ending.memory.start, RUNS * PAGE, 0, 0) > staying.region
        assert [ending.memory[page] for page in range(RUNS)] == ending.expected

    in_child(child)
    about = Region()
    assert windows.region_get(ending.region, ctypes.byref(about))
    for made in (ending, staying):
        made.end()


def _as_nobody() -> None:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    libc.prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: or /proc/self would be root's


def test_without_permission_only_plain_swaps_work_and_it_is_said_why(advised: Advised) -> None:
    if Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() != "0":
        pytest.skip("this machine permits userfaultfd to everybody")

    def child() -> None:
        _as_nobody()
        windows = advised.windows
        error, why = windows.open()
        assert error == -errno.EPERM
        assert "vm.unprivileged_userfaultfd=1" in why
        assert "/dev/userfaultfd" in why
        assert windows.track(advised.memory.start, RUNS * PAGE) == 0
        assert advised.swap(0, 8) == [Status.OFF] * 8
        advised.write(2, b"other")
        advised.write(12, bytes(PAGE))
        libc.madvise(advised.memory.at(13), PAGE, mmap.MADV_DONTNEED)
        fates = {2: Status.DIFFERS}
        assert advised.swap(0, 8, plain=1) == [fates.get(page, Status.MERGED) for page in range(8)]
        assert advised.swap(11, 3, ZEROS, plain=1) == [Status.DIFFERS, Status.MERGED, Status.ABSENT]
        other = Slots([content(page) for page in range(8)], extent=2)
        advised.write(3, b"broken")
        fates = {2: Status.DIFFERS, 3: Status.BROKEN}
        assert advised.swap(0, 8, other.at(0), plain=1) == [fates.get(page, Status.MERGED) for page in range(8)]
        assert windows.restore(advised.memory.start, RUNS, 0) == 7  # private all the same
        assert not advised.files()
        assert windows.restore(advised.memory.start, RUNS, 1) == 0
        for page in range(RUNS):
            assert advised.memory[page] == (bytes(PAGE) if page == 13 else advised.expected[page])

    in_child(child)


def test_an_open_device_is_permission_enough(advised: Advised) -> None:
    device = os.open("/dev/userfaultfd", os.O_RDWR)

    def child() -> None:
        _as_nobody()
        assert advised.windows.open(device) == (0, "")
        assert advised.windows.track(advised.memory.start, RUNS * PAGE) == 1
        assert advised.swap(0, 16) == [Status.MERGED] * 16
        advised.check()

    in_child(child)
    os.close(device)


NO_PIN = f"-{errno.EOPNOTSUPP} the self-test of windows failed: no page can be pinned"


@pytest.mark.parametrize("how", ["refuse", "kill"])
@pytest.mark.parametrize(
    ("refused", "answer"),
    [
        ((), "0 "),
        (("io_uring",), "0 "),
        (("process_vm_readv",), "0 "),
        (("io_uring", "process_vm_readv"), NO_PIN),
        (("userfaultfd",), "0 "),  # there is /dev/userfaultfd, too
    ],
)
def test_a_seccomp_filter_is_respected(library: Path, refused: tuple[str, ...], answer: str, how: str) -> None:
    command = [sys.executable, str(Path(__file__).with_name("window_driver.py")), str(library), how, *refused]
    got = subprocess.run(command, capture_output=True, text=True, check=True)
    assert got.stdout.startswith(answer)


# --- regions ---------------------------------------------------------------------------------------------------------


def test_regions_are_found_and_do_not_overlap(windows: Windows) -> None:
    base, made = 1 << 40, []
    order = list(range(0, 400, 2))
    random.Random(1).shuffle(order)
    for number in order:
        made.append((windows.region_add(base + number * PAGE, PAGE, number % 3, 0), number))
        assert made[-1][0] > 0
    for number in order:
        assert windows.region_add(base + number * PAGE, PAGE, 0, 0) == -errno.EEXIST
        assert windows.region_add(base + (number - 1) * PAGE, 2 * PAGE, 0, 0) == -errno.EEXIST
    for start, size in ((base + 1, PAGE), (base, PAGE + 1), (base, 0), ((1 << 64) - PAGE, 2 * PAGE)):
        assert windows.region_add(start, size, 0, 0) == -errno.EINVAL
    region = Region()
    for name, number in made:
        assert windows.region_at(base + number * PAGE + 5, ctypes.byref(region))
        assert (region.id, region.quiet, region.start) == (name, number % 3, base + number * PAGE)
        assert not windows.region_at(base + (number + 1) * PAGE, ctypes.byref(region))
    walked, after = [], 0
    while windows.region_next(after, ctypes.byref(region)):
        walked.append(region.id)
        after = region.id
    assert walked == sorted(walked)
    assert {name for name, _ in made} <= set(walked)
    count, pages = ctypes.c_uint32(), ctypes.c_uint64()
    windows.region_totals(ctypes.byref(count), ctypes.byref(pages))
    assert count.value == len(walked)
    for name, _ in made:
        assert windows.region_remove(name) == 0
        assert windows.region_remove(name) == -errno.ENOENT
    windows.region_totals(ctypes.byref(count), ctypes.byref(pages))
    assert count.value == len(walked) - len(made)


# --- threads, limits, faults: in C -----------------------------------------------------------------------------------


def drive(driver: Path, *words: str) -> dict[str, object]:
    got = subprocess.run([str(driver), *words], capture_output=True, text=True, timeout=300, check=False)
    assert got.returncode == 0, got.stderr
    return dict(json.loads(got.stdout))


# c stores, r read(2), d direct I/O, u io_uring fixed buffers, m /proc/self/mem, v process_vm_writev, f forks that verify all
@pytest.mark.parametrize("kinds", ["cc", "rc", "dd", "uu", "mv", "cf", "crdumvf"])
def test_no_write_is_lost_whoever_writes(driver: Path, tmp_path: Path, kinds: str) -> None:
    got = drive(driver, "stress", kinds, "3000", str(tmp_path / "file"))
    statuses = got["statuses"]
    assert isinstance(statuses, list)
    assert statuses[Status.MERGED] > 1000
    assert got["restored"] and got["remapped"]
    assert statuses[Status.DIFFERS] or "u" in kinds
    assert statuses[Status.PINNED] or not set("du") & set(kinds)
    assert got["forks"] or "f" not in kinds


@pytest.mark.parametrize("command", ["limit", "pinned", "scanned", "locked"])
def test_adversities(driver: Path, tmp_path: Path, command: str) -> None:
    words = {"limit": [], "pinned": [str(tmp_path / "file")], "scanned": ["3000"], "locked": ["1"]}[command]
    got = drive(driver, command, *words)
    if command == "limit":
        assert got["refused"]
        assert got["kept"]
    if command == "locked":
        assert drive(driver, command, "2") and drive(driver, command, "3")


POINTS = [
    *(("window", point) for point in range(1, 10)),
    *(("remap", point) for point in range(1, 7)),
    *(("restore", point) for point in range(1, 11)),
]


@pytest.mark.parametrize(("kind", "point"), POINTS)
def test_killed_at_any_step_it_ends_at_once_and_its_twin_is_right(driver: Path, kind: str, point: int) -> None:
    """The twin, a child forked before, holds the output open: reading to its end also proves that nobody is left behind."""
    environment = {**os.environ, "PAGEFOLD_FAULT": f"{kind}:{point}"}
    got = subprocess.run([str(driver), "steps", kind], env=environment, stdout=subprocess.PIPE, timeout=60, check=False)
    assert got.returncode == -signal.SIGKILL
    assert got.stdout == b"twin right\n"


@pytest.mark.parametrize(("kind", "point"), POINTS)
def test_stopped_at_any_step_it_goes_on(driver: Path, kind: str, point: int) -> None:
    environment = {**os.environ, "PAGEFOLD_FAULT": f"stop-{kind}:{point}"}
    with subprocess.Popen([str(driver), "steps", kind], env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == b"twin right\n"
        assert process.wait(60) == 0


def test_every_fault_point_is_in_the_protocol_once_and_documented() -> None:
    """The numbers tested above are all there are."""
    folder = Path(__file__).parents[2] / "csrc"
    text = "".join((folder / name).read_text() for name in ("window.c", "remap.c", "restore.c"))
    for kind in ("window", "remap", "restore"):
        points = [point for name, point in POINTS if name == kind]
        for point in points:
            assert text.count(f"PF_FAULT_{kind.upper()}, {point})") == 1, (kind, point)
        assert f"PF_FAULT_{kind.upper()}, {len(points) + 1})" not in text
