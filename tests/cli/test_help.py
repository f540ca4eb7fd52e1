"""Judge what the command line says of itself, and that saying it costs nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from tests.cli.running import PAGEFOLD, run, told
from typer.testing import CliRunner

from pagefold import __version__
from pagefold.cli.app import app

SHOW_MODULES = """
import sys
import pagefold.cli
sys.argv = ["pagefold", *sys.argv[1:]]
try:
    pagefold.cli.main()
finally:
    print(*sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def words(text: str) -> str:
    """Undo the wrapping of lines."""
    return re.sub(r"\s+", " ", text)


def test_help_names_every_verb() -> None:
    result = run("--help")
    assert result.returncode == 0
    for part in ("Usage: pagefold", "--version", "plan", "explain-design", "Same-page merging"):
        assert part in result.stdout
    assert result.stderr == ""


def test_no_arguments_show_the_help() -> None:
    result = run()
    assert result.stdout + result.stderr == run("--help").stdout
    assert result.returncode in (0, 2)


def test_help_of_plan_teaches() -> None:
    result = run("plan", "--help")
    assert result.returncode == 0
    text = words(result.stdout)
    for option in (
        "PID",
        "--all-mine",
        "--image FILE",
        "--advised",
        "--interval SECONDS",
        "--max-page-sharing N",
        "--json",
    ):
        assert option in text
    for lesson in (
        "Never writes to a process and never stops one",
        "Examples: `pagefold plan 1234 1235`",
        "merge_across_nodes",
    ):
        assert lesson in text


def test_help_of_explain_design_teaches() -> None:
    result = run("explain-design", "--help")
    assert result.returncode == 0
    text = words(result.stdout)
    for part in ("[1..5]", "--json", "five questions", "invariants are checked after every step"):
        assert part in text


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"pagefold {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["frobnicate"], "frobnicate"),
        (["--frob"], "--frob"),
        (["plan", "--frob"], "--frob"),
        (["plan", "--interval", "soon", "1"], "--interval"),
        (["plan", "--image"], "--image"),
        (["plan", "--json=yes", "1"], "--json"),
        (["explain-design", "one"], "[1..5]"),
        (["explain-design", "1", "2"], "2"),
    ],
)
def test_words_the_command_does_not_know(arguments: list[str], named: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert named in result.stderr
    assert "Error: " in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["plan", "--help"], ["explain-design", "--help"]])
def test_help_loads_nothing_compiled(arguments: list[str]) -> None:
    command = [sys.executable, "-c", SHOW_MODULES, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = set(result.stderr.split())
    assert "typer" in modules and "pagefold" in modules
    assert not modules & {"numpy", "numba", "llvmlite", "xxhash"}


@pytest.mark.parametrize("arguments", [["--help"], ["explain-design", "1"], ["explain-design", "--json"]])
def test_a_reader_that_went_away_is_no_traceback(arguments: list[str]) -> None:
    """As `| head`, but the other end is closed before anything is written."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [PAGEFOLD, *arguments]
        result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert told(result) == ""
    assert result.returncode > 0


def test_head() -> None:
    command = f"'{PAGEFOLD}' explain-design | head -1"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout == "Question 1. How are other pages kept off a misplaced page?\n"
    assert told(result) == ""
