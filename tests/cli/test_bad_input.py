"""Judge every mistake a user can make: one line that names the value and what to do, an exit code, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.running import PAGEFOLD, refusal, run, run_here
from tests.cli.test_plan_command import core, raw

from pagefold.sources.identity import identify

ROOT = os.geteuid() == 0
SOURCE = Path(__file__).parents[2] / "src"

# As nobody. The interpreter may live where nobody may look: a first run, with all rights, imports what the command needs.
AS_NOBODY = """
import contextlib, io, os, sys
from pagefold.cli import main
arguments, sys.argv = sys.argv[1:], ["pagefold", "plan", "--interval", "0", str(2**31 - 1)]
with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
    main()
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
sys.argv = ["pagefold", *arguments]
main()
"""


def as_nobody(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command without any right."""
    if not ROOT:
        pytest.skip("only root can become nobody")
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, *(str(argument) for argument in arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["plan"], ["nothing to plan", "give PIDs, --all-mine, or --image FILE", "pagefold plan --help"]),
        (["plan", "--json"], ["nothing to plan"]),
        (["plan", str(2**31 - 1)], [f"PID {2**31 - 1}", "no such process"]),
        (["plan", "abc"], ["'abc' is not a PID", "give the number of a running process"]),
        (["plan", "1\n2"], ["'1\\n2' is not a PID"]),
        (["plan", "0"], ["'0' is not a PID"]),
        (["plan", "--", "-5"], ["'-5' is not a PID"]),
        (["plan", "9" * 5000], ["is not a PID"]),
        (["plan", str(2**31)], [f"'{2**31}' is not a PID"]),
        (["plan", "--max-page-sharing", "1", "1"], ["max_page_sharing: 1 is out of range", "use 2 to 2147483647"]),
        (["plan", "--max-page-sharing", "0", "1"], ["max_page_sharing: 0 is out of range", "use 2 to"]),
        (["plan", "--max-page-sharing", "-7", "1"], ["max_page_sharing: -7 is out of range", "use 2 to"]),
        (["plan", "--max-page-sharing", str(10**20), "1"], [f"max_page_sharing: {10**20} is out of range", "use 2 to"]),
        (["plan", "--max-page-sharing", "abc", "1"], ["max_page_sharing: 'abc' is not a whole number"]),
        (["plan", "--interval", "-1", "1"], ["an interval of -1.0 seconds cannot be", "use 0 to 86400"]),
        (["plan", "--interval", "nan", "1"], ["an interval of nan seconds cannot be", "use 0 to 86400"]),
        (["plan", "--interval", "inf", "1"], ["an interval of inf seconds cannot be", "use 0 to 86400"]),
        (["explain-design", "0"], ["there is no question 0", "use 1 to 5"]),
        (["explain-design", "6"], ["there is no question 6", "use 1 to 5"]),
        (["explain-design", "6", "--json"], ["there is no question 6", "use 1 to 5"]),
        (["explain-design", "--", "-1"], ["there is no question -1", "use 1 to 5"]),
    ],
)
def test_bad_words(arguments: list[str], parts: list[str]) -> None:
    result = run_here(*arguments)
    line = refusal(result)
    for part in parts:
        assert part in line
    assert result.returncode == (1 if "no such process" in line else 2)


def missing(folder: Path) -> Path:
    return folder / "missing"


def directory(folder: Path) -> Path:
    return folder


def text(folder: Path) -> Path:
    (folder / "notes.txt").write_text("no image\n")
    return folder / "notes.txt"


def empty(folder: Path) -> Path:
    (folder / "empty").touch()
    return folder / "empty"


def program(folder: Path) -> Path:
    return Path("/proc/self/exe")  # of whoever opens it: pagefold's own interpreter


def truncated(folder: Path) -> Path:
    return core(folder, cut=100)


def newline(folder: Path) -> Path:
    return folder / "two\nlines"


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (missing, ["missing", "No such file or directory"]),
        (directory, ["not a regular file", "copy the memory into a file first"]),
        (text, ["notes.txt", "9 bytes are not a whole number of", "copy it again in full"]),
        (empty, ["empty", "at least one page"]),
        (program, ["not a core", "make one with gcore PID"]),
        (truncated, ["process.core", "truncated core", "copy it again, in full"]),
        (newline, ["two?lines", "No such file or directory"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_files_that_are_no_image(make: Callable[[Path], Path], parts: list[str], tmp_path: Path) -> None:
    result = run_here("plan", "--image", make(tmp_path))
    line = refusal(result)
    for part in parts:
        assert part in line
    assert result.returncode == 1


def test_of_several_failures_all_are_told(tmp_path: Path) -> None:
    result = run("plan", 2**31 - 1, "--image", missing(tmp_path))
    assert (result.returncode, result.stdout) == (1, "")
    first, last = result.stderr.splitlines()
    assert first.startswith("pagefold: left out: ") and "No such file" in first
    assert last.startswith("pagefold: PID 2147483647: no such process")


def test_pagefold_itself() -> None:
    """The shell's own PID is pagefold's once it becomes that."""
    command = ["sh", "-c", f"exec '{PAGEFOLD}' plan $$"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    line = refusal(result)
    assert "pagefold cannot read itself: its pages change while it reads" in line


def test_a_kernel_thread() -> None:
    if not Path("/proc/2").exists() or not identify(2).kernel_thread:
        pytest.skip("no kernel thread is visible here")
    assert "PID 2 (kthreadd) is a kernel thread: it has no memory of its own" in refusal(run("plan", 2))


def test_a_process_of_another_user() -> None:
    result = as_nobody("plan", os.getpid())
    line = refusal(result)
    assert result.returncode == 77
    for part in (f"PID {os.getpid()} (", "not permitted", "needs ptrace access", "CAP_SYS_PTRACE"):
        assert part in line


def test_all_mine_of_a_user_without_processes() -> None:
    if ROOT and any(
        path.name.isdecimal() and path.stat().st_uid == 65534 for path in Path("/proc").iterdir() if path.exists()
    ):
        pytest.skip("nobody has processes here")
    result = as_nobody("plan", "--all-mine")
    line = refusal(result)
    assert result.returncode == 77
    assert "no process that can be read" in line and "CAP_SYS_PTRACE" in line


def test_an_image_of_another_user(tmp_path: Path) -> None:
    path = raw(tmp_path)
    path.chmod(0o600)
    assert "Permission denied" in refusal(as_nobody("plan", "--image", path))
