"""Judge `pagefold doctor` on the machine at hand: lines, JSON, exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tests.cli.running import run, run_here

from pagefold.plan.diagnosis import OPT_IN

KSM = Path("/sys/kernel/mm/ksm")


def test_json_holds_the_state_and_the_findings() -> None:
    result = run("doctor", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    answer = json.loads(result.stdout)
    assert set(answer) == {"format", "machine", "findings"}
    assert set(answer["machine"]) == {"built", "page_size", "knobs", "advisor", "nodes", "huge", "advised"}
    assert answer["machine"]["built"] == KSM.is_dir()
    for finding in answer["findings"]:
        assert set(finding) == {"name", "severity", "words", "why", "remedy"}
        assert finding["severity"] in ("stops", "loses", "slows", "costs", "note")


def test_lines_for_people() -> None:
    result = run_here("doctor")
    assert (result.returncode, result.stderr) == (0, "")
    first, *rest = result.stdout.splitlines()
    assert first.endswith("could be read).") and "are advised MERGEABLE" in first
    assert rest, "there is always something to note"
    for line in rest:
        assert line.startswith(("    ", "Nothing merges: ", "Some pages never merge: ", "Slow: ", "Costs: ", "Note: "))


@pytest.mark.skipif(not KSM.is_dir(), reason="this kernel has no KSM")
def test_the_remedy_for_a_whole_program_works() -> None:
    """The command is run as printed; the program it starts is opted in, where the kernel tells and we may."""
    shown = Path("/proc/self/ksm_stat")
    if not shown.exists() or "ksm_merge_any" not in shown.read_text():
        pytest.skip("this kernel does not tell which processes are opted in (ksm_merge_any in ksm_stat)")
    words = OPT_IN.replace("python3", sys.executable).replace("COMMAND", "cat /proc/self/ksm_stat")
    result = subprocess.run(words, shell=True, capture_output=True, text=True, check=False)
    if "refused" in result.stderr:
        pytest.skip("opting a process in needs CAP_SYS_RESOURCE")
    assert "ksm_merge_any: yes" in result.stdout
