"""Kill the daemon at every step of the protocol, and see that clients have their memory, the next daemon learns them, and nothing is left.

The steps are calls of the daemon's own functions, counted by the nursery; the clients are processes, and live through all of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.live.conftest import Start
from tests.live.processes import DaemonProcess, WorkerProcess, eventually
from tests.live.store_files import anywhere, held_by

from pagefold.errors import PagefoldError
from pagefold.live.messages import PAGE

Workers = Callable[[Path], WorkerProcess]

# What the daemon is doing when it ends: (call, how often it was called, whether it has just returned).
ARRIVAL = [
    ("pagefold.live.daemon.Daemon._accept", 1, False),
    ("pagefold.live.peer.Peer.open_files", 2, False),
    ("pagefold.live.peer.Peer.open_files", 2, True),
    ("pagefold.live.merging.Merging.join", 3, True),
    ("pagefold.live.peer.Peer.send", 1, False),
    ("pagefold.live.peer.Peer.send", 3, True),
    ("pagefold.live.merging.Merging.advise", 1, False),
    ("pagefold.live.merging.Merging.advise", 3, True),
]
LOOKING = [
    ("pagefold.live.looking.Looking.look", 1, False),
    ("pagefold.live.tracking.private_pages", 2, True),
    ("pagefold.live.looking.Looking.read", 1, False),
    ("pagefold.live.mirror.Mirror.update", 2, False),
    ("pagefold.live.looking.Looking.read", 3, True),
    ("pagefold.engine.Engine.scan", 1, True),
    ("pagefold.engine.Engine.scan", 2, True),
]
FILLING = [
    ("pagefold.live.merging.Merging._fill", 1, False),
    ("pagefold.live.store.Store.allocate", 1, False),
    ("pagefold.live.store._make", 1, True),
    ("pagefold.live.store.Extent._back", 1, False),
    ("pagefold.live.store.Extent._back", 1, True),
    ("pagefold.live.slots.Slots._copy", 1, True),
    ("pagefold.live.store.Extent.publish", 1, False),
    ("pagefold.live.store.Extent.publish", 1, True),
]
WINDOWS = [
    ("pagefold.live.store.Extent.descriptor_for", 1, False),
    ("pagefold.live.store.Extent.descriptor_for", 2, True),
    ("pagefold.live.merging.Merging._send", 1, False),
    ("pagefold.live.merging.Merging._send", 1, True),
    ("pagefold.live.peer.Peer.ask", 2, False),
    ("pagefold.live.peer.Peer.ask", 3, True),
    ("pagefold.live.peer.Peer.take_batch", 1, False),
    ("pagefold.live.merging.Merging.outcome", 1, False),
    ("pagefold.live.merging.Merging.outcome", 2, True),
    ("pagefold.live.merging.Merging.outcome", 3, True),
]


HELLO = "pagefold.live.daemon.Daemon._hello"  # steps are counted from the first client on


class Party:
    """Some workers with equal memory, of which each has a page of its own."""

    def __init__(self, workers: Workers, path: Path, count: int = 3) -> None:
        self.workers = [workers(path) for _ in range(count)]
        for number, worker in enumerate(self.workers):
            worker.advise(1, 90, [20, 21])
            worker.write(1, 40 + number, 7)

    def right(self) -> bool:
        return all(worker.right() for worker in self.workers)

    def merged(self, daemon: DaemonProcess) -> bool:
        """Tell whether all that is equal is one now."""
        stat = daemon.stat()
        everywhere = 88 - len(self.workers)  # and each page of one's own is equal in the others
        sharing = everywhere * (len(self.workers) - 1) + len(self.workers) * (len(self.workers) - 2)
        return len(stat["clients"]) == len(self.workers) and stat["counters"]["pages_sharing"] == sharing


@pytest.mark.parametrize(
    "steps", [ARRIVAL, LOOKING, FILLING, WINDOWS], ids=["arrival", "looking", "filling", "windows"]
)
def test_killed_at_every_step_of_merging(daemons: Start, workers: Workers, steps: list[tuple[str, int, bool]]) -> None:
    """One daemon after the other dies in front of the same clients."""
    daemon = daemons(knobs={"run": 0})
    party = Party(workers, daemon.path)
    daemon.kill()
    for call, count, after in steps:
        since = HELLO if call != "pagefold.live.daemon.Daemon._accept" else ""
        daemon = daemons(sabotage={"call": call, "count": count, "after": after, "since": since})
        assert daemon.code() == -signal.SIGKILL, f"it never came to {call}"
        assert party.right(), call
    last = daemons()
    eventually(lambda: party.merged(last))
    assert party.right()
    last.judge()


GIVING_BACK = [
    ("pagefold.live.mirror.Mirror.set", 1, False),
    ("pagefold.live.mirror.Mirror.set", 1, True),
    ("pagefold.live.peer.Peer.ask", 1, False),
    ("pagefold.live.peer.Peer.ask", 3, True),
    ("pagefold.live.merging.Merging.outcome", 1, False),
    ("pagefold.live.merging.Merging.outcome", 2, True),
    ("pagefold.live.tidying.Tidying.tidy", 1, True),
]


def test_killed_while_it_gives_everything_back(daemons: Start, workers: Workers) -> None:
    first = daemons(knobs={"run": 0})
    party = Party(workers, first.path)
    first.kill()
    knob = "pagefold.live.mirror.Mirror.set"
    for call, count, after in GIVING_BACK:
        since = knob if call != knob else ""
        daemon = daemons(sabotage={"call": call, "count": count, "after": after, "since": since})
        eventually(lambda: party.merged(daemon))  # noqa: B023
        with contextlib.suppress(PagefoldError):
            daemon.set(run=2)
        assert daemon.code() == -signal.SIGKILL, f"it never came to {call}"
        assert party.right(), call
    last = daemons()
    eventually(lambda: party.merged(last))


def test_killed_while_extents_are_emptied_and_freed(daemons: Start, workers: Workers) -> None:
    calls = [
        ("pagefold.live.slots.Slots.relocate", 1, False),
        ("pagefold.live.slots.Slots.relocate", 1, True),
        ("pagefold.live.tidying.Tidying._empty", 1, True),
        ("pagefold.live.store.Store._free", 1, False),
        ("pagefold.live.store.Store._free", 1, True),
    ]
    first = daemons(knobs={"run": 0})
    party = Party(workers, first.path)
    first.kill()
    for call, count, after in calls:
        daemon = daemons(sabotage={"call": call, "count": count, "after": after})
        eventually(lambda: daemon.ended() or party.merged(daemon))  # noqa: B023
        numbers = [worker.advise(2, 400) for worker in party.workers]
        eventually(lambda: daemon.ended() or daemon.stat()["store_bytes"] >= 400 * PAGE)  # noqa: B023
        for worker, number in zip(party.workers, numbers, strict=True):
            assert worker.unadvise(number)
        assert daemon.code() == -signal.SIGKILL, f"it never came to {call}"
        assert party.right(), call
    last = daemons()
    eventually(lambda: party.merged(last))


def test_killed_while_a_client_leaves(daemons: Start, workers: Workers) -> None:
    first = daemons(knobs={"run": 0})
    party = Party(workers, first.path, 4)
    first.kill()
    for after in (False, True):
        call = "pagefold.live.mirror.Mirror.detach"
        daemon = daemons(sabotage={"call": call, "count": 1, "after": after, "since": HELLO})
        eventually(lambda: party.merged(daemon))  # noqa: B023
        party.workers.pop().kill()
        assert daemon.code() == -signal.SIGKILL
        assert party.right()
    last = daemons()
    eventually(lambda: party.merged(last))


def test_clients_and_daemon_killed_together(daemons: Start, workers: Workers) -> None:
    """Nothing is left: no socket that answers, no file of the store."""
    daemon = daemons()
    party = Party(workers, daemon.path, 4)
    eventually(lambda: party.merged(daemon))
    used = held_by(daemon.pid)
    assert used
    daemon.kill()
    for worker in party.workers[:2]:
        worker.kill()
    assert all(worker.right() for worker in party.workers[2:])
    assert held_by(*(worker.pid for worker in party.workers[2:])) == used, "who lives maps it still"
    for worker in party.workers[2:]:
        worker.kill()
    assert not anywhere(used)
    again = daemons()
    assert again.stat()["clients"] == []
    again.stop()
    assert not list(daemon.path.parent.iterdir())


def test_extents_of_dead_daemons_are_gone_when_everybody_has_moved(daemons: Start, workers: Workers) -> None:
    daemon = daemons()
    party = Party(workers, daemon.path)
    eventually(lambda: party.merged(daemon))
    for _ in range(3):
        daemon.kill()
        daemon = daemons()
        eventually(lambda: party.merged(daemon))  # noqa: B023
    for worker in party.workers:
        worker.drop()
    eventually(lambda: len(held_by(daemon.pid, *(worker.pid for worker in party.workers))) <= 1 + 3)
    daemon.set(run=2)
    eventually(lambda: daemon.stat()["store_bytes"] == 0)
    assert party.right()


def test_a_daemon_that_hangs_holds_no_client_up(daemons: Start, workers: Workers) -> None:
    """Clients never wait for it: they read and write while it is stopped in the middle of its work."""
    daemon = daemons()
    party = Party(workers, daemon.path)
    eventually(lambda: party.merged(daemon))
    os.kill(daemon.pid, signal.SIGSTOP)
    for worker in party.workers:
        assert worker.write(1, 5, 3)
        assert worker.right()
    os.kill(daemon.pid, signal.SIGCONT)
    eventually(lambda: daemon.stat()["cow_breaks"] == 3)
