"""Own the near side of a real-kernel host: the host interface, spoken to a driver on the kernel to be judged (the folder `far`).

Where that kernel runs is not known here: requests and answers are lines over two pipes.
"""

from __future__ import annotations

import errno
import json
import os
import select
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from pagefold import settings
from pagefold.errors import EngineStopped, NoSuchProcess, UnknownKnob, UsageError
from pagefold.machine import Area
from pagefold.scenario.host import COUNTERS, KNOBS, STATS, HostFailed, Observation, WrongFill

PATIENCE = 120.0  # seconds in which any request must be answered, or the kernel hangs
# Where the first area of a process starts; each further one starts a page behind the last, as in a `Machine`.
FIRST_PAGE = 16


class Pipe(Protocol):
    """What a driver is reached by."""

    def fileno(self) -> int:
        """Return the descriptor."""


class Channel:
    """Requests and answers over two pipes."""

    def __init__(self, to: Pipe, back: Pipe, who: str) -> None:
        self._to, self._back, self._who = to, back, who
        self._read = b""
        self._failed = ""  # why nothing more is asked: a late answer would be taken for the next one

    def ask(self, *request: Any) -> Any:
        """Return the answer to a request; OSError if that is the answer, HostFailed if none comes."""
        try:
            if self._failed:
                raise HostFailed(self._failed)
            self._send(json.dumps(request).encode() + b"\n")
            answer = json.loads(self._line(request))
        except BrokenPipeError:
            self._failed = f"{self._who}: it is gone; nothing was answered to {request}"
            raise HostFailed(self._failed) from None
        except HostFailed as error:
            self._failed = str(error)
            raise
        if "errno" in answer:
            raise OSError(answer["errno"], answer["text"])
        return answer["ok"]

    def _send(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._to.fileno(), data) :]

    def _line(self, request: Any) -> bytes:
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._read:
            left = max(deadline - time.monotonic(), 0)
            if not select.select([self._back], [], [], left)[0]:
                raise HostFailed(f"{self._who}: no answer to {request} within {PATIENCE:.0f} seconds")
            got = os.read(self._back.fileno(), 1 << 16)
            if not got:
                raise HostFailed(f"{self._who}: it died at {request}")
            self._read += got
        line, self._read = self._read.split(b"\n", 1)
        return line


class KernelProcess:
    """A real process, driven."""

    def __init__(self, host: KernelHost, number: int, next_vpn: int, mapped: Iterable[int]) -> None:
        self._host = host
        self.number = number
        self._next_vpn = next_vpn
        self._mapped = set(mapped)  # page numbers
        self._pins: dict[int, int] = {}  # page number: how many
        self._alive = True

    def _check_alive(self) -> None:
        if not self._alive:
            raise NoSuchProcess(f"process {self.number} of this host has exited")

    def _ask(self, verb: str, *arguments: Any) -> Any:
        self._check_alive()
        return self._host.channel.ask("worker", self.number, verb, *arguments)

    def _page(self, area: Area, index: int) -> int:
        vpn = area.vpn(index)
        if vpn not in self._mapped:
            raise UsageError(f"page {index} (number {vpn}) of process {self.number} is not mapped")
        return vpn

    def fork(self) -> KernelProcess:
        """See HostProcess."""
        self._check_alive()
        return self._host._adopt("fork", self.number, next_vpn=self._next_vpn, mapped=self._mapped)

    def exit(self) -> None:
        """See HostProcess."""
        self._check_alive()
        for vpn, count in self._pins.items():
            for _ in range(count):
                self._ask("unpin", vpn)  # if the kernel does it, it does it later
        self._host.channel.ask("exit", self.number)
        self._alive = False

    def mmap(self, pages: int, node: int | None = None) -> Area:
        """See HostProcess."""
        if pages < 1:
            raise UsageError(f"an area of {pages} pages cannot be; use 1 or more")
        if node is not None:
            self._host.check_node(node)
        area = Area(self._next_vpn, pages)
        self._ask("mmap", area.start, pages, node)
        self._next_vpn += pages + 1
        self._mapped.update(range(area.start, area.start + pages))
        return area

    def munmap(self, area: Area, first: int = 0, count: int | None = None) -> None:
        """See HostProcess."""
        start, pages = area.span(first, count)
        self._ask("munmap", start, pages)
        self._mapped.difference_update(range(start, start + pages))

    def write(self, area: Area, index: int, content: int) -> None:
        """See HostProcess."""
        self._ask("write", self._page(area, index), content)

    def read(self, area: Area, index: int) -> int:
        """See HostProcess."""
        try:
            return int(self._ask("read", self._page(area, index)))
        except OSError as error:
            if error.errno == errno.EILSEQ:
                raise WrongFill(f"process {self.number}: {error.strerror}; data was lost") from None
            raise

    def madvise(self, area: Area, advice: str) -> None:
        """See HostProcess."""
        if advice not in ("MERGEABLE", "UNMERGEABLE"):
            raise UsageError(f"advice {advice!r} is not known; use MERGEABLE or UNMERGEABLE")
        try:
            self._ask("madvise", area.start, area.pages, advice)
        except OSError as error:
            # Over a hole the call advises the rest and then says ENOMEM.
            if error.errno != errno.ENOMEM or self._mapped.issuperset(range(area.start, area.start + area.pages)):
                raise

    def merge_any(self, on: bool) -> None:
        """See HostProcess."""
        self._ask("merge_any", on)

    def move_pages(self, area: Area, wishes: Mapping[int, int]) -> dict[int, int]:
        """See HostProcess."""
        return {index: int(self._ask("move", area.vpn(index), node)) for index, node in wishes.items()}

    def pin(self, area: Area, index: int) -> None:
        """See HostProcess."""
        vpn = self._page(area, index)
        self._ask("pin", vpn)
        self._pins[vpn] = self._pins.get(vpn, 0) + 1

    def unpin(self, area: Area, index: int) -> None:
        """See HostProcess."""
        vpn = area.vpn(index)
        if not self._pins.get(vpn):
            raise UsageError(f"page {index} is not pinned by process {self.number}")
        self._ask("unpin", vpn)
        self._pins[vpn] -= 1


