"""Judge the memory handler for NumPy's arrays: blocks are what C promises, grow up into regions, and nothing of them stays behind."""

from __future__ import annotations

import ctypes
import random
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
from tests.live.children import in_child, wait_until
from tests.live.test_agent import forked, started, windows  # noqa: F401  (a fixture)

from pagefold.live.agent import PAGE, library

ARRAY = 65536  # PF_ARRAY
MIB = 1 << 20


class Handler:
    """The four functions."""

    def __init__(self) -> None:
        functions = library().functions
        self.malloc = lambda size: functions.pf_array_malloc(None, size)
        self.calloc = lambda count, size: functions.pf_array_calloc(None, count, size)
        self.realloc = lambda pointer, size: functions.pf_array_realloc(None, pointer, size)
        self.free = lambda pointer, size: functions.pf_array_free(None, pointer, size)


def view(pointer: int, size: int) -> np.ndarray[Any, Any]:
    return np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), np.uint8)


def fill(pointer: int, size: int, seed: int) -> None:
    view(pointer, size)[:] = np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def holds(pointer: int, size: int, seed: int) -> bool:
    return bool((view(pointer, size) == np.random.default_rng(seed).integers(0, 256, size, np.uint8)).all())


def mapped(pointer: int) -> bool:
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= pointer < high:
            return True
    return False


def resident() -> int:
    match = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert match
    return int(match[1]) * 1024


def grown_up(count: int) -> None:
    """Wait until that many blocks are regions."""
    agent = started()
    wait_until(lambda: agent.state().regions == count, f"{count} regions")


# --- what C promises --------------------------------------------------------------------------------------------------------


def promises() -> None:
    handler = Handler()
    for size in (1, 100, ARRAY - 1):
        pointer = handler.malloc(size)
        fill(pointer, size, size)
        assert holds(pointer, size, size)
        handler.free(pointer, size)
    for size in (ARRAY, ARRAY + 1, 5 * PAGE + ARRAY, MIB + 7, 40 * MIB):
        pointer = handler.malloc(size)
        assert pointer % PAGE == 0
        fill(pointer, size, size)
        other = handler.malloc(size)
        assert not pointer <= other < pointer + size
        assert holds(pointer, size, size)
        handler.free(pointer, size)
        handler.free(other, size)
    handler.free(None, 0)
    for impossible in (2**63 - 1, 2**64 - 1, 2**64 - PAGE, 2**47):
        assert handler.malloc(impossible) is None
    for count, size in ((2**32, 2**33), (2**63, 2), (2**64 - 1, 1), (1, 2**47)):
        assert handler.calloc(count, size) is None


def test_blocks_are_memory() -> None:
    in_child(promises)


