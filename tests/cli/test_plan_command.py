"""Judge `pagefold plan` on real children whose memory is known: the table, the JSON, and who is left out."""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests.cli.running import refusal, run
from tests.sources.conftest import Specimen
from typer.testing import CliRunner

from pagefold.cli.app import app
from pagefold.sources.elf import HEADER, SEGMENT

PAGE = mmap.PAGESIZE
Make = Callable[[str], Specimen]
# Ten pages that every such child has alike, two of its own, three of zeroes; and what nobody advised.
KNOWN = """
memory, other = area(15), area(4)
for page in range(10): fill(memory, page, 1000 + page)
for page in range(10, 12): fill(memory, page, (os.getpid() << 8) + page)
for page in range(12, 15): fill(memory, page, 0)
for page in range(4): fill(other, page, 5)
memory.madvise(12)
RESULT = address(memory)
def change(page):
    fill(memory, page, os.getpid() << 16)
    return "done"
"""
PREDICTION = {
    *("merge_across_nodes", "use_zero_pages", "max_page_sharing"),
    *("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "ksm_zero_pages", "split_zero_pages"),
    *("stable_node_chains", "stable_node_dups"),
    *("general_profit", "saved_bytes", "metadata_bytes", "processes"),
}
PROCESS = {
    *("label", "pid", "pages", "ksm_rmap_items", "ksm_merging_pages", "ksm_zero_pages", "split_zero_pages"),
    *("pages_unshared", "pages_volatile", "ksm_process_profit"),
}
SOURCE = {
    *("label", "pid", "pages", "already_merged", "zero_mapped", "swapped", "unreadable", "vanished"),
    *("incompatible", "unadvised", "missing"),
}


def plan_json(*arguments: object) -> dict[str, Any]:
    result = run("plan", "--json", "--interval", "0", *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def one(answer: dict[str, Any], across: int, zero: int) -> dict[str, Any]:
    """Return one of the four predictions."""
    (found,) = (p for p in answer["predictions"] if (p["merge_across_nodes"], p["use_zero_pages"]) == (across, zero))
    return dict(found)


def figures(prediction: dict[str, Any], *names: str) -> list[int]:
    return [prediction[name] for name in names]


def test_json_has_stable_names(specimen: Make) -> None:
    answer = plan_json("--max-page-sharing", 9, specimen(KNOWN).pid)
    settings = {"format", "page_size", "max_page_sharing", "smart_scan", "interval", "advised_only"}
    assert set(answer) == settings | {"predictions", "sources", "skipped", "notes"}
    assert (answer["format"], answer["smart_scan"], answer["advised_only"]) == (1, 0, False)
    assert (answer["page_size"], answer["max_page_sharing"], answer["skipped"]) == (PAGE, 9, [])
    assert len(answer["predictions"]) == 4
    for prediction in answer["predictions"]:
        assert set(prediction) == PREDICTION
        assert prediction["max_page_sharing"] == 9
        (process,) = prediction["processes"]
        assert set(process) == PROCESS
    (source,) = answer["sources"]
    assert set(source) == SOURCE


def test_figures_of_two_children_with_equal_pages(specimen: Make) -> None:
    pids = [specimen(KNOWN).pid, specimen(KNOWN).pid]
    answer = plan_json("--advised", "--max-page-sharing", 256, *pids)
    names = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "ksm_zero_pages", "saved_bytes")
    assert figures(one(answer, 1, 0), *names) == [11, 15, 4, 0, 0, 15 * PAGE]
    assert figures(one(answer, 1, 1), *names) == [10, 10, 4, 0, 6, 16 * PAGE]
    for zero in (0, 1):
        process = one(answer, 1, zero)["processes"][1]
        assert (process["pid"], process["pages"]) == (pids[1], 15)
        assert process["label"].endswith(f"[{pids[1]}]")
        assert process["ksm_merging_pages"] == (13, 10)[zero]
        assert process["ksm_rmap_items"] == (15, 12)[zero]
    assert one(answer, 1, 0)["general_profit"] == 15 * PAGE - 30 * 64
    assert one(answer, 1, 0)["metadata_bytes"] == (30 + 11) * 64
    assert [source["pages"] for source in answer["sources"]] == [15, 15]
    assert all(source["unadvised"] >= 4 for source in answer["sources"])


def test_chains_at_a_small_limit(specimen: Make) -> None:
    pids = [specimen(KNOWN).pid, specimen(KNOWN).pid]
    prediction = one(plan_json("--advised", "--max-page-sharing", 2, *pids), 1, 0)
    names = ("pages_shared", "pages_sharing", "stable_node_chains", "stable_node_dups")
    assert figures(prediction, *names) == [13, 13, 1, 3]  # the six zeroes on three KSM pages


def test_all_compatible_memory_is_the_default(specimen: Make) -> None:
    child = specimen(KNOWN)
    everything, advised = plan_json(child.pid), plan_json("--advised", child.pid)
    assert everything["sources"][0]["pages"] >= 19 > advised["sources"][0]["pages"] == 15
    assert everything["sources"][0]["unadvised"] == 0


def test_the_table(specimen: Make) -> None:
    pids = [specimen(KNOWN).pid, specimen(KNOWN).pid]
    result = run("plan", "--advised", "--interval", "0", "--max-page-sharing", "256", *pids)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"pages_shared\W+11\W+11\W+KSM pages in use", result.stdout)
    assert re.search(r"pages_sharing\W+15\W+15\W", result.stdout)
    assert re.search(r"in total\W+30\W+26\W+4\W+0\W+0\W", result.stdout)
    assert (
        "Merging would save 60.0 KiB (60.0 KiB if pages of different nodes stay apart), and cost 2,624 B of"
        in result.stdout
    )
    assert "Pages full of zeroes: 6; with use_zero_pages 1 merging would save 64.0 KiB in all." in result.stdout
    for pid in pids:
        assert f"[{pid}]" in result.stdout


