"""Hold the README and the docs to what they show: every command runs, every example prints what is printed there."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BIN = str(Path(sys.executable).parent)
MADE_BY_CI = {"make run", "make test"}  # .ci/run calls these two


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = [line for block in blocks("console") for line in block.splitlines()]
    assert all(line.startswith("$ ") for line in lines)
    return [line[2:].split("#")[0].strip() for line in lines]


def test_ci_runs_the_two_commands() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    for command in MADE_BY_CI:
        assert command in commands()
        assert re.search(rf"^step {command}$", script, re.MULTILINE), f"{command} is not run by .ci/run"


@pytest.mark.parametrize("command", [c for c in commands() if c not in MADE_BY_CI])
def test_command_of_the_readme_runs(command: str) -> None:
    assert shutil.which("bash")
    # The shell must stay the process that $$ names: no exec of the last command.
    script = command.replace(".venv/bin/", f"{BIN}/") + "; exit $?"
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_python_example_prints_what_the_readme_shows() -> None:
    (example,) = blocks("python")
    shown = next(block for block in blocks("text") if block.startswith("stable tree"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    assert printed.getvalue() == shown


def test_the_five_questions_page_is_the_real_output() -> None:
    shown = re.search(r"```text\n(.*?)```", (ROOT / "docs" / "five-questions.md").read_text(), re.DOTALL)
    assert shown
    done = subprocess.run([f"{BIN}/pagefold", "explain-design"], capture_output=True, text=True, check=True)
    assert done.stdout == shown[1]
