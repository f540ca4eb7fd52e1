"""Own what can go wrong with a guest: one family, one line each, with what to do about it."""

from __future__ import annotations


class GuestError(Exception):
    """A guest cannot be started, or did not end as it should; the text is one line for people."""


class GuestDied(GuestError):  # noqa: N818
    """The guest ended before its program did: the kernel panicked, QEMU could not start, or init failed."""


class GuestHung(GuestError):  # noqa: N818
    """The guest did not end within its time and was killed."""
