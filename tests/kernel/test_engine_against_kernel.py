"""Judge the engine's rules by the kernel: the same writes to the same pages, the same counters once both have settled."""

from __future__ import annotations

import ctypes
import mmap
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from pagefold import Engine, Machine
from pagefold.machine import Area, Process
from pagefold.scenario.kernel_ksm import KernelKsm

WHY_NOT = KernelKsm.why_not()
pytestmark = [pytest.mark.kernel, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
PAGE = mmap.PAGESIZE
MADV_MERGEABLE, MADV_UNMERGEABLE, MADV_NOHUGEPAGE = 12, 13, 15
COMPARED = (
    *("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "ksm_zero_pages"),
    *("stable_node_chains", "stable_node_dups", "general_profit"),
)
NEVER = 10**6  # ms: chains are pruned by what searches meet only, so that the hour does not matter


class Both:
    """One area of pages, in this process for the kernel and in a simulated one for the engine."""

    def __init__(self, ksm: KernelKsm, pages: int, **knobs: int) -> None:
        knobs = {"smart_scan": 0, "stable_node_chains_prune_millisecs": NEVER, **knobs}
        for knob, value in {"sleep_millisecs": 0, "pages_to_scan": 100_000, **knobs}.items():
            ksm.set(knob, value)
        self.ksm = ksm
        self.block = mmap.mmap(-1, pages * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.pages = np.frombuffer(self.block, np.uint8).reshape(pages, PAGE)
        self.advise(MADV_NOHUGEPAGE)
        self.engine = Engine(Machine(frames=4 * pages), run=1, **knobs)
        self.process: Process = self.engine.machine.spawn()
        self.area: Area = self.process.mmap(pages)
        self.advise(MADV_MERGEABLE)
        self.process.madvise(self.area, "MERGEABLE")

    def advise(self, advice: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        start, length = ctypes.c_void_p(self.pages.ctypes.data), ctypes.c_size_t(self.pages.nbytes)
        assert libc.madvise(start, length, advice) == 0, ctypes.get_errno()

    def write(self, index: int, content: int) -> None:
        self.pages[index] = np.random.default_rng(content).integers(0, 256, PAGE, np.uint8) if content else 0
        self.pages[index, 0] = content  # memcmp orders pages as the engine orders contents: trees have the same shape
        self.process.write(self.area, index, content)

    def settle(self) -> dict[str, int]:
        """Let both settle; return the counters, which must be equal. The kernel scans only meanwhile."""
        self.ksm.set("run", 1)
        reached = self.ksm.settle(COMPARED)
        self.ksm.set("run", 0)
        self.engine.scan_full(2 * len(self.pages))
        self.engine.validate()
        assert {name: self.engine.get(name) for name in COMPARED} == reached
        return reached


@contextmanager
def both(pages: int, **knobs: int) -> Iterator[Both]:
    with KernelKsm() as ksm:
        pair = Both(ksm, pages, **knobs)
        try:
            yield pair
        finally:
            pair.advise(MADV_UNMERGEABLE)


@pytest.mark.parametrize("loser", [(0, 1), (2, 3)])
def test_a_chain_left_with_one_dup_collapses_at_any_walk(loser: tuple[int, int]) -> None:
    with both(6, max_page_sharing=2) as pair:
        for index in range(4):
            pair.write(index, 1)
        assert pair.settle()["stable_node_dups"] == 2
        for index in loser:
            pair.write(index, 10 + index)
        settled = pair.settle()
    assert (settled["stable_node_chains"], settled["stable_node_dups"]) == (0, 0)


@pytest.mark.parametrize("limit", [2, 3, 256])
@pytest.mark.parametrize("zero", [0, 1])
def test_random_writes_between_quiet_times(limit: int, zero: int) -> None:
    """20 rounds of up to six writes to 14 pages; the same counters after each round."""
    generator = random.Random(1000 * limit + zero)
    merged = 0
    with both(14, max_page_sharing=limit, use_zero_pages=zero) as pair:
        for _ in range(20):
            for _ in range(generator.randint(1, 6)):
                pair.write(generator.randrange(14), generator.choice((0, 1, 1, 2, 3)))
            merged += pair.settle()["pages_sharing"]
    assert merged
