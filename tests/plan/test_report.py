"""Judge the report: four predictions from one reading, and the notes that limit them."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
from tests.plan.tables import Page, source

from pagefold.plan import PageTable, predict
from pagefold.plan.reading import Skipped
from pagefold.plan.report import make_report

APART = "the node of no page is known: all count as node 0, and both settings of merge_across_nodes are alike"
ONE_NODE = "all pages are on one NUMA node: both settings of merge_across_nodes are alike"


def test_four_predictions_of_one_reading() -> None:
    sources = [source([Page(0, 1, 0), Page(5, 2, 0), Page(5, 3, 1)]), source([Page(0, 4, 1), Page(5, 5, 1)], 7)]
    skipped = [Skipped("9", "PID 9: no such process")]
    report = make_report(sources, skipped, 3, interval=1.0)
    assert (report.page_size, report.max_page_sharing, report.skipped) == (4096, 3, tuple(skipped))
    assert report.sources == tuple(sources)
    for across, zero in product((0, 1), repeat=2):
        expected = predict(PageTable.of(sources), merge_across_nodes=across, use_zero_pages=zero, max_page_sharing=3)
        assert report.prediction(across, zero) == expected
    assert len({one.pages_shared for one in report.predictions}) > 1
    assert report.notes == ()


def notes(*pages: Page, pid: int | None = 100, **changes: object) -> tuple[str, ...]:
    return make_report([replace(source(pages, pid), **changes)], [], 256, interval=1.0).notes


def test_nothing_to_look_at() -> None:
    assert notes() == ("there is no page that KSM would look at here",)


def test_what_is_not_known_is_said() -> None:
    assert notes(Page(1, 1)) == (ONE_NODE,)
    assert notes(Page(1, 1, -1)) == (APART,)
    assert notes(Page(1, 0, -1), pid=None) == (APART,)
    hidden, _ = notes(Page(1, -1))
    assert "CAP_SYS_ADMIN" in hidden
    merged, _ = notes(Page(1, 1, ksm=True), Page(1, 1, ksm=True))
    assert merged == "2 of these pages are merged already; the figures are against no merging at all"
    huge, _ = notes(Page(1, 1), huge=np.ones(1, np.bool_))
    assert huge == "1 pages are in transparent huge pages, which merging would split"


def test_everything_left_out_is_counted() -> None:
    counts = ("zero_mapped", "swapped", "unreadable", "vanished", "unadvised", "incompatible", "missing")
    for number, name in enumerate(counts, 1000):
        _, note = notes(Page(1, 1), **{name: number})
        assert note.startswith(f"left out: {number:,} pages ")
    everything = notes(Page(1, 1), **dict.fromkeys(counts, 1))
    assert len(everything) == len(set(everything)) == 1 + len(counts)


def test_a_single_look_is_said() -> None:
    (note,) = make_report([source([Page(1, 1)])], [], 256).notes[-1:]
    assert note.startswith("processes were looked at once")


def test_frames_shared_with_processes_outside_the_plan_are_not_saved() -> None:
    inside = source([Page(5, 1), Page(5, 2), Page(5, 3)])
    inside.exclusive[:2] = False  # two of the three frames are mapped by somebody who is not planned
    report = make_report([inside], [], 256, interval=1.0)
    assert report.prediction(1, 0).pages_sharing == 2
    assert report.prediction(1, 0).saved_bytes == 0
    assert "2 pages share their frame with processes that are not planned here" in report.notes[0]
