"""Judge who may be read and the one line that refuses the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pagefold.errors import NoSuchProcess, NotReadable, PagefoldError, UsageError
from pagefold.sources import ProcessReader, list_mine
from pagefold.sources.identity import identify

ROOT = os.geteuid() == 0
SOURCE = Path(__file__).parents[2] / "src"
NOBODY = 65534

# Runs as nobody: imports first (the interpreter may live where nobody may look), then drops every right.
UNPRIVILEGED = """
import json, os, subprocess, sys
import pagefold.sources as sources
from pagefold.errors import PagefoldError
other, free = int(sys.argv[1]), sys.argv[2]
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
answer = {"uid": os.geteuid()}
try:
    sources.ProcessReader(other).read()
except PagefoldError as error:
    answer["other"] = [type(error).__name__, str(error)]
own = subprocess.Popen([free], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
try:
    while True:   # until the child has left the memory it was forked with, and is at rest in its read of standard input
        comm = open(f"/proc/{own.pid}/comm").read().strip()
        if comm == os.path.basename(free)[:15] and open(f"/proc/{own.pid}/syscall").read().split()[1:2] == ["0x0"]: break
    pages = sources.ProcessReader(own.pid).read()
    again = sources.ProcessReader(own.pid, use_scan=False).read()
    frames, nodes = sorted(set(pages.frame.tolist())), bool((pages.node >= 0).all())
    answer["own"] = [len(pages), frames, bool(pages.ksm.any()), nodes]
    answer["walked"] = [len(again), again.zero_mapped - pages.zero_mapped,
                        (again.high == pages.high).all().item() if len(again) == len(pages) else None]
    answer["mine"] = sources.list_mine()
    answer["pid"] = own.pid
finally:
    own.kill(); own.wait()
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def nobody() -> dict[str, object]:
    """Return what a reader without any right sees: a process of root, and one of its own."""
    if not ROOT:
        pytest.skip("only root can become nobody")
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        result = subprocess.run(
            [sys.executable, "-c", UNPRIVILEGED, str(other.pid), "/bin/cat"],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(SOURCE)},
        )
    finally:
        other.kill()
        other.communicate()
    assert result.returncode == 0, result.stderr
    return {**json.loads(result.stdout), "other_pid": other.pid}


def test_a_process_of_another_user_is_not_permitted(nobody: dict) -> None:
    kind, line = nobody["other"]
    assert nobody["uid"] == NOBODY
    assert kind == "NotPermitted"
    assert line.startswith(f"PID {nobody['other_pid']} (")
    assert "ptrace access" in line and "CAP_SYS_PTRACE" in line and "run as the user who owns it" in line
    assert "\n" not in line


def test_a_process_of_ones_own_is_read_without_frames(nobody: dict) -> None:
    count, frames, ksm, nodes = nobody["own"]
    assert count > 0
    assert frames == [-1]
    assert not ksm
    assert nodes
    assert nobody["walked"] == [count, 0, True]


def test_mine_are_only_my_own(nobody: dict) -> None:
    assert nobody["mine"] == [nobody["pid"]]


def test_list_mine(specimen: Callable) -> None:
    child = specimen("RESULT = 0")
    pids = list_mine()
    assert child.pid in pids
    assert os.getpid() not in pids
    assert pids == sorted(set(pids))
    assert not any(identify(pid).kernel_thread for pid in pids if Path(f"/proc/{pid}").exists())


def test_list_mine_of_a_fake_proc(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "77").mkdir()
    assert list_mine(tmp_path) == []


def test_unknown_pid() -> None:
    pid = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    with pytest.raises(NoSuchProcess, match=f"^PID {pid}: no such process; give the PID of one that runs$"):
        ProcessReader(pid)


@pytest.mark.parametrize("pid", [0, -1, -(2**40)])
def test_numbers_that_are_no_pid(pid: int) -> None:
    with pytest.raises(UsageError, match="PIDs are 1 or more"):
        ProcessReader(pid)


def test_ourselves() -> None:
    with pytest.raises(NotReadable, match="pagefold cannot read itself: its pages change while it reads"):
        ProcessReader(os.getpid())


def test_one_of_our_own_threads() -> None:
    started, stop = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (started.set(), stop.wait()))
    thread.start()
    started.wait()
    try:
        assert thread.native_id is not None
        with pytest.raises(NotReadable, match="cannot read itself"):
            ProcessReader(thread.native_id)
    finally:
        stop.set()
        thread.join()


def test_a_thread_of_another_process(specimen: Callable) -> None:
    child = specimen("""
import threading
thread = threading.Thread(target=threading.Event().wait, daemon=True)
thread.start()
RESULT = thread.native_id
""")
    with pytest.raises(NotReadable, match=f"is a thread: give its process, {child.pid}"):
        ProcessReader(child.addresses[0])


def test_kernel_thread() -> None:
    if not Path("/proc/2").exists() or not identify(2).kernel_thread:
        pytest.skip("no kernel thread is visible here")
    with pytest.raises(NotReadable, match=r"^PID 2 \(kthreadd\) is a kernel thread: it has no memory of its own$"):
        ProcessReader(2)


def test_names_with_brackets_and_control_characters(specimen: Callable) -> None:
    child = specimen("""
open("/proc/self/comm", "w").write("a) (b\\x1b[31m")
RESULT = 0
""")
    assert ProcessReader(child.pid).label == f"a) (b?[31m [{child.pid}]"


def test_a_kernel_without_smaps_is_named(specimen: Callable, tmp_path: Path) -> None:
    child = specimen("RESULT = 0")
    folder = tmp_path / str(child.pid)
    folder.mkdir()
    for name in ("stat", "status", "statm"):
        (folder / name).write_text(Path(f"/proc/{child.pid}/{name}").read_text())
    with pytest.raises(NotReadable, match="CONFIG_PROC_PAGE_MONITOR"):
        ProcessReader(child.pid, proc=tmp_path)


def test_every_refusal_is_one_line() -> None:
    for pid in (0, 2, os.getpid(), 2**31 - 1):
        with pytest.raises(PagefoldError) as caught:
            ProcessReader(pid)
        assert "\n" not in str(caught.value)
