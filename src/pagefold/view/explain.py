"""Own how an explanation is shown: a ranked list in words, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from pagefold.plan.diagnosis import Severity
from pagefold.plan.explanation import AreaShare, Explanation, Row
from pagefold.plan.reasons import Reason
from pagefold.view.doctor import finding_dicts, finding_lines
from pagefold.view.fields import size
from pagefold.view.line import one_line

_MOST_AREAS = 3  # JSON has all


def print_explanation_json(answer: Explanation) -> None:
    """Print one JSON object; sizes are in pages and in bytes."""
    told = {
        "format": 1,
        "page_size": answer.page_size,
        "rss_pages": answer.rss,
        "rss_bytes": answer.rss * answer.page_size,
        "looks": answer.looks,
        "interval": answer.interval,
        "processes": [{"label": label, "pid": pid, "rss_pages": rss} for label, pid, rss in answer.processes],
        "machine": finding_dicts(answer.findings),
        "reasons": [_dict(row, answer.page_size) for row in answer.rows],
        "beside_rss": [_dict(row, answer.page_size) for row in answer.beside],
        "skipped": [asdict(one) for one in answer.skipped],
        "notes": list(answer.notes),
    }
    print(json.dumps(told, indent=2))


def _dict(row: Row, page_size: int) -> dict[str, Any]:
    told = {
        "reason": row.reason.value,
        "pages": row.pages,
        "bytes": row.pages * page_size,
        "words": row.text,
        "remedy": row.remedy,
        "frees_bytes": row.frees * page_size,
        "huge_pages": row.huge,
        "locked_pages": row.locked,
        "areas": [asdict(area) for area in row.areas],
        **row.details,
    }
    if row.would:
        told["if_advised"] = [_dict(part, page_size) for part in row.would]
    return told


def print_explanation(answer: Explanation) -> None:
    """Print the machine's findings, then the reasons by size, each with its areas and remedy; commands stay on one line.

    Of the findings, notes are left to JSON and to `pagefold doctor`.
    """
    for line in _lines(answer):
        print(one_line(line))


def _lines(answer: Explanation) -> Iterator[str]:
    yield from finding_lines([one for one in answer.findings if one.severity < Severity.NOTE])
    names = ", ".join(label for label, _, _ in answer.processes)
    yield f"Of {size(answer.rss * answer.page_size)} ({answer.rss:,} pages) resident in {names}:"
    for row in answer.rows:
        yield f"{_much(row, answer)} {row.text}{_details(row, answer)}."
        yield from (
            f"    of these, if they were advised, {_much(part, answer)} {part.text}" + _details(part, answer)
            for part in row.would
        )
        if row.huge or row.locked:
            parts = [f"{row.huge:,} are in transparent huge pages, which merging splits"] * bool(row.huge)
            parts += [f"{row.locked:,} are locked, which does not keep them from merging"] * bool(row.locked)
            yield f"    of these pages {' and '.join(parts)}"
        yield from (f"    in {_place(area, answer)}" for area in row.areas[:_MOST_AREAS])
        if len(row.areas) > _MOST_AREAS:
            rest = sum(area.pages for area in row.areas[_MOST_AREAS:])
            yield f"    and {size(rest * answer.page_size)} in {len(row.areas) - _MOST_AREAS:,} more areas"
        yield from _twins(row, answer)
        for part in row.would:
            yield from _twins(part, answer)
        if row.frees:
            yield f"    Merging would free {size(row.frees * answer.page_size)}."
        if row.remedy:
            yield f"    Remedy: {row.remedy}"
    for row in answer.beside:
        yield f"Beside the resident set: {_much(row, answer)} {row.text}."
    for note in answer.notes:
        yield f"Note: {note}."


def _twins(row: Row, answer: Explanation) -> Iterator[str]:
    """Yield where misaligned bytes are, and where they are as well."""
    for place in row.details.get("places", ())[:_MOST_AREAS]:
        other = f"{place['other_address']:#x} of {place['other_pid']}"
        yield f"    {size(place['bytes'])} at {place['address']:#x} of {place['pid']} are at {other} as well"
    if row.reason is Reason.MISALIGNED:
        yield f"    with equal offsets {size(row.frees * answer.page_size)} could be freed: {row.remedy}"


def _much(row: Row, answer: Explanation) -> str:
    return f"{size(row.pages * answer.page_size)} ({row.pages:,} page{'s' * (row.pages != 1)})"


def _place(area: AreaShare, answer: Explanation) -> str:
    return (
        f"{area.label} {area.start:x}-{area.end:x} {area.name or '(anonymous)'}: {size(area.pages * answer.page_size)}"
    )


def _details(row: Row, answer: Explanation) -> str:
    if row.reason is Reason.MERGED and row.details:
        return f" on {row.details['copies']:,} copies, up to {row.details['most_on_one_copy']:,} of these pages on one"
    if row.reason is Reason.VOLATILE:
        often = row.details["changed_in_looks"]
        return (
            " ("
            + ", ".join(f"{pages:,} in {times} of {answer.looks - 1}" for times, pages in sorted(often.items()))
            + " looks)"
        )
    return ""
