"""Own how an exploration is shown: what was explored; for a broken invariant the path, the trees, and the line that makes it again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pagefold.check.explore import BYTES_PER_STATE, Result
from pagefold.check.replay import Replay, Stage, encode
from pagefold.check.worlds import SmallWorld, as_options
from pagefold.view.trees import draw


@dataclass(frozen=True)
class Story:
    """A path made again: its stages, the trees around the last one, and what is broken at its end ('': nothing)."""

    stages: tuple[Stage, ...]
    before: str
    after: str
    broken: str
    is_promise: bool  # broken only by what follows if nothing happens any more


def tell(small: SmallWorld, path: Sequence[int]) -> Story:
    """Make a path again, to its end or the first broken invariant."""
    replay = Replay(small)
    before = after = draw(replay.engine())
    stages: list[Stage] = []
    for how in path:
        before = after
        stages.append(replay.go(how))
        after = draw(replay.engine())
        if stages[-1].broken:
            return Story(tuple(stages), before, after, stages[-1].broken, False)
    broken, _ = replay.ask()
    return Story(tuple(stages), before, after, broken, bool(broken))


def print_result(result: Result, *, as_json: bool) -> None:
    """Print what was explored, and a violation with its path."""
    violation = result.violation
    story = tell(result.world, violation.path) if violation else None
    if as_json:
        path = list(violation.path) if violation else []
        print(
            json.dumps(
                {"format": 1, **_summary(result), "violation": story and _as_json(result.world, path, story)}, indent=2
            )
        )
        return
    for line in _summary_lines(result):
        print(line)
    if violation and story:
        print()
        _print_story(result.world, violation.path, story)


def print_replay(small: SmallWorld, path: Sequence[int], *, as_json: bool) -> bool:
    """Print a path made again; True if something is broken at its end."""
    story = tell(small, path)
    if as_json:
        print(json.dumps({"format": 1, "replay": _as_json(small, path, story)}, indent=2))
    else:
        _print_story(small, path, story)
    return bool(story.broken)


def _summary(result: Result) -> dict[str, Any]:
    return {
        "world": asdict(result.world),
        "states": result.states,
        "transitions": result.transitions,
        "depth": result.depth,
        "exhausted": result.exhausted,
        "checkpoints": result.checkpoints,
        "seconds": round(result.seconds, 3),
        "bytes_per_state": BYTES_PER_STATE,
        "bytes_per_state_to_explore": result.image_bytes,
        "chance_of_a_miss": result.chance_of_a_miss,
    }


def _summary_lines(result: Result) -> Iterator[str]:
    small = result.world
    budget = f", at most {small.budget} on any path" if small.budget else ""
    yield (
        f"{small.rules} rules: {_count(small.nodes, 'node')}, {_count(small.mms, 'process', 'processes')}, "
        f"{_count(small.pages, 'page')} each, {_count(small.contents, 'content')}"
    )
    yield f"events: {', '.join(small.events)}; up to {small.inside} inside a step{budget}"
    if small.ignore:
        yield f"not asked for: {', '.join(small.ignore)}"
    rate = result.transitions / result.seconds if result.seconds else 0
    yield (
        f"{result.states:,} states, {result.transitions:,} transitions ({rate:,.0f}/s), {result.depth} deep, "
        f"up to {_count(result.checkpoints, 'checkpoint')} in a step"
    )
    yield (
        f"{BYTES_PER_STATE} bytes for each state, {result.image_bytes:,} more while it is to be explored; "
        f"chance that equal fingerprints hid a state: {result.chance_of_a_miss:.0e}"
    )
    if result.violation:
        yield f"BROKEN: {result.violation.invariant}, after {_count(len(result.violation.path), 'transition')}"
    elif result.exhausted:
        yield "clean, and exhausted: every state that can be reached was explored"
    else:
        yield f"clean so far: stopped {result.depth} deep, not everything was explored"


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def _print_story(small: SmallWorld, path: Sequence[int], story: Story) -> None:
    for number, stage in enumerate(story.stages, start=1):
        print(f"{number:4}. {stage.words}")
    print("\nbefore the last of these:\n")
    print(_indented(story.before))
    print("\nafter it:\n")
    print(_indented(story.after))
    print()
    if story.is_promise:
        scans = small.within if story.broken == "converges" else 2
        gone = "" if story.broken == "converges" else ", all processes exit,"
        print(f"Then nothing else happens{gone} and after {scans} full scans `{story.broken}` does not hold.")
    elif story.broken:
        print(f"`{story.broken}` is broken.")
    else:
        print("Nothing is broken here.")
    print(f"Again: {_command(small, path)}")


def _command(small: SmallWorld, path: Sequence[int]) -> str:
    options = as_options(small)
    return f"pagefold check {options}{' ' if options else ''}--replay {encode(path)}"


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def _as_json(small: SmallWorld, path: Sequence[int], story: Story) -> dict[str, Any]:
    return {
        "invariant": story.broken or None,
        "is_promise": story.is_promise,
        "path": encode(path),
        "steps": [stage.words for stage in story.stages],
        "trees_before": story.before.splitlines(),
        "trees_after": story.after.splitlines(),
        "again": _command(small, path),
    }
