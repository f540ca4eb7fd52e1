"""Own the knobs of a daemon: the kernel's, and the one it has not. Standard library only. Must not know: who sets them, what they do."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable

from pagefold import settings
from pagefold.errors import KnobInvalid, UnknownKnob, UsageError

MAX_CPU_PERCENT = "max_cpu_percent"  # most processor time the daemon takes; 100 is one processor
NAMES = (*settings.KNOBS, MAX_CPU_PERCENT)


def check(name: str, value: int | str) -> int:
    """Return a knob's value as a number; UnknownKnob, or KnobInvalid with the limits."""
    if name not in NAMES:
        raise UnknownKnob(f"there is no knob {name!r}; the knobs are {', '.join(NAMES)}")
    if name != MAX_CPU_PERCENT:
        return settings.parse(settings.find(name), value)
    most = 100 * (os.cpu_count() or 1)
    number = int(value) if re.fullmatch(r"\+?[0-9]{1,9}", str(value), re.ASCII) else 0
    if not 1 <= number <= most:
        raise KnobInvalid(name, f"{value!r} is out of range; use 1 to {most} (100 is one processor)")
    return number


def read_words(words: Iterable[str]) -> dict[str, str]:
    """Return what words of the form NAME=VALUE say, each of them checked; of a name said twice the last."""
    said = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"{word!r} sets nothing; write NAME=VALUE, as in pages_to_scan=1000")
        check(name, value)
        said[name] = value
    return said
