"""Judge the borrowing of the kernel's KSM, in a folder that plays its part: permission, lock, and giving back."""

from __future__ import annotations

import fcntl
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pagefold.errors import NotPermitted, PagefoldError
from pagefold.scenario.kernel_ksm import SYSFS, KernelKsm, KsmInUse

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may borrow KSM")
FILES = {
    "run": "0\n",
    "pages_shared": "0\n",
    "ksm_zero_pages": "0\n",
    "full_scans": "12\n",
    "pages_to_scan": "100\n",
    "sleep_millisecs": "20\n",
    "merge_across_nodes": "1\n",
    "max_page_sharing": "256\n",
    "use_zero_pages": "0\n",
    "smart_scan": "1\n",
    "stable_node_chains_prune_millisecs": "2000\n",
    "advisor_mode": "[none] scan-time\n",
}
CHANGES = {"smart_scan": 0, "pages_to_scan": 9999, "max_page_sharing": 3, "advisor_mode": "scan-time"}
# Borrows, changes everything, writes one line to the log and one to us, and holds on until told to leave.
BORROW = """
import os, pathlib, signal, sys
from pagefold.scenario.kernel_ksm import KernelKsm
sysfs, name, end = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def log(word):
    with (sysfs.parent / "log").open("a") as file: print(name, word, file=file)
print("begins", flush=True)
with KernelKsm(sysfs) as ksm:
    log("in")
    for knob in ("smart_scan", "pages_to_scan", "max_page_sharing", "run"): ksm.set(knob, 5)
    print("borrowed", flush=True)
    sys.stdin.readline()
    log("out")
    if end == "killed": os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """Return a folder with KSM's files."""
    folder = tmp_path / "ksm"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def borrowed(fake: Path) -> KernelKsm:
    return KernelKsm(fake)


def knobs(fake: Path) -> dict[str, str]:
    return {path.name: path.read_text().strip() for path in fake.iterdir()}


RESTORED = {name: text.strip() for name, text in FILES.items()} | {"advisor_mode": "none"}