def test_a_name_that_looks_like_markup_is_shown(specimen: Make) -> None:
    child = specimen('open("/proc/self/comm", "w").write("[/bold]")\nRESULT = 0')
    result = run("plan", "--interval", "0", child.pid)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"[/bold] [{child.pid}]" in result.stdout


def raw(tmp_path: Path, name: str = "guest.raw") -> Path:
    path = tmp_path / name
    path.write_bytes(b"".join(bytes([value]) * PAGE for value in (1, 2, 1, 0, 0, 1)))
    return path


def core(tmp_path: Path, cut: int = 0) -> Path:
    """Write an ELF core with one segment of four pages, two of them equal."""
    data = b"".join(bytes([value]) * PAGE for value in (7, 8, 7, 9))
    head = HEADER.pack(
        b"\x7fELF" + bytes([2, 1, 1]) + bytes(9), 4, 62, 1, 0, HEADER.size, 0, 0, 64, SEGMENT.size, 1, 64, 0, 0
    )
    segment = SEGMENT.pack(1, 6, HEADER.size + SEGMENT.size, 16 * PAGE, 0, len(data), len(data), PAGE)
    path = tmp_path / "process.core"
    whole = head + segment + data
    path.write_bytes(whole[: len(whole) - cut])
    return path


def test_images(tmp_path: Path) -> None:
    answer = plan_json("--image", raw(tmp_path), "--image", core(tmp_path), "--max-page-sharing", 256)
    names = ("pages_shared", "pages_sharing", "pages_unshared", "ksm_zero_pages")
    assert figures(one(answer, 1, 0), *names) == [3, 4, 3, 0]
    assert figures(one(answer, 1, 1), *names) == [2, 3, 3, 2]
    assert [(source["label"], source["pid"]) for source in answer["sources"]] == [
        ("guest.raw", None),
        ("process.core", None),
    ]
    assert any("the node of no page is known" in note for note in answer["notes"])


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    path = raw(tmp_path, "a\udcff[b]\x1b\n")
    result = run("plan", "--image", path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "a?[b]??" in result.stdout
    path.write_bytes(b"cut")
    assert "a?[b]??: 3 bytes" in refusal(run("plan", "--image", path))


def test_who_cannot_be_read_is_left_out_and_the_rest_goes_on(specimen: Make, tmp_path: Path) -> None:
    child, cut = specimen(KNOWN), core(tmp_path, cut=1)
    result = run("plan", "--json", "--interval", "0", 2**31 - 1, child.pid, "--image", cut)
    assert result.returncode == 0
    answer = json.loads(result.stdout)
    assert [source["pid"] for source in answer["sources"]] == [child.pid]
    assert [one["source"] for one in answer["skipped"]] == [str(2**31 - 1), str(cut)]
    lines = result.stderr.splitlines()
    assert lines == [f"pagefold: left out: {one['why']}" for one in answer["skipped"]]
    assert "truncated core" in lines[1]


def during_the_rest(monkeypatch: pytest.MonkeyPatch, action: Callable[[], object]) -> list[float]:
    """Let something happen where the command would sleep; return the seconds it asked for."""
    rests: list[float] = []
    monkeypatch.setattr("pagefold.cli.plan.time", SimpleNamespace(sleep=lambda s: (rests.append(s), action())))
    return rests


def test_a_process_that_vanishes_meanwhile(specimen: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    child, other = specimen(KNOWN), specimen(KNOWN)
    rests = during_the_rest(monkeypatch, child.end)
    result = CliRunner().invoke(app, ["plan", "--json", str(child.pid), str(other.pid)])
    assert result.exit_code == 0
    assert rests == [1.0]
    answer = json.loads(result.stdout)
    assert [source["pid"] for source in answer["sources"]] == [other.pid]
    assert [one["source"] for one in answer["skipped"]] == [str(child.pid)]
    assert re.fullmatch(rf"pagefold: left out: PID {child.pid} \(.*\) ended while it was being read\n", result.stderr)


def test_a_page_that_changes_meanwhile(specimen: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    child = specimen(KNOWN)
    during_the_rest(monkeypatch, lambda: child.do("change(3)"))
    result = CliRunner().invoke(app, ["plan", "--json", "--advised", "--interval", "3", str(child.pid)])
    prediction = one(json.loads(result.stdout), 1, 0)
    assert figures(prediction, "pages_volatile", "pages_shared", "pages_sharing", "pages_unshared") == [1, 1, 2, 11]
