"""Make paths again: what a violation printed leads to the same state, and what cannot be a path is refused in one line."""

from __future__ import annotations

import pytest

from pagefold.check.explore import explore
from pagefold.check.replay import Replay, decode, encode, stages
from pagefold.check.worlds import SmallWorld, parse_knobs
from pagefold.core import invariants
from pagefold.errors import UsageError
from tests.conftest import SLOW

STEP, P1_EXITS = 2, 1 << 12 | 1


def test_a_path_is_one_word() -> None:
    path = (2, 0xE07001072, 2**64 - 1)
    assert decode(encode(path)) == path


@pytest.mark.parametrize("word", ["", "x", "2..2", "-1", "1" + "0" * 16])
def test_what_is_not_a_path(word: str) -> None:
    with pytest.raises(UsageError, match="is not a path; use the line that a violation printed"):
        decode(word)


def test_a_path_in_words() -> None:
    replay = Replay(SmallWorld(contents=1, inside=0, events=("exit",)))
    words = [stage.words for stage in stages(replay, (STEP, STEP, STEP, P1_EXITS, STEP))]
    assert words == ["scan: p1 page 0", "scan: p2 page 0", "scan: the full scan ends", "p1 exits", "scan: p2 page 0"]
    assert [process.alive for process in replay.engine().machine.processes] == [False, True]
    assert tuple(int(one) for one in invariants.check(replay.bench.world)) == (0, 0)


@pytest.mark.parametrize(("how", "said"), [(0, "is not one"), (99 << 12 | 1, "a move that this world does not know")])
def test_a_step_that_is_none(how: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Replay(SmallWorld()).go(how)


def test_events_inside_a_step_say_where() -> None:
    small = SmallWorld(contents=2, inside=1, events=("write",))
    writes_other = 2  # the table's second move: p1 writes content 2 to page 0
    replay = Replay(small)
    stage = replay.go(2 | 1 << 4 | writes_other << 12)
    assert stage.words == "scan: p1 page 0; at page-chosen: p1 writes content 2 to page 0"
    assert stage.broken == ""


@pytest.mark.skipif(SLOW, reason="thousands of states: compiled only")
def test_a_violation_is_there_again_at_the_end_of_its_path() -> None:
    small = SmallWorld(rules="mainline", mms=3, budget=4, ignore=("no-leak",))
    violation = explore(small).violation
    assert violation is not None
    replay = Replay(small)
    assert [stage.broken for stage in stages(replay, violation.path)] == [""] * len(violation.path)
    assert replay.ask() == (violation.invariant, violation.where)
    assert replay.ask()[0] == "converges", "asking leaves the state as it is"
    assert tuple(int(one) for one in invariants.check(replay.bench.world)) == (0, 0)


def test_knobs_of_a_world() -> None:
    assert parse_knobs(["max_page_sharing=3", "use_zero_pages=1"], "mainline") == (
        ("max_page_sharing", 3),
        ("use_zero_pages", 1),
    )
    assert int(Replay(SmallWorld(knobs=(("max_page_sharing", 3),))).bench.world.ctl[0]["max_page_sharing"]) == 3


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("run", "--knob 'run' is not NAME=VALUE"),
        ("run=1", "--knob run means nothing in a small world"),
        ("speed=1", "speed"),
    ],
)
def test_knobs_that_cannot_be(word: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse_knobs([word], "mainline")
