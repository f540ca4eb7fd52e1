"""Judge `pagefold explain-design`: five stories, as text and as JSON."""

from __future__ import annotations

import json

import pytest
from tests.cli.running import run, told
from typer.testing import CliRunner

from pagefold.cli.app import app
from pagefold.scenario.five_questions import STORIES


def test_all_five_as_json() -> None:
    result = run("explain-design", "--json")
    assert (result.returncode, told(result)) == (0, "")
    stories = json.loads(result.stdout)
    assert [story["question"] for story in stories] == [story.question for story in STORIES]
    assert len(stories) == 5
    for story in stories:
        assert set(story) == {"question", "answer", "steps"}
        assert len(story["steps"]) >= 3
        for step in story["steps"]:
            assert set(step) == {"step", "trees"}
            assert any(line.startswith("migrate_nodes:") for line in step["trees"])
            assert [line for line in step["trees"] if line.startswith("stable tree of node ")]


@pytest.mark.parametrize("number", range(1, 6))
def test_one_as_text(number: int) -> None:
    result = CliRunner().invoke(app, ["explain-design", str(number)])
    assert result.exit_code == 0
    story = STORIES[number - 1]
    assert result.stdout.startswith(f"Question {number}. {story.question}\n")
    assert result.stdout.endswith(f"Answer. {story.answer}\n\n")
    assert result.stdout.count("migrate_nodes:") >= 3
    assert "\n1. " in result.stdout and "\n3. " in result.stdout


def test_all_five_as_text() -> None:
    text = CliRunner().invoke(app, ["explain-design"]).stdout
    assert [line[9] for line in text.splitlines() if line.startswith("Question ")] == list("12345")


def test_one_as_json_is_its_part_of_all() -> None:
    one = json.loads(CliRunner().invoke(app, ["explain-design", "3", "--json"]).stdout)
    everything = json.loads(CliRunner().invoke(app, ["explain-design", "--json"]).stdout)
    assert one == everything[2:3]
