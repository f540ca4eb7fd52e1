"""Own the words with which a kernel says that something is wrong in it. Knows nothing of guests: text in, lines out."""

from __future__ import annotations

import re

# Only what follows a time stamp: a program may write anything to its stderr, also half a line before the kernel's.
_COMPLAINT = re.compile(
    r"""
    \[\s*\d+\.\d+\](?:\[\s*[TC]\d+\])?\ ((?:  # the stamp, and the caller if it is printed
      BUG:\                                      # a bad access, sleeping while atomic, KASAN, KCSAN, KFENCE, KMSAN
    | kernel\ BUG\ at                            # BUG()
    | WARNING:\                                  # WARN(), lockdep
    | UBSAN:\  | Oops\b | Kernel\ panic
    | (?:general\ protection\ fault|double\ fault|invalid\ opcode|divide\ error|stack\ segment|int3)\b
    | INFO:\ task\ .*\ blocked\ for\ more\ than
    | watchdog:\ .*(?:lockup|LOCKUP)
    | (?:rcu:\ )?INFO:\ rcu\w*\ .*stall
    | rcu:\ .*\ kthread\ (?:starved|timer\ wakeup)
    | Out\ of\ memory: | Memory\ cgroup\ out\ of\ memory:
    | list_(?:add|del)\ corruption | usercopy:\ Kernel\ memory | refcount_t:\  | unchecked\ MSR\ access
    ).*)
    """,
    re.VERBOSE,
)


def complaints(log: str) -> list[str]:
    """Return what a console log's kernel complains of, a line each, without time stamps."""
    return [match[1] for line in log.splitlines() if (match := _COMPLAINT.search(line))]
