"""Judge the client with a daemon: what is advised merges in the background, across processes, and is itself again when it ends."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.live.own_process import BOUND, ROOT, own_process, python
from tests.live.processes import DaemonProcess
from tests.live.test_client import (
    PAGE,
    PAGES,
    accounted,
    content,
    hammer_in_threads,
    merging_pages,
    need_windows,
    numbers,
    regions,
    same,
)

import pagefold
from pagefold.live import control


def wait_merged(handle: pagefold.Handle, least: int = PAGES) -> pagefold.Report:
    assert pagefold.settled(BOUND), handle.note
    report = handle.report()
    assert report.merged >= least, f"{report}\n{pagefold.stats()}"
    return report


@own_process
def test_what_is_advised_merges_and_is_private_again(daemon: DaemonProcess) -> None:
    need_windows()
    one, two = numbers(40), numbers(40)
    with pagefold.advise({"one": one, "two": two}) as handle:
        report = accounted(wait_merged(handle, 2 * PAGES))
        assert not handle.note
        assert not report.held
        stats = pagefold.stats()
        assert stats["why"] == ""
        assert stats["process"]["connected"]
        assert stats["process"]["ksm_merging_pages"] >= 2 * PAGES
        counters = stats["domain"]["counters"]
        assert counters["pages_shared"] + counters["pages_sharing"] >= 2 * PAGES
        assert stats["domain"]["saved_bytes"] >= PAGES * 4096
        assert same(one, 40)
        assert same(two, 40)
    assert merging_pages() == regions() == 0
    assert same(one, 40)
    assert same(two, 40)


@own_process
def test_settled_counts_what_was_just_written(daemon: DaemonProcess) -> None:
    need_windows()
    for seed in range(50, 60, 2):
        one, two = numbers(seed), numbers(seed + 1)
        with pagefold.advise([one, two]) as handle:
            assert pagefold.settled(BOUND)
            assert handle.report().merged < PAGES
            first = -two.ctypes.data % PAGE
            two[first : first + PAGES * PAGE] = np.frombuffer(content(seed), np.uint8)
            wait_merged(handle, 2 * PAGES)


@own_process
def test_a_merge_is_through_the_daemon(daemon: DaemonProcess) -> None:
    one, two = numbers(41), numbers(41)
    handle = pagefold.advise(one)
    assert pagefold.settled(BOUND)
    report = accounted(pagefold.merge(two))
    assert report.through_daemon
    assert report.merged >= PAGES, str(report)
    assert same(one, 41)
    assert same(two, 41)
    report.release()
    assert pagefold.unadvise(handle) == 0
    assert merging_pages() == 0


OTHER = """
import sys
sys.path.insert(0, {root!r})
from tests.live.test_client import numbers, same
import pagefold
one = numbers({seed})
handle = pagefold.advise(one)
print("ready", flush=True)
for line in sys.stdin:
    print(int(same(one, {seed})), handle.report().merged, flush=True)
"""


class Other:
    """Another process that advises the same pages."""

    def __init__(self, seed: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", OTHER.format(root=str(ROOT), seed=seed)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        assert self.process.stdout.readline() == "ready\n"

    def ask(self) -> tuple[bool, int]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        whole, merged = self.process.stdout.readline().split()
        return whole == "1", int(merged)

    def end(self) -> None:
        self.process.communicate(timeout=BOUND)


@own_process
def test_processes_that_know_nothing_of_each_other(daemon: DaemonProcess) -> None:
    need_windows()
    others = [Other(42) for _ in range(2)]
    mine = numbers(42)
    handle = pagefold.advise(mine)
    wait_merged(handle)
    assert pagefold.settled(BOUND)
    answers = [other.ask() for other in others]
    assert all(whole and merged >= PAGES for whole, merged in answers), answers
    rows = pagefold.stats()["domain"]["clients"]
    assert {row["pid"] for row in rows} == {os.getpid(), *(other.process.pid for other in others)}
    others[0].end()
    assert same(mine, 42)
    pagefold.unadvise(handle)
    assert others[1].ask()[0]
    others[1].end()


@own_process
def test_settled_waits_for_what_was_just_advised(daemon: DaemonProcess) -> None:
    """Not for the daemon's idea of being done from before it heard of it."""
    need_windows()
    kept: list[Any] = []
    for seed in range(43, 48):
        one, two = numbers(seed), numbers(seed)
        kept += [one, two, pagefold.advise([one, two])]
        assert pagefold.settled(BOUND)
        assert kept[-1].report().merged >= 2 * PAGES, (seed, str(kept[-1].report()))
    assert pagefold.settled(0) in (True, False)
    assert pagefold.settled() is True


