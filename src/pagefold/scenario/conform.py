"""Own the comparison: every scenario on every host that can run it, and where they first differ.

Hosts are compared that have the same number of nodes. The simulated machine, if it is asked for, is the reference of every real one;
else it is the first that ran the scenario.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal

from pagefold.errors import UsageError
from pagefold.scenario.files import Scenario
from pagefold.scenario.host import FreshHost, HostFailed
from pagefold.scenario.places import KINDS, Kind, Place, open_host
from pagefold.scenario.record import Recorder, Step, first_difference
from pagefold.scenario.sim_host import SimHost

State = Literal["equal", "ran", "skipped", "different", "failed"]
BAD: tuple[State, ...] = ("different", "failed")
MOST_NODES = 8
USUAL_NODES = 2  # of a guest, where nobody says
Opener = Callable[[Place], AbstractContextManager[FreshHost]]


@dataclass(frozen=True)
class Difference:
    """Where two records first differ: the step (from 1), its line, and (what, on the reference, on this host) of each thing."""

    step: int
    line: str
    things: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Row:
    """What came of one scenario on one host. `reference` is the host it was compared with, "" for none."""

    scenario: Scenario
    kind: Kind
    nodes: int
    state: State
    why: str = ""
    reference: str = ""
    difference: Difference | None = None
    steps: int = 0
    release: str = ""  # of the kernel, "" for the simulated machine

    @property
    def repeat(self) -> str:
        """The command that repeats it."""
        hosts = ",".join(dict.fromkeys(name for name in (self.reference, self.kind) if name))
        nodes = "" if self.kind == "kernel" else f" --nodes {self.nodes}"
        return f"pagefold conform {self.scenario.path}::{self.scenario.name} --host {hosts}{nodes}"


@dataclass
class Run:
    """One run: its record, and why it failed if it did."""

    steps: list[Step] = field(default_factory=list)
    failure: str = ""


def check_kinds(names: Sequence[str]) -> list[Kind]:
    """Return the kinds of hosts named, in the order in which they are run, or raise UsageError."""
    for name in names:
        if name not in KINDS:
            raise UsageError(f"there is no host {name!r}; use {', '.join(KINDS)}")
    return [kind for kind in KINDS if kind in names]


def check_nodes(text: str | None) -> int | None:
    """Return a number of nodes that a guest can have, or raise UsageError."""
    if text is None:
        return None
    if not text.isdecimal() or not 1 <= int(text) <= MOST_NODES:
        raise UsageError(f"{text!r} nodes cannot be; use 1 to {MOST_NODES}")
    return int(text)


def arrange(
    scenarios: Sequence[Scenario], kinds: Sequence[Kind], nodes: int | None, places: dict[Kind, Place]
) -> dict[Place, list[Scenario]]:
    """Return which scenarios are run where: each place is opened once. `places` says more of a kind, as its kernel."""
    arranged: dict[Place, list[Scenario]] = {}
    real = [kind for kind in kinds if kind != "sim"]
    for kind in real or kinds:
        for scenario in scenarios:
            place = places.get(kind, Place(kind))
            if kind != "kernel":
                usual = USUAL_NODES if kind == "guest" else 1
                wanted = nodes or max(usual, scenario.nodes)
                hotplug = kind == "guest" and "offline" in scenario.needs and wanted > 1
                place = place._replace(nodes=wanted, hotplug=hotplug)
            arranged.setdefault(place, []).append(scenario)
    return arranged


def conform(arranged: dict[Place, list[Scenario]], *, with_sim: bool, opener: Opener = open_host) -> Iterator[Row]:
    """Yield what came of every scenario at every place, as it comes."""
    references = _References(with_sim)
    for place, scenarios in arranged.items():
        left = list(scenarios)
        while left:
            yield from _at_place(place, left, references, opener)


def _at_place(place: Place, left: list[Scenario], references: _References, opener: Opener) -> Iterator[Row]:
    """Run what is left at a place until nothing is, or the host fails: then the rest waits for a fresh one."""
    done = 0
    try:
        with opener(place) as host:
            while left:
                row = _judge(host, place.kind, left[0], references)
                left.pop(0)
                done += 1
                yield row
    except HostFailed as error:
        if left:
            yield Row(left.pop(0), place.kind, place.nodes, "failed", str(error))
            if not done:  # it never worked: nor would it for the others
                yield from (Row(one, place.kind, place.nodes, "failed", "the host failed before") for one in left)
                left.clear()
        else:
            raise


class _References:
    """What hosts are compared with: records by scenario and number of nodes."""

    def __init__(self, with_sim: bool) -> None:
        self._with_sim = with_sim
        self._sims: dict[int, SimHost] = {}
        self._first: dict[tuple[Scenario, int], tuple[Kind, Run]] = {}

    def of(self, scenario: Scenario, kind: Kind, nodes: int, run: Run) -> tuple[str, Run | None]:
        """Return the reference's name and record; ("", None) if this is the first."""
        if self._with_sim and kind != "sim":
            sim = self._sims.setdefault(nodes, SimHost(nodes))
            return sim.name, play(sim, scenario)
        key = (scenario, nodes)
        if key in self._first:
            return self._first[key]
        self._first[key] = (kind, run)
        return "", None


def play(host: FreshHost, scenario: Scenario) -> Run:
    """Run a scenario on a host; HostFailed if the host itself fails."""
    run = Run()
    try:
        host.begin(scenario.knobs)
        recorder = Recorder(host)
        run.steps = recorder.steps
        scenario.run(recorder)
    except HostFailed:
        raise
    except Exception as error:
        run.failure = _where(error, scenario)
    else:
        recorder.observe()
    if complaints := host.complaints():
        run.failure = f"{host.name} complains: {'; '.join(complaints)}"
    return run


def _where(error: Exception, scenario: Scenario) -> str:
    """Say what went wrong in a scenario, and at which line of its file."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename == str(scenario.path):
            said = f": {error}" if str(error) else ""
            return f"{scenario.path.name}:{frame.lineno}: {frame.line}: {type(error).__name__}{said}"
    return f"{type(error).__name__}: {error}"


def _judge(host: FreshHost, kind: Kind, scenario: Scenario, references: _References) -> Row:
    """Run a scenario on a host and compare it."""
    if reason := scenario.why_not(host):
        return Row(scenario, kind, host.nodes, "skipped", reason, release=host.release)
    run = play(host, scenario)
    name, reference = references.of(scenario, kind, host.nodes, run)
    state: State = "ran" if reference is None else "equal"
    difference = None
    why = run.failure
    if reference is not None:
        if reference.failure and not why:
            why = f"on {name}: {reference.failure}"
        if found := first_difference(reference.steps, run.steps):
            number, things = found
            line = (reference.steps if number < len(reference.steps) else run.steps)[number].line
            difference = Difference(number + 1, line, tuple(things))
    if difference:
        state = "different"
    elif why:
        state = "failed"
    return Row(scenario, kind, host.nodes, state, why, name, difference, len(run.steps), host.release)
