"""Judge the reading of real processes: content, frames, flags, counts, looks, and that none is disturbed."""

from __future__ import annotations

import mmap
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash

from pagefold.errors import NoSuchProcess
from pagefold.sources import Pages, ProcessReader
from pagefold.sources.hashing import CHUNK_PAGES
from pagefold.sources.memory_reader import MemoryReader
from pagefold.sources.pages import UNKNOWN_FRAME
from pagefold.sources.process_files import ProcessFiles

PAGE = mmap.PAGESIZE
ROOT = os.geteuid() == 0

KNOWN = """
memory = area(16)
for page in range(4): fill(memory, page, 7)          # equal
for page in range(4, 8): fill(memory, page, page)    # unique
for page in range(8, 11): fill(memory, page, 0)      # written zeros: real pages
sum(memory[page * PAGE] for page in range(11, 13))   # read only: the kernel's zero page
RESULT = address(memory)                             # 13 to 15: never touched
"""


def within(pages: Pages, start: int, count: int) -> Pages:
    """Return the entries of one area."""
    return pages.select((pages.address >= start) & (pages.address < start + count * PAGE))


def pair(data: bytes) -> tuple[int, int]:
    """Return the hash of a page as the reader should."""
    value = xxhash.xxh3_128_intdigest(data)
    return value >> 64, value & (1 << 64) - 1


def assert_same(one: Pages, other: Pages) -> None:
    """Compare two readings entirely."""
    for name in Pages.__slots__:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name


