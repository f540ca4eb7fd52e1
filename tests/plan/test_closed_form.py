"""Judge the closed form by the engine: on any pages, what is predicted is what scanning reaches."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import SLOW, scaled
from tests.plan.tables import PAGE, Page, table

from pagefold.engine import Engine
from pagefold.plan import PageTable, Prediction, predict
from pagefold.plan.replay import build_machine, replay

COMPARED = (
    *("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "ksm_zero_pages"),
    *("stable_node_chains", "stable_node_dups", "general_profit"),
)
# Zeroes, halves that differ in one place only, and numbers whose top bits are set.
CONTENTS = (0, 1, 1 << 64, 2**128 - 1, 2**127 | 7, 2**63)
THOROUGH = dict(deadline=None, derandomize=True, database=None)
Settings = dict[str, int]

knobs = st.fixed_dictionaries(
    {
        "merge_across_nodes": st.sampled_from((0, 1)),
        "use_zero_pages": st.sampled_from((0, 1)),
        "max_page_sharing": st.sampled_from((2, 3, 4, 5, 6, 256)),
    }
)


@st.composite
def tables(draw: st.DrawFn, *, volatile: bool = True, most: int = 16) -> PageTable:
    """Draw sources with frames of their own and frames that fork left to several, in any order of scanning."""
    count = draw(st.integers(1, 5))
    contents = CONTENTS[: draw(st.integers(1, len(CONTENTS)))]
    nodes = draw(st.integers(1, 3))
    frames = draw(
        st.lists(
            st.tuples(
                st.sampled_from(contents),
                st.integers(0, nodes - 1),
                st.dictionaries(st.integers(0, count - 1), st.integers(0, 30), min_size=1),  # source -> place in it
                st.booleans() if volatile else st.just(False),
                st.booleans(),
            ),
            max_size=most,
        )
    )
    sources: list[list[tuple[int, Page]]] = [[] for _ in range(count)]
    for frame, (content, node, users, one, other) in enumerate(frames):
        page = Page(content, frame, node, exclusive=len(users) == 1, volatile=one and other)
        for user, place in users.items():
            sources[user].append((place, page))
    return table(*([page for _, page in sorted(pages)] for pages in sources))


def figures(answer: object) -> dict[str, int]:
    return {name: getattr(answer, name) for name in COMPARED}


@given(tables(), knobs)
@settings(max_examples=scaled(1000), **THOROUGH)
def test_the_prediction_is_what_the_engine_reaches(pages: PageTable, wanted: Settings) -> None:
    assert figures(predict(pages, **wanted)) == figures(replay(pages, **wanted))


@given(tables(volatile=False), knobs)
@settings(max_examples=scaled(400), **THOROUGH)
def test_saved_bytes_are_the_frames_the_engine_frees(pages: PageTable, wanted: Settings) -> None:
    machine, _ = build_machine(pages)
    engine = Engine(machine, smart_scan=0, run=1, **wanted)
    before = sum(machine.free_frames(node) for node in range(machine.nodes))
    engine.scan_full(len(pages) + 3)
    engine.validate()
    after = sum(machine.free_frames(node) for node in range(machine.nodes))
    assert predict(pages, **wanted).saved_bytes == (after - before) * PAGE


@given(tables(most=30), knobs)
@settings(max_examples=scaled(400), **THOROUGH)
def test_the_parts_are_the_whole(pages: PageTable, wanted: Settings) -> None:
    assert_parts(predict(pages, **wanted), len(pages))


def assert_parts(whole: Prediction, pages: int) -> None:
    """Check that every page is in one state, and that the processes add up to the totals."""

    def total(name: str) -> int:
        return sum(getattr(one, name) for one in whole.processes)

    assert total("pages") == pages
    assert total("ksm_merging_pages") == whole.pages_shared + whole.pages_sharing
    for name in ("pages_unshared", "pages_volatile", "ksm_zero_pages", "split_zero_pages"):
        assert total(name) == getattr(whole, name)
    assert total("ksm_rmap_items") == pages - whole.ksm_zero_pages - whole.split_zero_pages
    for one in (*whole.processes, whole):
        merged = one.ksm_merging_pages if one is not whole else whole.pages_shared + whole.pages_sharing
        parts = (merged, one.ksm_zero_pages, one.split_zero_pages, one.pages_unshared, one.pages_volatile)
        assert min(parts) >= 0
        assert sum(parts) == (one.pages if one is not whole else pages)
    assert total("ksm_process_profit") == whole.general_profit + whole.pages_shared * PAGE
    chained = whole.stable_node_chains
    assert whole.metadata_bytes == 64 * (total("ksm_rmap_items") + whole.pages_shared + chained)
    assert 2 * chained <= whole.stable_node_dups <= whole.pages_shared
    assert 0 <= whole.saved_bytes <= (whole.pages_sharing + whole.ksm_zero_pages + whole.split_zero_pages) * PAGE


@given(tables(), knobs)
@settings(max_examples=scaled(200), **THOROUGH)
def test_the_settings_are_repeated_in_the_answer(pages: PageTable, wanted: Settings) -> None:
    answer = predict(pages, **wanted)
    assert {name: getattr(answer, name) for name in wanted} == wanted
    assert [one.label for one in answer.processes] == [one.label for one in pages.sources]


def big_table(seed: int, pages: int) -> PageTable:
    """Make a table of many equal pages, half of them forked."""
    dice = random.Random(seed)
    users = dice.randrange(2, 7)
    sources: list[list[tuple[float, Page]]] = [[] for _ in range(users)]
    for frame in range(pages):
        forked = dice.random() < 0.5
        page = Page(dice.choice(CONTENTS), frame, dice.randrange(2), not forked, not forked and dice.random() < 0.05)
        for user in dice.sample(range(users), dice.randrange(2, users + 1) if forked else 1):
            sources[user].append((dice.random(), page))
    return table(*([page for _, page in sorted(one)] for one in sources))


@pytest.mark.parametrize("seed", range(scaled(20)))
def test_bigger_tables(seed: int) -> None:
    pages = big_table(seed, 20 if SLOW else 300)
    for limit in (2, 3, 7, 256):
        for across in (1, 0):
            wanted = dict(merge_across_nodes=across, use_zero_pages=seed % 2, max_page_sharing=limit)
            answer = predict(pages, **wanted)
            assert figures(answer) == figures(replay(pages, **wanted)), f"replay: big_table({seed}, …), {wanted}"
            assert_parts(answer, len(pages))
