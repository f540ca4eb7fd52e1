"""Judge what is found on false machines: each cause by name, severity, figures and remedy; and nothing on a good one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.plan.conftest import Specimen
from tests.plan.machines import machine

from pagefold.plan.diagnosis import OPT_IN, Severity, diagnose, pass_seconds
from pagefold.plan.machine_state import Advised, count_advised, read_machine

SOME = Advised(pages=1000, processes=2, looked_at=5)
CASES: list[tuple[str, dict[str, Any], Severity, str, str]] = [
    ("run_0", {"run": 0}, Severity.STOPS, "0 pages that merged earlier stay merged", "echo 1 > .*/run"),
    ("run_2", {"run": 2}, Severity.STOPS, "taken apart", "echo 1 > .*/run"),
    ("offlining", {"run": 5}, Severity.STOPS, "run is 5", ""),
    ("no_full_scan", {"full_scans": 0}, Severity.NOTE, "second pass at the earliest; 900 looks", ""),
    ("batch_0", {"pages_to_scan": 0}, Severity.STOPS, "looks at nothing", "echo 1000 > .*/pages_to_scan"),
    ("no_rest", {"sleep_millisecs": 0}, Severity.COSTS, "a whole CPU", "echo 20 > .*/sleep_millisecs"),
    ("advisor_on", {"advisor_mode": "none [scan-time]"}, Severity.SLOWS,
     "a pass of 200 s, with at most 30,000", "echo 60 > .*target_scan_time"),
    ("smart_scan", {"smart_scan": 1, "pages_skipped": 100}, Severity.SLOWS, "10 % of all looks were skipped", "echo 0 > .*/smart_scan"),
    ("chains", {"stable_node_chains": 3, "stable_node_dups": 10}, Severity.LOSES, "3 contents have 10 copies: 28 KiB more",
     "echo 2 > .*/run && echo 4096 > .*/max_page_sharing && echo 1 > .*/run"),
    ("max_page_sharing", {"max_page_sharing": 16}, Severity.NOTE, "of 1,600 equal pages 100 copies", ""),
    ("nodes_apart", {"nodes": "0-3", "merge_across_nodes": 0}, Severity.LOSES, "each of the 4 NUMA nodes",
     "echo 1 > .*/merge_across_nodes"),
    ("nodes_together", {"nodes": "0,2"}, Severity.COSTS, "2 NUMA nodes share one copy", "echo 0 > .*/merge_across_nodes"),
    ("no_profit", {"general_profit": -6400}, Severity.COSTS, "6,400 bytes more", "echo 2 > .*/run"),
    ("huge_pages", {"huge": "[always] madvise never"}, Severity.COSTS, "splits all of it", "echo madvise > .*/enabled"),
    ("zero_pages", {"use_zero_pages": 0}, Severity.NOTE, "a copy for 256 of them", "echo 1 > .*/use_zero_pages"),
    ("merged", {"pages_sharing": 30, "pages_shared": 4}, Severity.NOTE, "30 mappings more than the 4 copies need", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "setting", "severity", "why", "remedy"), CASES, ids=lambda value: str(value)[:20])
def test_each_cause_is_found(
    name: str, setting: dict[str, Any], severity: Severity, why: str, remedy: str, tmp_path: Path
) -> None:
    found = {one.name: one for one in diagnose(read_machine(machine(tmp_path, **setting), SOME))}
    assert set(found) - {"max_page_sharing"} == {name} - {"max_page_sharing"}, "nothing else is wrong there"
    assert found[name].severity == severity
    assert why in found[name].why
    assert bool(found[name].remedy) == bool(remedy)
    pattern = [part.strip() for part in remedy.split(".*")]
    assert all(part in found[name].remedy for part in pattern)


def test_a_kernel_without_ksm(tmp_path: Path) -> None:
    sys = machine(tmp_path)
    shutil.rmtree(sys / "kernel/mm/ksm")
    (found,) = diagnose(read_machine(sys, SOME))
    assert (found.name, found.severity) == ("not_built", Severity.STOPS)
    assert "CONFIG_KSM" in found.why and found.remedy == "pagefold run -- COMMAND"


def test_the_defaults_are_slow_for_much_memory(tmp_path: Path) -> None:
    state = read_machine(machine(tmp_path), Advised(pages=3 << 20, processes=1, looked_at=1))
    assert pass_seconds(state, 3 << 20) == pytest.approx((3 << 20) / 5000)
    found = {one.name: one for one in diagnose(state)}
    assert found["slow_scan"].words == "one pass over 3,145,728 pages takes 10.5 minutes or more"
    assert "100 pages, then a rest of 20 ms: at most 5,000 pages/s" in found["slow_scan"].why
    assert "before its second pass: 21.0 minutes" in found["slow_scan"].why
    assert found["slow_scan"].remedy == "echo 1049 > /sys/kernel/mm/ksm/pages_to_scan"
    assert "scan-time" in found["advisor_off"].remedy
    faster = read_machine(machine(tmp_path / "faster", pages_to_scan=1049), state.advised)
    assert "slow_scan" not in {one.name for one in diagnose(faster)}, "the remedy suffices"
    assert "slow_scan" not in {one.name for one in diagnose(state, pages=300_000)}, "the pages given count"


def test_with_the_advisor_pages_to_scan_is_not_the_remedy(tmp_path: Path) -> None:
    sys = machine(tmp_path, advisor_mode="none [scan-time]", advisor_target_scan_time=60)
    found = {one.name: one for one in diagnose(read_machine(sys, Advised(3 << 20, 1, 1)))}
    assert found["slow_scan"].remedy == ""
    assert (found["advisor_on"].remedy, found["advisor_on"].severity) == ("", Severity.NOTE)
    assert "advisor_off" not in found


def test_nothing_is_advised(tmp_path: Path) -> None:
    found = diagnose(read_machine(machine(tmp_path), Advised(0, 0, 12)))
    assert (found[0].name, found[0].remedy) == ("nothing_advised", OPT_IN)
    assert "of 12 processes" in found[0].why


def test_the_gravest_comes_first(tmp_path: Path) -> None:
    found = diagnose(read_machine(machine(tmp_path, run=0, smart_scan=1, use_zero_pages=0, stable_node_chains=1), SOME))
    order = [one.severity for one in found]
    assert order == sorted(order) and len(set(order)) == 4


def test_an_old_kernel_has_fewer_files(tmp_path: Path) -> None:
    newer = ("use_zero_pages", "smart_scan", "advisor_mode", "general_profit", "stable_node_chains", "max_page_sharing")
    state = read_machine(machine(tmp_path, **dict.fromkeys(newer)), SOME)
    assert state.advisor == "" and "smart_scan" not in state.knobs
    assert diagnose(state) == ()


def test_advised_memory_is_counted(specimen: Any, tmp_path: Path) -> None:
    program = "memory = area(9)\nfor page in range(7): fill(memory, page, page + 1)\nmemory.madvise(12)\nRESULT = 0"
    children: list[Specimen] = [specimen(program), specimen(program), specimen("RESULT = 0")]
    for child in children:
        (tmp_path / str(child.pid)).symlink_to(f"/proc/{child.pid}")
    told: list[tuple[int, int]] = []
    assert count_advised(tmp_path, lambda what, done, total: told.append((done, total))) == Advised(14, 2, 3)
    assert told == [(0, 3), (1, 3), (2, 3)]
