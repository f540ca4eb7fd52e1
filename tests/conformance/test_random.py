"""Judge the engine by real kernels: random sequences of 30 moves, everything compared after every scan.

A sequence that differs is shrunk, and printed as a scenario: give it a name, and put it into the library.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conformance.conftest import ALL
from tests.conftest import scaled

from pagefold.scenario.host import NEVER, FreshHost, Observation
from pagefold.scenario.random_play import KINDS, Move, Player
from pagefold.scenario.record import Recorder, Step, as_scenario, first_difference
from pagefold.scenario.sim_host import SimHost

MOVES = 30
OFTEN = {"scan": 7, "write": 5, "write_many": 4, "move": 3, "move_many": 3}
# The first is what shrinking ends at: nothing.
KIND = st.sampled_from(["rest", *(kind for kind in KINDS for _ in range(OFTEN.get(kind, 1)))])
NUMBER = st.integers(0, 255)
SEQUENCES = st.lists(st.tuples(KIND, NUMBER, NUMBER, NUMBER), min_size=MOVES, max_size=MOVES)
SETTINGS = st.fixed_dictionaries(
    {
        "merge_across_nodes": st.sampled_from([0, 0, 0, 1]),
        "max_page_sharing": st.sampled_from([256, 2, 3]),
        "use_zero_pages": st.sampled_from([0, 1]),
        "smart_scan": st.sampled_from([0, 1]),
        "stable_node_chains_prune_millisecs": st.sampled_from([NEVER, 0]),
    }
)


def record(host: FreshHost, knobs: dict[str, int], moves: list[Move]) -> list[Step]:
    host.begin(knobs)
    recorder = Recorder(host)
    player = Player(recorder)
    player.begin(areas_on=range(host.nodes))
    player.play(moves)
    recorder.observe()
    assert host.complaints() == [], f"{host.name} complains"
    return recorder.steps


def compare(host: FreshHost, examples: int) -> None:
    """Play so many sequences on a host and on the simulated machine; raise on the first that differs, shrunk."""
    sim = SimHost(host.nodes)
    merged = 0

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(SETTINGS, SEQUENCES)
    def equal(knobs: dict[str, int], moves: list[Move]) -> None:
        nonlocal merged
        reference, steps = record(sim, knobs, moves), record(host, knobs, moves)
        merged += any(isinstance(step.outcome, Observation) and step.outcome["pages_sharing"] for step in steps)
        if found := first_difference(reference, steps):
            number, things = found
            text = "\n".join(as_scenario(reference[: number + 1], "found", "Say what it shows.", knobs))
            pytest.fail(f"differs at step {number + 1}: {things}\n\n{text}", pytrace=False)

    equal()
    assert merged > examples // 4, "the sequences merge too little to show anything"


@pytest.mark.kernel
def test_this_kernel(kernel: FreshHost) -> None:
    compare(kernel, scaled(300 if ALL else 100))


@pytest.mark.guest
@pytest.mark.timeout(1800)
def test_guest(guest: FreshHost) -> None:
    compare(guest, 300 if ALL else 30)


@pytest.mark.guest
@pytest.mark.timeout(1800)
def test_guest_of_four_nodes(guest_of_four: FreshHost) -> None:
    compare(guest_of_four, 300)
