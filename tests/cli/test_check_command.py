"""Use `pagefold check` as people do: what is clean, what is broken, a path made again, and mistakes in options."""

from __future__ import annotations

import json

import pytest
from tests.cli.running import refusal, run, run_here
from tests.conftest import SLOW

compiled = pytest.mark.skipif(SLOW, reason="thousands of states: compiled only")
LEAK = ("check", "--mms", "3", "--inside", "0", "--events", "fork,exit", "--ignore", "converges")


def test_help_teaches() -> None:
    result = run("check", "--help")
    assert result.returncode == 0
    for option in ("--rules", "--events", "--inside", "--budget", "--replay", "--json", "docs/checking.md"):
        assert option in result.stdout


@compiled
def test_a_clean_world() -> None:
    result = run("check", "--rules", "pagefold", "--contents", "1", "--budget", "1")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "clean, and exhausted: every state that can be reached was explored"


@compiled
def test_a_bound_is_said() -> None:
    result = run("check", "--rules", "pagefold", "--depth", "2", "--json")
    assert result.returncode == 0, result.stderr
    told = json.loads(result.stdout)
    assert (told["format"], told["exhausted"], told["depth"], told["violation"]) == (1, False, 2, None)
    assert told["states"] > 1
    assert 0 < told["chance_of_a_miss"] < 1e-12


@compiled
def test_a_violation_and_the_line_that_makes_it_again() -> None:
    found = run(*LEAK)
    assert found.returncode == 1
    story = found.stdout.split("\n\n", 1)[1]
    assert story.startswith("   1. ")
    again = story.splitlines()[-1].removeprefix("Again: pagefold ")
    replayed = run(*again.split())
    assert replayed.returncode == 1
    assert replayed.stdout == story


@compiled
def test_a_violation_as_json() -> None:
    found = run(*LEAK, "--json")
    assert found.returncode == 1
    violation = json.loads(found.stdout)["violation"]
    assert (violation["invariant"], violation["is_promise"]) == ("no-leak", True)
    replayed = run(*violation["again"].split()[1:], "--json")
    assert replayed.returncode == 1
    assert json.loads(replayed.stdout)["replay"] == violation


def test_a_path_that_ends_well() -> None:
    result = run("check", "--inside", "0", "--replay", "2.2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("   1. scan: p1 page 0\n   2. scan: p2 page 0\n")
    assert "Nothing is broken here." in result.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--workers", "0"), "--workers 0 is not possible; use 1 or more"),
        (("--workers", "257"), "--workers 257 is not possible; use 1 to 256"),
        (("--depth", "-1"), "--depth -1 is not possible; use 0 or more"),
        (("--states", "0"), "--states 0 is not possible; use 1 or more"),
        (("--nodes", "9"), "nodes 9 is not possible; use 1 to 4"),
        (("--rules", "modern"), "rules 'modern' are not known"),
        (("--events", "quake"), "events 'quake' are not known; use some of migrate,"),
        (("--ignore", "data"), "'data' cannot be ignored; use some of no-leak,converges"),
        (("--knob", "x"), "--knob 'x' is not NAME=VALUE"),
        (("--replay", "zz"), "'zz' is not a path; use the line that a violation printed"),
    ],
)
def test_mistakes_are_one_line(options: tuple[str, ...], said: str) -> None:
    assert said in refusal(run_here("check", *options))
