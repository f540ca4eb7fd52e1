"""Own the order of changes to what threads share: one after the other, also when one begins in the middle of another.

A lock alone is not enough: the garbage collector and signal handlers run Python code between any two instructions, and what they
call may want the same lock in the same thread. Here every change is a job in a queue, and whoever has the turn does what is in it.

Why every job is done, once, whole, and before `run` returns to a caller who is not himself inside a job:

1. A job is queued before the turn is taken, and the turn is only given up when the queue was seen empty after `_busy` was set back.
   So a job that was queued meanwhile is either seen there, or its own thread finds nobody busy and does it.
2. Who waits for the turn does so with his job queued, so it is done when he gets the turn, by him or by another.
3. Who finds his own thread busy (he interrupted a job) returns at once; the job he interrupted is followed by his.
4. `try_run` never waits: whoever has the turn takes the job along, or the next who gets it.

Must not know: what jobs do.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

from pagefold.errors import PagefoldError


class Turn:
    """Do jobs one after the other, whatever thread they come from."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._busy = False  # only ever looked at by who has the lock
        self._forks = 0  # under way; also with the lock only
        self._jobs: deque[_Job] = deque()

    def run(self, work: Callable[[], Any]) -> Any:
        """Do `work` and return what it returns; None, with the work still to come, if this thread is in the middle of other work."""
        job = _Job(work)
        self._jobs.append(job)
        try:
            with self._lock:
                self._work()
        except BaseException:  # the user's Ctrl-C: nobody will get the result
            job.work = None
            raise
        if job.error is not None:
            raise job.error
        return job.result

    def try_run(self, work: Callable[[], Any]) -> None:
        """Have `work` done, now or soon, and never wait."""
        self._jobs.append(_Job(work, lasting=True))
        if self._lock.acquire(blocking=False):
            try:
                self._work()
            finally:
                self._lock.release()

    def before_fork(self) -> None:
        """Take the turn, so that no job is half done in the child."""
        self._lock.acquire()
        self._forks += 1
        self._work()

    def after_fork(self, *, child: bool) -> None:
        """Give it back; in the child jobs of threads that are not there are dropped. Nothing if this was made in the middle of a fork."""
        if not self._forks:
            return
        self._forks -= 1
        if child and not self._busy:
            lasting = [job for job in self._jobs if job.lasting]
            self._jobs.clear()
            self._jobs.extend(lasting)
        self._lock.release()

    def _work(self) -> None:
        if self._busy:
            return
        while self._jobs:
            self._busy = True
            try:
                while self._jobs:
                    self._jobs.popleft().do()
            finally:
                self._busy = False


class _Job:
    __slots__ = ("error", "lasting", "result", "work")

    def __init__(self, work: Callable[[], Any], *, lasting: bool = False) -> None:
        self.work: Callable[[], Any] | None = work
        self.lasting = lasting  # must be done in a forked child too
        self.result: Any = None
        self.error: Exception | None = None

    def do(self) -> None:
        work, self.work = self.work, None
        if work is None:
            return
        try:
            self.result = work()
        except Exception as error:
            self.error = error
        except BaseException:  # meant for this thread, not for the one whose job it was
            self.error = PagefoldError("interrupted while pagefold was at work for another thread; try again")
            raise
