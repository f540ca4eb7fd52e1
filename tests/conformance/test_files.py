"""Judge how scenario files are read: what they state, and one clear line for every mistake in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pagefold.errors import PagefoldError, UsageError
from pagefold.scenario.files import load
from pagefold.scenario.sim_host import SimHost

FILE = '''
"""Scenarios."""
from pagefold.scenario.files import states
from pagefold.scenario.host import Host, HostProcess

nodes = 2
knobs = {"max_page_sharing": 3}


def scenario_of_the_file(host: Host) -> None:
    """Show one thing.

    At length.
    """


@states(nodes=4, needs={"pin", "smart_scan"}, knobs={})
def scenario_of_its_own(host: Host) -> None:
    """Show another."""


def scenario_by_attribute(host: Host) -> None:
    """Show a third."""


scenario_by_attribute.nodes = 1


def no_scenario(host: Host) -> None:
    pass
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.py"
    path.write_text(FILE)
    return path


def test_what_a_file_and_a_function_state(file: Path) -> None:
    first, second, third = load(str(file))
    assert (first.name, first.nodes, first.needs, first.knobs) == (
        "of_the_file",
        2,
        frozenset(),
        {"max_page_sharing": 3},
    )
    assert first.shows == "Show one thing."
    assert (second.nodes, second.needs, second.knobs) == (4, {"pin", "smart_scan"}, {})
    assert (third.nodes, third.knobs) == (1, {"max_page_sharing": 3})


def test_a_file_can_set_knobs_by_their_names(tmp_path: Path) -> None:
    path = tmp_path / "named.py"
    path.write_text("merge_across_nodes = 0\nadvisor_mode = 'none'\nrun = 1\ndef scenario_a(host): pass\n")
    (scenario,) = load(str(path))
    assert scenario.knobs == {"merge_across_nodes": 0, "advisor_mode": "none"}


@pytest.mark.parametrize("name", ["of_its_own", "scenario_of_its_own"])
def test_one_scenario_by_name(file: Path, name: str) -> None:
    assert [scenario.name for scenario in load(f"{file}::{name}")] == ["of_its_own"]


def test_a_folder_is_all_its_files(file: Path) -> None:
    (file.parent / "another.py").write_text("def scenario_z(host):\n    'Z.'\n")
    assert [scenario.name for scenario in load(str(file.parent))][:2] == ["z", "of_the_file"]


def test_a_file_can_import_what_lies_beside_it(file: Path) -> None:
    (file.parent / "beside_it.py").write_text("THING = 1\n")
    file.write_text("from beside_it import THING\ndef scenario_a(host): pass\n")
    assert [scenario.name for scenario in load(str(file))] == ["a"]


def test_the_same_scenario_is_equal_however_often_it_is_loaded(file: Path) -> None:
    assert list(load(str(file))) == list(load(str(file)))


def test_why_a_host_cannot_run_it(file: Path) -> None:
    first, second, third = load(str(file))
    host = SimHost(2)
    assert first.why_not(host) is None
    assert first.why_not(SimHost(1)) == "needs 2 nodes, there is 1"
    assert second.why_not(host) == "needs 4 nodes, there are 2"
    host.features = frozenset({"pin"})
    assert third.why_not(host) == "needs max_page_sharing"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("x = 1", ["no function scenario_*"]),
        ("def f(:", ["some.py", "SyntaxError"]),
        ("import nothing_like_it", ["some.py", "ModuleNotFoundError", "nothing_like_it"]),
        ("nodes = 0\ndef scenario_a(host): pass", ["scenario_a states nodes = 0", "use 1 or more"]),
        ("nodes = 'two'\ndef scenario_a(host): pass", ["states nodes = 'two'"]),
        ("needs = 'pin'\ndef scenario_a(host): pass", ["states needs = 'pin'", "use a set"]),
        ("needs = {'wings'}\ndef scenario_a(host): pass", ["needs wings", "use merge_any, offline, pin"]),
        ("knobs = ['run']\ndef scenario_a(host): pass", ["states knobs = ['run']", "use a dictionary"]),
        ("knobs = {'max_page_sharing': 1}\ndef scenario_a(host): pass", ["max_page_sharing", "1 is out of range"]),
        ("import sys\nsys.exit(0)", ["some.py: SystemExit: 0"]),
        ("def scenario_a(host): yield", ["scenario_a is a generator or async"]),
        ("async def scenario_a(host): pass", ["scenario_a is a generator or async"]),
        ("knobs = {'rum': 1}\ndef scenario_a(host): pass", ["no knob 'rum'", "the knobs are run"]),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "some.py"
    path.write_text(text)
    with pytest.raises(PagefoldError) as refusal:
        list(load(str(path)))
    said = str(refusal.value)
    assert "\n" not in said
    assert [part for part in parts if part not in said] == [], said


def test_no_file_and_no_name(file: Path) -> None:
    with pytest.raises(UsageError, match="there is no such scenario file"):
        list(load("/nowhere/x.py"))
    with pytest.raises(UsageError, match="there is no scenario y in it"):
        list(load(f"{file}::y"))
