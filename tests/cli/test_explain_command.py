"""Judge `pagefold explain` on real children whose memory is known: the lines, the JSON, and what is refused."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable
from typing import Any

import pytest
from tests.cli.running import refusal, run, run_here
from tests.sources.conftest import Specimen

PAGE = mmap.PAGESIZE
Make = Callable[[str], Specimen]
KNOWN = """
memory, other = area(8), area(4)
for page in range(5): fill(memory, page, 1000 + page)
for page in range(5, 8): fill(memory, page, (os.getpid() << 8) + page)
for page in range(4): fill(other, page, 5)
memory.madvise(12)
RESULT = address(memory)
"""
TOP = {"format", "page_size", "rss_pages", "rss_bytes", "looks", "interval", "processes", "machine"}
ROW = {"reason", "pages", "bytes", "words", "remedy", "frees_bytes", "huge_pages", "locked_pages", "areas"}


def explain_json(*arguments: object) -> dict[str, Any]:
    result = run_here("explain", "--json", "--looks", 1, *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_json(specimen: Make) -> None:
    children = [specimen(KNOWN), specimen(KNOWN)]
    answer = explain_json(*(child.pid for child in children))
    assert set(answer) == TOP | {"reasons", "beside_rss", "skipped", "notes"}
    assert [process["pid"] for process in answer["processes"]] == [child.pid for child in children]
    assert sum(process["rss_pages"] for process in answer["processes"]) == answer["rss_pages"]
    assert sum(row["pages"] for row in answer["reasons"]) == answer["rss_pages"]
    rows = {row["reason"]: row for row in answer["reasons"]}
    for row in rows.values():
        assert set(row) - {"if_advised"} == ROW
        assert row["bytes"] == row["pages"] * PAGE
    assert rows["would_merge"]["pages"] == 10 and rows["would_merge"]["frees_bytes"] == 5 * PAGE
    assert rows["unique"]["pages"] == 6
    assert sum(part["pages"] for part in rows["not_advised"]["if_advised"]) == rows["not_advised"]["pages"] > 8
    area = rows["would_merge"]["areas"][0]
    assert area["start"] <= children[0].addresses[0] < area["end"] and area["pages"] == 5


def test_lines(specimen: Make) -> None:
    children = [specimen(KNOWN), specimen(KNOWN)]
    result = run("explain", "--interval", "0", *(child.pid for child in children))
    assert (result.returncode, result.stderr) == (0, "")
    text = result.stdout
    whole = re.search(r"^Of [\d.]+ MiB \(([\d,]+) pages\) resident in python3?\S* \[", text, re.MULTILINE)
    assert whole
    assert re.search(r"^40\.0 KiB \(10 pages\) have equals and ", text, re.MULTILINE)
    assert "    Merging would free 20.0 KiB." in text
    assert "are never looked at: nothing advised them." in text
    assert "    of these, if they were advised, " in text
    assert f"[{children[0].pid}] {children[0].addresses[0] & ~0xFFF:x}" in text
    counts = re.findall(r"^[\d.,]+ \w+ \(([\d,]+) pages?\) ", text, re.MULTILINE)
    assert sum(int(count.replace(",", "")) for count in counts) == int(whole[1].replace(",", ""))


def test_names_of_processes_and_files_stay_on_their_line(specimen: Make) -> None:
    child = specimen('open("/proc/self/comm", "w").write("[/bold]\\x1b")\nRESULT = 0')
    result = run_here("explain", "--looks", 1, child.pid)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"[/bold]? [{child.pid}]" in result.stdout and "\x1b" not in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["0x1"], "'0x1' is not a PID"),
        ([str(2**31 - 1)], "no such process"),
        (["--looks", "0", "1"], "0 looks cannot be taken; use 1 to 100"),
        (["--interval", "-1", "1"], "an interval of -1.0 seconds"),
    ],
)
def test_refusals(arguments: list[str], said: str) -> None:
    assert said in refusal(run_here("explain", *arguments))


def test_who_cannot_be_read_is_left_out(specimen: Make) -> None:
    child = specimen(KNOWN)
    result = run_here("explain", "--json", "--looks", 1, 2**31 - 1, child.pid)
    assert result.returncode == 0
    answer = json.loads(result.stdout)
    assert [process["pid"] for process in answer["processes"]] == [child.pid]
    assert result.stderr == f"pagefold: left out: {answer['skipped'][0]['why']}\n"
