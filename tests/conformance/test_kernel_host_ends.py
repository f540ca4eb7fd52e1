"""Judge how the real-kernel host ends: whatever ends it, knobs are restored and no process is left. Each test borrows KSM itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pagefold.scenario import kernel_host, places
from pagefold.scenario.host import HostFailed
from pagefold.scenario.kernel_ksm import KNOBS, KernelKsm
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
    if sys.argv[1] == "in a scan":
        host.scan(100_000_000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def chosen() -> dict[str, str]:
    folder = Path("/sys/kernel/mm/ksm")
    return {name: (folder / name).read_text() for name in ("run", *KNOBS, "pages_shared") if (folder / name).exists()}


@pytest.mark.parametrize(
    ("when", "sent"),
    [("between requests", signal.SIGKILL), ("in a scan", signal.SIGKILL), ("in a scan", signal.SIGINT)],
)
def test_however_we_are_ended_knobs_are_restored_and_no_process_is_left(when: str, sent: signal.Signals) -> None:
    with KernelKsm():
        before = chosen()
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, when], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as ours:
        assert ours.stdout is not None
        pids = [int(word) for word in ours.stdout.readline().split()]
        assert len(pids) == 3
        if when == "in a scan":  # between requests it kills itself
            ours.send_signal(sent)
        ours.communicate()
    with KernelKsm():  # the guard lets go of the lock when all who used the knobs are gone and the knobs are restored
        assert [pid for pid in pids if is_running(pid)] == []
        assert chosen() == before


def is_running(pid: int) -> bool:
    """Tell whether a process runs; one that is dead and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_driver_that_dies_is_said_to() -> None:
    with pytest.raises(HostFailed, match="this kernel"), open_host(Place("kernel")) as host:
        host.begin({})
        driver = host.channel.ask("pids")[0]  # type: ignore[attr-defined]
        os.kill(driver, signal.SIGKILL)
        host.scan()


def test_a_driver_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_host, "PATIENCE", 0.2)
    monkeypatch.setattr(places, "_GRACE", 0.2)
    with KernelKsm():
        before = chosen()
    with pytest.raises(HostFailed, match=r"no answer to .* within"), open_host(Place("kernel")) as host:
        pid = host.channel.ask("pids")[0]  # type: ignore[attr-defined]
        os.kill(pid, signal.SIGSTOP)
        host.begin({})
    assert not is_running(pid)
    with KernelKsm():
        assert chosen() == before


def test_who_waits_for_the_lock_says_so() -> None:
    script = "from pagefold.scenario.kernel_ksm import KernelKsm\nwith KernelKsm(): print('mine', flush=True)"
    with KernelKsm():
        waiting = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert waiting.stderr is not None
        assert waiting.stderr.readline() == "pagefold: waiting for another user of this machine's KSM ...\n"
    assert waiting.communicate()[0] == "mine\n"