class KernelHost:
    """A real kernel. `complain` tells what the kernel itself complained of since it was last asked."""

    def __init__(
        self, name: str, channel: Channel, complain: Callable[[], list[str]], features: frozenset[str]
    ) -> None:
        self.name = name
        self.channel = channel
        self.complaints = complain
        try:
            said = channel.ask("hello")
        except OSError as error:
            raise HostFailed(f"{name}: {error.strerror}") from None
        numbers = said["nodes"]
        counts = (count for count in range(len(numbers), 0, -1) if numbers[:count] == list(range(count)))
        self.nodes = next(counts, 0)
        if self.nodes > 1 and said["balancing"]:
            raise HostFailed(f"{name}: NUMA balancing moves pages by itself; set kernel.numa_balancing to 0")
        self.release = str(said["release"])
        self.features = features | frozenset(said["features"])
        self._spawned = 0

    def begin(self, knobs: Mapping[str, int | str]) -> None:
        """See FreshHost."""
        self._spawned = 0
        try:
            self.channel.ask("reset", KNOBS)
        except OSError as error:
            raise HostFailed(
                f"{self.name}: {error.strerror}; nothing can be compared while it would be merged too"
            ) from None
        for knob, value in knobs.items():
            self.set(knob, value)

    def end(self) -> None:
        """See FreshHost."""
        self.channel.ask("clear")

    def set(self, knob: str, value: int | str) -> None:
        """See Host."""
        settings.find(knob)
        self.channel.ask("set", knob, value)

    def get(self, name: str) -> int | str:
        """See Host."""
        if name not in COUNTERS and name not in settings.KNOBS:
            raise UnknownKnob(f"there is no knob or counter {name!r}")
        answer: int | str = self.channel.ask("get", name)
        return answer

    def spawn(self) -> KernelProcess:
        """See Host."""
        return self._adopt("spawn", next_vpn=FIRST_PAGE, mapped=())

    def _adopt(self, *how: Any, next_vpn: int, mapped: Iterable[int]) -> KernelProcess:
        self._spawned += 1
        self.channel.ask(*how, self._spawned)
        return KernelProcess(self, self._spawned, next_vpn, mapped)

    def offline(self, node: int) -> None:
        """See Host. Not this machine's own memory: a scenario states that it needs to."""
        self._check_hotplug(node)
        self.channel.ask("offline", node)

    def online(self, node: int) -> None:
        """See Host."""
        self._check_hotplug(node)
        self.channel.ask("online", node)

    def check_node(self, node: int) -> None:
        """Raise UsageError if there is no such node."""
        if not 0 <= node < self.nodes:
            raise UsageError(f"node {node} does not exist; use 0 to {self.nodes - 1}")

    def _check_hotplug(self, node: int) -> None:
        self.check_node(node)
        if "offline" not in self.features:
            raise OSError(
                errno.EOPNOTSUPP, f"{self.name}: memory is not taken offline here; state needs = {{'offline'}}"
            )

    def scan(self, passes: int = 1) -> None:
        """See Host."""
        if self.get("run") != 1:
            raise EngineStopped(f"run is {self.get('run')}: nothing is scanned; set run to 1")
        self.channel.ask("scan", passes)

    def observe(self) -> Observation:
        """See Host."""
        seen = self.channel.ask("observe", COUNTERS)
        stats = {int(number): {name: of[name] for name in STATS if name in of} for number, of in seen["stats"].items()}
        return Observation.of(seen["counters"], stats, (tuple(page) for page in seen["pages"]))
