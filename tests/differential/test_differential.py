"""Run the engine beside its twin: 20,000 random operations and more, all that can be seen equal after each.

Replay of a seeded run that failed: `python -m tests.differential.stress 1 SEED`.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import pytest
import stress
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from pair import OPERATIONS, Pair, random_run

from tests.conftest import scaled

GOAL = scaled(20_000)
FIRST_SEED = 100_000
ROOT = Path(__file__).parents[2]
NUMBER = st.integers(0, 1 << 16)


class Both(RuleBasedStateMachine):
    """One rule per operation of the pair; the shape of the machine and the rule set are drawn too."""

    done: ClassVar[Counter[str]] = Counter()

    @initialize(
        nodes=st.integers(1, 4),
        frames=st.sampled_from((16, 40, 100)),
        rules=st.sampled_from(("classic", "mainline")),
        across=st.integers(0, 1),
    )
    def start(self, nodes: int, frames: int, rules: str, across: int) -> None:
        self.pair = Pair(nodes, frames, 6, rules, across)
        Both.done[f"{rules}, {nodes} nodes"] += 1
        for number in range(2):  # something to work on from the first rule
            for name in ("spawn", "mmap", "madvise"):
                self.pair.do(name, number, 5, 1, 1)


def _add_rule(name: str) -> None:
    def apply(self: Any, a: int, b: int, c: int, d: int) -> None:
        self.pair.do(name, a, b, c, d)
        Both.done[name] += 1

    setattr(Both, name, rule(a=NUMBER, b=NUMBER, c=NUMBER, d=NUMBER)(apply))


for _name in OPERATIONS:
    _add_rule(_name)


def test_engine_and_twin_agree_on_twenty_thousand_operations() -> None:
    Both.done.clear()
    run_state_machine_as_test(
        Both,
        settings=settings(
            max_examples=scaled(100),
            stateful_step_count=50,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    ruled = sum(Both.done[name] for name in OPERATIONS)
    assert ruled >= GOAL // 20
    assert {name for name in OPERATIONS if Both.done[name]} == set(OPERATIONS)
    seeded, seed = 0, FIRST_SEED
    while ruled + seeded < GOAL:
        try:
            seeded += len(random_run(seed, stress.LENGTH).log)
        except Exception as error:
            raise AssertionError(f"repeat: python -m tests.differential.stress 1 {seed}") from error
        seed += 1
    assert ruled + seeded >= GOAL


def test_both_rule_sets_and_all_numbers_of_nodes_are_drawn() -> None:
    """Many short runs: the seeded half must not stay with one shape either."""
    starts = Counter(random_run(seed, 1).start[::3] for seed in range(FIRST_SEED, FIRST_SEED + 60))
    assert {rules for _, rules in starts} == {"classic", "mainline"}
    assert {nodes for nodes, _ in starts} == {1, 2, 3, 4}


def test_the_pair_notices_a_difference() -> None:
    """Change one thing on one side only: each comparison must hear of it."""
    for disturb, says in (
        (lambda pair: pair.machine.processes[0].write(pair.areas[1][0], 0, 77), "pages differ|process|counters|== "),
        (lambda pair: pair.engine.scan_full(2), "counters differ: full_scans"),
        (lambda pair: pair.machine.processes[0].madvise(pair.areas[1][0], "UNMERGEABLE"), "differ"),
    ):
        pair = Pair(2, 40, 4, "mainline")
        pair.do("spawn", 0, 0, 0, 0)
        pair.do("mmap", 0, 3, 0, 1)
        pair.do("madvise", 0, 0, 1, 1)
        for index in range(3):
            pair.do("write", 0, 0, index, 2)
        for _ in range(3):
            pair.do("scan", 0, 0, 0, 0)
        disturb(pair)
        with pytest.raises(AssertionError, match=says):
            pair.do("scan", 0, 0, 0, 0)


def stress_test(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.differential.stress", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_stress_counts_its_operations() -> None:
    ran = stress_test("2", "7")
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{2 * stress.LENGTH} operations, engine and twin equal after each\n"


@pytest.mark.parametrize("arguments", [["2"], ["two", "7"]])
def test_bad_arguments_of_the_stress_say_how_to_call_it(arguments: list[str]) -> None:
    ran = stress_test(*arguments)
    assert ran.returncode == 2
    assert ran.stderr == "usage: python -m tests.differential.stress ITERATIONS SEED\n"


def test_a_difference_prints_the_line_that_repeats_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def differ(seed: int, length: int) -> None:
        assert seed != 9, "they differ"

    monkeypatch.setattr(stress, "random_run", differ)
    with pytest.raises(AssertionError, match="they differ"):
        stress.main(["5", "7"])
    assert capsys.readouterr().err.endswith("repeat: python -m tests.differential.stress 1 9\n")
