"""Judge the comparison: a host that does anything otherwise is found; one that fails is said to, and costs no other scenario."""

from __future__ import annotations

import errno
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from pagefold.errors import UsageError
from pagefold.scenario.conform import AT_THE_END, Row, arrange, check_kinds, conform
from pagefold.scenario.files import Scenario
from pagefold.scenario.host import FreshHost, Host, HostFailed, Observation
from pagefold.scenario.kernel_ksm import KsmInUse
from pagefold.scenario.places import Place, nodes_here
from pagefold.scenario.sim_host import SimHost, SimProcess


def tell(host: Host) -> None:
    """Do a little of everything."""
    process = host.spawn()
    area = process.mmap(3)
    for index in range(2):
        process.write(area, index, 7)
    process.madvise(area, "MERGEABLE")
    host.scan(2)
    process.move_pages(area, {0: host.nodes - 1})
    process.read(area, 0)
    host.get("pages_shared")
    host.observe()


def fail(host: Host) -> None:
    """Ask for what is not so."""
    assert host.nodes == 7


def scenario(run: object = tell, **stated: object) -> Scenario:
    name = stated.pop("name", "told")
    return Scenario(str(name), Path(__file__), run, **stated)  # type: ignore[arg-type]


class Bent(SimHost):
    """A host that does one thing otherwise."""

    def __init__(self, how: str, nodes: int = 1) -> None:
        self.how = how
        super().__init__(nodes)

    def spawn(self) -> SimProcess:
        process = super().spawn()
        if self.how == "read":
            process.read = lambda area, index: 8
        elif self.how == "move":
            process.move_pages = lambda area, wishes: dict.fromkeys(wishes, -errno.EBUSY)
        return process

    def scan(self, passes: int = 1) -> None:
        if self.how == "dies":
            raise HostFailed("it died")
        if self.how == "refuses":
            raise OSError(errno.EBUSY, "no")
        super().scan(passes - (self.how == "lazy"))

    def get(self, name: str) -> int | str:
        return 99 if self.how == "get" and name == "pages_shared" else super().get(name)

    def observe(self) -> Observation:
        if self.how == "blind":
            raise FileNotFoundError("ksm_stat")
        seen = super().observe()
        pages = dict(seen.pages)
        if self.how == "loses":
            pages.pop(next(iter(pages)), None)
        stats = {
            number: {name: value + (self.how == "stats") for name, value in of.items()}
            for number, of in seen.processes.items()
        }
        return Observation(seen.counters, stats, pages)

    def complaints(self) -> list[str]:
        return ["WARNING: CPU: 0"] if self.how == "complains" else super().complaints()


def compared(how: str, *scenarios: Scenario, nodes: int = 1, with_sim: bool = True) -> list[Row]:
    opened = 0

    @contextmanager
    def opener(place: Place) -> Iterator[FreshHost]:
        nonlocal opened
        opened += 1
        assert opened < 20
        yield Bent(how, nodes)

    return list(conform({Place("kernel"): list(scenarios or [scenario()])}, with_sim=with_sim, opener=opener))


def test_hosts_that_do_the_same_are_equal() -> None:
    (row,) = compared("")
    assert (row.state, row.reference, row.difference, row.why) == ("equal", "sim", None, "")
    assert row.steps == 12


@pytest.mark.parametrize(
    ("how", "line"),
    [
        ("read", "p1.read(r1, 0)"),
        ("move", "p1.move_pages(r1, {0: 0})"),
        ("refuses", "host.scan(2)"),
        ("lazy", "host.observe()"),
        ("get", "host.get('pages_shared')"),
        ("loses", "host.observe()"),
        ("stats", "host.observe()"),
    ],
)
def test_whatever_is_otherwise_is_found(how: str, line: str) -> None:
    (row,) = compared(how)
    assert row.state == "different"
    assert row.difference is not None
    assert row.difference.line == line
    assert row.difference.things
    assert row.repeat.endswith("::told --host sim,kernel")


def test_a_complaint_of_the_kernel_fails_the_scenario() -> None:
    (row,) = compared("complains")
    assert (row.state, row.difference) == ("failed", None)
    assert "WARNING: CPU: 0" in row.why


def test_a_scenario_that_is_wrong_fails_and_says_where() -> None:
    (row,) = compared("", scenario(fail))
    assert row.state == "failed"
    assert row.why.startswith("test_comparison.py:") and "assert host.nodes == 7" in row.why


def quiet(host: Host) -> None:
    """Do next to nothing."""
    host.spawn()


def test_a_host_that_dies_costs_one_scenario() -> None:
    rows = compared("dies", *(scenario(run, name=f"s{n}") for n, run in enumerate((quiet, tell, tell, tell, quiet))))
    assert [row.state for row in rows] == ["equal", "failed", "failed", "failed", "equal"]
    assert {row.why for row in rows} == {"", "it died"}


@contextmanager
def closed(place: Place) -> Iterator[FreshHost]:
    error = KsmInUse("KSM is in use")
    error.add_note("and so it is")
    raise error
    yield