def test_content_zero_pages_and_absent_pages(specimen: Callable) -> None:
    child = specimen(KNOWN)
    start = child.addresses[0]
    reader = ProcessReader(child.pid)
    everything = reader.read()
    pages = within(everything, start, 16)
    assert ((pages.address - start) // PAGE).tolist() == list(range(11))
    values = [7] * 4 + [4, 5, 6, 7]
    expected = [pair(value.to_bytes(8, "little") * (PAGE // 8)) for value in values] + [(0, 0)] * 3
    assert list(zip(pages.high.tolist(), pages.low.tolist(), strict=True)) == expected
    assert pages.zero.tolist() == [False] * 8 + [True] * 3
    assert pages.exclusive.all()
    assert not pages.advised.any() and not pages.huge.any() and not pages.ksm.any() and not pages.volatile.any()
    assert everything.zero_mapped >= 2
    assert everything.unreadable == everything.vanished == everything.swapped == 0
    assert everything.incompatible > 0
    assert everything.label == f"{Path(f'/proc/{child.pid}/comm').read_text().strip()} [{child.pid}]"
    assert (everything.pid, everything.page_size) == (child.pid, PAGE)
    assert (np.diff(everything.address) > 0).all()


def test_exactly_the_pages_smaps_calls_anonymous(specimen: Callable) -> None:
    """smaps counts anonymous pages per area too; the sum over compatible areas is the number of entries."""
    child = specimen(KNOWN)
    reader = ProcessReader(child.pid)
    areas = [area for area in reader.areas() if area.compatible]
    pages = reader.read()
    for area in areas:
        inside = ((pages.address >= area.start) & (pages.address < area.end)).sum()
        assert inside * PAGE == area.kib["Anonymous"] * 1024, area
    assert len(pages) * PAGE == sum(area.kib["Anonymous"] for area in areas) * 1024


def test_shared_and_file_pages_are_left_out_and_copied_file_pages_are_in(specimen: Callable, tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(b"x" * PAGE * 4)
    child = specimen(f"""
shared = mmap.mmap(-1, 4 * PAGE)
shared[:] = b"s" * (4 * PAGE)
fd = os.open({str(file)!r}, os.O_RDONLY)
copied = mmap.mmap(fd, 4 * PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
sum(copied[page * PAGE] for page in range(4))
copied[2 * PAGE] = 65
RESULT = f"{{address(shared)}} {{address(copied)}}"
""")
    shared, copied = child.addresses
    pages = ProcessReader(child.pid).read()
    assert len(within(pages, shared, 4)) == 0
    assert pages.incompatible >= 4
    assert within(pages, copied, 4).address.tolist() == [copied + 2 * PAGE]


def test_advised_areas(specimen: Callable) -> None:
    child = specimen("""
plain, advised = area(8), area(8)
advised.madvise(mmap.MADV_MERGEABLE)
for page in range(8): fill(plain, page, 1 + page); fill(advised, page, 1 + page)
RESULT = f"{address(plain)} {address(advised)}"
""")
    plain, advised = child.addresses
    pages = ProcessReader(child.pid).read()
    assert within(pages, advised, 8).advised.tolist() == [True] * 8
    assert not within(pages, plain, 8).advised.any()
    only = ProcessReader(child.pid, advised_only=True).read()
    assert only.address.tolist() == [advised + page * PAGE for page in range(8)]
    assert only.unadvised == len(pages) - 8
    assert pages.unadvised == 0


def test_huge_pages(specimen: Callable) -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("transparent huge pages are off")
    child = specimen("""
memory = area(2048, mmap.MADV_HUGEPAGE)
for page in range(2048): fill(memory, page, page)
RESULT = address(memory)
""")
    start = child.addresses[0]
    reader = ProcessReader(child.pid)
    area = next(area for area in reader.areas() if area.start <= start < area.end)
    if not area.kib["AnonHugePages"]:
        pytest.skip("the kernel had no huge page to give")
    pages = within(reader.read(), start, 2048)
    assert pages.huge.sum() * PAGE == area.kib["AnonHugePages"] * 1024
    assert_same(reader.read(), ProcessReader(child.pid, use_scan=False).read())


@pytest.mark.skipif(not ROOT, reason="frames are shown to root only")
def test_forked_child_shares_frames_until_it_writes(specimen: Callable) -> None:
    child = specimen("""
memory = area(8)
for page in range(8): fill(memory, page, 1 + page)
orders, answers = os.pipe(), os.pipe()
pid = os.fork()
if not pid:
    os.close(orders[1])   # so that it ends with its parent
    os.read(orders[0], 1) or os._exit(0)
    fill(memory, 3, 99)
    os.write(answers[1], b"x")
    os.read(orders[0], 1)
    os._exit(0)
def write_in_child(): return os.write(orders[1], b"x"), os.read(answers[0], 1)
def end_child(): return os.write(orders[1], b"x"), os.waitpid(pid, 0)
RESULT = f"{address(memory)} {pid}"
""")
    start, pid = child.addresses
    # Twice: reading must not part what is shared (process_vm_readv does, and this test found it).
    ProcessReader(child.pid).read()
    ProcessReader(pid).read()
    parents, childs = (
        within(ProcessReader(child.pid).read(), start, 8),
        within(ProcessReader(pid).read(), start, 8),
    )
    assert parents.frames_known and len(parents) == 8
    assert parents.frame.tolist() == childs.frame.tolist()
    assert len(set(parents.frame.tolist())) == 8
    assert not parents.exclusive.any() and not childs.exclusive.any()
    child.do("write_in_child()")
    parents, childs = (
        within(ProcessReader(child.pid).read(), start, 8),
        within(ProcessReader(pid).read(), start, 8),
    )
    assert (parents.frame != childs.frame).tolist() == [page == 3 for page in range(8)]
    assert parents.exclusive.tolist() == childs.exclusive.tolist() == [page == 3 for page in range(8)]
    child.do("end_child()")


# Every way to find and to copy pages must say the same of the same process.
MIXED = """
memory = area(3000)
for page in range(1000): fill(memory, page, page % 50)
for page in range(1000, 2000, 2): fill(memory, page, page)
sum(memory[page * PAGE] for page in range(2000, 2500))
fill(memory, 2999, 1)
forked = area(64)
for page in range(64): fill(forked, page, page % 5)
RESULT = address(memory)
"""


@pytest.mark.skipif(not ROOT, reason="without frames the plain pagemap tells less")
def test_plain_pagemap_equals_scan(specimen: Callable) -> None:
    child = specimen(MIXED)
    scanned = ProcessReader(child.pid).read()
    assert len(within(scanned, child.addresses[0], 3000)) == 1501
    assert scanned.zero_mapped >= 500
    assert_same(scanned, ProcessReader(child.pid, use_scan=False).read())


def test_falls_back_where_the_kernel_lacks_the_scan(specimen: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    child = specimen(MIXED)
    expected = ProcessReader(child.pid).read()

    def missing(*_: object) -> int:
        raise OSError(25, "no such request")

    monkeypatch.setattr("fcntl.ioctl", missing)
    if ROOT:
        assert_same(expected, ProcessReader(child.pid).read())


def test_older_kernels_that_know_no_guard_pages(specimen: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    child = specimen(MIXED)
    expected = ProcessReader(child.pid).read()
    real = fcntl.ioctl

    def older(fd: int, request: int, argument: object) -> int:
        if argument.return_mask & 1 << 8:  # type: ignore[attr-defined]
            raise OSError(22, "unknown category")
        return real(fd, request, argument)

    monkeypatch.setattr("fcntl.ioctl", older)
    assert_same(expected, ProcessReader(child.pid).read())


def test_pages_the_process_itself_may_not_read(specimen: Callable) -> None:
    """KSM does not ask for read permission, so pages behind PROT_NONE count; the reader gets at them."""
    child = specimen("""
memory = area(8)
for page in range(8): fill(memory, page, 1 + page)
start = address(memory)
libc = ctypes.CDLL(None)
assert libc.mprotect(ctypes.c_void_p(start + 2 * PAGE), ctypes.c_size_t(3 * PAGE), 0) == 0
RESULT = start
""")
    start = child.addresses[0]
    everything = ProcessReader(child.pid).read()
    pages = within(everything, start, 8)
    assert everything.unreadable == 0
    expected = [pair((1 + page).to_bytes(8, "little") * (PAGE // 8)) for page in range(8)]
    assert list(zip(pages.high.tolist(), pages.low.tolist(), strict=True)) == expected


def test_second_look_marks_changed_pages_and_drops_those_that_went(specimen: Callable) -> None:
    child = specimen("""
memory = area(600)
for page in range(600): fill(memory, page, 1 + page)
RESULT = address(memory)
""")
    start = child.addresses[0]
    reader = ProcessReader(child.pid, advised_only=False)
    first = reader.read()
    child.do("[fill(memory, page, 5000 + page) for page in (3, 77, 400)] and None")
    child.do("memory.madvise(mmap.MADV_DONTNEED, 500 * PAGE, 10 * PAGE)")
    told: list[int] = []
    second = reader.second_look(first, told.append)
    pages = within(second, start, 600)
    assert sum(told) == len(first)
    assert ((pages.address[pages.volatile] - start) // PAGE).tolist() == [3, 77, 400]
    numbers = ((pages.address - start) // PAGE).tolist()
    assert numbers == [page for page in range(600) if not 500 <= page < 510]
    assert second.vanished >= 10 and second.vanished == len(first) - len(second)
    assert (pages.high[3], pages.low[3]) == pair((5003).to_bytes(8, "little") * (PAGE // 8))
    # Looking put no page back: the hole is still a hole.
    assert len(within(reader.read(), start, 600)) == 590
    # A third look remembers what the second saw.
    third = within(reader.second_look(second), start, 600)
    assert ((third.address[third.volatile] - start) // PAGE).tolist() == [3, 77, 400]


def test_second_look_at_areas_that_are_gone(specimen: Callable) -> None:
    child = specimen("""
memory = [area(40)]
for page in range(40): fill(memory[0], page, 1 + page)
RESULT = address(memory[0])
""")
    start = child.addresses[0]
    reader = ProcessReader(child.pid)
    first = reader.read()
    # addressof() keeps the buffer exported, so unmap by hand; the object is never touched again.
    child.do(f"ctypes.CDLL(None).munmap(ctypes.c_void_p({start}), ctypes.c_size_t(40 * PAGE))")
    second = reader.second_look(first)
    assert len(within(second, start, 40)) == 0
    assert second.vanished >= 40
    child.process.kill()


def test_pages_that_go_between_survey_and_read_are_counted(specimen: Callable) -> None:
    child = specimen("""
memory = area(600)
gone = area(600)
for page in range(600): fill(memory, page, 1 + page); fill(gone, page, 1 + page)
RESULT = f"{address(memory)} {address(gone)}"
""")
    kept, lost = child.addresses
    reader = ProcessReader(child.pid)
    count = reader.count()
    child.do("memory.madvise(mmap.MADV_DONTNEED, 100 * PAGE, 50 * PAGE)")
    child.do(f"ctypes.CDLL(None).munmap(ctypes.c_void_p({lost}), ctypes.c_size_t(600 * PAGE))")
    told: list[int] = []
    pages = reader.read(told.append)
    assert sum(told) == count
    assert len(within(pages, lost, 600)) == 0
    assert pages.vanished >= 600
    if ROOT:
        assert len(within(pages, kept, 600)) == 550
        assert pages.vanished >= 650
    child.process.kill()


def test_pages_that_are_present_but_refused_are_unreadable(specimen: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    child = specimen(KNOWN)
    start = child.addresses[0]

    copy = MemoryReader.copy

    def without_page_5(self: MemoryReader, ranges: np.ndarray, buffer: np.ndarray) -> int:
        done = 0
        for address, size in ranges.tolist():
            for at in range(address, address + size, PAGE):
                if at == start + 5 * PAGE:
                    return done
                done += copy(self, np.array([[at, PAGE]], np.uint64), buffer[done : done + PAGE])
        return done

    monkeypatch.setattr(MemoryReader, "copy", without_page_5)
    everything = ProcessReader(child.pid).read()
    pages = within(everything, start, 16)
    assert everything.unreadable == 1
    assert ((pages.address - start) // PAGE).tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert (pages.high[5], pages.low[5]) == pair((6).to_bytes(8, "little") * (PAGE // 8))


@pytest.mark.parametrize("when", ["counted", "reading", "between looks"])
def test_process_that_ends_midway(specimen: Callable, when: str) -> None:
    child = specimen(f"""
memory = area({64 * CHUNK_PAGES})
for page in range({64 * CHUNK_PAGES}): fill(memory, page, page)
RESULT = address(memory)
""")
    reader = ProcessReader(child.pid)
    message = re.escape(f"{child.pid} (") + ".*ended while it was being read"
    if when == "reading":
        ended = threading.Lock()

        def end_once(_: int) -> None:
            if ended.acquire(blocking=False):
                child.end()

        with pytest.raises(NoSuchProcess, match=message):
            reader.read(end_once)
        return
    pages = reader.read() if when == "between looks" else None
    reader.count()
    child.end()
    with pytest.raises(NoSuchProcess, match=message):
        reader.second_look(pages) if pages else reader.read()


def test_process_that_ends_and_is_not_waited_for(specimen: Callable) -> None:
    """A zombie still has a directory in /proc, but no memory."""
    child = specimen(KNOWN)
    reader = ProcessReader(child.pid)
    reader.count()
    child.process.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(NoSuchProcess, match="ended"):
        reader.read()
    with pytest.raises(NoSuchProcess, match="has ended: only its exit status is left"):
        ProcessReader(child.pid)


def test_a_later_process_with_the_same_pid_is_not_taken_for_ours(
    specimen: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = specimen(KNOWN)
    reader = ProcessReader(child.pid)
    from dataclasses import replace

    reader.files.identity = replace(reader.files.identity, started=1)
    with pytest.raises(NoSuchProcess):
        reader.read()


def test_reading_changes_nothing(specimen: Callable) -> None:
    """The areas, all their sizes and the process's page faults are the same after two looks."""
    child = specimen(
        MIXED
        + """
pipe = os.pipe()
if not os.fork():
    os.close(pipe[1])   # so that it ends with its parent
    os.read(pipe[0], 1)
    os._exit(0)
"""
    )

    def state() -> tuple[object, list[str]]:
        words = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        areas = [(area.start, area.end, area.flags, tuple(sorted(area.kib.items()))) for area in reader.areas()]
        return areas, words[7:11]

    reader = ProcessReader(child.pid)
    before = state()
    reader.second_look(reader.read())
    ProcessReader(child.pid, use_scan=False).read()
    assert state() == before


def test_progress_adds_up_to_the_count(specimen: Callable) -> None:
    child = specimen(MIXED)
    reader = ProcessReader(child.pid)
    told: list[int] = []
    count = reader.count()
    threads = set()

    def progress(done: int) -> None:
        told.append(done)
        threads.add(threading.get_ident())

    pages = reader.read(progress)
    assert sum(told) == count == len(pages)
    assert min(told) >= 0 and len(told) >= 1
    assert threads == {threading.get_ident()}


def test_an_interrupt_in_the_progress_bar_ends_the_reading(specimen: Callable) -> None:
    child = specimen(MIXED)

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ProcessReader(child.pid).read(interrupt)


def test_advised_only_of_a_process_that_advised_nothing(specimen: Callable) -> None:
    child = specimen(KNOWN)
    reader = ProcessReader(child.pid, advised_only=True)
    assert reader.count() == 0
    pages = reader.read()
    assert len(pages) == 0 and pages.unadvised > 0 and pages.frames_known
    assert len(reader.second_look(pages)) == 0


def test_a_folder_that_is_not_proc(tmp_path: Path) -> None:
    with pytest.raises(NoSuchProcess, match="PID 4242: no such process"):
        ProcessFiles(4242, tmp_path)


def test_nodes_of_one_and_of_several(specimen: Callable, tmp_path: Path) -> None:
    """A machine that claims several nodes makes the reader ask the kernel, which here knows the true one."""
    child = specimen(KNOWN)
    online = tmp_path / "devices/system/node/online"
    online.parent.mkdir(parents=True)
    online.write_text("0-1\n")
    asked = ProcessReader(child.pid, sys=tmp_path).read()
    online.write_text("3\n")
    alone = ProcessReader(child.pid, sys=tmp_path).read()
    real = ProcessReader(child.pid).read()
    assert set(alone.node.tolist()) == {3}
    assert np.array_equal(asked.node, real.node)
    assert (real.node >= 0).all()


def test_frames_are_real(specimen: Callable) -> None:
    child = specimen(KNOWN)
    pages = ProcessReader(child.pid).read()
    if not ROOT:
        assert (pages.frame == UNKNOWN_FRAME).all()
        return
    assert (pages.frame > 0).all()
    assert len(set(pages.frame.tolist())) == len(pages)
