"""Own the running of the real command, as a user would, and what a refusal must look like."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

from pagefold.cli import main

PAGEFOLD = Path(sys.executable).parent / "pagefold"


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `pagefold` with these arguments."""
    command = [str(PAGEFOLD), *(str(argument) for argument in arguments)]
    environment = {**os.environ, "COLUMNS": "140", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, **options)


def run_here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run what the command runs, in this process: much faster."""
    out, err = io.StringIO(), io.StringIO()
    words = ["pagefold", *(str(argument) for argument in arguments)]
    with patch.object(sys, "argv", words), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as end:
            assert isinstance(end.code, int | None)
            code = end.code or 0
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def told(result: subprocess.CompletedProcess[str]) -> str:
    """Return what was said on stderr, but for the line that the engine is being compiled (once in a while it is)."""
    lines = result.stderr.splitlines(keepends=True)
    return "".join(line for line in lines if not line.startswith("pagefold: compiling the engine"))


def refusal(result: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that refuses: nothing on stdout, no traceback, an exit code."""
    assert result.returncode > 0
    assert result.stdout == ""
    assert result.stderr.endswith("\n")
    (line,) = result.stderr.splitlines()
    assert line.startswith("pagefold: ")
    return line