@contextmanager
def fails_at_its_end(place: Place) -> Iterator[FreshHost]:
    yield SimHost(1)
    raise HostFailed("knobs could not be restored")


def test_a_place_that_cannot_be_opened_costs_its_own_scenarios_alone() -> None:
    told = [scenario(name="a"), scenario(name="b")]
    rows = list(conform({Place("kernel"): told}, with_sim=True, opener=closed))
    assert [(row.state, row.why) for row in rows] == [("failed", "KSM is in use; and so it is")] * 2


def test_a_host_that_fails_at_its_end_is_a_row_of_its_own() -> None:
    first, last = conform({Place("kernel"): [scenario()]}, with_sim=True, opener=fails_at_its_end)
    assert first.state == "equal"
    assert (last.scenario, last.state, last.why) == (AT_THE_END, "failed", "knobs could not be restored")
    assert last.repeat == "pagefold conform --host sim,kernel"


def swallows(host: Host) -> None:
    with suppress(Exception):
        host.scan()


def test_a_host_that_dies_is_noticed_though_the_scenario_goes_on() -> None:
    (row,) = compared("dies", scenario(swallows))
    assert (row.state, row.why) == ("failed", "it died")


def ends_all(host: Host) -> None:
    sys.exit(0)


def skips(host: Host) -> None:
    pytest.skip("not today")


def answers(host: Host) -> str:
    return "fine"


def divides(host: Host) -> None:
    assert 1 // 0


@pytest.mark.parametrize(
    ("run", "said"),
    [
        (ends_all, "SystemExit: 0"),
        (skips, "Skipped: not today"),
        (answers, "it returned 'fine'"),
        (divides, "ZeroDivisionError"),
    ],
)
def test_a_scenario_that_ends_oddly_has_failed(run: object, said: str) -> None:
    first, second = compared("", scenario(run, name="odd"), scenario(name="next"))
    assert first.state == "failed"
    assert said in first.why
    assert second.state == "equal"


def test_a_host_that_cannot_be_observed_at_the_end_has_failed_the_scenario() -> None:
    (row,) = compared("blind", scenario(quiet))
    assert row.state == "different"
    assert row.why.endswith("FileNotFoundError: ksm_stat")


def test_a_line_to_repeat_it_is_one_shell_command() -> None:
    odd = Scenario("x", Path("a b/some.py"), quiet)
    row = Row(odd, Place("guest", 2, kernel=Path("my vmlinuz")), 2, "failed", with_sim=True)
    words = shlex.split(row.repeat)
    assert words == [
        "pagefold",
        "conform",
        "a b/some.py::x",
        "--host",
        "sim,guest",
        "--nodes",
        "2",
        "--kernel",
        "my vmlinuz",
    ]


def test_a_scenario_that_cannot_be_run_is_skipped_with_the_reason() -> None:
    (row,) = compared("", scenario(nodes=2))
    assert (row.state, row.why) == ("skipped", "needs 2 nodes, there is 1")


def test_without_the_simulated_machine_the_first_host_is_the_reference() -> None:
    @contextmanager
    def opener(place: Place) -> Iterator[FreshHost]:
        yield Bent("" if place.kind == "kernel" else "get", 3 if place.hotplug else 1)

    told = [scenario()]
    places = {Place("kernel"): told, Place("guest"): told, Place("guest", 3, True): told}
    first, second, third = conform(places, with_sim=False, opener=opener)
    assert (first.state, first.reference) == ("ran", "")
    assert (second.state, second.reference) == ("different", "kernel")
    assert (third.state, third.reference) == ("ran", "")  # another number of nodes: nothing to compare with


def test_each_place_is_opened_once() -> None:
    one, two, four = scenario(name="one"), scenario(name="two", nodes=2), scenario(name="four", nodes=4)
    off = scenario(name="off", nodes=2, needs=frozenset({"offline"}))
    everything = [one, two, four, off]
    assert arrange(everything, ["sim", "kernel", "guest"], None, {}) == {
        Place("kernel"): everything,
        Place("guest", 2): [one, two],
        Place("guest", 4): [four],
        Place("guest", 2, hotplug=True): [off],
    }
    assert list(arrange([scenario(nodes=9)], ["guest"], None, {})) == [
        Place("guest", 8)
    ]  # which then says that it has 8
    assert list(arrange([one], ["kernel", "guest"], None, {})) == [Place("kernel"), Place("guest", nodes_here())]
    assert arrange(everything, ["sim"], None, {}) == {
        Place("sim", 1): [one],
        Place("sim", 2): [two, off],
        Place("sim", 4): [four],
    }
    with_kernel: Mapping[str, Place] = {"guest": Place("guest", kernel=Path("vmlinuz"))}
    assert list(arrange([one], ["guest"], 3, dict(with_kernel))) == [Place("guest", 3, kernel=Path("vmlinuz"))]  # type: ignore[arg-type]


def test_names_of_hosts() -> None:
    assert check_kinds(["guest", "sim", "guest"]) == ["sim", "guest"]
    with pytest.raises(UsageError, match="no host 'cloud'; use sim, kernel, guest"):
        check_kinds(["cloud"])
