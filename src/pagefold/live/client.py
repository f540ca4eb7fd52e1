"""Own what a program calls: merge, advise, unadvise, enable, stats, settled; and that the agent runs where it is needed.

The agent is started by the first call that needs it, in a forked child again. Loading this module loads the agent's library, which must
happen before a fork if parent and child shall know of each other's pages without a daemon (the embedded store): `pagefold` sees to it. At
the end of the interpreter the agent stops, before memory is freed in whatever order. Standard library only. Must not know: how pages are
swapped.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagefold.errors import PagefoldError, UsageError
from pagefold.live import agent, buffers, control, domain, loading, vmas
from pagefold.live.findings import Handle, Report
from pagefold.live.hold import Hold
from pagefold.live.holds import Holds

__all__ = ["Handle", "Report", "advise", "enable", "merge", "settled", "stats", "unadvise"]

_WHY_FAILED = {
    errno.ETIMEDOUT: "not merged in time: the daemon is busy; give it a longer timeout",
    errno.EAGAIN: "the daemon does not merge now (`pagefold set run=1`)",
    errno.ENOENT: "let go in the meantime",
    errno.ECANCELED: "the agent stopped in the meantime",
    errno.EMFILE: "no file descriptor is left to look at the mapping; raise `ulimit -n`",
    errno.ENOBUFS: "no memory is left to look at the mapping",
}
_NO_DAEMON = "no daemon: nothing merges in the background until there is one (`pagefold serve`, or `pagefold run`)"
_POLL_SECONDS = 0.02
_ASK_SECONDS = 10.0
_TOGETHER = 32  # merges that wait at a time: the agent asks for no more


def merge(thing: Any, timeout: float | None = 60.0) -> Report:
    """Swap the pages of an object for equal ones that are known elsewhere, now; say what was merged, and why the rest was not.

    Takes NumPy arrays, pandas and Arrow tables, torch CPU tensors, whatever has a buffer, and dicts, lists and tuples of those. Known is
    what the daemon's domain holds; without a daemon what this process merged before, or one it was forked from or that it forked.
    `timeout` (seconds) bounds the wait for a daemon.

    Pages stay merged until they are written, their array is freed, or `release()` is called on the report. A NumPy array is not kept
    alive by that (but cannot `resize`); memory of all others (bytes, bytearray, mmap, Arrow, torch ...) is kept until `release()`.
    Where safe windows are not possible (`stats()["why"]`), nobody else may write to the object during this call and `release()`.
    """
    _client.start()
    found = buffers.find(thing, _client.let_go)  # references the owners until we are done
    hold = _client.holds.take(found.pieces, quiet=True)
    try:
        report = Report(hold, _client.release)
        _client.holds.look(hold)
        edges = min(sum(other.edges for other in hold.others), found.why_not.get(buffers.EDGE, 0))
        report.refuse(
            {reason: pages - edges if reason == buffers.EDGE else pages for reason, pages in found.why_not.items()}
        )
        report.refuse(hold.why_not)
        until = None if timeout is None else time.monotonic() + timeout
        state = _client.library.state()
        wanted = {region.number: (region.start, region.pages) for region in list(hold.regions)}
        for other in hold.others:  # several may name one region: it is merged once
            wanted.setdefault(other.number, (other.start, (other.end - other.start) // buffers.PAGE))
        order = sorted(wanted.items(), key=lambda item: item[1])
        done = _merge_all([number for number, _ in order], until)
        for (_, (_, pages)), (code, figures) in zip(order, done, strict=True):
            if code < 0:
                report.refuse({_WHY_FAILED.get(-code, f"the agent failed: {os.strerror(-code)}"): pages})
                continue
            report.count(figures.by_status, state.why.decode(errors="replace"))
            report.zero_pages += figures.zero_pages
            report.saved_bytes += figures.saved_bytes
            report.through_daemon = report.through_daemon or bool(figures.through_daemon)
    except BaseException:
        _client.release(hold)
        raise
    if wanted and not state.windows_safe:
        report.note = f"swapped without windows, which is safe only if nobody wrote meanwhile: {state.why.decode(errors='replace')}"
    return report


def _merge_all(numbers: list[int], until: float | None) -> list[tuple[int, agent.Report]]:
    """Merge regions; those that wait for the daemon do so together, in threads, for it answers many at once."""

    def one(number: int) -> tuple[int, agent.Report]:
        left = agent.NO_TIMEOUT if until is None else int(max(until - time.monotonic(), 0) * 1000)
        return _client.library.merge(number, left)

    first = [one(number) for number in numbers[:1]]  # and wait for the connection, if one is being made
    rest = numbers[1:]
    if not rest or not _client.library.state().connected:
        return first + [one(number) for number in rest]
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(min(len(rest), _TOGETHER)) as threads:
        return [*first, *threads.map(one, rest)]


def advise(thing: Any) -> Handle:
    """Let the pages of an object be merged in the background from now on; takes what `merge` takes.

    The memory is kept, and cannot resize, until the handle is given to `unadvise`, or the `with` block it was opened for ends. Dropping the
    handle changes nothing: the advice stays as long as the process. Needs a daemon (`pagefold run`, `pagefold serve`), now or
    later; `handle.note` says why nothing happens yet.
    """
    _client.start()
    found = buffers.find(thing, _client.let_go)
    hold = _client.holds.take(found.pieces, quiet=False)
    state = _client.library.state()
    if state.windows_safe and not state.connected:
        # What merge did to them before ended when they were advised, and nobody else does it again.
        for region in hold.begun_anew:
            _client.library.merge(region.number)
    hold.begun_anew.clear()
    return Handle(hold, found.why_not, _client.note, _client.release, _client.holds.look)


def unadvise(handle: Handle | Report) -> int:
    """End what `advise` (or `merge`) began: pages become private copies again, unless another handle advises them. May be called again.

    Returns how many pages stay in a mapping of the store's file, though private and correct: pinned by a device.
    """
    if not isinstance(handle, Handle | Report):
        raise UsageError(
            f"{type(handle).__name__} is no handle; give unadvise what advise (or merge) returned for the memory"
        )
    return handle.release()


def enable() -> None:
    """Advise every NumPy array of 64 KiB and more that is made from now on, in all threads, once it has lived a second or two.

    Such arrays begin at a page, so that equal ones can merge; nothing keeps them alive. If NumPy is not loaded yet, this waits until it is.
    """
    if "numpy" not in sys.modules:
        if not _client.waiting:
            _client.waiting = True
            loading.when_loaded("numpy", enable)
        return
    from pagefold.live import allocator

    _client.everywhere = allocator.install(_client.library.array_functions())
    _client.enabled = True
    _client.start()


def stats() -> dict[str, Any]:
    """Return the figures of this process and of its domain, by the kernel's counter names where it has one.

    `process`: `ksm_merging_pages` map the store now, `cow_breaks` did until they were written, `ksm_rmap_items` are advised; `windows`,
    `pages` (by what became of them), `restored`, `remapped` count since the start or fork. `domain`: what the daemon says, None
    without one. `why`: why nothing merges in the background, '' if it does.
    """
    state = _client.library.state()
    census = vmas.census(vmas.store_ranges())
    process = {
        "ksm_merging_pages": census.merged,
        "cow_breaks": census.written,
        "ksm_rmap_items": int(state.region_pages),
        "regions": int(state.regions),
        "windows": int(state.windows),
        "pages": state.pages(),
        "restored": int(state.restored),
        "remapped": int(state.remapped),
        "enabled": _client.enabled,
        "started": bool(state.started),
        "connected": bool(state.connected),
        "windows_safe": bool(state.windows_safe),
    }
    why = _client.note() if state.started else ""
    try:
        answer = control.ask(_client.socket(), {"verb": "stat"}, _ASK_SECONDS)
    except PagefoldError as error:
        return {"process": process, "domain": None, "why": why or str(error)}
    answer.pop("ok", None)
    return {"process": process, "domain": answer, "why": why}


def settled(timeout: float | None = None) -> bool:
    """Wait until nothing more can merge in this domain, with all that this process advised; False if that takes longer than `timeout`.

    Arrays of enable() count from when they are advised, a second or two after they were made. Raises NotHere without a daemon.
    """
    until = None if timeout is None else time.monotonic() + max(timeout, 0.0)
    path = _client.socket()
    while True:
        known = _client.known_to(path)
        left = None if until is None else until - time.monotonic()
        if known:
            request = {"verb": "settled"} | ({} if left is None else {"timeout": max(left, 0.0)})
            answer = control.ask(path, request, None if left is None else max(left, 0.0) + _ASK_SECONDS)
            if answer.get("settled") or left is not None:
                return bool(answer.get("settled"))
        elif left is not None and left <= 0:
            return False
        else:
            time.sleep(_POLL_SECONDS if left is None else min(_POLL_SECONDS, left))


class _Client:
    """This process as a client."""

    def __init__(self) -> None:
        self.library = agent.library()
        self.agent = agent.Agent(self.library)
        self.advise: Callable[[int, int, int], int] = self.library.functions.pf_advise_unseen
        self.holds = Holds(self)
        self.why = ""  # there is no daemon, if that is because its socket cannot be named
        self.waiting = False  # for NumPy
        self.enabled = False
        self.everywhere = False  # and not only in the thread that called enable()
        self._started = False
        self._starting = threading.RLock()
        os.register_at_fork(
            before=self.holds.turn.before_fork,
            after_in_parent=lambda: self.holds.turn.after_fork(child=False),
            after_in_child=self._after_fork_in_child,
        )
        atexit.register(self._end)

    def socket(self) -> Path:
        """Return where the daemon is, or would be; NotHere or NotPermitted if that cannot be said."""
        return domain.socket_path()

    def start(self) -> None:
        """Start the agent, if it does not run and this is not the end."""
        if self._started or self.holds.closed:
            return
        with self._starting:
            if not self._started:
                try:
                    path, self.why = str(self.socket()), ""
                except PagefoldError as error:
                    path, self.why = "", str(error)
                self.agent.start(path)
                self._started = True

    def note(self) -> str:
        """Return why nothing happens in the background; '' if it does."""
        state = self.library.state()
        if not state.windows_safe:
            return state.why.decode(errors="replace")
        return "" if state.connected else self.why or _NO_DAEMON

    def known_to(self, path: Path) -> bool:
        """Tell whether the daemon knows all regions of this process. Raises NotHere without a daemon."""
        regions = self.library.state().regions
        rows = control.ask(path, {"verb": "clients"}, _ASK_SECONDS).get("clients", [])
        known = (row["regions"] + row["ignored_regions"] for row in rows if row["pid"] == os.getpid())
        return not regions or max(known, default=0) >= regions

    def release(self, hold: Hold) -> int:
        """Let a hold go. At the end of the interpreter nothing: the memory goes with the process."""
        return 0 if self.holds.closed else self.holds.release(hold)

    def let_go(self, address: int, size: int) -> None:
        """Torch moves this memory next: whatever holds it must not."""
        self.holds.let_go(address, size)

    # --- what holds ask of the agent ------------------------------------------------------------------------------------------

    def unadvise(self, region: int, *, quietly: bool) -> int:
        """End a region. `quietly`: nobody writes to it meanwhile."""
        end = self.library.unadvise_plainly if quietly else self.library.unadvise
        code = end(region)
        if code == -errno.ESRCH:  # in a forked child that called nothing yet
            with contextlib.suppress(PagefoldError):
                self.start()
            code = end(region)
        # Without an agent the pages stay in a mapping of the store, private and correct.
        return self.library.forget(region) if code == -errno.ESRCH else code

    def suits(self, region: int) -> int:
        """Tell whether a region can be merged."""
        return self.library.suits(region)

    def find(self, address: int) -> tuple[int, int, int]:
        """Return the region at an address."""
        return self.library.find(address)

    def discard(self, region: int) -> int:
        """End a region whose content nobody wants."""
        return self.library.discard(region)

    # --- forks and the end ----------------------------------------------------------------------------------------------------

    def _after_fork_in_child(self) -> None:
        self._started = False
        self._starting = threading.RLock()
        self.holds.turn.after_fork(child=True)
        if self.enabled or any(not region.quiet for region in self.holds.regions()):
            with contextlib.suppress(PagefoldError):
                self.start()

    def _end(self) -> None:
        self.holds.closed = True
        self.library.stop()


_client = _Client()
