"""Own the real kernel's merger, borrowed: its knobs under a lock, and as they were when we are done, however we end.

Why it is restored even after SIGKILL: a guard process holds the other end of a pipe and the lock. When the pipe closes,
for whatever reason, the guard unmerges, writes the saved knobs back, and only then lets go of the lock.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from pagefold.errors import NotPermitted, PagefoldError

SYSFS = Path("/sys/kernel/mm/ksm")
# The order matters: with the advisor on, pages_to_scan cannot be written.
KNOBS = (
    *("advisor_mode", "pages_to_scan", "sleep_millisecs", "merge_across_nodes", "max_page_sharing", "use_zero_pages"),
    *("smart_scan", "stable_node_chains_prune_millisecs"),
)
_GUARD = """
import pathlib, sys
sysfs, saved = pathlib.Path(sys.argv[1]), dict(a.split("=", 1) for a in sys.argv[2:])
print("ready", flush=True)
sys.stdin.read()
(sysfs / "run").write_text("2")
for knob, value in saved.items():
    try:
        (sysfs / knob).write_text(value)
    except OSError as error:
        print(f"pagefold: {knob} could not be restored to {value}: {error}", file=sys.stderr)
"""


class KsmInUse(PagefoldError):  # noqa: N818
    """Something else merges on this machine: borrowing its knobs would disturb it."""


class KernelKsm:
    """The kernel's KSM for the time of a `with` block: `run` is 0 and nothing is merged at its begin.

    Needs root. Raises NotPermitted without, KsmInUse if KSM runs or holds merged pages; waits for the lock.
    """

    def __init__(self, sysfs: Path = SYSFS, lock: Path | None = None) -> None:
        self.sysfs = sysfs
        self.lock = lock or Path(tempfile.gettempdir()) / "pagefold-ksm.lock"
        self._guard: subprocess.Popen[str] | None = None
        self._lock_fd = -1

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
        self._lock_fd = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX)
        try:
            if self.get("run") or self.get("pages_shared"):
                raise KsmInUse(
                    "KSM is in use on this machine (run or pages_shared is not 0); stop it first: run=2, then 0"
                )
            self._start_guard()
        except BaseException:
            os.close(self._lock_fd)
            raise
        return self

    def _start_guard(self) -> None:
        saved = [f"{name}={self._chosen(name)}" for name in KNOBS if (self.sysfs / name).exists()]
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(self.sysfs), *saved, "run=0"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(self._lock_fd,),
            start_new_session=True,  # a Ctrl-C for us must not end it
        )
        assert self._guard.stdout is not None
        if self._guard.stdout.readline() != "ready\n":
            raise PagefoldError("the guard that restores the KSM knobs did not start; nothing was changed")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._guard is not None
        assert self._guard.stdin is not None
        self._guard.stdin.close()
        self._guard.wait()
        os.close(self._lock_fd)

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
        """Wait until that many more full scans are done (run must be 1); waits for scans, not for time."""
        goal = self.get("full_scans") + passes
        poll = _Poll()
        while self.get("full_scans") < goal:
            poll.rest()

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


class _Poll:
    """Rest between two looks at a counter, a little longer each time."""

    def __init__(self) -> None:
        self.seconds = 0.0005

    def rest(self) -> None:
        import time

        time.sleep(self.seconds)
        self.seconds = min(self.seconds * 1.5, 0.02)
