"""Judge merge, advise and unadvise on real memory, without a daemon: every kind of buffer, owners that go, threads, forks, the end.

Each test is a process of its own. `Vault` knows what every byte must be, whatever happens to the pages under it.
"""

from __future__ import annotations

import array
import concurrent.futures
import contextlib
import ctypes
import gc
import hashlib
import mmap
import multiprocessing
import os
import pickle
import random
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.live.own_process import own_process, python, skip

import pagefold
from pagefold.errors import NotHere, UsageError
from pagefold.live import vmas

PAGE = 4096
PAGES = 64


def content(seed: int, pages: int = PAGES) -> bytes:
    """Return bytes in which no two pages are equal, the same for the same seed."""
    return b"".join(hashlib.sha256(b"%d %d" % (seed, page)).digest() * (PAGE // 32) for page in range(pages))


def numbers(seed: int, pages: int = PAGES) -> np.ndarray[Any, Any]:
    """Return an array that owns its memory, its whole pages those of `content`."""
    made = np.empty((pages + 2) * PAGE, np.uint8)
    first = -made.ctypes.data % PAGE
    made[:] = 1
    made[first : first + pages * PAGE] = np.frombuffer(content(seed, pages), np.uint8)
    return made


def same(one: np.ndarray[Any, Any], seed: int, pages: int = PAGES) -> bool:
    first = -one.ctypes.data % PAGE
    return one[first : first + pages * PAGE].tobytes() == content(seed, pages)


def merging_pages() -> int:
    """Return how many pages of this process map the store."""
    return int(pagefold.stats()["process"]["ksm_merging_pages"])


def regions() -> int:
    return int(pagefold.stats()["process"]["regions"])


def accounted(report: pagefold.Report) -> pagefold.Report:
    """Return a report that names every page once."""
    assert report.pages == report.merged + sum(report.why_not.values()), repr(report)
    return report


def need_windows() -> None:
    pagefold.merge(bytearray(PAGE))
    process = pagefold.stats()["process"]
    if not process["windows_safe"]:
        skip(f"no safe windows here: {pagefold.stats()['why']}")


# --- merge --------------------------------------------------------------------------------------------------------------


@own_process
def test_merge_says_what_became_of_every_page() -> None:
    one, two = numbers(1), numbers(1)
    first = accounted(pagefold.merge(one))
    assert first.merged == 0
    assert first.why_not["no equal page is known"] >= PAGES
    second = accounted(pagefold.merge(two))
    assert second.merged >= PAGES
    assert second.saved_bytes >= PAGES * PAGE
    assert not second.through_daemon
    third = accounted(pagefold.merge(two))
    assert third.merged == 0
    assert third.why_not["merged already"] >= PAGES
    assert merging_pages() >= 2 * PAGES
    assert same(one, 1)
    assert same(two, 1)
    text = str(second)
    assert "pages merged" in text
    assert "MiB given back" in text
    assert "merged=" not in text
    assert repr(second).startswith("<pagefold.Report: ")


@own_process
def test_equal_pages_inside_one_object_merge_and_zeros_take_no_memory() -> None:
    one = np.tile(np.frombuffer(content(2, 1), np.uint8), PAGES + 1)
    zeros = np.zeros((PAGES + 1) * PAGE, np.uint8)
    zeros[::PAGE] = 1
    zeros[:] = 0  # every page there, and zero
    pagefold.merge(one[:PAGE])
    report = accounted(pagefold.merge({"one": one, "zeros": zeros}))
    assert report.zero_pages >= PAGES
    assert report.merged >= report.zero_pages
    assert not zeros.any()
    assert (one.reshape(-1, PAGE) == one[:PAGE]).all()


@own_process
def test_a_write_parts_what_was_merged() -> None:
    one, two = numbers(3), numbers(3)
    pagefold.merge([one, two])
    pagefold.merge([one, two])
    assert merging_pages() >= 2 * PAGES
    middle = -one.ctypes.data % PAGE + 5 * PAGE
    one[middle] += 1
    assert pagefold.stats()["process"]["cow_breaks"] == 1
    assert same(two, 3)
    assert not same(one, 3)
    one[middle] -= 1
    assert same(one, 3)


@own_process
def test_what_cannot_merge_says_why() -> None:
    shared = mmap.mmap(-1, 4 * PAGE)
    file = mmap.mmap(os.open(sys.executable, os.O_RDONLY), 4 * PAGE, access=mmap.ACCESS_READ)
    report = accounted(pagefold.merge([shared, file, bytes(10), multiprocessing.RawArray("d", 9000), "text"]))
    assert report.merged == 0
    assert not report.held
    reasons = " / ".join(report.why_not)
    for word in ("shared memory", "too small", "no memory of its own (str)"):
        assert word in reasons
    locked = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    place = ctypes.addressof(ctypes.c_char.from_buffer(locked))
    if ctypes.CDLL(None).mlock(ctypes.c_void_p(place), ctypes.c_size_t(4 * PAGE)) == 0:
        assert pagefold.merge(locked).why_not == {"this memory is locked (mlock)": 4}
    with pytest.raises(UsageError, match="a int has no memory that could be merged"):
        pagefold.merge(5)


def loaded(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        skip(f"{name} is not installed")


def private_map(data: bytes) -> mmap.mmap:
    made = mmap.mmap(-1, len(data), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    made[:] = data
    return made


def ctypes_array(data: bytes) -> Any:
    import ctypes

    return (ctypes.c_char * len(data)).from_buffer(bytearray(data))


def arrow(data: bytes) -> Any:
    """Return an Arrow array whose memory Arrow itself allocated."""
    pyarrow = loaded("pyarrow")
    whole = pyarrow.array(np.frombuffer(data, np.int64))
    return pyarrow.concat_arrays([whole.slice(0, 8), whole.slice(8)])


KINDS: dict[str, Callable[[bytes], Any]] = {
    "bytes": lambda data: bytes(bytearray(data)),
    "bytearray": bytearray,
    "array.array": lambda data: array.array("B", data),
    "memoryview": lambda data: memoryview(bytearray(data)),
    "mmap": private_map,
    "ndarray": lambda data: np.frombuffer(data, np.uint8).copy(),
    "ndarray of dates": lambda data: np.frombuffer(data, np.uint8).copy().view("M8[s]"),
    "ndarray view": lambda data: np.frombuffer(data, np.uint8).copy()[::-1],
    "ndarray of bytes": lambda data: np.frombuffer(bytes(bytearray(data)), np.uint8),
    "ctypes": ctypes_array,
    "pandas": lambda data: loaded("pandas").DataFrame(np.frombuffer(data, np.int64).reshape(-1, 8).copy()),
    "pandas of Arrow": lambda data: loaded("pandas").Series(
        arrow(data), dtype=loaded("pandas").ArrowDtype(arrow(data).type)
    ),
    "Arrow buffer": lambda data: arrow(data).buffers()[1],
    "Arrow array": arrow,
    "Arrow table": lambda data: loaded("pyarrow").table({"x": arrow(data)}),
    "tensor": lambda data: loaded("torch").from_numpy(np.frombuffer(data, np.uint8).copy()).clone(),
    "dict": lambda data: {"a": [bytearray(data), (np.frombuffer(data, np.uint8).copy(), "text")]},
}


def read(kind: str, thing: Any) -> bytes:
    """Return an object's bytes, through its own library."""
    if kind == "dict":
        return bytes(thing["a"][0]) + thing["a"][1][0].tobytes()
    if kind == "pandas of Arrow":
        return bytes(thing.to_numpy().tobytes())
    if kind == "pandas":
        return bytes(thing.to_numpy().tobytes())
    if kind == "Arrow array":
        return bytes(thing.to_numpy().tobytes())
    if kind == "Arrow table":
        return bytes(thing["x"].to_numpy().tobytes())
    if kind == "tensor":
        return bytes(thing.numpy().tobytes())
    return bytes(thing.tobytes() if hasattr(thing, "tobytes") else thing)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_merges_and_is_itself_again(kind: str) -> None:
    every_kind(kind=kind)


@own_process
def every_kind(kind: str) -> None:
    need_windows()
    # A page that repeats, so that pages are equal wherever in a page an object begins.
    data = content(4, 1) * PAGES
    one, two = KINDS[kind](data), KINDS[kind](data)
    before = read(kind, one)
    pagefold.merge(one)
    reports = [accounted(pagefold.merge(one)), accounted(pagefold.merge(two))]
    merged = merging_pages()
    assert merged >= 2 * (PAGES - 3), str(reports[1])
    assert read(kind, one) == read(kind, two) == before
    handles = [pagefold.advise(one), pagefold.advise(two), pagefold.advise(one)]
    assert all(handle.pages >= PAGES - 3 for handle in handles)
    assert read(kind, one) == read(kind, two) == before
    assert merging_pages() >= merged - 2
    for handle in handles:
        assert pagefold.unadvise(handle) == 0
    assert merging_pages() == 0
    assert regions() == 0
    assert read(kind, one) == read(kind, two) == before
    reports = [pagefold.merge(one), pagefold.merge(two)]
    assert merging_pages() >= PAGES - 3
    kept = kind not in ("ndarray", "ndarray of dates", "ndarray view", "pandas")
    assert all(report.held == kept for report in reports)
    assert ("kept until release()" in str(reports[0])) == kept
    for report in reports:
        report.release()
        report.release()
    assert merging_pages() == 0
    assert read(kind, one) == read(kind, two) == before
    del one, two, reports
    gc.collect()
    assert regions() == 0


# --- owners -------------------------------------------------------------------------------------------------------------


class Subclass(np.ndarray[Any, Any]):
    pass


@own_process
def test_merge_keeps_no_array_and_what_comes_after_it_is_clean() -> None:
    """Memory that was merged goes back to malloc; whoever gets it next finds what malloc promises."""
    chance = random.Random(5)
    for turn in range(150):
        pages = chance.choice([3, 20, 64, 300])
        one, two = numbers(turn % 3, pages), numbers(turn % 3, pages)
        kind = turn % 3
        if kind == 1:
            one, two = one.view(Subclass).copy(), two.copy()
        if kind == 2:
            one = np.array([f"{n % 7}" for n in range(pages * 50)], object)
        pagefold.merge([one, two])
        pagefold.merge([two, one])
        gone = [weakref.ref(one), weakref.ref(two)]
        del one, two
        gc.collect()
        assert [ref() for ref in gone] == [None, None]
        zeros = [np.zeros(chance.choice([5000, 100_000, 1_000_000]), np.uint8) for _ in range(4)]
        assert not any(one.any() for one in zeros)
        for one in zeros:
            one[:] = 77
    assert regions() == 0
    assert merging_pages() == 0


@own_process
def test_an_array_in_garbage_is_whole_until_the_last_reader() -> None:
    class Reader:
        def __del__(self) -> None:
            read.append(same(self.array, 6))

    read: list[bool] = []
    twin = numbers(6)
    for _ in range(5):
        reader = Reader()
        reader.array = numbers(6).view(Subclass).copy().view(Subclass)
        reader.array[:] = twin
        reader.itself = reader
        first = -reader.array.ctypes.data % PAGE
        reader.array[first : first + PAGES * PAGE] = np.frombuffer(content(6), np.uint8)
        pagefold.merge([twin, reader.array])
        pagefold.merge([twin, reader.array])
        del reader
        gc.collect()
    assert read == [True] * 5


@own_process
def test_objects_in_a_merged_array_are_released() -> None:
    class Thing:
        pass

    things = [Thing() for _ in range(PAGE // 8)]
    refs = [weakref.ref(thing) for thing in things]
    one = np.array(things * 50)  # the same page again and again, wherever it begins
    two = one.copy()
    pagefold.merge([one, two])
    pagefold.merge([one, two])
    assert merging_pages() > 0
    del things, one, two
    assert not any(ref() for ref in refs)


@own_process
def test_resize_is_refused_while_held_and_works_after() -> None:
    for take in (pagefold.merge, pagefold.advise):
        one = numbers(7)
        held = take(one)
        for refcheck in (True, False):
            with pytest.raises(ValueError, match="cannot resize an array that references or is referenced"):
                one.resize(10, refcheck=refcheck)
        assert same(one, 7)
        pagefold.unadvise(held)
        one.resize(1 << 20, refcheck=False)
        assert not one[-1000:].any()


@own_process
def test_owners_that_would_move_are_refused_while_held_and_may_after() -> None:
    data = content(8)
    text, items, mapped = bytearray(data), array.array("B", data), private_map(data)
    held: list[Any] = [pagefold.merge([text, items, mapped]), pagefold.advise([text, items, mapped])]
    changes: list[Callable[[], Any]] = [
        lambda: text.append(1),
        text.clear,
        lambda: items.append(1),
        lambda: mapped.resize(1 << 20),
        mapped.close,
    ]
    while held:
        for change in changes:
            with pytest.raises(BufferError):
                change()
        pagefold.unadvise(held.pop())
    assert bytes(text) == bytes(items) == mapped[:] == data
    for change in changes:
        change()


@own_process
def test_a_tensor_that_moves_to_other_processes_is_let_go_first() -> None:
    torch = loaded("torch")
    whole = torch.from_numpy(numbers(8))
    one, two = whole.clone(), whole.clone()
    expected = whole.numpy().tobytes()
    pagefold.merge([one, two])
    handle = pagefold.advise([one, two])
    with pytest.raises(RuntimeError, match="not resizable"):
        one.untyped_storage().resize_(1 << 20)
    assert regions() == 2
    one.share_memory_()
    assert regions() == 1
    assert one.numpy().tobytes() == two.numpy().tobytes() == expected
    assert pagefold.unadvise(handle) == 0
    del two
    gc.collect()
    assert regions() == 0


@own_process
def test_advice_keeps_memory_until_it_ends() -> None:
    one = numbers(9)
    gone, place = weakref.ref(one), one.ctypes.data
    handle = pagefold.advise(one[5:])
    del one
    gc.collect()
    assert gone() is not None
    assert vmas.at(place) is not None
    del handle  # dropping the handle changes nothing
    gc.collect()
    assert gone() is not None
    with pagefold.advise(gone()) as handle:
        assert handle.pages == PAGES + 1 or handle.pages == PAGES
    assert gone() is not None
    assert regions() == 1


def bytes_read() -> int:
    """Return how much this process has read in all, from whatever file."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


@own_process
def test_thousands_of_objects_are_looked_at_together() -> None:
    """To look at one is to read smaps, all of it: for each of many that would take minutes."""
    arrays = [np.full(16 * PAGE // 8, n) for n in range(600)]
    pagefold.advise(arrays[0])
    begin = bytes_read()
    handles = [pagefold.advise(one) for one in arrays]
    assert sum(handle.pages for handle in handles) >= 600 * 15
    end = bytes_read()
    whole = len(Path("/proc/self/smaps").read_bytes())
    maps = len(Path("/proc/self/maps").read_bytes()) * len(arrays)  # read for each before Linux 6.11
    assert end - begin < 5 * whole + maps, f"{end - begin:,} bytes read for a smaps of {whole:,}"
    with pagefold.advise(arrays) as handle:
        assert handle.pages == sum(one.pages for one in handles)


@own_process
def test_what_cannot_be_merged_is_found_out_whoever_asks_first() -> None:
    one, two = (mmap.mmap(-1, 8 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2))
    for memory in (one, two):
        place = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        assert ctypes.CDLL(None).madvise(ctypes.c_void_p(place + 2 * PAGE), ctypes.c_size_t(PAGE), 16) == 0  # DONTDUMP
    handle = pagefold.advise(one)
    report = pagefold.merge(one)
    assert report.why_not == handle.why_not == {"this memory is MADV_DONTDUMP": 8}
    assert not handle.pages
    assert not report.held
    one.close()  # nothing keeps it
    assert repr(pagefold.advise(two)).startswith("<pagefold.Handle: 0 pages advised")
    assert regions() == 0


@own_process
def test_overlapping_advice_counts() -> None:
    need_windows()
    one, two = numbers(10), numbers(10)
    pagefold.merge([one, two])
    whole, again = pagefold.advise([one, two]), pagefold.advise([one, two])
    first = -one.ctypes.data % PAGE
    part = pagefold.advise(one[first + 10 * PAGE : first + 20 * PAGE])
    pagefold.merge([one, two])
    assert merging_pages() >= 2 * PAGES
    pagefold.unadvise(whole)
    assert merging_pages() >= 2 * PAGES
    pagefold.unadvise(again)
    assert regions() == 1
    assert part.pages == 10
    assert pagefold.stats()["process"]["ksm_rmap_items"] == 10
    pagefold.unadvise(part)
    assert regions() == merging_pages() == 0
    assert same(one, 10)
    assert same(two, 10)


@own_process
def test_unadvise_may_be_called_again_and_knows_its_own() -> None:
    one = numbers(11)
    handle, report = pagefold.advise(one), pagefold.merge(one)
    other = pagefold.advise(one)
    for _ in range(3):
        assert pagefold.unadvise(handle) == 0
        assert handle.pages == 0
        assert handle.report().merged == 0
        assert repr(handle) == "<pagefold.Handle: released>"
    assert other.pages >= PAGES
    assert pagefold.unadvise(report) == 0
    pagefold.unadvise(other)
    for thing in (5, one, None, object()):
        with pytest.raises(UsageError, match=f"{type(thing).__name__} is no handle"):
            pagefold.unadvise(thing)  # type: ignore[arg-type]
    for thing in (other, report):
        with pytest.raises(UsageError, match="of this process"):
            pickle.dumps(thing)


@own_process
def test_without_a_daemon_everything_says_so() -> None:
    assert pagefold.stats()["process"]["started"] is False
    handle = pagefold.advise(numbers(12))
    if pagefold.stats()["process"]["windows_safe"]:
        assert "no daemon" in handle.note
    assert handle.note in repr(handle)
    stats = pagefold.stats()
    assert stats["domain"] is None
    assert stats["why"]
    with pytest.raises(NotHere, match="no daemon there"):
        pagefold.settled(1)
    private, absent = handle.report().why_not["not merged, or not yet"], "not there: never touched, or zeros"
    assert private + handle.report().why_not.get(absent, 0) == handle.pages


# --- threads ------------------------------------------------------------------------------------------------------------


def hammer(seed: int, until: float, errors: list[str]) -> None:
    """Make, merge, advise, view, write, resize and drop arrays; every byte is known."""
    chance = random.Random(seed)
    mine: list[tuple[np.ndarray[Any, Any], int, int]] = []
    handles: list[Any] = []
    while time.monotonic() < until and not errors:
        try:
            act = chance.random()
            if act < 0.3 or not mine:
                kind, pages = chance.randrange(3), chance.choice([2, 10, 40])
                mine.append((numbers(kind, pages), kind, pages))
            one, kind, pages = chance.choice(mine)
            view = one[chance.randrange(one.size // 2) :]
            if act < 0.5:
                report = pagefold.merge(view if act < 0.4 else one)
                if chance.random() < 0.3:
                    report.release()
            elif act < 0.65:
                handles.append(pagefold.advise(view))
            elif act < 0.8 and handles:
                pagefold.unadvise(handles.pop(chance.randrange(len(handles))))
            elif act < 0.85:
                first = -one.ctypes.data % PAGE
                at = first + chance.randrange(pages * PAGE)
                one[at] ^= 255
                if same(one, kind, pages):
                    errors.append("a write was lost")
                one[at] ^= 255
            elif act < 0.9:
                with contextlib.suppress(ValueError):
                    one.resize(one.size, refcheck=False)
            elif len(mine) > 8 or act > 0.97:
                del mine[next(at for at, item in enumerate(mine) if item[0] is one)]
                view = one = np.zeros(chance.choice([100, 300_000]), np.uint8)
                if one.any():
                    errors.append("zeros are not zeros")
                one[:] = 1
                continue
            if not same(one, kind, pages):
                errors.append(f"bytes are not what they were (seed {seed})")
        except Exception as error:
            errors.append(f"{error!r} (seed {seed})")
    for handle in handles:
        pagefold.unadvise(handle)


def hammer_in_threads(seconds: float, beside: Callable[[], None] | None = None) -> None:
    """Have threads hammer, and do something else beside; nothing but what was held before may be held after."""
    held = regions()
    seed = random.randrange(1 << 30)
    errors: list[str] = []
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=hammer, args=(seed + one, until, errors)) for one in range(3)]
    for thread in threads:
        thread.start()
    while beside and time.monotonic() < until:
        beside()
    for thread in threads:
        thread.join()
    assert not errors, errors
    gc.collect()
    assert regions() == held


@own_process
def test_threads_that_do_everything_at_once() -> None:
    hammer_in_threads(4)


@own_process
def test_forks_beside_threads_that_do_everything() -> None:
    kept = numbers(13)
    pagefold.merge(kept)

    def fork() -> None:
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                twin = numbers(13)
                pagefold.merge(kept)
                report = pagefold.merge(twin)
                handle = pagefold.advise(twin)
                pagefold.unadvise(handle)
                status = 0 if same(kept, 13) and same(twin, 13) and report.pages else 2
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

    hammer_in_threads(4, fork)
    assert same(kept, 13)


@own_process
def test_the_collector_and_signals_in_the_middle_of_it() -> None:
    """Finalizers and signal handlers that call pagefold come between any two of its own instructions, and nothing waits for itself."""

    class Holder:
        """A thing of a program that ends its advice when it is collected."""

        def __init__(self) -> None:
            self.handle = pagefold.advise(numbers(14, 2))
            self.itself = self

        def __del__(self) -> None:
            pagefold.unadvise(self.handle)
            ended.append(1)

    ended: list[int] = []
    came: list[int] = []
    kept = numbers(15)
    pagefold.merge(kept).release()  # a handler cannot use a module that is just being imported

    def handler(number: int, frame: object) -> None:
        came.append(1)
        report = pagefold.merge(kept)
        pagefold.unadvise(pagefold.advise(kept))
        report.release()

    gc.set_threshold(50, 2, 2)
    signal.signal(signal.SIGALRM, handler)
    chance = random.Random(18)
    made = 300
    for _ in range(made):
        # One at a time: handlers that interrupt handlers would never let us go on.
        signal.setitimer(signal.ITIMER_REAL, chance.random() * 0.002 + 1e-6)
        Holder()
        with pagefold.advise([numbers(14, 3), bytearray(content(14, 3))]):
            pass
    signal.setitimer(signal.ITIMER_REAL, 0)
    assert len(came) > made // 10
    gc.collect()
    assert len(ended) == made
    assert same(kept, 15)
    pagefold.merge(kept).release()
    assert regions() == 0


@own_process
def test_ctrl_c_at_any_moment_leaves_nothing_behind() -> None:
    class Stop(BaseException):
        pass

    def handler(number: int, frame: object) -> None:
        if armed:
            armed.clear()
            raise Stop

    armed: list[int] = []
    kept = numbers(16)
    signal.signal(signal.SIGALRM, handler)
    stopped = 0
    chance = random.Random(17)
    for _ in range(400):
        one = numbers(16, 5)
        handles: list[Any] = []
        armed.append(1)
        try:
            signal.setitimer(signal.ITIMER_REAL, chance.random() * 0.002 + 1e-6)
            handles.append(pagefold.advise([one, kept]))
            handles.append(pagefold.merge([one, kept]))
            pagefold.unadvise(handles[0])
            handles[1].release()
            while armed:
                pass
        except Stop:
            stopped += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        armed.clear()
        for handle in handles:
            pagefold.unadvise(handle)
    assert stopped > 200
    del one, handles
    # What was advised while nobody got its handle is held, as after a handle that was dropped: the agent and the books agree on it.
    from pagefold.live import client

    assert same(kept, 16)
    known = [region for region in client._client.holds.regions() if not region.dead]
    assert regions() == len(known)
    client._client.holds.let_go(0, 1 << 56)
    assert regions() == 0


# --- other processes ----------------------------------------------------------------------------------------------------


@own_process
def test_parent_and_child_merge_what_each_made() -> None:
    one = numbers(20)
    pagefold.merge(one)
    child = os.fork()
    if child == 0:
        twin = numbers(20)
        report = pagefold.merge(twin)
        again = pagefold.merge(twin)
        ok = report.merged + again.merged + again.why_not.get("merged already", 0) >= PAGES and same(twin, 20)
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same(one, 20)


@own_process
def test_two_children_merge_though_the_parent_never_did() -> None:
    """The parent has only imported pagefold: the store that a family shares must be there before the first fork."""
    assert "pagefold.live.client" not in sys.modules
    turn = [os.pipe(), os.pipe()]
    children = []
    for number in range(2):
        child = os.fork()
        if child == 0:
            mine = numbers(21)
            if number == 1:
                os.read(turn[0][0], 1)
            report = pagefold.merge(mine)
            if number == 0:
                os.write(turn[0][1], b"x")
                os.read(turn[1][0], 1)
                ok = same(mine, 21)
            else:
                os.write(turn[1][1], b"x")
                ok = report.merged >= PAGES and same(mine, 21)
            os._exit(0 if ok else 1)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


@own_process
def test_a_child_inherits_what_is_held_and_ends_it_for_itself() -> None:
    need_windows()
    one, two = numbers(22), numbers(22)
    pagefold.merge([one, two])
    handle = pagefold.advise([one, two])
    weak = numbers(22)
    pagefold.merge(weak)
    before = merging_pages()
    assert before >= 3 * PAGES
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(AssertionError):
            assert merging_pages() == before
            del weak  # the first thing this child does: nothing is started yet
            assert handle.pages >= 2 * PAGES
            assert pagefold.unadvise(handle) == 0
            assert merging_pages() == regions() == 0
            assert same(one, 22)
            assert same(two, 22)
            one[:] = 0
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert merging_pages() == before
    assert same(one, 22)
    assert same(weak, 22)


@own_process
def test_an_array_that_goes_in_a_child_that_called_nothing() -> None:
    # Of malloc's heap, where memory stays mapped when it is freed; a subclass, whose content must stay until it is.
    twin, one, above = (Subclass((96_000,), np.uint8) for _ in range(3))
    for array_ in (twin, one, above):
        array_[:] = np.resize(np.arange(16, dtype=np.uint8), 96_000)
    del array_
    two = numbers(23)
    three = numbers(23)
    pagefold.merge([twin, one, two, three])
    pagefold.merge([twin, one, two, three])
    assert merging_pages() > PAGES
    child = os.fork()
    if child == 0:
        before = merging_pages()
        del one
        without_one = merging_pages()
        del two
        if not before > without_one > merging_pages():  # its pages are private and anonymous before malloc has them
            os._exit(2)
        zeros = [np.zeros(100_000, np.uint8) for _ in range(20)]
        os._exit(0 if not any(zero.any() for zero in zeros) and same(three, 23) and (above == twin).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same(two, 23)


def work_elsewhere(seed: int) -> tuple[bool, int]:
    one, two = numbers(seed), numbers(seed)
    pagefold.merge(one)
    report = pagefold.merge(two)
    return same(one, seed) and same(two, seed), report.merged


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_every_kind(method: str) -> None:
    workers(method=method)


@own_process
def workers(method: str) -> None:
    one = numbers(24)
    handle = pagefold.advise(one)
    pagefold.merge(one)
    context = multiprocessing.get_context(method)
    with context.Pool(2) as pool:
        answers = pool.map(work_elsewhere, range(24, 30))
    assert all(good and merged >= PAGES for good, merged in answers), answers
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as executor:
        answers = list(executor.map(work_elsewhere, range(24, 28)))
    assert all(good and merged >= PAGES for good, merged in answers), answers
    assert same(one, 24)
    pagefold.unadvise(handle)


@own_process
def test_commands_while_things_are_advised() -> None:
    one = numbers(25)
    handle = pagefold.advise(one)
    pagefold.merge(one)
    for _ in range(10):
        assert subprocess.run(["true"], check=False).returncode == 0
        assert subprocess.run(["true"], check=False, preexec_fn=lambda: None).returncode == 0
        assert os.system("true") == 0
    done = subprocess.run(
        [sys.executable, "-c", "import pagefold; print(pagefold.merge(bytearray(1 << 20)).pages)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) >= 255
    with concurrent.futures.ThreadPoolExecutor(4) as executor:
        assert all(good for good, _ in executor.map(work_elsewhere, range(26, 34)))
    assert same(one, 25)
    pagefold.unadvise(handle)


@own_process
def test_exec_in_the_middle_of_it() -> None:
    child = os.fork()
    if child == 0:
        one = numbers(26)
        pagefold.advise(one)
        pagefold.merge(one)
        os.execv("/bin/true", ["true"])
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- the end ------------------------------------------------------------------------------------------------------------

ENDS = {
    "the end of the program": "",
    "sys.exit": "sys.exit(0)",
    "os._exit": "os._exit(0)",
    "in a thread's time": "threading.Thread(target=lambda: time.sleep(0.1)).start()",
    "daemon threads at work": "[threading.Thread(target=churn, daemon=True).start() for _ in range(3)]; time.sleep(0.2)",
    "later exit handlers": "atexit.register(lambda: print(pagefold.unadvise(handle)))",
    "globals that go in any order": "import builtins; builtins.kept = [arrays, handle]; sys.modules['kept'] = kept_module()",
    "a ring of garbage": "ring = [arrays, handle]; ring.append(ring); gc.disable(); del ring, arrays, handle",
}
PROGRAM = """
import atexit, gc, os, sys, threading, time, types
{early}
import numpy as np
import pagefold

class Subclass(np.ndarray):
    pass

def make(seed):
    return np.random.default_rng(seed).integers(0, 255, 200_000, np.uint8)

def churn():
    while True:
        pagefold.merge(make(1))
        with pagefold.advise(make(1)):
            pass

def kept_module():
    module = types.ModuleType("kept")
    module.array = make(1).view(Subclass).copy()
    pagefold.merge(module.array)
    return module

arrays = [make(1), make(1), bytearray(make(1)), np.array([object()] * 30_000), make(1).view(Subclass).copy()]
pagefold.merge(arrays)
handle = pagefold.advise([arrays, make(1)])
pagefold.merge(arrays)
{end}
"""


@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_ends_in_silence(end: str) -> None:
    early = "atexit.register(lambda: pagefold.unadvise(handle))" if end == "later exit handlers" else ""
    done = python("-c", PROGRAM.format(early=early, end=ENDS[end]))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def test_the_agent_has_stopped_before_memory_goes() -> None:
    """What was registered before us runs after us; then come the modules and all that they hold, in any order."""
    early = "from pagefold.live import agent\natexit.register(lambda: print(agent.library().state().started))"
    done = python("-c", PROGRAM.format(early=early, end="print(agent.library().state().started)"))
    assert (done.stdout.split(), done.stderr) == (["1", "0"], "")


@own_process
def test_after_the_end_began_nothing_begins() -> None:
    from pagefold.live import client

    one = numbers(30)
    handle = pagefold.advise(one)
    client._client._end()
    report = accounted(pagefold.merge(numbers(31)))
    assert report.merged == 0
    assert report.why_not["the interpreter is about to end"] >= PAGES
    assert pagefold.advise(numbers(31)).pages == 0
    assert pagefold.unadvise(handle) == 0
    assert not client._client.library.state().started


def test_nothing_is_left_behind() -> None:
    """No socket, no file, no process: what a client makes goes with it."""
    before = left()
    done = python("-c", PROGRAM.format(early="", end=""))
    assert done.returncode == 0, done.stderr
    assert left() - before == set()


def left() -> set[str]:
    return {str(path) for folder in ("/tmp", "/dev/shm") for path in Path(folder).glob("*pagefold*")}


@pytest.fixture(autouse=True)
def _library_is_built() -> Iterator[None]:
    from pagefold.live import agent

    agent.library()
    yield