def zeros() -> None:
    handler = Handler()
    for _ in range(20):  # also where a dirty block of that size was just freed
        for size in (ARRAY, MIB):
            dirty = handler.malloc(size)
            view(dirty, size)[:] = 255
            handler.free(dirty, size)
            clean = handler.calloc(size // 8, 8)
            assert not view(clean, size).any()
            view(clean, size)[:] = 1
            handler.free(clean, size)
    pointer = handler.calloc(100, 7)
    assert not view(pointer, 700).any()
    handler.free(pointer, 700)


def test_calloc_is_zero_after_whatever() -> None:
    in_child(zeros)


def the_rest_of_the_last_page() -> None:
    """Equal arrays are equal to their last page: behind the array there are zeros, also in a block that was used before."""
    handler = Handler()
    dirty = handler.malloc(ARRAY + PAGE)
    view(dirty, ARRAY + PAGE)[:] = 255
    handler.free(dirty, ARRAY + PAGE)
    again = handler.malloc(ARRAY + 5)
    assert again == dirty, "this is about a block that is used again"
    assert not view(again, ARRAY + PAGE)[ARRAY + 5 :].any()
    view(again, ARRAY + 5)[:] = 255
    shorter = handler.realloc(again, ARRAY + 2)
    assert not view(shorter, ARRAY + PAGE)[ARRAY + 2 :].any()


def test_behind_an_array_are_zeros() -> None:
    in_child(the_rest_of_the_last_page)


SIZES = (10, ARRAY - 1, ARRAY, ARRAY + 1, 3 * ARRAY, 2 * MIB, 5 * MIB, 100)


def resized() -> None:
    handler = Handler()
    for old in SIZES:
        for new in SIZES:
            pointer = handler.malloc(old)
            fill(pointer, old, old)
            pointer = handler.realloc(pointer, new)
            assert pointer
            kept = min(old, new)
            whole = np.random.default_rng(old).integers(0, 256, old, np.uint8)
            assert (view(pointer, kept) == whole[:kept]).all()
            view(pointer, new)[:] = 7
            handler.free(pointer, new)


def test_resizing_keeps_the_contents() -> None:
    in_child(resized)


def resized_regions() -> None:
    handler = Handler()
    sizes = [(4 * ARRAY, 8 * ARRAY), (4 * ARRAY, 2 * ARRAY), (4 * ARRAY, 100), (4 * ARRAY, 4 * ARRAY + 1)]
    blocks = [handler.malloc(old) for old, _ in sizes]
    for pointer, (old, _) in zip(blocks, sizes, strict=True):
        fill(pointer, old, 3)
    grown_up(len(blocks))
    agent = started()
    for region in range(1, len(blocks) + 1):
        agent.merge(region)
    for pointer, (old, new) in zip(blocks, sizes, strict=True):
        made = handler.realloc(pointer, new)
        whole = np.random.default_rng(3).integers(0, 256, old, np.uint8)
        assert (view(made, min(old, new)) == whole[: min(old, new)]).all()
        if new > old:
            view(made, new)[old:] = 0
        handler.free(made, new)
    assert agent.state().regions == 0
    foreign = ctypes.CDLL(None).malloc
    foreign.restype = ctypes.c_void_p
    pointer = foreign(ctypes.c_size_t(1000))  # made by NumPy's own handler, before ours was set
    fill(pointer, 1000, 4)
    pointer = handler.realloc(pointer, 2 * ARRAY)
    assert pointer % PAGE == 0
    assert holds(pointer, 1000, 4)
    handler.free(pointer, 2 * ARRAY)
    handler.free(foreign(ctypes.c_size_t(10 * MIB)), 10 * MIB)


def test_regions_and_foreign_blocks_are_resized_by_copying() -> None:
    in_child(resized_regions)


# --- growing up --------------------------------------------------------------------------------------------------------------------


def grow_and_merge() -> tuple[dict[str, int], dict[str, int]]:
    handler = Handler()
    agent = started()
    blocks = [handler.malloc(MIB + 100) for _ in range(2)]
    small = handler.malloc(1000)
    for pointer in blocks:
        fill(pointer, MIB + 100, 1)
    grown_up(2)
    said = [agent.merge(region).by_name() for region in (1, 2)]
    assert all(holds(pointer, MIB + 100, 1) for pointer in blocks)
    for pointer in blocks:
        handler.free(pointer, MIB + 100)
    handler.free(small, 1000)
    assert agent.state().regions == 0
    assert not mapped(blocks[0])
    assert not mapped(blocks[1])
    return said[0], said[1]


def test_blocks_that_live_become_regions_and_merge(windows: None) -> None:  # noqa: F811
    assert in_child(grow_and_merge) == ({"unknown": 257}, {"merged": 257})


def young_before_the_agent() -> None:
    handler = Handler()
    pointer = handler.malloc(MIB)
    assert started().state().regions in (0, 1)
    grown_up(1)
    handler.free(pointer, MIB)
    assert started().state().regions == 0


def test_blocks_from_before_the_agent_grow_up_too() -> None:
    in_child(young_before_the_agent)


def temporaries() -> None:
    """None of many short-lived blocks becomes a region, and what is kept of them is small, and goes."""
    handler = Handler()
    agent = started()
    before = resident()
    for turn in range(3000):
        size = ARRAY << turn % 5
        pointer = handler.malloc(size)
        view(pointer, size)[::PAGE] = 1
        handler.free(pointer, size)
    assert resident() - before < 80 * MIB
    many = [handler.malloc(8 * MIB) for _ in range(40)]
    for pointer in many:
        view(pointer, 8 * MIB)[::PAGE] = 1
    for pointer in many:
        handler.free(pointer, 8 * MIB)
    assert resident() - before < 80 * MIB
    wait_until(lambda: resident() - before < 4 * MIB, "the cache to be given back")
    assert agent.state().by_status[0] == 0


def test_temporaries_are_kept_for_a_moment_only() -> None:
    in_child(temporaries)


def threads_at_work() -> None:
    handler = Handler()
    agent = started()
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        mine: dict[int, tuple[int, int]] = {}
        try:
            for turn in range(1500):
                size = chance.choice([200, ARRAY, 3 * ARRAY + 5, MIB])
                act = chance.random()
                if act < 0.5 or not mine:
                    pointer = handler.calloc(size, 1) if act < 0.1 else handler.malloc(size)
                    view(pointer, 8)[:] = view(pointer + size - 8, 8)[:] = turn % 251
                    assert pointer not in mine
                    mine[pointer] = size, turn % 251
                else:
                    pointer = chance.choice(list(mine))
                    old, value = mine.pop(pointer)
                    assert (view(pointer, 8) == value).all()
                    assert (view(pointer + old - 8, 8) == value).all()
                    if act < 0.8:
                        handler.free(pointer, old)
                    else:
                        pointer = handler.realloc(pointer, size)
                        assert (view(pointer, 8) == value).all()
                        view(pointer + size - 8, 8)[:] = value
                        view(pointer, 8)[:] = value
                        mine[pointer] = size, value
                if turn % 500 == 499:
                    threading.Event().wait(1.1)  # some grow up
            for pointer, (old, _) in mine.items():
                handler.free(pointer, old)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        assert forked(lambda: handler.free(handler.malloc(MIB), MIB)) == 0
        threading.Event().wait(0.05)
    for worker in workers:
        worker.join()
    if errors:
        raise errors[0]
    wait_until(lambda: agent.state().regions == 0, "the last block to go")


def test_threads_and_forks() -> None:
    in_child(threads_at_work)


def forks() -> None:
    handler = Handler()
    agent = started()
    young, old = handler.malloc(MIB), handler.malloc(MIB)
    fill(young, MIB, 1)
    fill(old, MIB, 1)
    grown_up(2)
    agent.merge(1)
    agent.merge(2)
    young = handler.malloc(MIB)
    fill(young, MIB, 2)

    def child() -> None:
        assert holds(old, MIB, 1)
        assert holds(young, MIB, 2)
        handler.free(old, MIB)
        assert not mapped(old)
        assert agent.state().regions == 1
        handler.free(young, MIB)
        more = handler.malloc(MIB)
        view(more, MIB)[:] = 9
        agent.start()
        grown_up(2)
        handler.free(more, MIB)

    assert forked(child) == 0
    assert holds(old, MIB, 1)
    assert holds(young, MIB, 2)


def test_a_forked_child_may_free_everything() -> None:
    in_child(forks)


def fork_at_every_moment() -> None:
    """Forks while blocks are being adopted: the child finds each block whole, can free it, and nothing is left over."""
    handler = Handler()
    started()
    blocks = [handler.malloc(ARRAY) for _ in range(300)]
    for pointer in blocks:
        fill(pointer, ARRAY, 5)
    agent = started()

    def child() -> None:
        for pointer in blocks:
            assert holds(pointer, ARRAY, 5)
            handler.free(pointer, ARRAY)
        agent.start()
        wait_until(lambda: agent.state().regions == 0, "nothing to be left")

    count = 0
    while agent.state().regions < 300 or count < 5:
        assert forked(child) == 0
        count += 1
    for pointer in blocks:
        handler.free(pointer, ARRAY)
    assert agent.state().regions == 0


def test_forks_while_blocks_grow_up() -> None:
    in_child(fork_at_every_moment)


def freed_while_adopted() -> None:
    handler = Handler()
    agent = started()
    for _ in range(3):
        blocks = [handler.malloc(ARRAY) for _ in range(200)]
        wait_until(lambda: agent.state().regions > 0, "the first to grow up")
        for pointer in reversed(blocks):
            handler.free(pointer, ARRAY)
        wait_until(lambda: agent.state().regions == 0, "all to end")
        for _ in blocks:
            again = handler.malloc(ARRAY)
            view(again, ARRAY)[:] = 1
            handler.free(again, ARRAY)


def test_blocks_freed_while_they_grow_up() -> None:
    in_child(freed_while_adopted)


def no_mappings_left() -> None:
    """Where no block can be mapped, malloc says so, and what is there stays."""
    import resource

    handler = Handler()
    pointer = handler.malloc(MIB)
    fill(pointer, MIB, 1)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (used + 2 * MIB, resource.RLIM_INFINITY))
    assert handler.malloc(64 * MIB) is None
    assert handler.calloc(64, MIB) is None
    assert handler.realloc(pointer, 64 * MIB) is None
    assert holds(pointer, MIB, 1)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    pointer = handler.realloc(pointer, 64 * MIB)
    assert holds(pointer, MIB, 1)
    handler.free(pointer, 64 * MIB)


def test_no_memory_is_said() -> None:
    in_child(no_mappings_left)
