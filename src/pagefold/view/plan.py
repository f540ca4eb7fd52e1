"""Own how a plan is shown: tables for people, JSON for programs; both from the same fields."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, fields

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pagefold.plan.prediction import Prediction, ProcessPrediction
from pagefold.plan.report import Report
from pagefold.view.fields import FIELDS, show, size
from pagefold.view.line import one_line

_TOTALS = tuple(field.name for field in fields(Prediction) if field.name in FIELDS)
_COLUMNS = {  # field: short title
    "pages": "pages",
    "ksm_merging_pages": "merging",
    "pages_unshared": "unshared",
    "pages_volatile": "volatile",
    "ksm_zero_pages": "zero",
    "ksm_process_profit": "profit",
}
_PIPE_WIDTH = 120  # columns, where there is no terminal to ask


def print_json(report: Report) -> None:
    """Print the report as one JSON object; figures have the kernel's counter names."""
    answer = {
        "format": 1,
        "page_size": report.page_size,
        "smart_scan": 0,
        "interval": report.interval,
        "advised_only": report.advised_only,
        "max_page_sharing": report.max_page_sharing,
        "predictions": [asdict(one) for one in report.predictions],
        "sources": [
            {
                "label": pages.label,
                "pid": pages.pid,
                "pages": len(pages),
                "already_merged": int(pages.ksm.sum()),
                "zero_mapped": pages.zero_mapped,
                "swapped": pages.swapped,
                "unreadable": pages.unreadable,
                "vanished": pages.vanished,
                "incompatible": pages.incompatible,
                "unadvised": pages.unadvised,
                "missing": pages.missing,
            }
            for pages in report.sources
        ],
        "skipped": [asdict(one) for one in report.skipped],
        "notes": list(report.notes),
    }
    print(json.dumps(answer, indent=2))


def print_report(report: Report, console: Console | None = None) -> None:
    """Print what merging would do in total and per process, the effect of use_zero_pages, and the notes."""
    console = console or Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    across, apart = report.prediction(1, 0), report.prediction(0, 0)
    console.print(_totals(across, apart))
    console.print(_per_process(across))
    console.print(f"\nMerging would save [bold]{size(across.saved_bytes)}[/bold] ({size(apart.saved_bytes)} if pages of different "
                  f"nodes stay apart), and cost {size(across.metadata_bytes)} of kernel memory.")  # fmt: skip
    zero = report.prediction(1, 1)
    if zero.ksm_zero_pages:
        console.print(
            f"Pages full of zeroes: {zero.ksm_zero_pages:,}; with use_zero_pages 1 merging would save {size(zero.saved_bytes)} in all."
        )
    if across.split_zero_pages:
        console.print(
            f"Pages full of zeroes in huge pages that merging would split: {across.split_zero_pages:,}; "
            "the kernel frees them then, and counts them nowhere."
        )
    for note in report.notes:
        console.print(f"Note: {note}.", highlight=False)


def _totals(across: Prediction, apart: Prediction) -> Table:
    table = Table(title="Once settled (smart_scan 0, use_zero_pages 0)", title_justify="left")
    table.add_column("counter")
    table.add_column("merge_across_nodes 1", justify="right")
    table.add_column("0", justify="right")
    table.add_column("meaning", style="dim", overflow="fold")
    for name in _TOTALS:
        figures = (show(name, getattr(one, name)) for one in (across, apart))
        table.add_row(name, *figures, FIELDS[name].help)
    return table


def _per_process(prediction: Prediction) -> Table:
    caption = "profit is the kernel's own figure: it counts every merging page, so the sum is more than what is saved"
    table = Table(
        title="Per process (merge_across_nodes 1)", title_justify="left", caption=caption, caption_justify="left"
    )
    table.add_column("process")
    for title in _COLUMNS.values():
        table.add_column(title, justify="right")
    for one in prediction.processes:
        # Text, for a process may be named like a markup tag of rich.
        table.add_row(Text(one_line(one.label)), *(show(name, getattr(one, name)) for name in _COLUMNS))
    if len(prediction.processes) > 1:
        table.add_section()
        table.add_row("in total", *(show(name, _sum(prediction.processes, name)) for name in _COLUMNS))
    return table


def _sum(processes: tuple[ProcessPrediction, ...], name: str) -> int:
    return sum(int(getattr(one, name)) for one in processes)
