"""Judge the five stories: each ends in the state that is its answer (spec section 7)."""

from __future__ import annotations

import pytest

from pagefold.engine import Engine, StableNode
from pagefold.errors import UsageError
from pagefold.scenario import five_questions
from pagefold.scenario.five_questions import STORIES

SEVEN = 7


def play(number: int) -> tuple[Engine, list[list[StableNode]]]:
    """Play a story to its end, judging every step; return the engine and the stable nodes after each step."""
    engine = five_questions.stage()
    seen = []
    for text in five_questions.find(number).tell(engine):
        assert text.endswith(".")
        engine.validate()
        seen.append(list(engine.stable_nodes()))
    return engine, seen


def places(nodes: list[StableNode]) -> list[tuple[str, int, int, list[int]]]:
    """Return (place, tree, node of the frame, processes that share it) of stable nodes."""
    return [(one.place, one.tree, one.frame_node, [mm for mm, _ in one.sharers]) for one in nodes]


def homes(engine: Engine) -> list[list[int]]:
    """Return, per process, the nodes where its pages are."""
    return [[where.node for _, where in process.pages()] for process in engine.machine.processes]


def test_question_1_nothing_is_merged_onto_a_misplaced_page() -> None:
    engine, seen = play(1)
    p1, p2, p3 = (process.mm for process in engine.machine.processes)
    assert places(seen[0]) == [("tree", 0, 0, [p2, p3])]
    assert places(seen[1]) == [("tree", 0, 1, [p2, p3])]
    assert [(place, node, sharers) for place, _, node, sharers in places(seen[-1])] == [("migrating", 1, [p2, p3])]
    (group,) = engine.sharing_groups().values()
    assert [process.mm for process, _ in group] == [p2, p3]
    assert homes(engine) == [[0], [1], [1]]
    first = engine.machine.processes[0]
    assert first.ksm_stat()["ksm_merging_pages"] == 0
    ((vpn, _),) = first.pages()
    assert p1 and engine._content(dict(first.pages())[vpn].frame) == SEVEN


def test_question_2_a_mapping_brings_the_node_home() -> None:
    engine, seen = play(2)
    _, p2, p3 = (process.mm for process in engine.machine.processes)
    assert [one.place for one in seen[-2]] == ["migrating"]
    assert places(seen[-1]) == [("tree", 1, 1, [p2, p3])]
    assert seen[-1][0].frame == seen[-2][0].frame


def test_question_3_a_stale_node_is_pruned_by_the_next_full_scan() -> None:
    engine, seen = play(3)
    everybody = [process.mm for process in engine.machine.processes]
    assert [one.content for one in seen[-2] if one.place == "migrating"] == [None]
    assert places(seen[-1]) == [("tree", 1, 1, everybody)]
    assert engine.counters().pages_shared == 1
    assert engine.counters().pages_sharing == 3
    assert homes(engine) == [[1]] * 4


def test_question_4_the_unstable_tree_needs_no_repair() -> None:
    engine, seen = play(4)
    p1, p2, p3 = (process.mm for process in engine.machine.processes)
    assert seen[0] == seen[1] == []
    assert places(seen[-1]) == [("tree", 1, 1, [p1, p3])]
    assert [(one.tree, one.mm, one.frame_node) for one in engine.unstable_pages()] == [(0, p2, 0)]
    assert homes(engine) == [[1], [0], [1]]


def test_question_5_the_displaced_node_is_the_one_that_waits() -> None:
    engine, seen = play(5)
    p1, p2, p3, p4 = (process.mm for process in engine.machine.processes)
    assert [(tree, node) for _, tree, node, _ in places(seen[1])] == [(0, 1), (1, 0)]
    took, waits = places(seen[2])
    assert took == ("tree", 1, 1, [p1, p2])
    assert (waits[0], waits[2:]) == ("migrating", (0, [p3, p4]))
    assert places(seen[-1]) == [("tree", 0, 0, [p3, p4]), ("tree", 1, 1, [p1, p2])]


@pytest.mark.parametrize("number", range(1, 6))
def test_stories_play_alike_every_time(number: int) -> None:
    assert play(number)[1] == play(number)[1]


def test_every_story_has_a_question_and_one_answer() -> None:
    assert len(STORIES) == 5
    for story in STORIES:
        assert story.question.endswith("?") and story.answer.endswith(".")
        assert "\n" not in story.question + story.answer


@pytest.mark.parametrize("number", [0, 6, -1, 10**9])
def test_there_are_five_questions(number: int) -> None:
    with pytest.raises(UsageError, match=f"^there is no question {number}; use 1 to 5$"):
        five_questions.find(number)
