"""Own the specimens: child processes that hold known memory and obey one line at a time over pipes."""

from __future__ import annotations

import contextlib
import mmap
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PAGE = mmap.PAGESIZE

# What every specimen knows: `area(pages)` makes private anonymous memory without huge pages and tells where.
PRELUDE = """
import ctypes, mmap, os, sys
PAGE = mmap.PAGESIZE
def area(pages, advice=mmap.MADV_NOHUGEPAGE):
    memory = mmap.mmap(-1, pages * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(advice)
    return memory
def address(memory):
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))
def fill(memory, page, value):
    memory[page * PAGE : (page + 1) * PAGE] = value.to_bytes(8, "little") * (PAGE // 8)
"""
OBEY = """
print(RESULT, flush=True)
for line in sys.stdin:
    print(eval(line), flush=True)
"""


class Specimen:
    """Drive one child: `said` is what it printed when ready; `do` evaluates an expression in it."""

    def __init__(self, program: str) -> None:
        code = PRELUDE + program + OBEY
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        self.said = self._line()

    @property
    def addresses(self) -> list[int]:
        """Return the numbers the child printed when ready."""
        return [int(word) for word in self.said.split()]

    def do(self, expression: str) -> str:
        """Let the child evaluate an expression and wait for its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(expression + "\n")
        self.process.stdin.flush()
        return self._line()

    def end(self) -> None:
        """End the child and wait until nothing is left of it."""
        self.process.kill()
        self.process.wait()
        # Not `communicate`: a forked child may hold the other end of the pipe for a moment longer.
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the specimen ended early"
        self._rest()
        return line.strip()

    def _rest(self) -> None:
        """Wait until the child is back in its read of standard input: what it still does after printing touches memory."""
        while Path(f"/proc/{self.pid}/syscall").read_text().split()[1:2] != ["0x0"]:
            assert self.process.poll() is None, "the specimen ended early"


@pytest.fixture
def specimen() -> Iterator[Callable[[str], Specimen]]:
    """Return a maker of specimens; all end with the test."""
    made: list[Specimen] = []

    def make(program: str) -> Specimen:
        made.append(Specimen(program))
        return made[-1]

    yield make
    for one in made:
        if one.process.returncode is None:
            one.end()
