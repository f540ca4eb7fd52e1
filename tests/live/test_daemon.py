"""Judge the daemon: what it merges, refuses, gives back, counts and says, with clients that come, write, go, and die."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.live.clients import Buffer, Client, Crowd, Pages, Status, random_pages, ready, track
from tests.live.conftest import Start
from tests.live.processes import DaemonProcess, WorkerProcess, eventually, limit_memory

from pagefold import settings
from pagefold.live import control, messages, tracking
from pagefold.live.control import Refused
from pagefold.live.messages import PAGE, RUN_PAGES

Workers = Callable[[Path], WorkerProcess]
ROOT = os.geteuid() == 0


def store_bytes(daemon: DaemonProcess) -> int:
    """Return what the kernel counts for the store, seen from outside."""
    total = 0
    for link in Path(f"/proc/{daemon.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "memfd:pagefold" in str(link.readlink()):
                total += link.stat().st_blocks * 512
    return total


def join_many(crowd: Crowd, daemon: DaemonProcess, count: int, contents: Pages, **how: Any) -> list[Client]:
    """Let so many clients join, each with the same contents."""
    made = [crowd.join(daemon.path) for _ in range(count)]
    for client in made:
        client.advise(contents, **how)
    return made


def merged(daemon: DaemonProcess) -> int:
    return sum(client["merged_pages"] for client in daemon.stat()["clients"])


def zeros(daemon: DaemonProcess) -> int:
    return sum(client["zero_pages"] for client in daemon.stat()["clients"])


# --- merging --------------------------------------------------------------------------------------------------------------


def test_equal_pages_of_four_processes_are_one(daemons: Start, workers: Workers) -> None:
    """What is said to be saved is what the kernel counts, to the page."""
    daemon = daemons(knobs={"run": 0})
    four = [workers(daemon.path) for _ in range(4)]
    for one in four:
        one.advise(1, 200, [50, 51, 52, 199])
    before = sum(one.pss() for one in four)
    assert before == 4 * 200 * PAGE
    daemon.set(run=1)
    stat = daemon.settle()
    for one in four:
        assert one.drop()
        assert one.touch()
    after = sum(one.pss() for one in four)
    assert after == 196 * PAGE == stat["store_bytes"] == store_bytes(daemon)
    assert stat["saved_bytes"] == before - after
    counters = stat["counters"]
    assert (counters["pages_shared"], counters["pages_sharing"], counters["ksm_zero_pages"]) == (196, 3 * 196, 16)
    assert stat["groups"] == [{"node": 0, "pids": [one.pid for one in four], "pages": 196, "bytes": 196 * PAGE}]
    assert all(client["merged_pages"] == 196 for client in stat["clients"])
    assert stat["merged"] == 4 * 200
    assert daemon.judge()["elsewhere"] == 0


def test_one_process_merges_with_itself(daemon: DaemonProcess, workers: Workers) -> None:
    one = workers(daemon.path)
    one.advise(3, 50)
    one.advise(3, 50)
    stat = daemon.settle()
    assert stat["counters"]["pages_shared"] == stat["counters"]["pages_sharing"] == 50
    assert one.drop()
    assert one.touch()
    assert one.pss() == 50 * PAGE


def test_only_what_is_equal_merges(daemon: DaemonProcess, crowd: Crowd) -> None:
    contents = random_pages(1, 60)
    one = crowd.join(daemon.path)
    one.advise(contents)
    other = contents.copy()
    other[10:20] = random_pages(2, 10)
    other[30, 4095] ^= 1
    two = crowd.join(daemon.path)
    two.advise(other)
    crowd.until(daemon.settled)
    assert daemon.counters()["pages_shared"] == 60 - 11
    assert daemon.counters()["pages_unshared"] == 2 * 11
    assert {page for _, first, count, *_ in two.asked for page in range(first, first + count)} == (
        set(range(60)) - {*range(10, 20), 30}
    )


def test_zeros_become_holes(daemon: DaemonProcess, crowd: Crowd) -> None:
    contents = random_pages(1, 20)
    contents[5:12] = 0
    one = crowd.join(daemon.path)
    buffer = one.advise(contents)
    crowd.until(lambda: zeros(daemon) == 7)
    assert one.asked == [(1, 5, 7, 0, 0)], "one run, and no slot"
    assert store_bytes(daemon) == 0
    buffer.write(6, 9)
    buffer.write(7, 0)
    crowd.until(lambda: zeros(daemon) == 6 and daemon.settled())
    assert daemon.counters()["ksm_zero_pages"] == 6, "the page that got zeros again is a hole again"


def test_zeros_are_pages_as_any_others_if_so_wished(daemons: Start, crowd: Crowd) -> None:
    daemon = daemons(knobs={"use_zero_pages": 0})
    contents = random_pages(1, 6)
    contents[2:5] = 0
    join_many(crowd, daemon, 1, contents)
    crowd.until(daemon.settled)
    counters = daemon.counters()
    assert (counters["ksm_zero_pages"], counters["pages_shared"], counters["pages_sharing"]) == (0, 1, 2)
    assert zeros(daemon) == 0


def test_neighbours_get_neighbouring_slots_in_runs(daemon: DaemonProcess, crowd: Crowd) -> None:
    clients = join_many(crowd, daemon, 2, random_pages(1, 300))
    crowd.until(daemon.settled)
    for client in clients:
        lengths = [count for _, _, count, _, _ in client.asked]
        assert sum(lengths) == 300
        assert max(lengths) <= RUN_PAGES
        for before, after in pairwise(sorted(client.asked)):
            assert (after[3], after[4]) == (before[3], before[4] + before[2]), "slots in the order of the pages"
    assert [client["mappings"] for client in daemon.stat()["clients"]] == [1, 1]


def test_a_client_that_comes_later_gets_what_is_there(daemon: DaemonProcess, crowd: Crowd) -> None:
    join_many(crowd, daemon, 2, random_pages(1, 30))
    crowd.until(daemon.settled)
    before = store_bytes(daemon)
    join_many(crowd, daemon, 1, random_pages(1, 30)[::-1])
    crowd.until(lambda: merged(daemon) == 90)
    assert store_bytes(daemon) == before


def test_pages_that_become_equal_merge(daemon: DaemonProcess, crowd: Crowd) -> None:
    one, two = (crowd.join(daemon.path) for _ in range(2))
    first = one.advise(random_pages(1, 10))
    two.advise(random_pages(2, 10))
    crowd.until(daemon.settled)
    assert merged(daemon) == 0
    first.pages[:] = first.expected[:] = random_pages(2, 10)
    crowd.until(lambda: merged(daemon) == 20)


def test_smart_scan_merges_as_well(daemons: Start, crowd: Crowd) -> None:
    daemon = daemons(knobs={"smart_scan": 1})
    join_many(crowd, daemon, 2, random_pages(1, 30))
    crowd.until(daemon.settled)
    assert merged(daemon) == 60


def test_many_small_steps_are_as_good_as_one(daemons: Start, crowd: Crowd) -> None:
    daemon = daemons(knobs={"pages_to_scan": 7})
    join_many(crowd, daemon, 3, random_pages(1, 40))
    crowd.until(daemon.settled)
    assert daemon.counters()["pages_sharing"] == 80


def test_sharing_is_limited_by_dups(daemons: Start, crowd: Crowd) -> None:
    daemon = daemons(knobs={"max_page_sharing": 2})
    join_many(crowd, daemon, 6, random_pages(1, 8))
    crowd.until(daemon.settled)
    stat = daemon.stat()
    assert stat["counters"]["pages_shared"] == 3 * 8, "three copies of each, for two pages each"
    assert stat["counters"]["stable_node_chains"] == 8
    assert store_bytes(daemon) == 3 * 8 * PAGE
    assert merged(daemon) == 48


def test_several_regions_of_a_client_come_and_go(daemon: DaemonProcess, crowd: Crowd) -> None:
    one, two = (crowd.join(daemon.path) for _ in range(2))
    for seed in range(1, 6):
        one.advise(random_pages(seed, 10))
    for seed in (5, 3, 1):
        two.advise(random_pages(seed, 10), number=seed * 1000)
    crowd.until(daemon.settled)
    assert merged(daemon) == 60
    two.unadvise(3000)
    one.unadvise(1)
    crowd.until(lambda: daemon.counters()["pages_shared"] == 10 + 10 + 10 and daemon.settled())
    clients = {client["regions"]: client for client in daemon.stat()["clients"]}
    assert clients[4]["pages"] == 40
    assert clients[2]["pages"] == 20
    one.advise(random_pages(3, 10))
    crowd.until(lambda: merged(daemon) == 10 + 10 + 20 + 10)


# --- writes ---------------------------------------------------------------------------------------------------------------


def test_writes_break_pages_and_are_counted(daemon: DaemonProcess, workers: Workers) -> None:
    one, two = (workers(daemon.path) for _ in range(2))
    for worker in (one, two):
        worker.advise(1, 40)
    daemon.settle()
    for index in (3, 4, 30):
        one.write(1, index, 99)
    eventually(lambda: daemon.stat()["cow_breaks"] == 3)
    assert two.right()
    assert merged(daemon) == 37 + 40
    broken = {client["pid"]: client["broken_pages"] for client in daemon.stat()["clients"]}
    assert broken == {one.pid: 3, two.pid: 0}
    assert daemon.judge()["elsewhere"] == 0


def test_a_newcomer_gets_the_old_bytes_of_a_page_that_was_written(daemon: DaemonProcess, crowd: Crowd) -> None:
    first, *_ = join_many(crowd, daemon, 2, random_pages(1, 10))
    crowd.until(daemon.settled)
    first.buffers[1].write(4, 200)
    crowd.until(lambda: daemon.stat()["cow_breaks"] == 1)
    join_many(crowd, daemon, 1, random_pages(1, 10))
    crowd.until(lambda: merged(daemon) == 29)


@pytest.mark.skipif(not ROOT, reason="needs userfaultfd for kernel faults")
def test_tracked_memory_is_read_when_it_was_written_and_only_then(daemon: DaemonProcess, crowd: Crowd) -> None:
    one, two = join_many(crowd, daemon, 2, random_pages(1, 30), tracked=True)
    one.advise(random_pages(7, 30), tracked=True)
    buffer = two.advise(random_pages(8, 30), tracked=True)
    crowd.until(daemon.settled)
    assert merged(daemon) == 60

    def scanned_and_looked() -> tuple[int, int]:
        return daemon.counters()["pages_scanned"], int(daemon.ask("history")["looks"])

    def rests() -> bool:
        before = scanned_and_looked()
        crowd.until(lambda: scanned_and_looked()[1] > before[1] + 3)
        return scanned_and_looked()[0] == before[0]

    crowd.until(rests)  # looks go on, and find nothing to scan
    buffer.pages[5:9] = buffer.expected[5:9] = random_pages(7, 30)[5:9]
    crowd.until(lambda: merged(daemon) == 68)
    crowd.until(rests)


@pytest.mark.skipif(not ROOT, reason="needs userfaultfd for kernel faults")
def test_what_was_not_advised_is_not_asked_for(daemon: DaemonProcess, crowd: Crowd) -> None:
    """Asking what was written takes the answer away from whoever else wants to know."""
    whole = Buffer(random_pages(1, 90))
    track(whole.address, whole.size)
    client = crowd.join(daemon.path)
    for number, first in ((1, 0), (2, 60)):
        client.send(messages.ADVISE, region=number, start=whole.address + first * PAGE, pages=30, tracked=1)
    crowd.until(lambda: daemon.counters()["pages_unshared"] == 60)
    with Path("/proc/self/pagemap").open("rb") as file:
        left = tracking.take_written(file.fileno(), whole.address, whole.address + whole.size)
    assert left.tolist() == [whole.address + at * PAGE for at in range(30, 60)]
    client.close()
    whole.unmap()


def test_a_page_that_changes_between_the_look_and_the_window_stays(daemon: DaemonProcess, crowd: Crowd) -> None:
    one, two = (crowd.join(daemon.path) for _ in range(2))
    buffer = one.advise(random_pages(1, 10))
    swap = one.plain_swap

    def late(run: np.void) -> Status:
        buffer.write(3, 1)
        one.swap = swap
        return swap(run)

    one.swap = late
    two.advise(random_pages(1, 10))
    crowd.until(lambda: merged(daemon) in (18, 19) and daemon.settled())
    assert daemon.stat()["refused"] == {"differs": 1}


# --- refusals -------------------------------------------------------------------------------------------------------------


def refusing(client: Client, status: int, pages: set[int], times: int = 1 << 30) -> None:
    """Let a client refuse some pages for a while."""
    swap, left = client.plain_swap, dict.fromkeys(pages, times)

    def refuse(run: np.void) -> Status:
        answer = swap(run)
        if int(run["extent"]) == messages.PRIVATE or int(run["region"]) not in client.buffers:
            return answer
        buffer = client.buffers[int(run["region"])]
        first = (int(run["start"]) - buffer.address) // PAGE
        for at in range(len(answer)):
            if left.get(first + at, 0) > 0:
                left[first + at] -= 1
                client.make_private(buffer, first + at, 1)
                answer[at] = status
        return answer

    client.swap = refuse


@pytest.mark.parametrize(
    "status", [messages.DIFFERS, messages.PINNED, messages.SHARED, messages.NO_VMA, messages.BUSY, messages.ABSENT]
)
def test_what_was_refused_is_taken_back_and_tried_again(daemon: DaemonProcess, crowd: Crowd, status: int) -> None:
    one, two = (crowd.join(daemon.path) for _ in range(2))
    refusing(one, status, {2, 3, 4}, times=2)
    for client in (one, two):
        client.advise(random_pages(1, 8))
    crowd.until(lambda: merged(daemon) == 16)
    assert daemon.stat()["refused"] == {messages.STATUS_NAMES[status]: 6}
    crowd.until(daemon.settled)
    assert daemon.judge()["elsewhere"] == 0


def test_what_is_always_refused_is_tried_less_and_less(daemon: DaemonProcess, crowd: Crowd) -> None:
    one, two = (crowd.join(daemon.path) for _ in range(2))
    refusing(one, messages.PINNED, {2})
    refuse, tries = one.swap, []

    def noting(run: np.void) -> Status:
        answer = refuse(run)
        if messages.PINNED in answer:
            tries.append(int(daemon.ask("history")["looks"]))
        return answer

    one.swap = noting
    for client in (one, two):
        client.advise(random_pages(1, 8))
    crowd.until(lambda: len(tries) >= 6)
    gaps = [after - before for before, after in pairwise(tries)]
    assert all(gap >= 2 ** (at + 1) for at, gap in enumerate(gaps)), gaps
    assert merged(daemon) == 15, "its twin stays where it is, as in the kernel"


@pytest.mark.parametrize("status", [messages.UNSUITABLE, messages.BROKEN, messages.BAD, messages.OFF])
def test_what_can_never_be_is_not_tried_again(daemon: DaemonProcess, crowd: Crowd, status: int) -> None:
    one, two = (crowd.join(daemon.path) for _ in range(2))
    refusing(one, status, {2})
    for client in (one, two):
        client.advise(random_pages(1, 8))
    crowd.until(daemon.settled)
    looks = int(daemon.ask("history")["looks"])
    crowd.until(lambda: int(daemon.ask("history")["looks"]) > looks + 10)
    assert daemon.stat()["refused"] == {messages.STATUS_NAMES[status]: 1}
    assert merged(daemon) == 15


def test_a_refusal_leaves_no_slot_behind(daemon: DaemonProcess, crowd: Crowd) -> None:
    for client in join_many(crowd, daemon, 2, random_pages(1, 70)):
        refusing(client, messages.UNSUITABLE, set(range(70)))
    crowd.until(lambda: daemon.settled() and store_bytes(daemon) == 0)
    assert daemon.stat()["saved_bytes"] == 0
    assert daemon.stat()["refused"] == {"unsuitable": 140}


# --- the budget of mappings -------------------------------------------------------------------------------------------------


def scattered(pages: int, runs: dict[int, int]) -> tuple[Pages, Pages]:
    """Return contents that are equal only in some runs (first page: length)."""
    one, two = random_pages(1, pages), random_pages(2, pages)
    for first, length in runs.items():
        two[first : first + length] = one[first : first + length]
    return one, two


@pytest.mark.parametrize("answering", [True, False])
def test_half_of_the_mappings_at_most_and_long_runs_first(daemon: DaemonProcess, crowd: Crowd, answering: bool) -> None:
    """Also when answers are outstanding: what was asked for counts."""
    runs = {10 + 20 * at: 1 + at % 8 for at in range(40)}
    for contents in scattered(1000, runs):
        client = crowd.join(daemon.path, max_map_count=42)
        client.answering = answering
        client.advise(contents)
    crowd.until(lambda: daemon.stat()["refused"] or all(len(client.asked) >= 10 for client in crowd.clients))
    passes = int(daemon.ask("history")["passes"])
    crowd.until(lambda: int(daemon.ask("history")["passes"]) > passes + 20)
    for client in crowd.clients:
        asked = {first: count for _, first, count, *_ in client.asked}
        assert len(asked) == 10, "20 mappings more, two for each run, and the one there was"
        assert set(asked.values()) == {8, 7}
        assert sorted(asked.values())[-5:] == [8] * 5
    for client in crowd.clients:
        client.answer()
        client.answering = True
    crowd.until(lambda: merged(daemon) == 2 * (5 * 8 + 5 * 7))
    assert all(client["mappings"] == 21 for client in daemon.stat()["clients"])


def test_room_for_mappings_is_used_when_it_comes(daemon: DaemonProcess, crowd: Crowd) -> None:
    for contents in scattered(200, {10: 4, 50: 3, 90: 1}):
        crowd.join(daemon.path, max_map_count=10).advise(contents)
    crowd.until(lambda: merged(daemon) == 14)
    assert "no_vma" not in daemon.stat()["refused"], "that is for what the client says"
    for client in crowd.clients:
        client.buffers[1].pages[10:14] = client.buffers[1].expected[10:14] = random_pages(len(client.asked), 4)
        client.make_private(client.buffers[1], 10, 4)


# --- knobs ----------------------------------------------------------------------------------------------------------------


def test_knobs_have_the_kernels_names_and_its_refusals(daemon: DaemonProcess) -> None:
    assert set(daemon.stat()["knobs"]) == {*settings.KNOBS, "max_cpu_percent"}
    for knob, value, code in [
        ("run", 3, errno.EINVAL),
        ("run", -1, errno.EINVAL),
        ("run", "one", errno.EINVAL),
        ("merge_across_nodes", 2, errno.EINVAL),
        ("max_page_sharing", 1, errno.EINVAL),
        ("pages_to_scan", 1 << 32, errno.EINVAL),
        ("sleep_millisecs", -1, errno.EINVAL),
        ("smart_scan", "maybe", errno.EINVAL),
        ("use_zero_pages", [], errno.EINVAL),
        ("advisor_mode", "always", errno.EINVAL),
        ("max_cpu_percent", 0, errno.EINVAL),
        ("max_cpu_percent", 100 * (os.cpu_count() or 1) + 1, errno.EINVAL),
        ("max_cpu_percent", None, errno.EINVAL),
        ("max_cpu_percent", {}, errno.EINVAL),
        ("max_cpu_percent", 1e400, errno.EINVAL),
        ("run", None, errno.EINVAL),
        ("run", 1.5, errno.EINVAL),
        ("run", {"run": 1}, errno.EINVAL),
    ]:
        before = daemon.stat()["knobs"]
        with pytest.raises(Refused, match=knob) as refusal:
            daemon.set(**{"use_zero_pages": 0, "smart_scan": 1, knob: value})
        assert refusal.value.errno == code or knob == "pages_to_scan"
        assert daemon.stat()["knobs"] == before, "all or none"
    with pytest.raises(Refused, match="no knob 'runn'"):
        daemon.set(runn=1)
    with pytest.raises(Refused, match="at least one knob"):
        daemon.set()


def test_knobs_take_what_the_kernel_takes(daemon: DaemonProcess) -> None:
    for knob, value, shown in [
        ("pages_to_scan", "100\n", 100),
        ("sleep_millisecs", 0, 0),
        ("smart_scan", "y", 1),
        ("use_zero_pages", "off", 0),
        ("max_page_sharing", 2, 2),
        ("merge_across_nodes", 0, 0),
        ("max_cpu_percent", 1, 1),
        ("run", "0", 0),
        ("advisor_mode", "scan-time", "scan-time"),
    ]:
        assert daemon.set(**{knob: value})[knob] == shown
    with pytest.raises(Refused, match="advisor") as refusal:
        daemon.set(pages_to_scan=5)
    assert refusal.value.errno == errno.EINVAL


@pytest.mark.parametrize("knob", ["max_page_sharing", "merge_across_nodes"])
def test_some_knobs_are_busy_while_pages_are_merged(daemon: DaemonProcess, crowd: Crowd, knob: str) -> None:
    join_many(crowd, daemon, 2, random_pages(1, 10))
    crowd.until(daemon.settled)
    value = {"max_page_sharing": 8, "merge_across_nodes": 0}[knob]
    with pytest.raises(Refused, match="set run to 2 first") as refusal:
        daemon.set(**{knob: value})
    assert refusal.value.errno == errno.EBUSY
    daemon.set(run=2)
    assert daemon.set(**{knob: value})[knob] == value
    daemon.set(run=1)
    crowd.until(lambda: merged(daemon) == 20)


def test_a_daemon_does_not_begin_with_a_wrong_knob(daemons: Start) -> None:
    broken = daemons("broken", knobs={"run": 9})
    assert broken.code() == 70
    assert "run: 9 is out of range" in broken.log.read_text()
    assert not broken.path.exists()
    broken.log.write_text("")


def test_a_sleep_of_weeks_is_no_end(daemons: Start, crowd: Crowd) -> None:
    """It is longer than epoll can wait."""
    daemon = daemons(knobs={"sleep_millisecs": 2**32 - 1})
    join_many(crowd, daemon, 1, random_pages(1, 3))
    crowd.until(lambda: daemon.counters()["pages_scanned"])
    assert daemon.stat()["knobs"]["sleep_millisecs"] == 2**32 - 1
    daemon.set(sleep_millisecs=0)
    join_many(crowd, daemon, 1, random_pages(1, 3))
    crowd.until(lambda: merged(daemon) == 6)


def test_run_0_stops_and_keeps(daemon: DaemonProcess, crowd: Crowd) -> None:
    join_many(crowd, daemon, 2, random_pages(1, 10))
    crowd.until(daemon.settled)
    daemon.set(run=0)
    scanned = daemon.counters()["pages_scanned"]
    join_many(crowd, daemon, 2, random_pages(2, 10))
    with pytest.raises(Refused, match="run is 0"):
        daemon.settled()
    for _ in range(20):
        crowd.pump(0.005)
        daemon.stat()
    assert merged(daemon) == 20
    assert daemon.counters()["pages_scanned"] == scanned
    crowd.clients[0].buffers[1].write(3, 99)
    crowd.until(lambda: daemon.stat()["cow_breaks"] == 1)
    crowd.until(lambda: daemon.stat()["saved_bytes"] == 9 * PAGE)
    daemon.set(run=1)
    crowd.until(lambda: merged(daemon) == 39)


def test_run_2_gives_everything_back_and_1_merges_again(daemon: DaemonProcess, workers: Workers) -> None:
    four = [workers(daemon.path) for _ in range(4)]
    for one in four:
        one.advise(1, 100, [10, 11])
    daemon.settle()
    assert four[0].write(1, 5, 77)
    eventually(lambda: daemon.stat()["cow_breaks"] == 1)
    daemon.set(run=2)
    eventually(lambda: not merged(daemon) and not zeros(daemon))
    for one in four:
        assert one.right()
        assert one.stores() == []
        assert one.pss() == 100 * PAGE
    eventually(lambda: store_bytes(daemon) == 0)
    counters = daemon.counters()
    assert counters["pages_shared"] == counters["pages_sharing"] == counters["ksm_zero_pages"] == 0
    daemon.set(run=1)
    stat = daemon.settle()
    assert stat["counters"]["pages_shared"] == 98
    assert stat["saved_bytes"] == (97 * 4 + 3 + 1 - 98 - 1 + 8) * PAGE, (
        "the page that was written is back in private memory"
    )
    assert all(one.right() for one in four)


def test_run_2_in_the_middle_of_windows(daemon: DaemonProcess, crowd: Crowd) -> None:
    """What was asked for before and is answered after it is given back all the same."""
    contents = random_pages(1, 30)
    contents[20:] = 0
    for client in join_many(crowd, daemon, 2, contents):
        client.answering = False
    crowd.until(lambda: all(client.unanswered for client in crowd.clients))
    daemon.set(run=2)
    for client in crowd.clients:
        client.answer()
        client.answering = True
    crowd.until(lambda: not merged(daemon) and not zeros(daemon) and store_bytes(daemon) == 0)
    crowd.until(lambda: not any("memfd:pagefold" in line for line in Path("/proc/self/maps").read_text().splitlines()))
    daemon.set(run=1)
    crowd.until(lambda: merged(daemon) == 40 and zeros(daemon) == 20)


# --- ends -----------------------------------------------------------------------------------------------------------------


def test_unadvise_forgets_and_frees(daemon: DaemonProcess, crowd: Crowd) -> None:
    one, two = join_many(crowd, daemon, 2, random_pages(1, 50))
    crowd.until(daemon.settled)
    buffer = one.unadvise(1)
    crowd.until(lambda: daemon.counters()["pages_sharing"] == 0)
    assert buffer.right()
    buffer.unmap()
    assert daemon.stat()["tracked_bytes"] == 50 * PAGE
    two.unadvise(1).unmap()
    crowd.until(lambda: store_bytes(daemon) == 0)
    assert [client["regions"] for client in daemon.stat()["clients"]] == [0, 0]
    assert one.released == two.released == [1]


def test_answers_for_a_region_that_is_gone_are_nothing(daemon: DaemonProcess, crowd: Crowd) -> None:
    one, _ = join_many(crowd, daemon, 2, random_pages(1, 20))
    one.answering = False
    crowd.until(lambda: one.unanswered)
    buffer = one.unadvise(1)
    one.advise(random_pages(9, 5), number=1)  # the number is used again
    one.answering = True
    one.answer()
    crowd.until(lambda: daemon.settled() and not daemon.counters()["pages_sharing"])
    assert buffer.right()
    buffer.unmap()
    assert next(client for client in daemon.stat()["clients"] if client["pages"] == 5)["merged_pages"] == 0


@pytest.mark.parametrize("state", ["connected", "hello", "advised", "asked", "merged", "waiting", "broken"])
def test_a_client_may_die_in_any_state(daemons: Start, crowd: Crowd, state: str) -> None:
    daemon = daemons()
    stays = crowd.join(daemon.path)
    stays.advise(random_pages(1, 20))
    crowd.until(lambda: daemon.stat()["tracked_bytes"])
    crowd.until(lambda: daemon.descriptors().count("socket") == 4)  # not the one of the question
    before = daemon.descriptors()
    dies = Client(daemon.path, hello=state != "connected")
    if state not in ("connected", "hello"):
        dies.answering = state != "asked"
        dies.advise(random_pages(1, 20), quiet=state == "waiting")
    if state == "waiting":
        dies.sync(1)
    elif state == "asked":
        dies.answering = False
        crowd.clients.append(dies)
        crowd.until(lambda: dies.unanswered)
    elif state in ("merged", "broken"):
        crowd.clients.append(dies)
        crowd.until(lambda: merged(daemon) == 40)
        if state == "broken":
            dies.buffers[1].write(3, 3)
            crowd.until(lambda: daemon.stat()["cow_breaks"] == 1)
    if dies in crowd.clients:
        crowd.clients.remove(dies)
    dies.close()
    crowd.until(lambda: len(daemon.stat()["clients"]) == 1 and daemon.counters()["pages_sharing"] == 0)
    assert stays.buffers[1].right()
    for buffer in dies.buffers.values():
        assert buffer.right(), "what it maps stays its own"
        buffer.unmap()
    crowd.until(lambda: [one for one in daemon.descriptors() if "memfd" not in one] == before)
    join_many(crowd, daemon, 1, random_pages(1, 20))
    crowd.until(lambda: merged(daemon) == 40)


def test_a_killed_process_is_forgotten_and_its_memory_freed(daemon: DaemonProcess, workers: Workers) -> None:
    three = [workers(daemon.path) for _ in range(3)]
    for one in three:
        one.advise(1, 100)
    one, two, three_ = three
    daemon.settle()
    one.kill()
    eventually(lambda: daemon.counters()["pages_sharing"] == 100)
    assert daemon.stat()["merged"] == 300, "what was done stays counted"
    two.kill()
    three_.kill()
    eventually(lambda: store_bytes(daemon) == 0)
    assert daemon.stat()["clients"] == []
    eventually(lambda: not any(daemon.counters()[name] for name in ("pages_shared", "pages_sharing", "pages_unshared")))
    eventually(lambda: daemon.descriptors().count("socket") == 3)  # its own socket, and two to wake it


def test_extents_that_are_mostly_dead_are_emptied(daemon: DaemonProcess, crowd: Crowd) -> None:
    clients = join_many(crowd, daemon, 3, random_pages(1, 10))
    for client in clients[:2]:
        client.advise(random_pages(2, 200))
    crowd.until(daemon.settled)
    assert store_bytes(daemon) == 210 * PAGE
    daemon.set(run=0)
    for client in clients[:2]:
        client.unadvise(2).unmap()
    crowd.until(lambda: daemon.stat()["tracked_bytes"] == 30 * PAGE)
    daemon.set(run=1)
    crowd.until(lambda: store_bytes(daemon) == 10 * PAGE)
    assert merged(daemon) == 30, "what lived in it lives elsewhere now"
    crowd.until(lambda: daemon.judge()["extents"] == {"2": [10, 10]})
    assert daemon.judge()["elsewhere"] == 0
    assert all(client.released == [1] for client in clients)


def test_pages_that_were_written_do_not_keep_an_extent(daemon: DaemonProcess, crowd: Crowd) -> None:
    """Their mapping is still one of the extent: they must become private memory before it can be freed."""
    clients = join_many(crowd, daemon, 2, random_pages(1, 80))
    crowd.until(daemon.settled)
    for client in clients:
        for index in range(80):
            client.buffers[1].write(index, index)
            client.buffers[1].pages[index, 100] = client.buffers[1].expected[index, 100] = id(client) % 251
    crowd.until(lambda: daemon.stat()["cow_breaks"] == 160)
    crowd.until(lambda: store_bytes(daemon) == 0)
    assert all(client.extents == {} for client in clients)
    for client in clients:
        client.buffers[1].pages[:] = client.buffers[1].expected[:] = random_pages(5, 80)
    crowd.until(lambda: merged(daemon) == 160)


def test_pages_that_cannot_leave_an_extent_are_asked_less_and_less(daemon: DaemonProcess, crowd: Crowd) -> None:
    one, two = join_many(crowd, daemon, 2, random_pages(1, 80))
    crowd.until(daemon.settled)
    swap = one.plain_swap
    asked: list[int] = []

    def pinned(run: np.void) -> Status:
        if int(run["extent"]) == messages.PRIVATE:
            looks = int(daemon.ask("history")["looks"])
            asked.extend([looks] if looks not in asked else [])
            if len(asked) < 6:
                return np.full(int(run["pages"]), messages.PINNED, np.uint8)
        return swap(run)

    one.swap = pinned
    for index in range(80):
        one.buffers[1].write(index, 1)
    two.unadvise(1).unmap()
    crowd.until(lambda: store_bytes(daemon) == 0)
    assert len(asked) >= 6
    assert asked[5] - asked[4] > asked[1] - asked[0]


def test_a_client_that_is_stopped_holds_nobody_up(daemons: Start, crowd: Crowd, workers: Workers) -> None:
    daemon = daemons(patch={"pagefold.live.peer._PATIENCE": 0.3})
    stopped = workers(daemon.path)
    stopped.advise(1, 30)
    os.kill(stopped.pid, signal.SIGSTOP)
    join_many(crowd, daemon, 2, random_pages(1, 30))
    crowd.until(daemon.settled)
    assert merged(daemon) == 60
    os.kill(stopped.pid, signal.SIGCONT)
    crowd.until(lambda: merged(daemon) == 90)


# --- settled --------------------------------------------------------------------------------------------------------------


def test_settled_means_that_nothing_more_can_merge(daemon: DaemonProcess, crowd: Crowd) -> None:
    crowd.until(daemon.settled)  # nobody, nothing
    for turn in range(1, 4):
        one, _ = join_many(crowd, daemon, 2, random_pages(turn, 20))
        one.answering = False
        assert not daemon.settled(), "it was told of new memory"
        crowd.until(lambda: one.unanswered)  # noqa: B023
        for _ in range(5):
            crowd.pump(0.002)
            assert not daemon.settled(), "an answer is outstanding"
        one.answering = True
        one.answer()
        crowd.until(daemon.settled)
        assert merged(daemon) == 40 * turn, "settled, and more could merge"
        assert daemon.stat()["settled_seconds"] <= daemon.stat()["uptime_seconds"]


def test_who_waits_is_told_when_it_has_settled(daemon: DaemonProcess, workers: Workers) -> None:
    for _ in range(2):
        workers(daemon.path).advise(1, 50)
    assert daemon.ask("settled")["settled"] is True
    assert daemon.counters()["pages_sharing"] == 50


def test_who_waits_is_told_in_time(daemon: DaemonProcess, crowd: Crowd) -> None:
    one, _ = join_many(crowd, daemon, 2, random_pages(1, 20))
    one.answering = False
    crowd.until(lambda: one.unanswered)
    assert daemon.ask("settled", timeout=0.05)["settled"] is False


def test_who_waits_is_told_when_merging_is_switched_off(daemon: DaemonProcess, crowd: Crowd) -> None:
    one, two = join_many(crowd, daemon, 2, random_pages(1, 20))
    one.answering = two.answering = False
    waits = crowd.join(daemon.path, hello=False)
    waits.connection.send(control.pack({"verb": "settled"})[0])
    two.sync(1, token=5)
    crowd.until(lambda: one.unanswered and two.unanswered)
    daemon.set(run=0)
    assert ready([waits], 60)
    assert b'"settled":false' in waits.connection.recv(1000)
    crowd.until(lambda: two.answers)
    assert two.answers[0]["error"] == -errno.EAGAIN


# --- pagefold.merge ---------------------------------------------------------------------------------------------------------


def synced(crowd: Crowd, client: Client, number: int = 1, token: int = 7) -> np.void:
    """Have a region merged now, and return the answer."""
    before = len(client.answers)
    client.sync(number, token)
    crowd.until(lambda: len(client.answers) > before)
    assert client.answers[-1]["token"] == token
    return client.answers[-1]


def quiet_ones(daemon: DaemonProcess, crowd: Crowd, windows_safe: bool) -> list[Client]:
    """Let two join with equal memory that is for merge alone, and rest."""
    contents = random_pages(1, 30)
    contents[3] = 0
    made = [crowd.join(daemon.path, windows_safe=windows_safe) for _ in range(2)]
    for client in made:
        client.advise(contents, quiet=True)
    crowd.until(daemon.settled)
    assert merged(daemon) == 0
    assert all(client.asked == [] for client in made)
    return made


def test_quiet_memory_merges_only_when_somebody_asks(daemon: DaemonProcess, crowd: Crowd) -> None:
    one, two = quiet_ones(daemon, crowd, windows_safe=True)
    first = synced(crowd, one)
    assert (first["pages"], first["error"], first["zero_pages"]) == (30, 0, 1)
    assert first["by_status"][messages.MERGED] == 30
    assert first["saved_bytes"] == 29 * PAGE // 2 + PAGE, "a slot is shared by two, zeros take nothing"
    crowd.until(lambda: daemon.counters()["pages_sharing"] == 29)
    again = synced(crowd, two, token=(1 << 64) - 1)
    assert again["by_status"][messages.MERGED] + again["by_status"][messages.ALREADY] == 30
    crowd.until(daemon.settled)
    asked = len(one.asked) + len(two.asked)
    two.buffers[1].pages[7:9] = two.buffers[1].expected[7:9] = random_pages(8, 2)
    looks = int(daemon.ask("history")["looks"])
    crowd.until(lambda: int(daemon.ask("history")["looks"]) > looks + 5)
    assert len(one.asked) + len(two.asked) == asked, "nobody asked for it"
    daemon.set(run=2)
    crowd.until(lambda: merged(daemon) == 0)


def test_where_windows_are_not_safe_only_who_asks_is_touched(daemon: DaemonProcess, crowd: Crowd) -> None:
    """He alone has promised that nobody writes."""
    one, two = quiet_ones(daemon, crowd, windows_safe=False)
    assert daemon.counters()["pages_unshared"] == 0, "nobody reads what nothing can happen to"
    answers = [synced(crowd, one)]
    assert answers[0]["error"] == 0
    assert two.asked == []
    answers.append(synced(crowd, two))
    assert answers[1]["by_status"][messages.MERGED] == 30, "an equal is known"
    asked = list(two.asked)
    answer = synced(crowd, one)
    assert answer["by_status"][[messages.MERGED, messages.ALREADY]].sum() == 30
    assert two.asked == asked
    assert daemon.counters()["pages_sharing"] == 29
    answers += [answer, synced(crowd, two)]
    assert sum(int(one["saved_bytes"]) for one in answers) == daemon.stat()["saved_bytes"] == (29 + 2) * PAGE
    assert synced(crowd, two)["saved_bytes"] == 0


def test_a_merge_says_why_not(daemon: DaemonProcess, crowd: Crowd) -> None:
    one, two = (crowd.join(daemon.path) for _ in range(2))
    refusing(one, messages.PINNED, {1})
    contents = random_pages(1, 10)
    one.advise(contents, quiet=True)
    other = contents.copy()
    other[5:] = random_pages(2, 5)
    two.advise(other)
    answer = synced(crowd, one)
    assert answer["by_status"][messages.MERGED] == 4
    assert answer["by_status"][messages.PINNED] == 1
    assert answer["by_status"][messages.UNKNOWN] == 5
    assert answer["by_status"].sum() == answer["pages"] == 10


def test_two_threads_merge_one_region(daemon: DaemonProcess, crowd: Crowd) -> None:
    one, two = (crowd.join(daemon.path) for _ in range(2))
    for client in (one, two):
        client.advise(random_pages(1, 10), quiet=True)
    one.sync(1, 1)
    one.sync(1, 2)
    crowd.until(lambda: len(one.answers) == 2)
    assert {int(answer["token"]) for answer in one.answers} == {1, 2}
    assert max(int(answer["by_status"][messages.MERGED]) for answer in one.answers) == 10


def test_a_merge_without_merging_says_so_at_once(daemons: Start, crowd: Crowd) -> None:
    daemon = daemons(knobs={"run": 0})
    (client,) = join_many(crowd, daemon, 1, random_pages(1, 10))
    assert synced(crowd, client)["error"] == -errno.EAGAIN


# --- a full store -----------------------------------------------------------------------------------------------------------


def test_a_store_that_is_full_pauses_and_goes_on(daemons: Start, crowd: Crowd) -> None:
    daemon = daemons(limits={"RLIMIT_FSIZE": 1 << 20})
    contents = random_pages(1, 40)
    contents[30:] = 0
    join_many(crowd, daemon, 3, contents)
    crowd.until(lambda: any("merging pauses" in note for note in daemon.stat()["notes"]))
    assert any("ulimit -f" in note for note in daemon.stat()["notes"])
    crowd.until(lambda: zeros(daemon) == 30)
    assert merged(daemon) == 0
    assert crowd.right()
    for _ in range(3):  # it is tried again and again, and nothing comes of it
        looks = int(daemon.ask("history")["looks"])
        crowd.until(lambda: int(daemon.ask("history")["looks"]) > looks + 8)  # noqa: B023
    assert daemon.stat()["refused"] == {}
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    crowd.until(lambda: merged(daemon) == 90)
    assert daemon.stat()["notes"] == []


def test_what_is_merged_stays_when_the_store_is_full(daemon: DaemonProcess, crowd: Crowd) -> None:
    join_many(crowd, daemon, 2, random_pages(1, 40))
    crowd.until(daemon.settled)
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (1 << 12, resource.RLIM_INFINITY))
    join_many(crowd, daemon, 2, random_pages(2, 5000))
    crowd.until(lambda: any("merging pauses" in note for note in daemon.stat()["notes"]))
    rows = daemon.stat()["clients"]
    assert [row["merged_pages"] for row in rows if row["pages"] == 40] == [40, 40]
    assert merged(daemon) < 80 + 10_000, "the rest of the first extent may be filled, and no more"
    join_many(crowd, daemon, 1, random_pages(1, 40))
    resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    crowd.until(lambda: merged(daemon) == 120 + 10_000)


def test_a_full_memory_cgroup_pauses_merging_and_nothing_else(cgroup: Path, daemons: Start, crowd: Crowd) -> None:
    limit_memory(cgroup, 48 << 20)
    daemon = daemons(cgroup=str(cgroup))
    join_many(crowd, daemon, 2, random_pages(1, 1000))
    crowd.until(lambda: merged(daemon) == 2000)
    join_many(crowd, daemon, 2, random_pages(2, 14_000))
    crowd.until(lambda: any("memory cgroup" in note for note in daemon.stat()["notes"]))
    assert 2000 <= merged(daemon) < 30_000
    limit_memory(cgroup, 256 << 20)
    crowd.until(lambda: merged(daemon) == 30_000)
    assert daemon.stat()["notes"] == []
    crowd.close()
    daemon.stop()


# --- domains and permissions --------------------------------------------------------------------------------------------------


def test_domains_share_nothing(daemons: Start, workers: Workers) -> None:
    here, there = daemons("here"), daemons("there")
    ours, theirs = workers(here.path), workers(there.path)
    for one in (ours, theirs):
        one.advise(1, 30)
        one.advise(1, 30)
    assert here.settle()["counters"]["pages_shared"] == there.settle()["counters"]["pages_shared"] == 30
    assert store_bytes(here) == store_bytes(there) == 30 * PAGE
    for daemon, one in ((here, ours), (there, theirs)):
        assert [client["pid"] for client in daemon.stat()["clients"]] == [one.pid]
    inodes = [
        {link.stat().st_ino for link in Path(f"/proc/{one.pid}/fd").iterdir() if "memfd" in str(link.readlink())}
        for one in (here, there)
    ]
    assert inodes[0].isdisjoint(inodes[1])
    ours.unadvise(1)
    ours.unadvise(2)
    eventually(lambda: store_bytes(here) == 0)
    assert there.counters()["pages_sharing"] == 30


def test_a_second_daemon_for_a_domain_does_not_begin(daemons: Start, daemon: DaemonProcess) -> None:
    second = daemons("d")
    assert second.code() == 70
    assert "serves this already" in second.log.read_text()
    second.log.write_text("")
    assert daemon.stat()["pid"] == daemon.pid


def in_child_as(uid: int, act: Callable[[], object]) -> str:
    """Do something as another user in a child, and return what came of it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            answer = str(act())
        except BaseException as error:
            answer = repr(error)
        os.write(writing, answer.encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        return file.read()


@pytest.mark.skipif(not ROOT, reason="needs another user")
def test_another_user_is_refused(daemon: DaemonProcess, tmp_path: Path) -> None:
    """By the folder, by the socket's mode, and if both were open, by the daemon."""
    assert "PermissionError" in in_child_as(65534, lambda: Client(daemon.path))
    folder = daemon.path
    for folder in list(daemon.path.parents)[:-2]:
        folder.chmod(0o755)
    assert "PermissionError" in in_child_as(65534, lambda: Client(daemon.path))
    daemon.path.chmod(0o666)

    def try_all() -> object:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.connect(str(daemon.path))
        with contextlib.suppress(ConnectionError):
            connection.send(messages.pack(messages.HELLO))
            connection.send(control.pack({"verb": "stop"})[0])
        with contextlib.suppress(ConnectionError):
            return connection.recv(1000)

    assert in_child_as(65534, try_all) in ("b''", "None")
    daemon.path.parent.chmod(0o700)
    daemon.path.parent.parent.chmod(0o700)
    assert daemon.stat()["clients"] == []


@pytest.mark.skipif(not ROOT, reason="needs another user")
def test_a_client_may_be_served_without_any_right(daemons: Start, workers: Workers) -> None:
    """Its daemon is another one: of its own."""
    assert daemons().stat()["uid"] == os.getuid()


@pytest.mark.skipif(not os.access("/dev/userfaultfd", os.R_OK), reason="needs /dev/userfaultfd")
def test_the_device_is_passed_to_who_wants_it(daemons: Start, crowd: Crowd) -> None:
    daemon = daemons(device="/dev/userfaultfd")
    wants, not_ = crowd.join(daemon.path, hello=False), crowd.join(daemon.path)
    wants.send(messages.HELLO, windows_safe=0, want_device=1)
    crowd.until(lambda: wants.welcomes and not_.welcomes)
    (fd,) = wants.welcomes[0]
    assert str(Path(f"/proc/self/fd/{fd}").readlink()) == "/dev/userfaultfd"
    os.close(fd)
    assert not_.welcomes == [[]]


# --- its own end ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_nothing_is_left(daemons: Start, workers: Workers, number: int) -> None:
    daemon = daemons()
    two = [workers(daemon.path) for _ in range(2)]
    for one in two:
        one.advise(1, 30)
    daemon.settle()
    os.kill(daemon.pid, number)
    assert daemon.code() == 0
    assert not list(daemon.path.parent.iterdir())
    assert all(one.right() for one in two)
    assert not any(one.connected() for one in two)


def test_a_new_daemon_learns_everything_anew(daemons: Start, workers: Workers) -> None:
    """Also pages that map extents of the dead one; those are free when everybody has moved."""
    first = daemons()
    three = [workers(first.path) for _ in range(3)]
    for one in three:
        one.advise(1, 60, [5, 6])
    first.settle()
    assert three[0].write(1, 9, 9)
    inode = {link.stat().st_ino for link in Path(f"/proc/{first.pid}/fd").iterdir() if "memfd" in str(link.readlink())}
    first.kill()
    assert all(one.right() for one in three)
    second = daemons()
    eventually(lambda: len(second.stat()["clients"]) == 3)
    eventually(lambda: second.settle()["counters"]["pages_shared"] == 58)
    stat = second.stat()
    assert stat["counters"]["pages_sharing"] == 2 * 58 - 1
    newcomer = workers(second.path)
    newcomer.advise(1, 60)
    eventually(lambda: second.counters()["pages_sharing"] == 3 * 58 - 1)
    for one in three:
        assert one.right()
        assert one.drop()
    for one in three[1:]:
        lines = Path(f"/proc/{one.pid}/maps").read_text().splitlines()
        assert not any(int(line.split()[4]) in inode for line in lines), "it maps the dead daemon's store"


def test_clients_say_everything_anew_to_a_daemon_that_comes_late(daemons: Start, workers: Workers) -> None:
    first = daemons()
    one, two = workers(first.path), workers(first.path)
    first.kill()
    one.advise(1, 30) if one.connected() else None
    second = daemons()
    eventually(lambda: one.connected() and two.connected())
    for worker in (one, two):
        worker.advise(2, 30)
    assert second.settle()["counters"]["pages_shared"] >= 30


def test_what_happened_is_told(daemon: DaemonProcess, crowd: Crowd) -> None:
    join_many(crowd, daemon, 2, random_pages(1, 30))
    crowd.until(daemon.settled)
    crowd.until(lambda: daemon.ask("history")["history"][-1][1] == 30 * PAGE)
    history = daemon.ask("history")["history"]
    assert [at for at, _ in history] == sorted(at for at, _ in history)
    assert daemon.ask("clients")["clients"] == daemon.stat()["clients"]
    with pytest.raises(Refused, match="no verb that is known"):
        daemon.ask("dance")
