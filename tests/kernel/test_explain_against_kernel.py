"""Judge the reasons by the kernel: what `explain` calls merged, and what it says would merge, is what ksmd does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from tests.kernel.test_plan_against_kernel import Worker, workers

from pagefold.plan.explanation import Explanation, Row, explain
from pagefold.plan.looks import take_looks
from pagefold.plan.machine_state import read_machine
from pagefold.plan.reading import Reader
from pagefold.plan.reasons import Reason
from pagefold.scenario.kernel_ksm import KernelKsm

WHY_NOT = KernelKsm.why_not()
pytestmark = [pytest.mark.kernel, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
FAST = {"smart_scan": 0, "sleep_millisecs": 0, "pages_to_scan": 100_000}


def ask(crew: list[Worker]) -> Explanation:
    reader = Reader()
    reader.add([str(worker.pid) for worker in crew], [])
    answer = explain(take_looks(reader, 1, lambda *_: None, lambda _: None), read_machine())
    assert sum(row.pages for row in answer.rows) == answer.rss
    assert Reason.MOVED not in {row.reason for row in answer.rows}
    return answer


def counts(answer: Explanation, *reasons: Reason) -> list[int]:
    rows = {row.reason: row.pages for row in answer.rows}
    return [rows.get(reason, 0) for reason in reasons]


def merged(answer: Explanation) -> Row:
    return next(row for row in answer.rows if row.reason is Reason.MERGED)


def test_what_would_merge_is_merged_then() -> None:
    reasons = (Reason.WOULD_MERGE, Reason.OVER_LIMIT, Reason.ZERO, Reason.UNIQUE, Reason.MERGED)
    with KernelKsm() as ksm, workers(2) as crew:
        for knob, value in {**FAST, "max_page_sharing": 3}.items():
            ksm.set(knob, value)
        crew[0].do("fill", [1, 2, 3, 4, 4, 4, 4, 0])
        crew[1].do("fill", [1, 2, 5, 4, 6])
        before = ask(crew)
        assert before.findings[0].name == "run_0"
        assert counts(before, *reasons) == [7, 2, 1, 3, 0]
        ksm.set("run", 1)
        ksm.settle()
        after = ask(crew)
        shared = ksm.get("pages_shared")
        ksm.set("run", 2)
        apart = ask(crew)
    assert counts(after, *reasons) == [0, 0, 1, 3, 9]
    assert merged(after).details == {"copies": shared, "most_on_one_copy": 3}
    assert shared == 4  # 1, 2, and 4 on two copies
    assert counts(apart, *reasons) == [7, 2, 1, 3, 0]
    assert apart.findings[0].name == "run_2"


def test_without_root_merged_pages_are_told_by_area() -> None:
    """Frames are hidden then, and which page is merged with them; how many in each area is not."""
    with KernelKsm() as ksm, workers(2) as crew:
        for knob, value in FAST.items():
            ksm.set(knob, value)
        crew[0].do("fill", [1, 2, 3, 4])
        crew[1].do("fill", [1, 2, 5])
        ksm.set("run", 1)
        ksm.settle()
        program = (
            "import ctypes, sys\n"
            "libc = ctypes.CDLL(None)\n"
            "for capability in (21, ): assert libc.prctl(24, capability, 0, 0, 0) == 0\n"  # PR_CAPBSET_DROP, CAP_SYS_ADMIN
            "import os; os.execvp(sys.argv[1], sys.argv[1:])"
        )
        command = [sys.executable, "-c", program, sys.executable, "-c", "from pagefold.cli import main; main()"]
        command += ["explain", "--looks", "1", *(str(worker.pid) for worker in crew)]
        told = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout
        ksm.set("run", 2)
    assert "16.0 KiB (4 pages) are merged now." in told
    assert "12.0 KiB (3 pages) have no equal" in told
    assert "frame numbers are hidden" in told
