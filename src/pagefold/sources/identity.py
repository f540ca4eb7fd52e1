"""Own who a process is and whether it may be read: its name, kind, user, and the words for refusing it.

Must not know: areas, pages.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pagefold.errors import NoSuchProcess, NotPermitted, NotReadable, UsageError

PROC = Path("/proc")
_PF_KTHREAD = 0x0020_0000
_STATE, _FLAGS, _START = 0, 6, 19  # places in /proc/PID/stat behind the name in parentheses


@dataclass(frozen=True, slots=True)
class Identity:
    """Say who a process is; `started` (clock ticks since boot) tells it from a later user of its PID."""

    pid: int
    name: str
    state: str
    kernel_thread: bool
    started: int
    group: int  # PID of the whole process; differs from `pid` for one of its threads

    @property
    def label(self) -> str:
        """Return the name for people."""
        return f"{self.name} [{self.pid}]"


def identify(pid: int, proc: Path = PROC) -> Identity:
    """Read who a process is; raises `NoSuchProcess`."""
    try:
        stat = (proc / str(pid) / "stat").read_text(errors="replace")
        status = (proc / str(pid) / "status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise gone(pid) from None
    except PermissionError:
        raise refused(pid) from None
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    words = stat[stat.rindex(")") + 2 :].split()
    group = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("Tgid:")), pid)
    kernel_thread = bool(int(words[_FLAGS]) & _PF_KTHREAD)
    # A process names itself: nothing it says may reach a terminal as a control sequence.
    name = "".join(letter if letter.isprintable() else "?" for letter in name)
    return Identity(pid, name, words[_STATE], kernel_thread, int(words[_START]), group)


def identify_readable(pid: int, proc: Path = PROC) -> Identity:
    """Read who a process is, and refuse those that can never be read, whatever the permissions."""
    if pid <= 0:
        raise UsageError(f"{pid} is not a PID: PIDs are 1 or more")
    who = identify(pid, proc)
    if who.group == os.getpid():
        raise NotReadable(f"PID {pid} is pagefold: pagefold cannot read itself: its pages change while it reads")
    if who.kernel_thread:
        raise NotReadable(f"PID {pid} ({who.name}) is a kernel thread: it has no memory of its own")
    if who.state in "ZX":
        raise NoSuchProcess(f"PID {pid} ({who.name}) has ended: only its exit status is left")
    if who.group != pid:
        raise NotReadable(f"PID {pid} ({who.name}) is a thread: give its process, {who.group}")
    return who


def has_memory(pid: int, proc: Path = PROC) -> bool:
    """Tell whether a process (still) has an address space: it loses that some time before it ends."""
    try:
        return int((proc / str(pid) / "statm").read_text().split()[0]) > 0
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone(pid: int, name: str | None = None) -> NoSuchProcess:
    """Make the error for a process that is not there, or, with its name, no longer."""
    if name is None:
        return NoSuchProcess(f"PID {pid}: no such process; give the PID of one that runs")
    return NoSuchProcess(f"PID {pid} ({name}) ended while it was being read")


def refused(pid: int, name: str | None = None) -> NotPermitted:
    """Make the error for a process this user may not read."""
    who = f"PID {pid} ({name})" if name else f"PID {pid}"
    return NotPermitted(
        f"{who}: not permitted: reading it needs ptrace access: run as the user who owns it, "
        "or with CAP_SYS_PTRACE (as root)"
    )


def list_mine(proc: Path = PROC) -> list[int]:
    """Return the PIDs, ascending, of this user's processes that can be read; for root, of all users'.

    Left out: ourselves, kernel threads, processes that ended or have no memory.
    """
    user = os.geteuid()
    mine = []
    for entry in proc.iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            if user not in (0, entry.stat().st_uid):
                continue
            identify_readable(int(entry.name), proc)
            # Opening asks for the same access as reading does.
            os.close(os.open(entry / "pagemap", os.O_RDONLY | os.O_CLOEXEC))
            if has_memory(int(entry.name), proc):
                mine.append(int(entry.name))
        except (OSError, NoSuchProcess, NotPermitted, NotReadable):
            continue
    return sorted(mine)
