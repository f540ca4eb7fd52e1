"""Judge the real-kernel host itself: a scan is one full scan, nothing but our pages is looked at, and nothing is left behind."""

from __future__ import annotations

import ctypes
import errno
import importlib
import subprocess
import sys

import pytest

from pagefold.errors import EngineStopped, NoSuchProcess, UnknownKnob, UsageError
from pagefold.scenario.host import FreshHost, HostFailed
from pagefold.scenario.kernel_ksm import KernelKsm
from pagefold.scenario.places import FAR_SIDE

WHY_NOT = KernelKsm.why_not()
pytestmark = [pytest.mark.kernel, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]
ADVISED = """
import mmap
block = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
block[0] = 1
block.madvise(12)  # MADV_MERGEABLE
print("ready", flush=True)
input()
block.close()
print("unmapped", flush=True)
input()
"""


@pytest.fixture
def host(kernel: FreshHost) -> FreshHost:
    kernel.begin({})
    return kernel


def advised(host: FreshHost, *contents: int):  # type: ignore[no-untyped-def]
    process = host.spawn()
    area = process.mmap(len(contents))
    for index, content in enumerate(contents):
        process.write(area, index, content)
    process.madvise(area, "MERGEABLE")
    return process, area


def test_a_scan_is_one_full_scan_and_never_a_page_more(host: FreshHost) -> None:
    advised(host, 1, 2, 3)
    for scans in range(1, 300):
        host.scan()
        seen = host.observe()
        assert (seen["full_scans"], seen["pages_scanned"] + seen["pages_skipped"]) == (scans, 3 * scans)
    host.scan(50)
    assert host.get("full_scans") == 349


def test_nothing_to_scan_ends_at_once(host: FreshHost) -> None:
    host.scan(3)
    assert host.get("full_scans") == 0
    process, _ = advised(host, 1)
    host.scan()
    process.exit()
    host.scan(2)  # the first of them frees the process's slot
    assert host.get("full_scans") == 2
    host.scan(5)
    assert host.get("full_scans") == 2


def test_run_is_what_the_scenario_set(host: FreshHost) -> None:
    advised(host, 1, 1)
    host.scan(2)
    assert (host.get("run"), host.get("pages_sharing")) == (1, 1)
    for value in (0, 2):
        host.set("run", value)
        assert host.get("run") == value
        with pytest.raises(EngineStopped, match=f"run is {value}"):
            host.scan()
    assert host.get("pages_sharing") == 0
    for text in ("1", "+1", "01\n"):  # as the kernel reads numbers; ksmd must not begin at once
        host.set("run", text)
        assert host.get("run") == 1
    host.scan(2)
    assert host.get("pages_sharing") == 1


def test_knobs_for_stepping_read_as_they_were_set(host: FreshHost) -> None:
    assert (host.get("pages_to_scan"), host.get("sleep_millisecs")) == (100, 20)
    host.set("pages_to_scan", 7)
    host.set("sleep_millisecs", 33)
    advised(host, *range(1, 20))
    host.scan(2)
    assert (host.get("pages_to_scan"), host.get("sleep_millisecs"), host.get("pages_scanned")) == (7, 33, 38)


def test_of_a_process_that_merges_anything_only_our_pages_are_looked_at(host: FreshHost) -> None:
    process = host.spawn()
    area = process.mmap(2)
    process.merge_any(True)
    process.write(area, 0, 1)
    child = process.fork()
    later = child.mmap(1)
    child.write(later, 0, 1)
    host.scan(3)
    seen = host.observe()
    assert [of["ksm_rmap_items"] for of in seen.processes.values()] == [1, 2]
    assert seen["pages_scanned"] == 9


def test_mistakes_are_the_same_errors_as_on_the_simulated_machine(host: FreshHost) -> None:
    process, area = advised(host, 1, 2)
    process.munmap(area, 1, 1)
    process.madvise(area, "MERGEABLE")  # the hole is passed over
    for mistake in (
        lambda: process.write(area, 1, 1),
        lambda: process.read(area, 1),
        lambda: process.read(area, 2),
        lambda: process.pin(area, 1),
        lambda: process.unpin(area, 0),
        lambda: process.madvise(area, "MERGE"),
        lambda: process.mmap(0),
        lambda: process.mmap(1, node=host.nodes),
        lambda: process.munmap(area, 1, 5),
        lambda: host.offline(host.nodes),
        lambda: host.online(-1),
    ):
        with pytest.raises(UsageError):
            mistake()
    for unknown in (lambda: host.get("rum"), lambda: host.set("rum", 1)):
        with pytest.raises(UnknownKnob):
            unknown()
    process.exit()
    for gone in (process.exit, process.fork, lambda: process.write(area, 0, 1)):
        with pytest.raises(NoSuchProcess):
            gone()


def test_this_machines_memory_is_not_taken_offline(host: FreshHost) -> None:
    for call in (host.offline, host.online):
        with pytest.raises(OSError, match="memory is not taken offline here") as refusal:
            call(0)
        assert refusal.value.errno == errno.EOPNOTSUPP


def test_a_page_that_is_not_one_fill_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FAR_SIDE.parent)
    calls, far = importlib.import_module("calls"), importlib.import_module("worker")
    worker = far.Worker.__new__(far.Worker)
    worker.do_mmap(5, 1, None)
    try:
        assert worker.do_read(5) == 0
        worker.do_write(5, 77)
        assert worker.do_read(5) == 77
        ctypes.memset(calls.where(5) + 4095, 1, 1)
        with pytest.raises(OSError, match="not one content's fill") as refusal:
            worker.do_read(5)
        assert refusal.value.errno == errno.EILSEQ
    finally:
        worker.do_munmap(5, 1)


def test_memory_that_someone_else_advised_is_in_the_way(kernel: FreshHost) -> None:
    with subprocess.Popen([sys.executable, "-c", ADVISED], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None and other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        kernel.channel.ask("set", "pages_to_scan", 0)  # type: ignore[attr-defined]  (as a scenario may)
        with pytest.raises(HostFailed, match="another process is advised MERGEABLE"):
            kernel.begin({})
        other.stdin.write(b"no more\n")
        other.stdin.flush()
        assert other.stdout.readline() == b"unmapped\n"
        kernel.begin({})  # it is registered for as long as it lives, but has nothing to merge