@own_process
def test_a_daemon_that_does_not_merge_is_not_settled(daemon: str) -> None:
    path = Path(daemon)
    control.ask(path, {"verb": "set", "knobs": {"run": 0}})
    one = numbers(49)
    handle = pagefold.advise([one, one.copy()])
    with pytest.raises(pagefold.live.control.Refused, match="run is 0"):
        pagefold.settled(1)
    control.ask(path, {"verb": "set", "knobs": {"run": 1}})
    assert pagefold.settled(BOUND)
    pagefold.unadvise(handle)


def test_a_daemon_that_goes_is_said_to_be_gone(daemon: DaemonProcess) -> None:
    outlive(daemon=daemon)
    assert daemon.code() == 0


@own_process
def outlive(daemon: str) -> None:
    need_windows()
    one, two = numbers(50), numbers(50)
    handle = pagefold.advise([one, two])
    wait_merged(handle, 2 * PAGES)
    control.ask(Path(daemon), {"verb": "stop"})
    until = time.monotonic() + BOUND
    while not handle.note:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert "no daemon" in handle.note
    assert merging_pages() >= 2 * PAGES
    one[:] = 5
    assert same(two, 50)
    assert pagefold.unadvise(handle) == 0
    assert merging_pages() == 0
    assert same(two, 50)


@own_process
def test_threads_that_do_everything_with_a_daemon(daemon: DaemonProcess) -> None:
    hammer_in_threads(4)


@own_process
def test_enabled_processes_merge_what_they_make(daemon: DaemonProcess) -> None:
    need_windows()
    pagefold.enable()
    import numpy as np

    made = [np.frombuffer(content(51), np.uint8).copy() for _ in range(3)]
    until = time.monotonic() + BOUND
    while merging_pages() < 3 * PAGES:
        assert time.monotonic() < until, pagefold.stats()
        time.sleep(0.05)
    assert all(one.tobytes() == content(51) for one in made)
    made[0][:] = 7
    assert made[1].tobytes() == content(51)
    one = made.pop()
    one_more = one[5:]
    del made
    gc.collect()
    assert one.tobytes() == content(51)
    del one, one_more
    assert merging_pages() == 0


def test_a_worker_of_run_is_enabled_and_merges(daemon: DaemonProcess) -> None:
    site = ROOT / "src" / "pagefold" / "live" / "site"
    code = (
        "import numpy as np, sys, time\n"
        "made = [np.random.default_rng(1).integers(0, 255, 1 << 20, np.uint8) for _ in range(2)]\n"
        "import pagefold\n"
        "until = time.monotonic() + 100\n"
        "while pagefold.stats()['process']['ksm_merging_pages'] < 512 and time.monotonic() < until: time.sleep(0.05)\n"
        "print(pagefold.stats()['process']['ksm_merging_pages'], (made[0] == made[1]).all())\n"
    )
    done = python("-c", code, PYTHONPATH=str(site), PAGEFOLD_ENABLE="1", PAGEFOLD_SOCKET=str(daemon.path))
    assert done.stdout.split() == ["512", "True"], done.stderr
