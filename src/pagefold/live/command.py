"""Own the running of a command as if nobody stood between it and its caller: terminal, descriptors, signals, exit code.

Must not know: why it is run.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Mapping

from pagefold.errors import PagefoldError

_PASSED_ON = {signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
_SI_KERNEL = 0x80  # si_code of a signal that a terminal sent to all of its foreground group
_RESTORED = (signal.SIGPIPE, signal.SIGXFSZ)  # Python ignores them; programs expect them not to be


class CannotRun(PagefoldError):  # noqa: N818
    """The command could not be started; the exit codes are a shell's: 127 not found, 126 not a program."""

    def __init__(self, command: str, error: OSError) -> None:
        super().__init__(f"{command}: {error.strerror}; give a program that is there and may be run")
        self.exit_code = 127 if isinstance(error, FileNotFoundError) else 126


def run(command: list[str], environment: Mapping[str, str], started: Callable[[int], None]) -> int:
    """Run a command to its end and return its exit code, 128+n if signal n ended it. `started` is called with its PID.

    Signals to us become signals to it, but for those of a terminal, which it gets by itself. Threads of the caller must be started
    in `started`: signals that are waited for here must be blocked in them.
    """
    watched = {*_PASSED_ON, signal.SIGCHLD}
    signal.signal(
        signal.SIGCHLD, signal.SIG_DFL
    )  # ignored, as some callers leave it, nobody could learn how a child ended
    before = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        try:
            pid = os.posix_spawnp(command[0], command, environment, setsigmask=before, setsigdef=_RESTORED)
        except OSError as error:
            raise CannotRun(command[0], error) from None
        started(pid)
        return _wait(pid, watched)
    finally:
        while signal.sigtimedwait(watched, 0):  # what came too late to be passed on shall not end us now
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _wait(pid: int, watched: set[signal.Signals]) -> int:
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        came = signal.sigwaitinfo(watched)
        if came.si_signo != signal.SIGCHLD and came.si_code != _SI_KERNEL and came.si_pid != pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, came.si_signo)
