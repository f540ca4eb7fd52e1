"""Own the record of a scenario's run: every step as the line of code that repeats it, with what came of it.

A `Recorder` is a host in front of another one. It names processes p1, p2, … and areas r1, r2, … in the order in which they come to be,
so the same scenario gives the same lines on every host. After every scan it observes by itself.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pagefold.errors import PagefoldError, UsageError
from pagefold.machine import Area
from pagefold.scenario.host import MOST_CONTENT, FreshHost, HostFailed, HostProcess, Observation


@dataclass(frozen=True)
class Step:
    """A line of the scenario, and what came of it: an observation, or a returned value or error as text."""

    line: str
    outcome: Observation | str

    def differences(self, other: Step) -> list[tuple[str, str, str]]:
        """Return (what, here, there) wherever two steps differ."""
        if self.line != other.line:
            return [("step", self.line, other.line)]
        if isinstance(self.outcome, Observation) and isinstance(other.outcome, Observation):
            return list(self.outcome.differences(other.outcome))
        return [] if self.outcome == other.outcome else [("outcome", str(self.outcome), str(other.outcome))]


def first_difference(here: list[Step], there: list[Step]) -> tuple[int, list[tuple[str, str, str]]] | None:
    """Return the first step (from 0) where two records differ, and how; None if they are equal."""
    for number, (one, other) in enumerate(zip(here, there, strict=False)):
        if found := one.differences(other):
            return number, found
    if len(here) != len(there):
        number = min(len(here), len(there))
        line_here, line_there = [steps[number].line if number < len(steps) else "nothing" for steps in (here, there)]
        return number, [("step", line_here, line_there)]
    return None


class Recorder:
    """A host that writes down what is done to another one, and what comes of it."""

    def __init__(self, host: FreshHost) -> None:
        self._host = host
        self.nodes = host.nodes
        self.steps: list[Step] = []
        self._areas: dict[Area, str] = {}

    def note(self, line: str, action: Callable[[], Any], name: Callable[[Any], str] | None = None) -> Any:
        """Do something and write down what came of it; an error of the step is written down and passed on."""
        try:
            result = action()
        except HostFailed:
            raise
        except (OSError, PagefoldError) as error:
            self.steps.append(Step(line, f"raises {_say(error)}"))
            raise
        if name is not None:
            line, result_text = f"{name(result)} = {line}", "done"
        else:
            result_text = "done" if result is None else repr(result)
        self.steps.append(Step(line, result if isinstance(result, Observation) else result_text))
        return result

    def area_name(self, area: Area) -> str:
        """Return the name of an area. A child's is its parent's."""
        return self._areas.get(area) or f"Area({area.start}, {area.pages})"

    def new_area(self, area: Area) -> str:
        """Name an area that has just been made; areas of two processes at the same place are one name."""
        return self._areas.setdefault(area, f"r{len(self._areas) + 1}")

    # --- the interface ---

    def set(self, knob: str, value: int | str) -> None:
        """See Host."""
        self.note(f"host.set({knob!r}, {value!r})", lambda: self._host.set(knob, value))

    def get(self, name: str) -> int | str:
        """See Host."""
        answer: int | str = self.note(f"host.get({name!r})", lambda: self._host.get(name))
        return answer

    def spawn(self) -> RecordedProcess:
        """See Host."""
        process = self.note("host.spawn()", self._host.spawn, lambda process: f"p{process.number}")
        return RecordedProcess(self, process)

    def offline(self, node: int) -> None:
        """See Host."""
        self.note(f"host.offline({node})", lambda: self._host.offline(node))

    def online(self, node: int) -> None:
        """See Host."""
        self.note(f"host.online({node})", lambda: self._host.online(node))

    def scan(self, passes: int = 1) -> None:
        """See Host. What can be seen after it is written down."""
        if passes < 1:
            raise UsageError(f"{passes} full scans cannot be waited for; use 1 or more")
        self.note(f"host.scan({'' if passes == 1 else passes})", lambda: self._host.scan(passes))
        self.observe()

    def observe(self) -> Observation:
        """See Host."""
        seen: Observation = self.note("host.observe()", self._host.observe)
        return seen


class RecordedProcess:
    """A process of a Recorder."""

    def __init__(self, recorder: Recorder, process: HostProcess) -> None:
        self._recorder = recorder
        self._process = process
        self.number = process.number

    def _note(self, call: str, action: Callable[[], Any], name: Callable[[Any], str] | None = None) -> Any:
        return self._recorder.note(f"p{self.number}.{call}", action, name)

    def fork(self) -> RecordedProcess:
        """See HostProcess."""
        process = self._note("fork()", self._process.fork, lambda process: f"p{process.number}")
        return RecordedProcess(self._recorder, process)

    def exit(self) -> None:
        """See HostProcess."""
        self._note("exit()", self._process.exit)

    def mmap(self, pages: int, node: int | None = None) -> Area:
        """See HostProcess."""
        call = f"mmap({pages}{'' if node is None else f', node={node}'})"
        area: Area = self._note(call, lambda: self._process.mmap(pages, node=node), self._recorder.new_area)
        return area

    def munmap(self, area: Area, first: int = 0, count: int | None = None) -> None:
        """See HostProcess."""
        call = f"munmap({self._name(area)}, {first}{'' if count is None else f', {count}'})"
        self._note(call, lambda: self._process.munmap(area, first, count))

    def write(self, area: Area, index: int, content: int) -> None:
        """See HostProcess."""
        if not 0 <= content <= MOST_CONTENT:
            raise UsageError(f"content {content} does not fit; use 0 to {MOST_CONTENT}")
        self._note(f"write({self._name(area)}, {index}, {content})", lambda: self._process.write(area, index, content))

    def read(self, area: Area, index: int) -> int:
        """See HostProcess."""
        return int(self._note(f"read({self._name(area)}, {index})", lambda: self._process.read(area, index)))

    def madvise(self, area: Area, advice: str) -> None:
        """See HostProcess."""
        self._note(f"madvise({self._name(area)}, {advice!r})", lambda: self._process.madvise(area, advice))

    def merge_any(self, on: bool) -> None:
        """See HostProcess."""
        self._note(f"merge_any({on})", lambda: self._process.merge_any(on))

    def move_pages(self, area: Area, wishes: Mapping[int, int]) -> dict[int, int]:
        """See HostProcess."""
        call = f"move_pages({self._name(area)}, {dict(wishes)})"
        answer: dict[int, int] = self._note(call, lambda: self._process.move_pages(area, wishes))
        return answer

    def pin(self, area: Area, index: int) -> None:
        """See HostProcess."""
        self._note(f"pin({self._name(area)}, {index})", lambda: self._process.pin(area, index))

    def unpin(self, area: Area, index: int) -> None:
        """See HostProcess."""
        self._note(f"unpin({self._name(area)}, {index})", lambda: self._process.unpin(area, index))

    def _name(self, area: Area) -> str:
        return self._recorder.area_name(area)


def _say(error: Exception) -> str:
    """Say which error it was, alike on every host: its errno, or its class."""
    code = getattr(error, "errno", None)
    return f"OSError {errno.errorcode.get(code, code)}" if isinstance(code, int) else type(error).__name__


def as_scenario(steps: list[Step], name: str, title: str) -> Iterator[str]:
    """Yield the lines of a scenario that repeats these steps."""
    yield f"def scenario_{name}(host: Host) -> None:"
    yield f'    """{title}"""'
    for step in steps:
        if isinstance(step.outcome, Observation):
            continue
        if step.outcome.startswith("raises "):
            yield "    with contextlib.suppress(OSError, PagefoldError):"
            yield f"        {step.line}"
        else:
            yield f"    {step.line}"
