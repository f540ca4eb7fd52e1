"""Own the simulated host: a `Machine` and its `Engine`, which validates itself at every observation."""

from __future__ import annotations

import errno
from collections.abc import Mapping

from pagefold import settings
from pagefold.engine import Engine
from pagefold.errors import CorruptionError
from pagefold.machine import Area, Machine, Process
from pagefold.scenario.host import COUNTERS, KNOBS, STATS, Observation
from pagefold.settings import Rules

FRAMES = 65536  # per node, as guests have


class SimProcess:
    """A process of the simulated machine, as a scenario sees it."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.munmap = process.munmap
        self.write = process.write
        self.read = process.read
        self.madvise = process.madvise
        self.merge_any = process.merge_any
        self.move_pages = process.move_pages
        self.pin = process.pin
        self.unpin = process.unpin

    @property
    def number(self) -> int:
        """See HostProcess."""
        return self._process.pid

    def mmap(self, pages: int, node: int | None = None) -> Area:
        """See HostProcess."""
        if node is not None and not self._process.machine.is_online(node):
            raise OSError(errno.EINVAL, f"node {node} is offline")
        return self._process.mmap(pages, node=node)

    def fork(self) -> SimProcess:
        """See HostProcess."""
        return SimProcess(self._process.fork())

    def exit(self) -> None:
        """See HostProcess."""
        self._process.unpin_all()
        self._process.exit()


class SimHost:
    """The simulated machine with so many nodes."""

    name = "sim"
    release = ""
    features = frozenset({"pin", "merge_any", "offline", *settings.KNOBS})

    def __init__(self, nodes: int = 1, rules: Rules = "mainline") -> None:
        self.nodes = nodes
        self.rules = rules
        self._broken: list[str] = []
        self.begin({})

    def begin(self, knobs: Mapping[str, int | str]) -> None:
        """See FreshHost."""
        self.machine = Machine(self.nodes, FRAMES, swap=0, shadow=True)
        self.engine = Engine(self.machine, self.rules, **{**KNOBS, "run": 1, **knobs})

    def end(self) -> None:
        """See FreshHost. Nothing outlives the machine, and the next scenario begins with another one."""

    def set(self, knob: str, value: int | str) -> None:
        """See Host."""
        self.engine.set(knob, value)

    def get(self, name: str) -> int | str:
        """See Host."""
        return self.engine.get(name)

    def spawn(self) -> SimProcess:
        """See Host."""
        return SimProcess(self.machine.spawn())

    def offline(self, node: int) -> None:
        """See Host."""
        if node == 0 or not self.machine.is_online(node):
            raise OSError(errno.EINVAL, f"node {node} is the one that boots, or offline already")
        self.machine.offline(node)

    def online(self, node: int) -> None:
        """See Host."""
        self.machine.online(node)

    def scan(self, passes: int = 1) -> None:
        """See Host."""
        self.engine.scan_full(passes)

    def observe(self) -> Observation:
        """See Host."""
        try:
            self.engine.validate()
        except CorruptionError as error:
            self._broken.append(str(error))
        living = [process for process in self.machine.processes if process.alive]
        stats = {process.pid: {name: process.ksm_stat()[name] for name in STATS} for process in living}
        pages = [(process.pid, vpn, at.node, at.frame) for process in living for vpn, at in process.pages()]
        return Observation.of({name: int(self.engine.get(name)) for name in COUNTERS}, stats, pages)

    def complaints(self) -> list[str]:
        """See FreshHost."""
        found, self._broken = self._broken, []
        return found
