"""Judge the one table of fields: it knows every figure, and shows it well."""

from __future__ import annotations

import io
from dataclasses import fields

import pytest
from rich.console import Console
from tests.plan.tables import Page, source

from pagefold.engine import Counters
from pagefold.plan.prediction import Prediction, ProcessPrediction
from pagefold.plan.report import make_report
from pagefold.view.fields import FIELDS, show, size
from pagefold.view.line import one_line
from pagefold.view.live import COLUMNS, TOTALS
from pagefold.view.plan import print_report

SETTINGS = {"merge_across_nodes", "use_zero_pages", "max_page_sharing"}
NAMES = {"label", "pid", "processes"}
FIGURES = (
    {field.name for kind in (Prediction, ProcessPrediction, Counters) for field in fields(kind)} - SETTINGS - NAMES
) | {*COLUMNS, *TOTALS}


@pytest.mark.parametrize("name", sorted(FIGURES))
def test_every_figure_has_a_meaning_and_a_unit(name: str) -> None:
    field = FIELDS[name]
    assert field.name == name
    assert field.unit in ("pages", "bytes", "count", "seconds")
    assert len(field.help) > 10
    assert "\n" not in field.help and not field.help.endswith(".")


def test_no_field_is_left_over() -> None:
    assert set(FIELDS) == FIGURES


def test_helps_differ() -> None:
    assert len({field.help for field in FIELDS.values()}) == len(FIELDS)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (-64, "-64 B"),
        (4096, "4,096 B"),
        (10239, "10,239 B"),
        (10240, "10.0 KiB"),
        (-10240, "-10.0 KiB"),
        (1023 * 1024, "1,023.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (2**20, "1.0 MiB"),
        (-(2**20), "-1.0 MiB"),
        (2**30 - 1, "1.0 GiB"),
        (5 * 2**30 + 2**29, "5.5 GiB"),
        (2**40, "1.0 TiB"),
        (2**50, "1,024.0 TiB"),
        (2**62, "4,194,304.0 TiB"),
    ],
)
def test_size(value: int, text: str) -> None:
    assert size(value) == text


def test_show_uses_the_unit() -> None:
    assert show("saved_bytes", 2**20) == "1.0 MiB"
    assert show("pages_shared", 2**20) == "1,048,576"
    assert show("stable_node_chains", -1) == "-1"
    assert show("uptime_seconds", 1234.56) == "1,234.6 s"
    with pytest.raises(KeyError):
        show("pages_imagined", 1)


@pytest.mark.parametrize(
    ("text", "line"),
    [("", ""), ("größe 大", "größe 大"), ("a\nb\r\tc", "a?b??c"), ("\x1b[31m", "?[31m"), ("\udcff\u2028", "??")],
)
def test_one_line(text: str, line: str) -> None:
    assert one_line(text) == line


def test_the_report_shows_every_figure_of_a_prediction() -> None:
    report = make_report([source([Page(5, 1), Page(5, 2, 1), Page(0, 3), Page(9, 4)])], [], 256, interval=1.0)
    paper = io.StringIO()
    print_report(report, Console(file=paper, width=160))
    text = paper.getvalue()
    for field in fields(Prediction):
        assert (field.name in text) == (field.name in FIELDS or field.name in SETTINGS)
    (row,) = (line.split() for line in text.splitlines() if "worker [100]" in line)
    (head,) = (line.split() for line in text.splitlines() if " process " in line and " pages " in line)
    told = dict(zip(head[3::2], row[4::2], strict=False))  # every second word is a line between columns
    assert told == {"pages": "4", "merging": "2", "unshared": "2", "volatile": "0", "zero": "0", "profit": "7,936"}
    assert "in total" not in text  # of one process there is no sum
    assert (
        "Merging would save 4,096 B (0 B if pages of different nodes stay apart), and cost 320 B of kernel memory."
        in text
    )
