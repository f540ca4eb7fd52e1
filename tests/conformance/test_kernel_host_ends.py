"""Judge how the real-kernel host ends: whatever ends it, knobs are restored and no process is left. Each test borrows KSM itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pagefold.scenario.host import HostFailed
from pagefold.scenario.kernel_ksm import KernelKsm
from pagefold.scenario.places import Place, open_host

WHY_NOT = KernelKsm.why_not()
pytestmark = [pytest.mark.kernel, pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))]

KILLED = """
import os, signal, sys
from pagefold.scenario.places import Place, open_host
with open_host(Place("kernel")) as host:
    host.begin({"max_page_sharing": 7, "smart_scan": 0})
    process = host.spawn()
    area = process.mmap(2)
    for index in range(2):
        process.write(area, index, 1)
    process.madvise(area, "MERGEABLE")
    host.scan(2)
    assert host.get("pages_sharing") == 1
    process.fork()
    print(*host.channel.ask("pids"), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_when_we_are_killed_knobs_are_restored_and_no_process_is_left() -> None:
    with KernelKsm() as ksm:
        before = {
            name: ksm.get(name) for name in ("max_page_sharing", "smart_scan", "sleep_millisecs", "pages_to_scan")
        }
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 3
    deadline = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []
    with KernelKsm() as ksm:  # the guard holds the lock until it has restored everything
        assert {name: ksm.get(name) for name in before} == before
        assert (ksm.get("run"), ksm.get("pages_shared")) == (0, 0)


def test_a_driver_that_dies_is_said_to() -> None:
    with pytest.raises(HostFailed, match="this kernel"), open_host(Place("kernel")) as host:
        host.begin({})
        driver = host.channel.ask("pids")[0]  # type: ignore[attr-defined]
        os.kill(driver, signal.SIGKILL)
        host.scan()
