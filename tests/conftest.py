"""Own what all tests share: where the twin is found, and how much is tried when code is slow."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "differential"))

# A shell that starts something in the background lets it ignore SIGINT, and all that it starts: what is to end by it would not.
signal.signal(signal.SIGINT, signal.default_int_handler)

SLOW = any(os.environ.get(name, "0") not in ("", "0") for name in ("NUMBA_DISABLE_JIT", "NUMBA_BOUNDSCHECK"))


def scaled(examples: int) -> int:
    """Return how many examples to try: all of them compiled, a twentieth uncompiled or with bounds checks."""
    return max(examples // 20, 3) if SLOW else examples
