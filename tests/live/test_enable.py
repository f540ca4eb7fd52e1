"""Judge enable(): NumPy's memory comes from the agent, in every thread, and is what NumPy promises. Each test is a process of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ctypes
import gc
import multiprocessing
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from tests.live.own_process import BOUND, own_process, python
from tests.live.window_driver import refuse_calls

import pagefold
from pagefold.errors import NotHere

PAGE = 4096
LARGE = 65536  # bytes, from which arrays are the agent's


def wait_until(true: Callable[[], object], what: str) -> None:
    until = time.monotonic() + BOUND
    while not true():
        assert time.monotonic() < until, f"waited for {what}"
        time.sleep(0.01)


def regions() -> int:
    return int(pagefold.stats()["process"]["regions"])


def served(size: int = LARGE) -> bool:
    """Tell whether an array made here and now is the agent's: they begin at a page, which malloc's never do."""
    import numpy as np

    return all(np.empty(size, np.uint8).ctypes.data % PAGE == 0 for _ in range(3))


@own_process
def test_arrays_from_now_on_are_the_agents() -> None:
    import numpy as np
    from numpy._core.multiarray import get_handler_name, get_handler_version

    before = np.zeros(LARGE)
    assert get_handler_name(before) == "default_allocator"
    assert not served()
    pagefold.enable()
    pagefold.enable()
    assert get_handler_name() == "pagefold"
    assert get_handler_version() == 1
    after = np.zeros(LARGE)
    assert get_handler_name(after) == "pagefold"
    assert after.ctypes.data % PAGE == 0
    assert served()
    assert not served(LARGE - 1)
    assert pagefold.stats()["process"]["enabled"]
    wait_until(lambda: regions() == 1, "the agent to advise the array")
    assert pagefold.stats()["process"]["ksm_rmap_items"] == LARGE * 8 // PAGE
    del after
    assert regions() == 0


@own_process
def test_every_thread_is_served_also_those_that_were_there() -> None:
    import numpy as np

    go, found = threading.Event(), []

    def wait() -> None:
        np.zeros(10)
        go.wait(BOUND)
        found.append(served())

    there = [threading.Thread(target=wait) for _ in range(3)]
    for thread in there:
        thread.start()
    pagefold.enable()
    go.set()
    for thread in there:
        thread.join()
    with concurrent.futures.ThreadPoolExecutor(2) as executor:
        found += executor.map(lambda _: served(), range(10))

    async def task() -> bool:
        return served() and await asyncio.to_thread(served)

    found.append(asyncio.run(task()))
    assert found == [True] * 14


@own_process
def test_enabled_in_a_thread_it_serves_the_others() -> None:
    import numpy as np

    thread = threading.Thread(target=pagefold.enable)
    thread.start()
    thread.join()
    assert served()
    assert np.zeros(LARGE).sum() == 0


@own_process
def test_arrays_of_before_are_freed_and_resized_after() -> None:
    import numpy as np

    seed = random.randrange(1 << 30)
    chance = np.random.default_rng(seed)
    sizes = [0, 1, 7, 100, 1023, 1024, 5000, 65535, 65536, 65537, 300_000, 5_000_000]
    arrays = [chance.integers(0, 255, size, np.uint8) for size in sizes for _ in range(3)]
    copies = [one.tobytes() for one in arrays]
    pagefold.enable()
    for _ in range(3):
        for at, one in enumerate(arrays):
            size = int(chance.choice(sizes))
            expected = copies[at][:size] + bytes(max(size - len(copies[at]), 0))
            one.resize(size, refcheck=False)
            assert one.tobytes() == expected, f"seed {seed}"
            copies[at] = expected
    arrays.clear()
    gc.collect()


@own_process
def test_memory_is_what_numpy_promises() -> None:
    """Random arrays of all sizes, made in every way NumPy makes them, written, resized and dropped by threads; every byte is known."""
    import numpy as np

    pagefold.enable()
    seed, errors = random.randrange(1 << 30), []
    until = time.monotonic() + 4

    def work(number: int) -> None:
        chance = random.Random(number)
        kept: list[tuple[Any, int]] = []
        while time.monotonic() < until and not errors:
            size = chance.choice([10, 3000, 65535, 65536, 70_000, 400_000, 5_000_000])
            act = chance.randrange(6)
            if act == 0:
                one = np.zeros(size, np.uint8)
                if one.any():
                    errors.append("zeros are not zeros")
            elif act == 1:
                one = np.full(size, 3, np.uint8)
            elif act == 2:
                one = np.repeat(np.arange(size // 10 + 1, dtype=np.uint8), 10)
                if (one[::10] != np.arange(size // 10 + 1, dtype=np.uint8)).any():
                    errors.append("wrong numbers")
            elif act == 3 and kept:
                one, value = kept.pop(chance.randrange(len(kept)))
                with contextlib.suppress(ValueError):
                    one.resize(size, refcheck=False)
                    if len(kept) % 2 and one.size and one[0] != value:
                        errors.append("resize lost bytes")
            elif act == 4 and kept:
                one, value = chance.choice(kept)
                if (one != value).any():
                    errors.append("bytes are not what they were")
                pagefold.merge(one) if chance.random() < 0.2 else None
                if (one != value).any():
                    errors.append("bytes are not what they were after a merge")
                continue
            else:
                one = np.sort(np.concatenate([np.ones(size, np.uint8), np.zeros(size, np.uint8)]))
                if one[size - 1] != 0 or one[size] != 1:
                    errors.append("sorted wrongly")
            value = chance.randrange(256)
            one[:] = value
            kept.append((one, value))
            if len(kept) > 6:
                kept.pop(0)

    threads = [threading.Thread(target=work, args=(seed + one,)) for one in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, f"{errors} (seed {seed})"
    gc.collect()
    wait_until(lambda: regions() == 0, "all arrays to be forgotten")


@own_process
def test_equal_arrays_begin_at_a_page_and_can_merge_whole() -> None:
    import numpy as np

    pagefold.enable()
    one, two = (np.random.default_rng(1).integers(0, 255, 100_000, np.uint8) for _ in range(2))
    reports = [pagefold.merge(one), pagefold.merge(two)]
    whole = -(-100_000 // PAGE)  # behind its last byte there is nobody else's
    assert (reports[1].merged, reports[1].pages) == (whole, whole), str(reports[1])
    assert (one == two).all()


def random_array(seed: int) -> Any:
    import numpy as np

    return np.random.default_rng(seed).integers(0, 255, 100_000, np.uint8)


def release_is_without_effect_on_others(one: Any, handle: Any) -> None:
    assert handle.release() == 0
    assert handle.pages == 0
    assert regions() == 2
    assert one.tobytes() == random_array(1).tobytes()


@own_process
def test_what_is_advised_already_merges_at_once_and_says_so() -> None:
    import numpy as np

    pagefold.enable()
    one, two = random_array(1), random_array(1)
    wait_until(lambda: regions() == 2, "the agent to advise the arrays")
    reports = [pagefold.merge(one), pagefold.merge(two)]
    assert not any(report.held for report in reports)
    assert reports[1].merged == reports[1].pages == 25, str(reports[1])
    assert reports[1].saved_bytes >= 24 * PAGE, str(reports[1])
    again = pagefold.merge(two[5000:90_000])
    assert again.merged == 0
    assert again.why_not["merged already"] == 25, str(again)
    with pagefold.advise(one) as handle:
        assert handle.pages == 100_000 // PAGE
        assert handle.report().merged == handle.pages, str(handle.report())
        assert not any("enable()" in reason for reason in handle.why_not)
        for refcheck in (True, False):
            with pytest.raises(ValueError, match="resize"):
                one.resize(200_000, refcheck=refcheck)
    release_is_without_effect_on_others(one, handle)
    for report in reports:
        assert report.release() == 0
    assert (one == two).all()
    one.resize(200_000, refcheck=False)
    assert not one[100_000:].any()
    one.resize(100_000, refcheck=False)
    assert np.array_equal(one, two)
    handle = pagefold.advise(two)
    del two
    gc.collect()
    assert handle.report().merged, "a handle keeps the array"
    pagefold.unadvise(handle)
    assert regions() <= 1
    del one
    gc.collect()
    wait_until(lambda: regions() == 0, "the arrays to be forgotten")


@pytest.mark.parametrize("call", ["merge", "advise"])
@own_process
def test_what_is_merged_while_young_is_advised_in_the_background_too(call: str) -> None:
    pagefold.enable()
    one, whole = random_array(1), 25
    asked = getattr(pagefold, call)(one)
    assert regions() == 1
    assert pagefold.stats()["process"]["ksm_rmap_items"] == whole, "the region of the array, not one of the call"
    asked.release()
    assert pagefold.stats()["process"]["ksm_rmap_items"] == whole
    view = pagefold.advise(random_array(2)[50_000:90_000])  # not where its memory begins
    assert pagefold.stats()["process"]["ksm_rmap_items"] == 2 * whole
    assert view.pages == 8
    view.release()
    del one
    gc.collect()
    wait_until(lambda: regions() == 0, "the arrays to be forgotten")


@own_process
def test_young_memory_that_cannot_be_swapped_is_refused() -> None:
    import numpy as np

    pagefold.enable()
    one = np.ones(LARGE, np.uint8)
    madvise = ctypes.CDLL(None).madvise
    assert madvise(ctypes.c_void_p(one.ctypes.data), ctypes.c_size_t(LARGE), 10) == 0  # MADV_DONTFORK
    report, handle = pagefold.merge(one), pagefold.advise(one)
    assert report.why_not == handle.why_not == {"this memory is MADV_DONTFORK": LARGE // PAGE}
    assert not handle.pages
    assert not pagefold.stats()["process"]["regions"]


@own_process
def test_without_windows_merge_swaps_what_is_advised_already() -> None:
    from pagefold.live import vmas

    refuse_calls([323, 16], 0x00050001)  # userfaultfd, and ioctl for /dev/userfaultfd: EPERM
    pagefold.enable()
    one, two = random_array(1), random_array(1)
    wait_until(lambda: regions() == 2, "the agent to advise the arrays")
    assert not pagefold.stats()["process"]["windows_safe"]
    pagefold.merge(one)
    report = pagefold.merge(two)
    assert report.merged == 25, str(report)
    assert "nobody wrote" in report.note
    pagefold.merge(one)
    assert vmas.census([(one.ctypes.data, one.ctypes.data + 24 * PAGE)]).merged == 24
    assert (one == two).all()
    two[:] = 1
    assert (one == random_array(1)).all()


@own_process
def test_children_are_served_and_advise_what_they_make() -> None:
    import numpy as np

    pagefold.enable()
    one = np.full(LARGE, 7)
    wait_until(lambda: regions() == 1, "the agent to advise the array")
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(AssertionError):
            two = np.full(LARGE, 8)
            assert served()
            wait_until(lambda: regions() == 2, "the child's agent to advise its array")
            assert (one == 7).all()
            assert (two == 8).all()
            del one
            assert regions() == 1
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (one == 7).all()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(elsewhere, range(4)) == [True] * 4


def elsewhere(_: int) -> bool:
    return served()


@own_process
def test_numpy_that_is_not_loaded_is_waited_for() -> None:
    assert "numpy" not in sys.modules
    pagefold.enable()
    pagefold.enable()
    assert "numpy" not in sys.modules
    finders = len(sys.meta_path)
    import numpy as np

    assert served()
    assert len(sys.meta_path) == finders - 1
    assert type(np.__spec__.loader).exec_module is np.__spec__.loader.exec_module.__func__
    assert np.__spec__.loader is np.__loader__


@own_process
def test_a_handler_that_looks_strange_is_left_alone() -> None:
    import numpy as np

    from pagefold.live import agent, allocator

    functions = agent.library().array_functions()
    strange = allocator._Handler(b"somebody's", 1, allocator._Allocator(None, 1, 2, 3, 4))
    assert allocator._redirect(strange, functions) is False
    newer = allocator._Handler(b"default_allocator", 2, allocator._Allocator(None, 1, 2, 3, 4))
    assert allocator._redirect(newer, functions) is False
    assert strange.allocator.malloc == 1
    known = allocator._Handler(b"default_allocator", 1, allocator._Allocator(None, 1, 2, 3, 4))
    assert allocator._redirect(known, functions) is True
    assert [getattr(known.allocator, name) for name in functions] == list(functions.values())
    assert np.zeros(3).sum() == 0


@own_process
def test_a_numpy_without_handlers_says_so() -> None:
    import types

    from pagefold.live import allocator

    old = ctypes.CFUNCTYPE(ctypes.c_uint)(lambda: 0xE)
    table = (ctypes.c_void_p * 400)()
    table[211] = ctypes.cast(old, ctypes.c_void_p)
    new_capsule = allocator._python.PyCapsule_New
    core = types.SimpleNamespace(_ARRAY_API=new_capsule(ctypes.addressof(table), None, None))
    sys.modules["numpy._core._multiarray_umath"] = core  # type: ignore[assignment]
    with pytest.raises(NotHere, match=r"use NumPy 1\.22"):
        allocator.install({})


@pytest.mark.parametrize("end", ["", "sys.exit(0)", "os._exit(0)", "builtins.kept = arrays"])
def test_an_enabled_interpreter_ends_in_silence(end: str) -> None:
    done = python(
        "-c",
        "import builtins, os, sys, threading, time, pagefold\n"
        "pagefold.enable()\n"
        "import numpy as np\n"
        "arrays = [np.full(100_000, n) for n in range(20)]\n"
        "def churn():\n"
        "    while True: np.zeros(100_000).sum()\n"
        "threading.Thread(target=churn, daemon=True).start()\n"
        "while pagefold.stats()['process']['regions'] < 20: time.sleep(0.01)\n" + end,
    )
    assert (done.returncode, done.stderr) == (0, "")
