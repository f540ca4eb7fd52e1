"""Own `pagefold explain-design`: the reviewer's five questions, answered by the running engine."""

from __future__ import annotations

import json
import textwrap
from typing import Annotated

import typer


def explain_design(
    question: Annotated[
        int | None, typer.Argument(metavar="[1..5]", help="Which question; all if none.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show why merging is safe while pages migrate: five questions, each played step by step with the trees drawn.

    The engine's invariants are checked after every step.
    """
    from pagefold.scenario import five_questions
    from pagefold.view.trees import draw

    numbers = [question] if question is not None else list(range(1, len(five_questions.STORIES) + 1))
    stories = [(number, five_questions.find(number)) for number in numbers]
    told = []
    for number, story in stories:
        engine = five_questions.stage()
        steps = []
        for step, text in enumerate(story.tell(engine), 1):
            engine.validate()
            trees = draw(engine)
            steps.append({"step": text, "trees": trees.split("\n")})
            if not as_json:
                if step == 1:
                    print(f"Question {number}. {story.question}\n")
                print(f"{textwrap.fill(f'{step}. {text}', 100)}\n\n{textwrap.indent(trees, '    ')}\n")
        if not as_json:
            print(f"Answer. {story.answer}\n")
        told.append({"question": story.question, "answer": story.answer, "steps": steps})
    if as_json:
        print(json.dumps(told, indent=2))
