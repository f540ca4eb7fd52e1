"""Explore small worlds: exact counts, the same for any number of workers, and what the rules themselves break."""

from __future__ import annotations

import pytest

from pagefold.check.explore import Progress, Result, explore
from pagefold.check.replay import Replay, stages
from pagefold.check.worlds import SmallWorld
from pagefold.errors import UsageError
from tests.conftest import SLOW

compiled = pytest.mark.skipif(SLOW, reason="thousands of states: compiled only")
OTHERS = ("migrate", "unmap", "pin", "offline", "knob", "advise", "swap", "lock")
TINY = SmallWorld(mms=2, contents=1, inside=1, budget=1, events=("exit",), ignore=("no-leak", "converges"))


def counts(result: Result) -> tuple[int, int, int, bool]:
    """Return (states, transitions, depth, exhausted) of a search that found nothing broken."""
    assert result.violation is None
    return result.states, result.transitions, result.depth, result.exhausted


def test_a_tiny_world_is_exhausted_compiled_or_not() -> None:
    assert counts(explore(TINY)) == (27, 85, 7, True)


@compiled
@pytest.mark.parametrize(
    ("small", "expected"),
    [
        (SmallWorld(rules="classic", nodes=3, contents=1, events=("migrate",)), (279, 13275, 8, True)),
        (SmallWorld(rules="mainline", mms=3, budget=2, ignore=("no-leak", "converges")), (2861, 23615, 21, True)),
        (SmallWorld(rules="pagefold", mms=3, budget=3), (24199, 350263, 26, True)),
        (
            SmallWorld(rules="pagefold", contents=1, budget=3, events=OTHERS),
            (15777, 468862, 19, True),
        ),
    ],
    ids=["three-nodes", "mainline", "pagefold", "every-event"],
)  # fmt: skip
def test_counts_are_exact(small: SmallWorld, expected: tuple[int, int, int, bool]) -> None:
    assert counts(explore(small)) == expected


@compiled
def test_counts_do_not_depend_on_the_workers() -> None:
    small = SmallWorld(rules="pagefold", mms=3, budget=2)
    assert counts(explore(small, workers=3)) == counts(explore(small, workers=1))


@compiled
def test_a_violation_does_not_depend_on_the_workers() -> None:
    small = SmallWorld(rules="mainline")
    one, three = explore(small, workers=1), explore(small, workers=3)
    assert one.violation == three.violation
    assert one.violation is not None


@compiled
@pytest.mark.parametrize("rules", ["classic", "mainline"])
def test_the_rules_leak_a_node_that_only_forked_pages_kept(rules: str) -> None:
    """Spec 9 `no-leak` is broken by the rules themselves (docs/checking.md); the pagefold rules mend it."""
    small = SmallWorld(rules=rules, contents=1, inside=0, events=("fork", "exit"), ignore=("converges",))
    result = explore(small)
    assert result.violation is not None
    assert result.violation.invariant == "no-leak"
    words = [stage.words for stage in stages(Replay(small), result.violation.path)]
    assert [word for word in words if "fork" in word]
    mended = SmallWorld(rules="pagefold", contents=1, inside=0, events=("fork", "exit"))
    assert explore(mended).exhausted


@compiled
def test_the_mainline_rules_leave_a_lone_page_that_a_child_maps() -> None:
    small = SmallWorld(rules="mainline", mms=3, budget=4, ignore=("no-leak",))
    result = explore(small)
    assert result.violation is not None
    assert result.violation.invariant == "converges"
    assert explore(SmallWorld(rules="pagefold", mms=3, budget=3)).violation is None


@compiled
def test_bounds_are_said() -> None:
    small = SmallWorld(rules="pagefold")
    by_depth = explore(small, depth=3)
    assert (by_depth.exhausted, by_depth.depth) == (False, 3)
    by_states = explore(small, states=100)
    assert not by_states.exhausted
    assert by_states.states >= 100


def test_progress_is_shown() -> None:
    shown: list[Progress] = []
    explore(TINY, show=shown.append)
    assert shown[-1].states > 1
    assert [one.states for one in shown] == sorted(one.states for one in shown)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rules": "modern"}, "rules 'modern' are not known"),
        ({"nodes": 0}, "nodes 0 is not possible; use 1 to 4"),
        ({"inside": 4}, "inside 4 is not possible; use 0 to 3"),
        ({"events": ("quake",)}, "events 'quake' are not known; use some of migrate,"),
        ({"ignore": ("data",)}, "'data' cannot be ignored; use some of no-leak,converges"),
        ({"frames": 1, "mms": 3}, "1 frames on each node do not hold all pages at first; use 2 or more"),
        ({"rules": "classic", "knobs": (("max_page_sharing", 3),)}, "the classic rules have no such knob"),
    ],
)
def test_worlds_that_cannot_be(wrong: dict[str, object], said: str) -> None:
    with pytest.raises((UsageError, OSError)) as caught:
        SmallWorld(**wrong)  # type: ignore[arg-type]
    assert said in str(caught.value)
