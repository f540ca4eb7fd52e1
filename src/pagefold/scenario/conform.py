"""Own the comparison: every scenario on every host that can run it, and where they first differ.

Hosts are compared that have the same number of nodes. The simulated machine, if it is asked for, is the reference of every real one;
else it is the first that ran the scenario.
"""

from __future__ import annotations

import shlex
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from pagefold.errors import PagefoldError, UsageError
from pagefold.scenario.files import Scenario
from pagefold.scenario.host import FreshHost, HostFailed
from pagefold.scenario.places import KINDS, Kind, Place, nodes_here, open_host
from pagefold.scenario.record import Recorder, Step, first_difference
from pagefold.scenario.sim_host import SimHost

State = Literal["equal", "ran", "skipped", "different", "failed"]
BAD: tuple[State, ...] = ("different", "failed")
MOST_NODES = 8
USUAL_NODES = 2  # of a guest, where nobody says
AT_THE_END = Scenario("(the host's end)", Path(), lambda host: None)
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
    place: Place
    nodes: int
    state: State
    why: str = ""
    reference: str = ""
    difference: Difference | None = None
    steps: int = 0
    release: str = ""  # of the kernel, "" for the simulated machine
    with_sim: bool = False

    @property
    def kind(self) -> Kind:
        """Which host it was."""
        return self.place.kind

    @property
    def repeat(self) -> str:
        """The command that repeats it."""
        hosts = dict.fromkeys(name for name in ("sim" if self.with_sim else "", self.reference, self.kind) if name)
        one = [] if self.scenario == AT_THE_END else [f"{self.scenario.path}::{self.scenario.name}"]
        words = ["pagefold", "conform", *one, "--host", ",".join(hosts)]
        if self.kind != "kernel":
            words += ["--nodes", str(self.nodes)]
        if self.place.kernel is not None:
            words += ["--kernel", str(self.place.kernel)]
        return shlex.join(words)


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
    scenarios: Sequence[Scenario], kinds: Sequence[Kind], nodes: int | None, places: Mapping[Kind, Place]
) -> dict[Place, list[Scenario]]:
    """Return which scenarios are run where: each place is opened once. `places` says more of a kind, as its kernel.

    Where nobody says how many nodes, a guest has what its scenario needs; beside this machine's kernel alone, as many as that has.
    """
    arranged: dict[Place, list[Scenario]] = {}
    real = [kind for kind in kinds if kind != "sim"]
    usual = {
        "sim": 1,
        "kernel": 1,
        "guest": nodes_here() if real == list(kinds) == ["kernel", "guest"] else USUAL_NODES,
    }
    for kind in real or kinds:
        for scenario in scenarios:
            place = places.get(kind, Place(kind))
            if kind != "kernel":
                wanted = nodes or min(max(usual[kind], scenario.nodes), MOST_NODES)
                hotplug = kind == "guest" and "offline" in scenario.needs and wanted > 1
                place = place._replace(nodes=wanted, hotplug=hotplug)
            arranged.setdefault(place, []).append(scenario)
    return arranged


def conform(
    arranged: Mapping[Place, Sequence[Scenario]], *, with_sim: bool, opener: Opener = open_host
) -> Iterator[Row]:
    """Yield what came of every scenario at every place, as it comes."""
    references = _References(with_sim)
    for place, scenarios in arranged.items():
        left = list(scenarios)
        while left:
            yield from _at_place(place, left, references, opener)


def _at_place(place: Place, left: list[Scenario], references: _References, opener: Opener) -> Iterator[Row]:
    """Run what is left at a place until nothing is, or the host fails: then the rest waits for a fresh one."""
    opened = False
    last: Scenario | None = None
    try:
        with opener(place) as host:
            opened = True
            while left:
                last = left.pop(0)
                yield _judge(host, place, last, references)
                last = None
    except PagefoldError as error:
        why = "; ".join([str(error), *getattr(error, "__notes__", ())])
        # One scenario, or the end after all was done; all of them if it did not even begin: nor would it for the next.
        lost = [last or AT_THE_END] if opened else [*left]
        if not opened:
            left.clear()
        yield from (Row(one, place, place.nodes, "failed", why, with_sim=references.with_sim) for one in lost)


class _References:
    """What hosts are compared with: records by scenario and number of nodes."""

    def __init__(self, with_sim: bool) -> None:
        self.with_sim = with_sim
        self._sims: dict[int, SimHost] = {}
        self._first: dict[tuple[Scenario, int], tuple[Kind, Run]] = {}

    def of(self, scenario: Scenario, kind: Kind, nodes: int, run: Run) -> tuple[str, Run | None]:
        """Return the reference's name and record; ("", None) if this is the first."""
        if self.with_sim and kind != "sim":
            if nodes not in self._sims:
                self._sims[nodes] = SimHost(nodes)
            return "sim", play(self._sims[nodes], scenario)
        key = (scenario, nodes)
        if key in self._first:
            return self._first[key]
        self._first[key] = (kind, run)
        return "", None


def play(host: FreshHost, scenario: Scenario) -> Run:
    """Run a scenario on a host; HostFailed if the host itself fails."""
    run = Run()
    recorder = Recorder(host)
    try:
        host.begin(scenario.knobs)
        run.steps = recorder.steps
        returned = scenario.run(recorder)
        if returned is not None:
            run.failure = f"it returned {returned!r}; what it has to say, it must assert"
        recorder.observe()
    except (HostFailed, KeyboardInterrupt):
        raise
    except BaseException as error:  # also one that wants to end us, or a test framework's
        run.failure = _where(error, scenario)
    if recorder.failed is not None:  # though the scenario went on
        raise recorder.failed
    host.end()  # what the kernel complains of while it cleans up is this scenario's doing too
    if complaints := host.complaints():
        run.failure = f"{host.name} complains: {'; '.join(complaints)}"
    return run


def _where(error: BaseException, scenario: Scenario) -> str:
    """Say what went wrong in a scenario, and at which line of its file."""
    said = f"{type(error).__name__}{f': {error}' if str(error) else ''}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if Path(frame.filename).resolve() == scenario.path.resolve():
            return f"{scenario.path.name}:{frame.lineno}: {frame.line}: {said}"
    return said


def _judge(host: FreshHost, place: Place, scenario: Scenario, references: _References) -> Row:
    """Run a scenario on a host and compare it."""
    row = Row(scenario, place, host.nodes, "ran", release=host.release, with_sim=references.with_sim)
    if reason := scenario.why_not(host):
        return replace(row, state="skipped", why=reason)
    run = play(host, scenario)
    row = replace(row, steps=len(run.steps), why=run.failure)
    name, reference = references.of(scenario, place.kind, host.nodes, run)
    if reference is None:
        return replace(row, state="failed" if run.failure else "ran")
    row = replace(row, reference=name, why=run.failure or (reference.failure and f"on {name}: {reference.failure}"))
    if found := first_difference(reference.steps, run.steps):
        number, things = found
        line = (reference.steps if number < len(reference.steps) else run.steps)[number].line
        return replace(row, state="different", difference=Difference(number + 1, line, tuple(things)))
    return replace(row, state="failed" if row.why else "equal")
