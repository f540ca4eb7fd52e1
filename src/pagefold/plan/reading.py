"""Own the reading of all sources of a plan: what can be read is, what cannot is said, and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pagefold import settings
from pagefold.errors import NoSuchProcess, NotPermitted, NotReadable, PagefoldError, UsageError
from pagefold.sources import Pages, ProcessReader, count_image, list_mine, read_image

PROC = Path("/proc")
KSM = Path("/sys/kernel/mm/ksm")
Progress = Callable[[str, int, int], None]  # what is being done, pages done, pages in all


@dataclass(frozen=True, slots=True)
class Skipped:
    """A source that was left out."""

    source: str
    why: str


class Reader:
    """Collect sources, then read them all; `skipped` says what was left out and why."""

    def __init__(
        self,
        *,
        advised_only: bool = False,
        max_page_sharing: str | int | None = None,
        interval: float = 0.0,
        proc: Path = PROC,
        ksm: Path = KSM,
    ) -> None:
        if not 0 <= interval <= 86400:
            raise UsageError(f"an interval of {interval} seconds cannot be; use 0 to 86400")
        self.advised_only = advised_only
        self.interval = interval
        self.proc = proc
        self.max_page_sharing = _sharing_limit(max_page_sharing, ksm)
        self.readers: list[ProcessReader] = []
        self.images: list[Path] = []
        self.skipped: list[Skipped] = []
        self._errors: list[PagefoldError] = []

    def add(self, pids: Sequence[str], images: Sequence[Path], *, all_mine: bool = False) -> None:
        """Add processes and images; UsageError for words that are no PID, and when there is nothing to read."""
        wanted = [_pid(word) for word in pids]
        if all_mine:
            wanted += [pid for pid in list_mine(self.proc) if pid not in wanted]
        if all_mine and not wanted and not images:
            raise NotPermitted(
                "--all-mine: this user has no process that can be read: start one, "
                "or run with CAP_SYS_PTRACE (as root) to read those of others"
            )
        if not wanted and not images:
            raise UsageError("nothing to plan: give PIDs, --all-mine, or --image FILE (see pagefold plan --help)")
        for pid in dict.fromkeys(wanted):
            try:
                self.readers.append(ProcessReader(pid, proc=self.proc, advised_only=self.advised_only))
            except (NoSuchProcess, NotPermitted, NotReadable) as error:
                self._skip(str(pid), error)
        self.images += {path.resolve(): path for path in images}.values()

    def _skip(self, source: str, error: PagefoldError) -> None:
        self._errors.append(error)
        self.skipped.append(Skipped(source, str(error)))

    def read(self, progress: Progress, rest: Callable[[float], None]) -> list[Pages]:
        """Read everything once, and processes again after `rest(interval)`; raise if nothing at all could be read."""
        sources = [pages for path in self.images if (pages := self._image(path, progress)) is not None]
        first = [(reader, pages) for reader in self.readers if (pages := self.look(reader, None, progress)) is not None]
        if first and self.interval:
            progress("waiting for the second look", 0, 1)
            rest(self.interval)
            again = [(reader, self.look(reader, pages, progress)) for reader, pages in first]
            first = [(reader, pages) for reader, pages in again if pages is not None]
        answer = [pages for _, pages in first] + sources
        if not answer:
            raise self.refusal() or AssertionError("nothing was read, and nothing refused")
        return answer

    def refusal(self) -> PagefoldError | None:
        """Return the error to raise when nothing could be read: a permission that is missing is what the user can mend."""
        return next(
            (error for error in self._errors if isinstance(error, NotPermitted)), next(iter(self._errors), None)
        )

    def _image(self, path: Path, progress: Progress) -> Pages | None:
        try:
            steps = _Steps(progress, f"reading {path.name}", count_image(path))
            return read_image(path, steps)
        except PagefoldError as error:
            self._skip(str(path), error)
            return None

    def look(self, reader: ProcessReader, before: Pages | None, progress: Progress) -> Pages | None:
        """Take one look at a process, the second where there is one `before`; None, and a line in `skipped`, if it cannot be had."""
        try:
            what = "reading" if before is None else "second look at"
            total = reader.count() if before is None else len(before)
            steps = _Steps(progress, f"{what} {reader.label}", total)
            return reader.read(steps) if before is None else reader.second_look(before, steps)
        except PagefoldError as error:
            self._skip(str(reader.pid), error)
            return None


class _Steps:
    """Turn "so many more pages" into "so many of all"."""

    def __init__(self, progress: Progress, what: str, total: int) -> None:
        self.progress, self.what, self.total, self.done = progress, what, total, 0
        progress(what, 0, total)

    def __call__(self, pages: int) -> None:
        self.done += pages
        self.progress(self.what, self.done, self.total)


def _pid(word: str) -> int:
    """Return the number of a process, or raise UsageError."""
    digits = word.lstrip("0") if word.isascii() and word.isdigit() else ""
    if not 1 <= len(digits) <= 10 or int(digits) >= 2**31:
        raise UsageError(f"{word!r} is not a PID; give the number of a running process")
    return int(digits)


def _sharing_limit(wanted: str | int | None, ksm: Path) -> int:
    """Return max_page_sharing: as wanted, else as the kernel has it now, else the kernel's default."""
    knob = settings.find("max_page_sharing")
    if wanted is not None:
        return settings.parse(knob, wanted)
    try:
        return int((ksm / "max_page_sharing").read_text())
    except (OSError, ValueError):
        return knob.default
