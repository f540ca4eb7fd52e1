"""Own the one exception family; every error says the value, what it means and what to do.

Three tiers (docs/design.md): a corrupt structure of our own raises `CorruptionError` and stops; a world that
changed under us is a status inside the compiled core and never an exception; everything a user can mend
is a `PagefoldError`, caught in one place by the command line and printed as one line.
"""

from __future__ import annotations

import errno


class PagefoldError(Exception):
    """Say in one line what is wrong and what to do; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(PagefoldError):
    """A value that no circumstance would make right: bad arguments, sizes, names."""

    exit_code = 2


class KnobError(PagefoldError, OSError):
    """A knob refused a value; `errno` is what the kernel's file would return."""

    def __init__(self, code: int, knob: str, message: str) -> None:
        OSError.__init__(self, code, message)
        self.knob = knob

    def __str__(self) -> str:
        return f"{self.knob}: {self.strerror}"


class KnobBusy(KnobError):  # noqa: N818  (the kernel's name for it is a noun: EBUSY)
    """The knob cannot change now (EBUSY): merged pages exist, or memory is going offline."""

    def __init__(self, knob: str, message: str) -> None:
        super().__init__(errno.EBUSY, knob, message)


class KnobInvalid(KnobError):  # noqa: N818
    """The value is out of range or the knob is ruled by another one (EINVAL, or ERANGE where the kernel says so)."""

    exit_code = 2

    def __init__(self, knob: str, message: str, code: int = errno.EINVAL) -> None:
        super().__init__(code, knob, message)


class UnknownKnob(UsageError):  # noqa: N818
    """There is no knob or counter of this name."""


class EngineStopped(PagefoldError):  # noqa: N818
    """A scan was asked for while `run` is not 1."""


class OutOfMemory(PagefoldError):  # noqa: N818
    """The simulated machine has no free frame left; nothing was changed."""


class NoSuchProcess(PagefoldError):  # noqa: N818
    """The process does not exist, or ended while it was being read."""


class NotPermitted(PagefoldError):  # noqa: N818
    """The kernel does not let this user read that process; names the permission missing."""

    exit_code = 77


class NotHere(PagefoldError):  # noqa: N818
    """What was asked for cannot be had on this machine; says what is missing."""

    exit_code = 77


class NotReadable(PagefoldError):  # noqa: N818
    """Something that is there but has no pages to read: a kernel thread, ourselves, an unreadable file."""


class NotAnImage(PagefoldError):  # noqa: N818
    """The file is not a memory image that this program understands."""


class TruncatedImage(NotAnImage):
    """The image promises more bytes than the file holds."""


class CorruptionError(AssertionError):
    """Our own structures break an invariant. Not a user's mistake: report it with the dump."""

    def __init__(self, invariant: str, detail: str) -> None:
        super().__init__(f"invariant {invariant!r} is broken: {detail}")
        self.invariant = invariant
        self.detail = detail
