"""Own what merging and advising answer: Report and Handle. Must not know: buffers, the agent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from pagefold.errors import UsageError
from pagefold.live import vmas
from pagefold.live.buffers import PAGE
from pagefold.live.hold import Hold

# By the agent's status (agent.h): why a page was not merged.
WHY_NOT = (
    "",
    "merged already",
    "changed while it was looked at",
    "pinned: a device or io_uring may write to it",
    "shared with a forked process, and could not be parted",
    "let go in the meantime",
    "the limit on mappings is reached (vm.max_map_count), or there is no memory for one more",
    "a mapping that cannot be swapped (locked, special, or watched by somebody else's userfaultfd)",
    "merged before and written since: it has a copy of its own again",
    "not there: never touched, or swapped out",
    "busy each time it was tried",
    "no safe way to swap pages here",
    "the request was refused as nonsense",
    "no equal page is known",
)
MERGED = 0


class Report:
    """Say what became of the pages of one `pagefold.merge`, or how those of a Handle stand.

    `pages` is every page that was looked at: `merged` of them were merged now, `why_not` counts the others by reason. `zero_pages` of the
    merged read as zeros without any memory; `saved_bytes` is the memory given back. `note` says what else there is to know.
    """

    def __init__(self, hold: Hold | None, release: Callable[[Hold], int] | None = None) -> None:
        self.pages = 0
        self.merged = 0
        self.zero_pages = 0
        self.saved_bytes = 0
        self.why_not: dict[str, int] = {}
        self.through_daemon = False
        self.note = ""
        self._hold = hold
        self._release = release

    @property
    def held(self) -> bool:
        """Tell whether memory is kept, unable to resize or to go, until `release()`."""
        return self._hold is not None and bool(self._hold.keeps)

    def release(self) -> int:
        """Let the memory go: its pages become private again, and its owner may free or resize it. May be called again.

        Returns how many pages stay in a mapping of the store's file, though private: pinned by a device.
        """
        stayed = self._release(self._hold) if self._hold and self._release else 0
        self._hold = None
        return stayed

    def refuse(self, why_not: dict[str, int]) -> None:
        """Count pages that were not merged in."""
        for reason, pages in why_not.items():
            self.why_not[reason] = self.why_not.get(reason, 0) + pages
            self.pages += pages

    def count(self, by_status: Iterable[int], off: str = "") -> None:
        """Count pages in by the agent's status; `off` says why there is no safe way, where there is none."""
        statuses = [*by_status][: len(WHY_NOT)]
        self.merged += statuses[MERGED]
        self.pages += statuses[MERGED]
        for reason, pages in zip(WHY_NOT[1:], statuses[1:], strict=False):
            if pages:
                self.refuse({f"{reason}: {off}" if reason == WHY_NOT[11] and off else reason: pages})

    def __str__(self) -> str:
        """Say it in lines."""
        zeros = f", {self.zero_pages:,} of them zeros" if self.zero_pages else ""
        saved = f", {self.saved_bytes / (1 << 20):,.1f} MiB given back" if self._release else ""
        lines = [f"{self.merged:,} of {self.pages:,} pages merged{zeros}{saved}"]
        for reason, pages in sorted(self.why_not.items(), key=lambda item: -item[1]):
            lines.append(f"  not merged: {pages:,} pages: {reason}" if pages else f"  not merged: {reason}")
        if self.held:
            lines.append("  its memory is kept until release() is called on this report")
        return "\n".join([*lines, *([f"  {self.note}"] if self.note else [])])

    def __repr__(self) -> str:
        """Say it in one line."""
        return f"<pagefold.Report: {self.merged} of {self.pages} pages merged, saved_bytes={self.saved_bytes}, why_not={self.why_not}>"

    def __reduce__(self) -> Any:
        """Refuse to be pickled: what it holds is memory of this process."""
        raise UsageError("a Report is of this process and cannot be sent to another; send str(report)")


class Handle:
    """Hold advised memory until it is given to `pagefold.unadvise`, or the `with` block it was opened for ends.

    The memory is kept and cannot resize meanwhile.
    """

    def __init__(
        self,
        hold: Hold,
        why_not: dict[str, int],
        note: Callable[[], str],
        release: Callable[[Hold], int],
        look: Callable[[Hold], None],
    ) -> None:
        self._why_not = why_not
        self._refused = hold.why_not  # grows when the pages are looked at
        self._note = note
        self._hold: Hold | None = hold
        self._release = release
        self._look = look

    @property
    def note(self) -> str:
        """Return why nothing happens in the background at present; '' if it does."""
        return self._note()

    @property
    def why_not(self) -> dict[str, int]:
        """Return how many pages could not be advised, by reason."""
        self._looked()
        return {
            reason: self._why_not.get(reason, 0) + self._refused.get(reason, 0)
            for reason in {**self._why_not, **self._refused}
        }

    def _looked(self) -> Hold | None:
        # Only now: the agent looks at all that was advised since it last looked, in one go.
        if self._hold:
            self._look(self._hold)
        return self._hold

    @property
    def pages(self) -> int:
        """Return how many whole pages are advised now; 0 once it is released."""
        hold = self._looked()
        return sum((end - start) // PAGE for start, end in hold.spans) if hold else 0

    def report(self) -> Report:
        """Say how the pages stand at this moment. Pages that were merged as zeros count as not there: they have no memory."""
        report = Report(None)
        report.note = self.note
        hold = self._looked()
        if hold:
            merged, written, private, absent = vmas.census(hold.spans)
            report.pages = report.merged = merged
            left = {
                WHY_NOT[8]: written,
                "not merged, or not yet": private,
                "not there: never touched, or zeros": absent,
            }
            report.refuse({reason: pages for reason, pages in left.items() if pages})
        report.refuse(self.why_not)
        return report

    def release(self) -> int:
        """Let the memory go, as `pagefold.unadvise` does. May be called again."""
        stayed = self._release(self._hold) if self._hold else 0
        self._hold = None
        return stayed

    def __enter__(self) -> Handle:
        """Advise for the length of a block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it."""
        self.release()

    def __repr__(self) -> str:
        """Say what it holds."""
        if self._hold is None:
            return "<pagefold.Handle: released>"
        refused = self.why_not
        why_not = f", why_not={refused}" if refused else ""
        note = f"; {self.note}" if self.note else ""
        return f"<pagefold.Handle: {self.pages} pages advised{why_not}{note}>"

    def __reduce__(self) -> Any:
        """Refuse to be pickled: what it holds is memory of this process."""
        raise UsageError("a Handle is of this process and cannot be sent to another; advise the memory there")
