"""Own the record of a scenario's run: every step as the line of code that repeats it, with what came of it.

A `Recorder` is a host in front of another one. It names processes p1, p2, … and areas r1, r2, … in the order in which they come to be,
so the same scenario gives the same lines on every host. After every scan it observes by itself.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from operator import index
from typing import Any

from pagefold.errors import NoSuchProcess, PagefoldError, UsageError
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
        self.failed: HostFailed | None = None  # though the scenario may not have let it pass
        self._areas: dict[Area, str] = {}

    def note(self, line: str, action: Callable[[], Any], name: Callable[[Any], str] | None = None) -> Any:
        """Do something and write down what came of it; an error of the step is written down and passed on."""
        try:
            result = action()
        except HostFailed as error:
            self.failed = error
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
        given = value if isinstance(value, str) else index(value)
        self.note(f"host.set({knob!r}, {given!r})", lambda: self._host.set(knob, given))

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
        number = index(node)
        self.note(f"host.offline({number})", lambda: self._host.offline(number))

    def online(self, node: int) -> None:
        """See Host."""
        number = index(node)
        self.note(f"host.online({number})", lambda: self._host.online(number))

    def scan(self, passes: int = 1) -> None:
        """See Host. What can be seen after it is written down."""
        count = index(passes)
        if count < 1:
            raise UsageError(f"{count} full scans cannot be waited for; use 1 or more")
        self.note(f"host.scan({'' if count == 1 else count})", lambda: self._host.scan(count))
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
        self._alive = True
        self.number = process.number

    def _note(self, call: str, action: Callable[[], Any], name: Callable[[Any], str] | None = None) -> Any:
        def do() -> Any:
            if not self._alive:
                raise NoSuchProcess(f"process {self.number} has exited")
            return action()

        return self._recorder.note(f"p{self.number}.{call}", do, name)

    def _on_page(self, call: str, area: Area, page: int, *more: int) -> Any:
        """Call a method of the process with an area, a page of it, and further numbers."""
        numbers = tuple(map(index, (page, *more)))
        line = f"{call}({self._recorder.area_name(area)}, {', '.join(map(str, numbers))})"
        return self._note(line, lambda: getattr(self._process, call)(area, *numbers))

    def fork(self) -> RecordedProcess:
        """See HostProcess."""
        process = self._note("fork()", self._process.fork, lambda process: f"p{process.number}")
        return RecordedProcess(self._recorder, process)

    def exit(self) -> None:
        """See HostProcess."""
        self._note("exit()", self._process.exit)
        self._alive = False

    def mmap(self, pages: int, node: int | None = None) -> Area:
        """See HostProcess."""
        count, wish = index(pages), None if node is None else index(node)
        call = f"mmap({count}{'' if wish is None else f', node={wish}'})"
        area: Area = self._note(call, lambda: self._process.mmap(count, wish), self._recorder.new_area)
        return area

    def munmap(self, area: Area, first: int = 0, count: int | None = None) -> None:
        """See HostProcess."""
        self._on_page("munmap", area, first, *(() if count is None else (count,)))

    def write(self, area: Area, index: int, content: int) -> None:
        """See HostProcess."""
        if not 0 <= content <= MOST_CONTENT:
            raise UsageError(f"content {content} does not fit; use 0 to {MOST_CONTENT}")
        self._on_page("write", area, index, content)

    def read(self, area: Area, index: int) -> int:
        """See HostProcess."""
        return int(self._on_page("read", area, index))

    def madvise(self, area: Area, advice: str) -> None:
        """See HostProcess."""
        call = f"madvise({self._recorder.area_name(area)}, {advice!r})"
        self._note(call, lambda: self._process.madvise(area, advice))

    def merge_any(self, on: bool) -> None:
        """See HostProcess."""
        wanted = bool(on)
        self._note(f"merge_any({wanted})", lambda: self._process.merge_any(wanted))

    def move_pages(self, area: Area, wishes: Mapping[int, int]) -> dict[int, int]:
        """See HostProcess."""
        numbers = {index(page): index(node) for page, node in wishes.items()}
        call = f"move_pages({self._recorder.area_name(area)}, {numbers})"
        answer: dict[int, int] = self._note(call, lambda: self._process.move_pages(area, numbers))
        return answer

    def pin(self, area: Area, index: int) -> None:
        """See HostProcess."""
        self._on_page("pin", area, index)

    def unpin(self, area: Area, index: int) -> None:
        """See HostProcess."""
        self._on_page("unpin", area, index)


def _say(error: Exception) -> str:
    """Say which error it was, alike on every host: its errno, or its class."""
    code = getattr(error, "errno", None)
    return f"OSError {errno.errorcode.get(code, code)}" if isinstance(code, int) else type(error).__name__


def as_scenario(steps: list[Step], name: str, title: str, knobs: Mapping[str, int | str]) -> Iterator[str]:
    """Yield the lines of a scenario that begins with these knobs and repeats these steps."""
    yield f"def scenario_{name}(host: Host) -> None:"
    yield f'    """{title}"""'
    for knob, value in knobs.items():
        yield f"    host.set({knob!r}, {value!r})"
    for step in steps:
        if isinstance(step.outcome, Observation):
            continue
        if step.outcome.startswith("raises "):
            yield "    with contextlib.suppress(OSError, PagefoldError):"
            yield f"        {step.line}"
        else:
            yield f"    {step.line}"
