"""Judge what is remembered of a command's savings: the peak and when, the end before it winds down, the first time that it settled."""

from __future__ import annotations

from typing import Any

from pagefold.live.savings import Savings

MIB = 1 << 20


def stat(uptime: float, saved: int, *, clients: int = 1, tracked: int = 100 * MIB, **more: Any) -> dict[str, Any]:
    return {
        "uptime_seconds": uptime,
        "saved_bytes": saved,
        "tracked_bytes": tracked,
        "clients": [{"pid": number} for number in range(clients)],
        "settled": False,
        "settled_seconds": None,
        "history": [],
        **more,
    }


def test_times_are_the_commands_own() -> None:
    """The daemon was there ten seconds earlier, and saved much then."""
    savings = Savings()
    history = [[3.0, 900 * MIB], [11.5, 7 * MIB], [12.0, 5 * MIB]]
    savings.take(stat(12.5, 4 * MIB, history=history), 2.5)
    assert (savings.peak_saved_bytes, savings.peak_seconds) == (7 * MIB, 1.5)
    assert savings.saved_bytes == 4 * MIB
    savings.take(stat(13.0, 8 * MIB, history=history), 3.0)
    assert (savings.peak_saved_bytes, savings.peak_seconds) == (8 * MIB, 3.0)


def test_the_end_is_before_it_winds_down() -> None:
    savings = Savings()
    savings.take(stat(1.0, 3 * MIB), 1.0)
    savings.take(stat(2.0, 50 * MIB, clients=4), 2.0)
    savings.take(stat(3.0, 49 * MIB, clients=4, tracked=95 * MIB), 3.0)
    savings.take(stat(4.0, 0, clients=4, tracked=10 * MIB), 4.0)
    savings.take(stat(5.0, 0, clients=0, tracked=0), 5.0)
    assert savings.saved_bytes == 49 * MIB
    assert savings.stat["uptime_seconds"] == 3.0


def test_without_clients_nothing_is_known() -> None:
    savings = Savings()
    savings.take(stat(1.0, 0, clients=0, tracked=0), 1.0)
    assert savings.stat == {} and savings.peak_seconds is None


def test_the_peak_is_known_even_if_it_was_between_two_looks() -> None:
    savings = Savings()
    savings.take(stat(9.0, 0, clients=0, tracked=0, history=[[5.0, 70 * MIB], [6.0, 0]]), 8.0)
    assert (savings.peak_saved_bytes, savings.peak_seconds) == (70 * MIB, 4.0)


def test_settled_is_the_first_time() -> None:
    savings = Savings()
    savings.take(stat(1.0, 0, settled=True, settled_seconds=0.5), 1.0)
    assert savings.settled_seconds is None, "nothing was merged yet"
    savings.take(stat(4.0, MIB, settled=True, settled_seconds=3.25), 3.0)
    assert savings.settled_seconds == 2.25
    savings.take(stat(9.0, MIB, settled=True, settled_seconds=8.0), 8.0)
    assert savings.settled_seconds == 2.25


def test_what_had_settled_before_we_came_settled_at_once() -> None:
    savings = Savings()
    savings.take(stat(100.0, MIB, settled=True, settled_seconds=20.0), 1.0)
    assert savings.settled_seconds == 0.0