class Borrower:
    """A process that borrows the fake KSM."""

    def __init__(self, fake: Path, name: str, end: str = "leaves") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", BORROW, str(fake), name, end],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.expect("begins")

    def expect(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == f"{word}\n"

    def leave(self) -> int:
        self.process.communicate("go\n")
        return self.process.returncode


def test_a_kernel_without_ksm(tmp_path: Path) -> None:
    with pytest.raises(NotPermitted, match="this kernel has no KSM"), KernelKsm(tmp_path / "missing"):
        pass


def test_without_root(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagefold.scenario.kernel_ksm.os.geteuid", lambda: 1000)
    assert KernelKsm.why_not(fake) == "root is needed to write /sys/kernel/mm/ksm"
    with pytest.raises(NotPermitted, match="root is needed"), borrowed(fake):
        pass
    assert knobs(fake) == {name: text.strip() for name, text in FILES.items()}


@needs_root
def test_why_not_of_root(fake: Path) -> None:
    assert KernelKsm.why_not(fake) is None
    assert KernelKsm().sysfs == SYSFS


@needs_root
def test_everything_is_given_back(fake: Path) -> None:
    with borrowed(fake) as ksm:
        for name, value in CHANGES.items():
            ksm.set(name, value)
        ksm.set("run", 1)
        assert ksm.get("pages_to_scan") == 9999
    assert knobs(fake) == RESTORED


@needs_root
@pytest.mark.parametrize(
    ("shown", "chosen"), [("[none] scan-time", "none"), ("none [scan-time]", "scan-time"), ("none", "none")]
)
def test_of_a_choice_the_bracketed_word_is_given_back(fake: Path, shown: str, chosen: str) -> None:
    (fake / "advisor_mode").write_text(f"{shown}\n")
    with borrowed(fake):
        pass
    assert (fake / "advisor_mode").read_text() == chosen


@needs_root
def test_knobs_this_kernel_has_not_are_not_made(fake: Path) -> None:
    (fake / "smart_scan").unlink()
    (fake / "advisor_mode").unlink()
    with borrowed(fake):
        pass
    assert not (fake / "smart_scan").exists() and not (fake / "advisor_mode").exists()


@needs_root
def test_a_knob_that_refuses_does_not_keep_the_others(fake: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PagefoldError, match=r"some knobs in .* could not be restored"), borrowed(fake) as ksm:
        for name, value in CHANGES.items():
            ksm.set(name, value)
        (fake / "max_page_sharing").unlink()
        (fake / "max_page_sharing").mkdir()
    (fake / "max_page_sharing").rmdir()
    assert knobs(fake) == {name: value for name, value in RESTORED.items() if name != "max_page_sharing"}
    assert "pagefold: max_page_sharing could not be restored to 256" in capfd.readouterr().err


@needs_root
def test_everything_is_given_back_when_the_borrower_is_killed(fake: Path) -> None:
    borrower = Borrower(fake, "one", "killed")
    borrower.expect("borrowed")
    assert knobs(fake) != RESTORED
    assert borrower.leave() == -signal.SIGKILL
    with borrowed(fake):  # waits for the guard, which holds the lock until all is as it was
        assert knobs(fake) == RESTORED


@needs_root
def test_everything_is_given_back_after_an_exception(fake: Path) -> None:
    with pytest.raises(RuntimeError), borrowed(fake) as ksm:
        ksm.set("sleep_millisecs", 0)
        raise RuntimeError
    assert knobs(fake) == RESTORED


def take_lock(fake: Path) -> None:
    """Take and drop the lock, or raise BlockingIOError."""
    folder = os.open(fake, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(folder)


def waits_for_a_lock(pid: int) -> bool:
    """Tell whether the kernel lists a process among those that wait for a file lock."""
    lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return any(line[1] == "->" and line[5] == str(pid) for line in lines)


@needs_root
def test_a_second_borrower_waits_for_the_first(fake: Path) -> None:
    first = Borrower(fake, "one")
    first.expect("borrowed")
    with pytest.raises(BlockingIOError):
        take_lock(fake)
    second = Borrower(fake, "two")
    while not waits_for_a_lock(second.process.pid):
        assert second.process.poll() is None
    assert first.leave() == 0
    second.expect("borrowed")
    assert second.leave() == 0
    assert (fake.parent / "log").read_text().split("\n") == ["one in", "one out", "two in", "two out", ""]
    assert knobs(fake) == RESTORED


@needs_root
@pytest.mark.parametrize(
    ("name", "value"), [("run", "1"), ("run", "2"), ("pages_shared", "3"), ("ksm_zero_pages", "1")]
)
def test_ksm_that_others_use_is_left_alone(fake: Path, name: str, value: str) -> None:
    (fake / name).write_text(value)
    before = knobs(fake)
    with pytest.raises(KsmInUse, match="in use on this machine"), borrowed(fake):
        pass
    assert knobs(fake) == before
    take_lock(fake)  # and nothing is held


class Scripted(KernelKsm):
    """A KSM whose full_scans goes on by one at each look, and whose counters come from a script."""

    def __init__(self, fake: Path, shared: list[int]) -> None:
        super().__init__(fake)
        self.scans, self.shared, self.looks = itertools.count(), shared, 0

    def get(self, name: str) -> int:
        if name == "full_scans":
            assert super().get("run") == 1
            return next(self.scans)
        if name == "run":
            return super().get("run")
        assert super().get("run") == 0, "counters are read while nothing is scanned"
        self.looks += 1
        return self.shared.pop(0) if len(self.shared) > 1 else self.shared[0]


def test_settle_waits_until_nothing_changes_three_times(fake: Path) -> None:
    (fake / "run").write_text("1")
    ksm = Scripted(fake, [4, 9, 9, 9, 8, 8, 8, 8, 7])
    assert ksm.settle(("pages_shared",)) == {"pages_shared": 8}
    assert ksm.looks == 8
    assert (fake / "run").read_text() == "1"


def test_wait_scans_counts_scans(fake: Path) -> None:
    (fake / "run").write_text("1")
    ksm = Scripted(fake, [0])
    ksm.wait_scans(3)
    assert next(ksm.scans) == 4


def test_waiting_ends_when_ksmd_does_not_run(fake: Path) -> None:
    with pytest.raises(PagefoldError, match="run is 0 while full scans are waited for"):
        KernelKsm(fake).wait_scans(1)


def test_waiting_ends_when_nothing_is_scanned(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagefold.scenario.kernel_ksm._PATIENCE", 0.0)
    (fake / "run").write_text("1")
    with pytest.raises(PagefoldError, match="is any memory advised MERGEABLE"):
        KernelKsm(fake).wait_scans(1)


FORK_AND_DIE = """
import os, pathlib, signal, sys
from pagefold.scenario.kernel_ksm import KernelKsm
with KernelKsm(pathlib.Path(sys.argv[1])) as ksm:
    ksm.set("smart_scan", 0)
    if os.fork() == 0:
        sys.stdin.read()  # outlives its parent
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@needs_root
def test_everything_is_given_back_though_a_forked_child_lives_on(fake: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", FORK_AND_DIE, str(fake)], stdin=subprocess.PIPE)
    assert process.wait() == -signal.SIGKILL
    # The child has the parent's descriptors: also that of the lock, which therefore tells nothing here.
    while knobs(fake) != RESTORED:
        pass
    assert process.stdin is not None
    process.stdin.close()
