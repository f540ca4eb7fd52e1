"""Judge the planner: pages become runs and nothing is lost or doubled, and mappings stay within the budget, the dearest pages last."""

from __future__ import annotations

import random
from itertools import pairwise

import numpy as np
import pytest
from tests.conftest import scaled

from pagefold.live import messages
from pagefold.live.messages import PAGE, RUN_PAGES
from pagefold.live.planner import Run, costs_mappings, runs_of, within_budget
from pagefold.live.region import HOLE, SHIFT, Region


def region(pages: int = 1000) -> Region:
    return Region(5, 0x7F0000000000, pages, tracked=False, quiet=False, vpn=16)


def numbers(*values: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(values, np.int64)


def expand(run: Run) -> list[tuple[int, int]]:
    """Return (page, what it shall map) of a run."""
    return [(run.index + at, run.target + at if run.target > 0 else run.target) for at in range(run.pages)]


def some_pages(chance: random.Random, pages: int) -> dict[int, int]:
    """Return what some pages shall map: slots in rows, holes, pages of their own."""
    wanted, at = {}, 0
    while at < pages:
        length = min(chance.choice([1, 1, 2, 5, 70, 200]), pages - at)
        kind = chance.choice(["skip", "slots", "slots", "hole", "private", "mixed"])
        slot = chance.randrange(1, 4) << SHIFT | chance.randrange(1000)
        for step in range(length):
            if kind != "skip":
                mixed = chance.choice([0, HOLE, slot + chance.randrange(4)])
                wanted[at + step] = {"slots": slot + step, "hole": HOLE, "private": 0, "mixed": mixed}[kind]
        at += length
    return wanted


@pytest.mark.parametrize("seed", range(scaled(40)))
def test_runs_are_the_pages_and_as_long_as_can_be(seed: int) -> None:
    wanted = some_pages(random.Random(seed), 600)
    made = runs_of(region(), numbers(*wanted), numbers(*wanted.values()))
    assert [entry for run in made for entry in expand(run)] == sorted(wanted.items())
    assert all(1 <= run.pages <= RUN_PAGES for run in made)
    for before, after in pairwise(made):
        last, first = expand(before)[-1], expand(after)[0]
        follows = first[1] == (last[1] + 1 if last[1] > 0 else last[1]) and (first[1] > 0) == (last[1] > 0)
        assert not (first[0] == last[0] + 1 and follows and before.pages < RUN_PAGES), "two runs should be one"


def test_no_pages_are_no_runs() -> None:
    assert runs_of(region(), numbers(), numbers()) == []


def test_a_slot_after_a_hole_is_no_row() -> None:
    """HOLE is -1 and 0 is private: arithmetic must not make rows of them."""
    made = runs_of(region(), numbers(0, 1, 2, 3), numbers(HOLE, 0, 1 << SHIFT, 0))
    assert [(run.index, run.pages, run.target) for run in made] == [
        (0, 1, HOLE),
        (1, 1, 0),
        (2, 1, 1 << SHIFT),
        (3, 1, 0),
    ]


def test_a_run_does_not_go_over_the_end_of_an_extent() -> None:
    made = runs_of(region(), numbers(0, 1), numbers((1 << SHIFT) + 4095, 2 << SHIFT))
    assert len(made) == 2


def test_a_run_says_itself() -> None:
    assert Run(region(), 3, 2, 7 << SHIFT | 9).record == (5, 0x7F0000000000 + 3 * PAGE, 2, 7, 9, 0)
    assert Run(region(), 3, 2, HOLE).record[3:5] == (0, 0)
    assert Run(region(), 3, 2, 0).record[3:5] == (messages.PRIVATE, 0)


@pytest.mark.parametrize("seed", range(scaled(40)))
def test_costs_are_never_too_small(seed: int) -> None:
    """What runs cost, each for itself, is at least what they add together, in whatever order they come."""
    chance = random.Random(seed)
    here = region(300)
    for at, target in some_pages(chance, 300).items():
        here.wanted[at] = target
    for _ in range(20):
        index = chance.randrange(290)
        run = Run(here, index, chance.randint(1, 10), chance.choice([here.wanted[index - 1] + 1, 9 << SHIFT | 5]))
        if run.target < 1 << SHIFT:
            continue
        before = here.mappings()
        cost = costs_mappings(run)
        for page, target in expand(run):
            here.wanted[page] = target
        assert here.mappings() - before <= cost


def test_mappings_are_counted_as_the_kernel_counts_them() -> None:
    here = region(10)
    assert here.mappings() == 1
    here.wanted[3] = 1 << SHIFT | 5
    assert here.mappings() == 3
    here.wanted[4] = 1 << SHIFT | 6
    assert here.mappings() == 3, "neighbours with neighbouring slots are one"
    here.wanted[5] = 1 << SHIFT | 9
    assert here.mappings() == 4
    here.wanted[9] = HOLE
    assert here.mappings() == 4, "a hole is no mapping of its own"
    here.wanted[0] = 2 << SHIFT
    assert here.mappings() == 5


def test_holes_and_private_pages_cost_nothing() -> None:
    assert costs_mappings(Run(region(), 5, 3, HOLE)) == costs_mappings(Run(region(), 5, 3, 0)) == 0


def test_a_run_at_an_edge_costs_one() -> None:
    assert costs_mappings(Run(region(10), 0, 3, 1 << SHIFT)) == 1
    assert costs_mappings(Run(region(10), 7, 3, 1 << SHIFT)) == 1
    assert costs_mappings(Run(region(10), 0, 10, 1 << SHIFT)) == 0
    assert costs_mappings(Run(region(10), 4, 1, 1 << SHIFT)) == 2


def test_what_is_within_the_budget_is_all_allowed_in_order() -> None:
    here = region()
    made = [Run(here, at, 1, 1 << SHIFT | at * 2) for at in range(2, 100, 2)]
    assert within_budget(made, 2 * len(made)) == (made, [])


def test_the_longest_go_first_and_keep_their_order() -> None:
    here = region()
    lengths = [1, 30, 2, 64, 1, 7]
    made = [Run(here, 1 + 100 * at, length, 1 << SHIFT | 500 * at) for at, length in enumerate(lengths)]
    allowed, beyond = within_budget(made, 7)
    assert [run.pages for run in allowed] == [30, 64, 7], "two mappings each; the seventh is left"
    assert [run.pages for run in beyond] == [1, 2, 1]


def test_without_a_budget_what_costs_nothing_still_goes() -> None:
    here = region()
    hole, single = Run(here, 3, 4, HOLE), Run(here, 50, 9, 1 << SHIFT)
    assert within_budget([single, hole], 0) == ([hole], [single])
