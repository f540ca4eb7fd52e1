"""Judge `pagefold conform` as a user meets it: the table, the JSON, the exit code, and the line that repeats a difference."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from tests.cli.running import refusal, run, run_here, told

from pagefold.scenario.kernel_ksm import KernelKsm

WHY_NOT = KernelKsm.why_not()
with_kernel = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
FILE = '''
def merge(host, content):
    p = host.spawn()
    r = p.mmap(2)
    p.write(r, 0, 5)
    p.write(r, 1, content)
    p.madvise(r, "MERGEABLE")
    host.scan(2)


def scenario_same(host):
    """Two equal [bold] pages merge."""
    merge(host, 5)
    assert host.observe()["pages_sharing"] == 1


def scenario_other(host):
    """Do something else on the simulated machine."""
    merge(host, 6 if type(host._host).__name__ == "SimHost" else 5)


def scenario_wrong(host):
    """Expect what is not so."""
    merge(host, 6)
    assert host.observe()["pages_sharing"] == 1


def scenario_wide(host):
    """Need four nodes."""
    assert host.nodes >= 4


scenario_wide.nodes = 4
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


def states(answer: str) -> dict[str, str]:
    return {row["scenario"]: row["state"] for row in json.loads(answer)["rows"]}


def test_simulated_alone(file: Path) -> None:
    result = run_here("conform", f"{file}::same", f"{file}::wide", "--host", "sim")
    assert result.returncode == 0
    assert "same" in result.stdout and "Two equal [bold] pages merge." in result.stdout
    assert result.stdout.splitlines()[-1] == "2 ran: nothing was compared"


def test_a_scenario_that_fails_is_an_exit_code(file: Path) -> None:
    result = run_here("conform", file, "--host", "sim", "--nodes", "2", "--json")
    assert result.returncode == 1
    assert states(result.stdout) == {"same": "ran", "other": "ran", "wrong": "failed", "wide": "skipped"}
    rows = {row["scenario"]: row for row in json.loads(result.stdout)["rows"]}
    assert re.fullmatch(r"mine\.py:\d+: assert host\.observe\(\)\[.*\] == 1: AssertionError", rows["wrong"]["why"])
    assert rows["wide"]["why"] == "needs 4 nodes, there are 2"
    assert {"host", "nodes", "release", "reference", "steps", "difference", "repeat", "file"} <= rows["same"].keys()


@with_kernel
@pytest.mark.kernel
def test_a_difference_is_shown_and_the_line_repeats_it(file: Path) -> None:
    result = run("conform", file, "--host", "sim,kernel")
    assert result.returncode == 1
    assert told(result) == ""
    assert re.search(r"same +│ equal", result.stdout)
    assert "other on kernel, 1 node: different" in result.stdout
    # The second write is the step that differs: its line says so.
    assert "sim: p1.write(r1, 1, 6);  kernel: p1.write(r1, 1, 5)" in result.stdout
    assert "Skipped on kernel, 1 node: 1, because it needs 4 nodes, there is 1." in result.stdout
    (again,) = (line for line in result.stdout.splitlines() if "Again:" in line and "::other" in line)
    words = shlex.split(again.split("Again: ")[1])
    assert words[0] == "pagefold"
    repeated = run(*words[1:])
    assert repeated.returncode == 1
    assert "sim: p1.write(r1, 1, 6);  kernel: p1.write(r1, 1, 5)" in repeated.stdout


@with_kernel
@pytest.mark.kernel
def test_json_has_every_difference(file: Path) -> None:
    result = run("conform", f"{file}::other", "--host", "sim,kernel", "--json")
    (row,) = json.loads(result.stdout)["rows"]
    assert (row["state"], row["reference"], row["host"], row["release"]) == (
        "different",
        "sim",
        "kernel",
        os.uname().release,
    )
    assert row["difference"]["step"] == 4
    assert row["difference"]["things"] == [
        {"what": "step", "reference": "p1.write(r1, 1, 6)", "host": "p1.write(r1, 1, 5)"}
    ]


def test_a_host_that_cannot_be_had_is_left_out_and_said_so(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))
    monkeypatch.setattr(KernelKsm, "why_not", staticmethod(lambda: "root is needed"))
    result = run_here("conform", f"{file}::same")
    assert result.returncode == 0
    kernel, guest = told(result).splitlines()
    assert kernel == "pagefold: left out: kernel: root is needed"
    assert guest.startswith("pagefold: left out: guest: ") and "is not installed" in guest
    refused = run_here("conform", f"{file}::same", "--host", "sim,guest")
    assert refused.returncode == 77
    assert "guest: " in refusal(refused)


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--host", "cloud"], ["no host 'cloud'", "use sim, kernel, guest"]),
        (["--host", ""], ["no host ''"]),
        (["--nodes", "0", "--host", "sim"], ["'0' nodes cannot be", "use 1 to 8"]),
        (["--nodes", "9", "--host", "sim"], ["'9' nodes cannot be"]),
        (["--nodes", "two", "--host", "sim"], ["'two' nodes cannot be", "use 1 to 8"]),
        (["/nowhere.py", "--host", "sim"], ["/nowhere.py", "there is no such scenario file"]),
        (["--kernel", "/nowhere", "--host", "guest"], ["/nowhere", "there is no such kernel image"]),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], parts: list[str]) -> None:
    result = run_here("conform", *arguments)
    assert result.returncode == 2
    line = refusal(result)
    assert [part for part in parts if part not in line] == [], line


def test_what_scenarios_print_is_not_our_answer(tmp_path: Path) -> None:
    path = tmp_path / "talk.py"
    path.write_text("print('loading')\ndef scenario_a(host):\n    print('running')\n")
    result = run("conform", path, "--host", "sim", "--json")
    assert states(result.stdout) == {"a": "ran"}
    assert "loading\nrunning\n" in result.stderr


def test_a_file_named_twice_is_run_once_and_files_are_told_apart(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text("def scenario_same(host):\n    'Do nothing.'\n")
    result = run_here("conform", f"{file}::same", file.parent / "mine.py::same", other, "--host", "sim")
    assert "mine::same" in result.stdout and "other::same" in result.stdout
    assert result.stdout.splitlines()[-1] == "2 ran: nothing was compared"


def test_a_failing_line_is_shown_for_a_relative_path_too(file: Path) -> None:
    result = run("conform", "mine.py::wrong", "--host", "sim", cwd=file.parent)
    assert result.returncode == 1
    assert re.search(r"mine\.py:\d+: assert host\.observe\(\)", result.stdout)


@with_kernel
@pytest.mark.kernel
def test_hosts_that_were_named_and_could_not_be_compared_are_an_exit_code(file: Path) -> None:
    result = run("conform", f"{file}::wide", "--host", "sim,kernel")
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "1 skipped: nothing was compared"


def test_a_file_that_cannot_be_loaded_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("def f(:\n")
    line = refusal(run_here("conform", path, "--host", "sim"))
    assert "broken.py: SyntaxError" in line
