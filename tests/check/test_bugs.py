"""Find every planted bug by the invariant it is said to break, in its own small world; without one the copy is the shipped engine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from pagefold.check.bugs import BUGS, Bug
from pagefold.check.explore import explore
from pagefold.check.hunt import hunt, row, table
from pagefold.check.planted import _with_switches, number_of, planted_engine
from pagefold.check.replay import Replay, stages
from pagefold.check.worlds import SmallWorld
from pagefold.errors import UsageError
from tests.conftest import SLOW

DOCS = Path(__file__).parents[2] / "docs" / "checking.md"
compiled = pytest.mark.skipif(SLOW, reason="thousands of states: compiled only")


hunted = cache(hunt)


@compiled
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_bug_is_found(bug: Bug) -> None:
    result = hunted(bug)
    assert result.violation is not None
    assert result.violation.invariant == bug.invariant
    assert row(bug, result) in DOCS.read_text().splitlines(), "`python -m pagefold.check.hunt` prints the table"
    replay = Replay(bug.world, planted_engine(), number_of(bug.name))
    led = list(stages(replay, result.violation.path))
    assert [stage.how for stage in led] == list(result.violation.path)
    assert (led[-1].broken or replay.ask()[0]) == bug.invariant
    assert not any(stage.broken for stage in led[:-1])


@compiled
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_the_same_world_is_clean_without_it(bug: Bug) -> None:
    """To the distance at which the bug is found, and a little further: what was found is the bug."""
    found = hunted(bug)
    assert found.violation is not None
    clean = explore(bug.world, depth=len(found.violation.path) + 1, states=2 * found.states)
    assert clean.violation is None
    assert clean.states >= found.states // 2


@compiled
def test_the_copy_without_a_bug_is_the_shipped_engine() -> None:
    small = SmallWorld(mms=3, pages=1, budget=2, ignore=("no-leak", "converges"))
    shipped, copy = explore(small), explore(small, engine=planted_engine())
    assert (copy.states, copy.transitions, copy.depth) == (shipped.states, shipped.transitions, shipped.depth)


def test_the_shipped_engine_has_no_switch() -> None:
    from pagefold.core import layout

    assert "bug" not in layout.ctl.names
    assert not any('["bug"]' in path.read_text() for path in Path(layout.__file__).parent.glob("*.py"))


def test_a_statement_that_is_gone_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"chain.py does not hold the statement of .* exactly once"):
        _with_switches("chain.py", "def has_room():\n    return True\n")


def test_there_are_enough_and_each_question_has_one() -> None:
    assert len(BUGS) >= 20
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert {bug.answers for bug in BUGS} == {0, 1, 2, 3, 4, 5}


def test_a_bug_that_is_not_known() -> None:
    with pytest.raises(UsageError, match="bug 'moth' is not known; use one of no-node-check-at-match"):
        number_of("moth")


def test_the_table_begins_with_its_heading() -> None:
    assert "bug" in next(table(()))
