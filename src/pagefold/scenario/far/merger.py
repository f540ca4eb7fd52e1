"""Own the kernel's merger: its knobs and counters, and how it is let through exactly one full scan at a time.

How one full scan is let through, and never a page more (ksmd sleeps in one of two places, and both are interruptible sleeps, state S,
which it is in nowhere else):

1. `pages_to_scan` is as large as it can be, so a batch ends only with a full scan; `sleep_millisecs` is so long that a second batch
   never begins by itself. Between scans the kernel's `run` is 0.
2. ksmd may still sleep off the rest after its last batch. Writing another `sleep_millisecs` wakes it, once it is seen asleep; with
   `run` 0 it finds nothing to do and goes to the sleep that `run` 1 ends.
3. `run` 1: it scans one batch, and then rests. Once it is seen asleep, `run` 0 is written, which waits for the merger's lock: after
   that, whatever the counters say is final. If they did not move, nothing is there to be scanned.

Both knobs are put back after the scan. A `run` of 1 is remembered, and put into the kernel for scans alone.
"""

from __future__ import annotations

import errno
import re
import time
from pathlib import Path

from calls import write_file

SYSFS = Path("/sys/kernel/mm/ksm")
STEPPING = ("pages_to_scan", "sleep_millisecs")  # ours while a scan runs
SINCE_BOOT = ("pages_scanned", "pages_skipped")  # counters that nothing resets: told as from the last reset
LONG = (100_000_000, 100_000_001)  # ms of sleep: a day; two values, because a change wakes ksmd
UINT_MAX = 2**32 - 1


class Merger:
    """The knobs as a scenario believes them to be, and scans."""

    def __init__(self) -> None:
        self.waiting = False  # `run` is 1 for whoever asks; the kernel's is 0 between scans
        self.base: dict[str, int] = {}
        self.ksmd = 0  # pid

    def find_ksmd(self) -> None:
        """Find the pid of the merger's thread; ESRCH if it is not to be seen."""
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if (folder / "comm").read_text() == "ksmd\n" and not (folder / "cmdline").read_bytes():
                    self.ksmd = int(folder.name)
                    return
            except OSError:
                continue  # it ended meanwhile
        raise OSError(errno.ESRCH, "no thread ksmd is to be seen: is this a pid namespace of its own?")

    def clear(self) -> None:
        """Unmerge everything; the kernel's `run` is 0 then."""
        for value in (0, 2, 0):
            write("run", value)

    def reset(self, knobs: dict[str, int | str]) -> None:
        """Begin afresh with these knobs; EBUSY if anybody's memory is there to be scanned."""
        self.clear()
        if (SYSFS / "advisor_mode").exists():
            write("advisor_mode", "none")
        write("pages_to_scan", UINT_MAX)
        if self.one_batch() and self.one_batch():  # the first lets go of processes that once were advised
            raise OSError(
                errno.EBUSY, "memory of another process is advised MERGEABLE (as a virtual machine's often is)"
            )
        self.waiting = True
        for name, setting in knobs.items():
            if (SYSFS / name).exists():
                self.set(name, setting)
        self.base = {name: number(name) for name in SINCE_BOOT}

    def set(self, name: str, value: int | str) -> None:
        """Write a knob; the kernel judges the value. `run` 1 waits for the next scan."""
        waiting = name == "run" and re.fullmatch(r"\+?0*1\n?", str(value)) is not None  # as the kernel reads numbers
        write(name, 0 if waiting else value)
        if name == "run":
            self.waiting = waiting

    def get(self, name: str) -> int | str:
        """Read a knob or counter."""
        if name == "run" and self.waiting:
            return 1
        text = (SYSFS / name).read_text().strip()
        if "[" in text:
            return text[text.index("[") + 1 : text.index("]")]
        return int(text) - self.base.get(name, 0)

    def scan(self, passes: int) -> int:
        """Let that many full scans through; return how many there were: fewer if nothing is there to be scanned."""
        ours = [name for name in STEPPING if name != "pages_to_scan" or not self.advised()]
        kept = {name: number(name) for name in ours}
        first = number("full_scans")
        try:
            if "pages_to_scan" in ours:
                write("pages_to_scan", UINT_MAX)
            for done in range(1, passes + 1):
                while number("full_scans") < first + done:
                    if not self.one_batch():
                        return done - 1
        finally:
            for name, value in kept.items():
                write(name, value)
        return passes

    def advised(self) -> bool:
        """Tell whether the advisor sets pages_to_scan: nobody else can then, and a full scan may take several batches."""
        return (SYSFS / "advisor_mode").exists() and self.get("advisor_mode") != "none"

    def one_batch(self) -> bool:
        """Let ksmd scan one batch; False if there was nothing to scan."""
        before = progress()
        self.wait_asleep()
        write("sleep_millisecs", LONG[number("sleep_millisecs") == LONG[0]])
        self.wait_asleep()
        write("run", 1)
        self.wait_asleep()
        write("run", 0)
        return progress() != before

    def wait_asleep(self) -> None:
        """Wait until ksmd rests."""
        rest = 0.0001
        while Path(f"/proc/{self.ksmd}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            time.sleep(rest)
            rest = min(rest * 1.5, 0.01)


def write(name: str, value: int | str) -> None:
    """Write a file of the merger."""
    write_file(SYSFS / name, str(value))


def number(name: str) -> int:
    """Read a knob or counter that is a number; 0 if this kernel does not have it."""
    try:
        return int((SYSFS / name).read_text())
    except FileNotFoundError:
        return 0


def progress() -> tuple[int, ...]:
    """Return what grows when ksmd scans."""
    return tuple(map(number, ("full_scans", *SINCE_BOOT)))
