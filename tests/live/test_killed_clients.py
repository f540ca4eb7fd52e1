"""Kill clients, or daemon and client at once, at every step of windows and of the protocol; see who is left whole, and nothing left behind.

Clients are processes with the real agent, built with fault points (csrc/fault.h); the daemon is a real one. A client that is to die with
its daemon stops at its step (SIGSTOP), so that both really die there, whoever is quicker.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.live.children import Child, in_child
from tests.live.conftest import Start
from tests.live.processes import eventually
from tests.live.store_files import anywhere, held_by
from tests.live.test_agent import safe
from tests.live.test_agent_link import advise, end, intact, kept, merge, start, write
from tests.live.test_windows import POINTS

from pagefold.live.agent import AgentError

PAGES, ZEROS = 64, 8
OWN = 2  # pages that each survivor has changed
LINK = [("link", point) for point in range(1, 13)]
EVERY = [*POINTS, *LINK]


@pytest.fixture(scope="module", autouse=True)
def windows() -> None:
    if not in_child(safe):
        pytest.skip("userfaultfd windows are not permitted here")


# --- what runs in clients -----------------------------------------------------------------------------------------------------


def begin(path: str, fault: str = "none") -> int:
    """Be a client with the memory that all have."""
    start(path, fault)
    return advise(PAGES, 1, False, ZEROS)[0]


def arm(fault: str) -> None:
    kept["agent"].library.functions.pf_set_fault(fault.encode())


def go_through_everything(path: str, fault: str) -> None:
    """Say and hear all messages there are; without a daemon in the middle of it, go on alone."""
    with contextlib.suppress(AgentError):
        number = begin(path, fault)
        merge(number)
        end(number)
        kept["regions"].clear()
        merge(advise(PAGES, 1, False, ZEROS)[0])


# --- the stage ----------------------------------------------------------------------------------------------------------------


class Stage:
    """A daemon, survivors with equal memory, and one victim after the other."""

    def __init__(self, daemons: Start) -> None:
        self.daemons = daemons
        self.daemon = daemons()
        self.path = str(self.daemon.path)
        self.files: set[int] = set()  # of the store, of all daemons that were
        self.survivors = [Child() for _ in range(2)]
        for at, one in enumerate(self.survivors):
            number = one.do(begin, self.path)
            for page in range(OWN):
                one.do(write, number, OWN * at + page, 7)
        self.recover()

    def recover(self) -> None:
        """Wait until the survivors, and nobody else, are merged; they and the daemon must be whole."""
        each = PAGES - ZEROS - OWN * len(self.survivors)
        eventually(lambda: {one.pid for one in self.survivors} == self.merged_pages().keys())
        eventually(lambda: self.daemon.counters()["pages_sharing"] == each and self.daemon.settled())
        self.files |= held_by(self.daemon.pid)
        self.daemon.judge()
        assert all(one.do(intact) for one in self.survivors)

    def merged_pages(self) -> dict[int, int]:
        """Return how many pages of each client are merged, by its process."""
        return {row["pid"]: row["merged_pages"] for row in self.daemon.stat()["clients"]}

    def another_daemon(self) -> None:
        """Kill the daemon; another one takes its place."""
        self.files |= held_by(self.daemon.pid)
        self.daemon.kill()
        assert all(one.do(intact) for one in self.survivors)
        self.daemon = self.daemons()

    def bring(self, victim: Child, kind: str, point: int, signal_prefix: str) -> None:
        """Let a client come to a step, where it is killed or stopped."""
        fault = f"{signal_prefix}{kind}:{point}"
        if kind == "link":
            victim.begin(go_through_everything, self.path, fault)
            if point == 12:  # RELEASE comes when an extent is to be freed
                eventually(lambda: self.merged_pages().get(victim.pid, 0) > PAGES // 2)
                self.daemon.set(run=2)
        elif kind == "window":
            victim.begin(begin, self.path, fault)
        else:
            number = victim.do(begin, self.path)
            eventually(lambda: self.merged_pages().get(victim.pid, 0) > PAGES // 2)
            if kind == "restore":
                victim.do(write, number, 20, 9)
                victim.do(arm, fault)
                victim.begin(end, number)
            else:  # another daemon has other slots for the same pages
                victim.do(arm, fault)
                self.another_daemon()

    def end(self) -> None:
        """End everybody, the daemon last; nothing of any daemon is left, not even in clients that live."""
        for one in self.survivors:
            for number in one.do(numbers):
                assert one.do(end, number) == 0
            assert one.do(intact)
        self.files |= held_by(self.daemon.pid)
        eventually(lambda: self.daemon.stat()["store_bytes"] == 0)
        self.daemon.stop()
        eventually(lambda: not anywhere(self.files))
        assert not list(Path(self.path).parent.iterdir())
        for one in reversed(self.survivors):  # a later one was forked with the channels of the earlier ones
            one.end()


def numbers() -> list[int]:
    return list(kept["regions"])


@pytest.fixture
def stage(daemons: Start) -> Iterator[Stage]:
    made = Stage(daemons)
    try:
        yield made
        made.end()
    finally:
        for one in reversed(made.survivors):
            if one.status is None:
                one.kill()


def stopped(victim: Child) -> bool:
    """Tell whether no thread runs. One may wait in the kernel for a stopped one, in `mremap`: then waitpid(2) knows of no stop."""
    states = []
    for task in Path(f"/proc/{victim.pid}/task").iterdir():
        with contextlib.suppress(OSError):
            states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    assert "Z" not in states, "it ended by itself"
    return "T" in states and set(states) <= {"T", "D"}


def by_kind(test: Callable[..., Any]) -> Callable[..., Any]:
    """Run a test once for each kind of steps, on one stage."""
    kinds = {kind: [point for name, point in EVERY if name == kind] for kind in ("window", "remap", "restore", "link")}
    return pytest.mark.parametrize(("kind", "points"), kinds.items(), ids=kinds)(test)


@by_kind
def test_a_client_dies_at_every_step(stage: Stage, kind: str, points: list[int]) -> None:
    descriptors = stage.daemon.descriptors()
    for point in points:
        with Child() as victim:
            stage.bring(victim, kind, point, "")
            assert victim.wait() == -signal.SIGKILL, (kind, point)
        if point == 12:
            stage.daemon.set(run=1)
        stage.recover()
        eventually(lambda: len(stage.daemon.descriptors()) <= len(descriptors))


@by_kind
@pytest.mark.parametrize("both", [True, False], ids=["both", "daemon"])
def test_the_daemon_dies_while_a_client_is_at_a_step(stage: Stage, kind: str, points: list[int], both: bool) -> None:
    """The client with it, or it alone: then the client goes on, with the memory it had."""
    for point in points:
        with Child() as victim:
            stage.bring(victim, kind, point, "stop-")
            eventually(lambda: stopped(victim))
            stage.another_daemon()
            if both:
                victim.kill()
            else:
                os.kill(victim.pid, signal.SIGCONT)
                if kind != "remap":
                    victim.result()
                assert victim.do(intact), (kind, point)
        stage.recover()
