"""Own the real kernel's merger, borrowed: its knobs under a lock, and as they were when we are done, however we end.

Why it is restored even after SIGKILL: a guard process watches us through a pidfd, and holds the lock too. When we say so, or are gone,
it waits until every process that we let use the knobs is gone too, unmerges, writes the saved knobs back, and only then lets go of the
lock. The lock is on the folder of the knobs itself, so that it is one for the whole machine. Who uses the knobs for us inherits
`witness`, the one writing end of a pipe that the guard reads: the pipe ends with the last of them.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType

from pagefold.errors import NotPermitted, PagefoldError

SYSFS = Path("/sys/kernel/mm/ksm")
# With the advisor on, pages_to_scan cannot be written: its mode is set to none first, and to what it was last.
KNOBS = (
    *("pages_to_scan", "sleep_millisecs", "merge_across_nodes", "max_page_sharing", "use_zero_pages", "smart_scan"),
    *(
        "stable_node_chains_prune_millisecs",
        "advisor_max_cpu",
        "advisor_min_pages_to_scan",
        "advisor_max_pages_to_scan",
    ),
    *("advisor_target_scan_time", "advisor_mode"),
)
_PATIENCE = 60.0  # seconds in which ksmd must end a full scan, or something is wrong
_GUARD = """
import errno, os, pathlib, select, sys, time
sysfs, parent, users = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
knobs = [word.split("=", 1) for word in sys.argv[4:]]
passing = (errno.EBUSY, errno.EINTR, errno.EAGAIN, errno.ENOMEM)
try:
    alive = [os.pidfd_open(parent)]
except ProcessLookupError:
    alive = []
print("ready", flush=True)
if alive:
    select.select([0, *alive], [], [])
select.select([users], [], [], 60)  # longer than any of them needs to end
failed = 0
for knob, value in knobs:
    for attempt in range(100):
        try:
            (sysfs / knob).write_text(value)
            break
        except OSError as error:
            if error.errno in passing and attempt < 99:
                time.sleep(0.05)
                continue
            print(f"pagefold: {knob} could not be restored to {value}: {error}", file=sys.stderr)
            failed = 1
            break
sys.exit(failed)
"""


class KsmInUse(PagefoldError):  # noqa: N818
    """Something else merges on this machine: borrowing its knobs would disturb it."""


class KernelKsm:
    """The kernel's KSM for the time of a `with` block: `run` is 0 and nothing is merged at its begin.

    Needs root. Raises NotPermitted without, KsmInUse if KSM runs or holds merged pages; waits for the lock.
    """

    def __init__(self, sysfs: Path = SYSFS) -> None:
        self.sysfs = sysfs
        self._guard: subprocess.Popen[str] | None = None
        self._lock_fd = -1
        self.witness = -1  # to be inherited by every process that uses the knobs for us

    @staticmethod
    def why_not(sysfs: Path = SYSFS) -> str | None:
        """Say why the kernel's KSM cannot be borrowed here, None if it can."""
        if not sysfs.is_dir():
            return "this kernel has no KSM (/sys/kernel/mm/ksm is missing)"
        if not os.access(sysfs / "run", os.W_OK) or os.geteuid():
            return "root is needed to write /sys/kernel/mm/ksm"
        return None

    def __enter__(self) -> KernelKsm:
        if reason := self.why_not(self.sysfs):
            raise NotPermitted(reason)
        self._lock_fd = os.open(self.sysfs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("pagefold: waiting for another user of this machine's KSM ...", file=sys.stderr)
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        try:
            if any(
                self.get(name) for name in ("run", "pages_shared", "ksm_zero_pages") if (self.sysfs / name).exists()
            ):
                raise KsmInUse(
                    "KSM is in use on this machine (run, pages_shared or ksm_zero_pages is not 0); set run to 2, then 0"
                )
            self._start_guard()
        except BaseException:
            os.close(self._lock_fd)
            raise
        return self

    def _start_guard(self) -> None:
        saved = [f"{name}={self._chosen(name)}" for name in KNOBS if (self.sysfs / name).exists()]
        quiet = ["advisor_mode=none"] if (self.sysfs / "advisor_mode").exists() else []
        users, self.witness = os.pipe()
        arguments = [str(self.sysfs), str(os.getpid()), str(users), "run=2", *quiet, *saved, "run=0"]
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(self._lock_fd, users),
            start_new_session=True,  # a Ctrl-C for us must not end it
        )
        os.close(users)
        assert self._guard.stdout is not None
        if self._guard.stdout.readline() != "ready\n":
            raise PagefoldError("the guard that restores the KSM knobs did not start; nothing was changed")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._guard is not None
        os.close(self.witness)
        self._guard.communicate("done")
        os.close(self._lock_fd)
        if self._guard.returncode and kind is None:
            raise PagefoldError(
                f"some knobs in {self.sysfs} could not be restored; the lines above say which: set them by hand"
            )

    def _chosen(self, name: str) -> str:
        """Return a knob as it must be written back; of '[none] scan-time' the bracketed word."""
        text = (self.sysfs / name).read_text().strip()
        return text[text.index("[") + 1 : text.index("]")] if "[" in text else text

    def get(self, name: str) -> int:
        """Return a knob or counter that is a number."""
        return int((self.sysfs / name).read_text())

    def set(self, name: str, value: int | str) -> None:
        """Write a knob; OSError with the kernel's errno if it refuses."""
        (self.sysfs / name).write_text(str(value))

    def wait_scans(self, passes: int) -> None:
        """Wait until that many more full scans are done; waits for scans, not for time.

        PagefoldError if run is not 1, or if no full scan ends for a minute: then nothing is advised, or ksmd is stuck.
        """
        scans = self.get("full_scans")
        goal = scans + passes
        deadline, rest = time.monotonic() + _PATIENCE, 0.0005
        while scans < goal:
            if self.get("run") != 1:
                raise PagefoldError(f"run is {self.get('run')} while full scans are waited for; it must stay 1")
            if time.monotonic() > deadline:
                raise PagefoldError(f"no full scan ended in {_PATIENCE:.0f} seconds: is any memory advised MERGEABLE?")
            time.sleep(rest)
            rest = min(rest * 1.5, 0.02)
            now = self.get("full_scans")
            if now != scans:
                scans, deadline = now, time.monotonic() + _PATIENCE

    def settle(self, names: tuple[str, ...] = ("pages_shared", "pages_sharing", "pages_unshared")) -> dict[str, int]:
        """Let the kernel scan (run must be 1) until these counters have been the same over three full scans; return them.

        They are read while run is 0: a page that is being looked at is on no tree, and would be missing from the count.
        """
        before: dict[str, int] = {}
        same = 0
        while same < 3:
            self.wait_scans(1)
            self.set("run", 0)
            now = {name: self.get(name) for name in names}
            self.set("run", 1)
            same = same + 1 if now == before else 0
            before = now
        return before
