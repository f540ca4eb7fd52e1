"""Judge the engine by real kernels: every scenario that comes with pagefold, and the page that lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.conformance import table

from pagefold.scenario.conform import play
from pagefold.scenario.files import LIBRARY, Scenario, load
from pagefold.scenario.host import FreshHost
from pagefold.scenario.places import Place, open_host, why_not
from pagefold.scenario.record import first_difference
from pagefold.scenario.sim_host import SimHost

SCENARIOS = list(load(str(LIBRARY)))
ON_ONE_NODE = [scenario for scenario in SCENARIOS if scenario.nodes == 1 and "offline" not in scenario.needs]
ON_NODES = [scenario for scenario in SCENARIOS if scenario.nodes == 2 and "offline" not in scenario.needs]


def name(scenario: Scenario) -> str:
    return f"{scenario.path.stem}::{scenario.name}"


def check(scenario: Scenario, host: FreshHost) -> None:
    if reason := scenario.why_not(host):
        pytest.skip(f"{host.name} {reason}")
    run, reference = play(host, scenario), play(SimHost(host.nodes), scenario)
    assert run.failure == ""
    assert reference.failure == ""
    assert first_difference(reference.steps, run.steps) is None


@pytest.mark.parametrize("nodes", [1, 2, 4])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=name)
def test_on_the_simulated_machine(scenario: Scenario, nodes: int) -> None:
    host = SimHost(nodes)
    if reason := scenario.why_not(host):
        assert scenario.nodes > nodes, reason
        return
    assert play(host, scenario).failure == ""


@pytest.mark.kernel
@pytest.mark.parametrize("scenario", ON_ONE_NODE, ids=name)
def test_on_this_kernel(scenario: Scenario, kernel: FreshHost) -> None:
    check(scenario, kernel)


@pytest.mark.guest
@pytest.mark.parametrize("scenario", ON_NODES, ids=name)
def test_in_a_guest(scenario: Scenario, guest: FreshHost) -> None:
    check(scenario, guest)


@pytest.mark.guest
def test_offline_in_a_guest() -> None:
    place = Place("guest", 2, hotplug=True)
    if reason := why_not(place):
        pytest.skip(f"guest: {reason}")
    offline = [scenario for scenario in SCENARIOS if "offline" in scenario.needs and scenario.nodes <= 2]
    assert offline
    with open_host(place) as host:
        for scenario in offline:
            check(scenario, host)


def test_every_scenario_says_what_it_shows_and_has_a_name_of_its_own() -> None:
    assert [scenario.name for scenario in SCENARIOS if not scenario.shows] == []
    assert len({scenario.name for scenario in SCENARIOS}) == len(SCENARIOS) >= 50


def test_the_example_of_the_page_shows_what_it_says(tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", table.PAGE.read_text(), re.DOTALL)
    path = tmp_path / "example.py"
    path.write_text(example)
    (scenario,) = load(str(path))
    assert (scenario.nodes, scenario.needs, scenario.knobs) == (2, frozenset(), {"merge_across_nodes": 0})
    run = play(SimHost(2), scenario)
    assert run.failure == ""
    assert len(run.steps) > 10


def test_the_page_lists_every_scenario() -> None:
    assert table.PAGE.read_text() == table.text(), "write it anew: python -m tests.conformance.table"
    assert all(f"| `{scenario.name}` |" in table.text() for scenario in SCENARIOS)
