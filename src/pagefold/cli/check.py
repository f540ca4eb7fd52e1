"""Own `pagefold check`: every interleaving of a small world, explored, or one path made again."""

from __future__ import annotations

from typing import Annotated

import typer

from pagefold.cli.progress import counting


def check(
    rules: Annotated[str, typer.Option(help="classic, mainline or pagefold.")] = "mainline",
    nodes: Annotated[int, typer.Option(help="NUMA nodes.")] = 2,
    mms: Annotated[int, typer.Option(help="Processes at a time.")] = 2,
    pages: Annotated[int, typer.Option(help="Pages of each process.")] = 1,
    contents: Annotated[int, typer.Option(help="Contents that a page may have.")] = 2,
    frames: Annotated[int, typer.Option(help="Frames on each node; 0: as many as can be wanted.")] = 0,
    events: Annotated[
        str,
        typer.Option(
            metavar="KIND,...",
            help="What may happen: migrate, write, exit, fork, unmap, pin, offline, knob, advise, swap, lock.",
        ),
    ] = "migrate,write,exit,fork",
    inside: Annotated[int, typer.Option(help="Events in the middle of one step of the scanner, at most.")] = 2,
    budget: Annotated[int, typer.Option(help="Events on any path, at most; 0: no limit.")] = 0,
    within: Annotated[int, typer.Option(help="Full scans within which all must have converged.")] = 3,
    knob: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE", help="A knob of the world, by the kernel's name; again for more.", show_default=False
        ),
    ] = None,
    ignore: Annotated[
        str,
        typer.Option(
            metavar="PROMISE,...", help="Promises that are not asked for: no-leak, converges.", show_default=False
        ),
    ] = "",
    depth: Annotated[
        int | None,
        typer.Option(help="Stop this many transitions from the first state. None: go on.", show_default=False),
    ] = None,
    states: Annotated[
        int | None, typer.Option(help="Stop when there are this many states. None: go on.", show_default=False)
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Threads. None: one for each CPU.", show_default=False)] = None,
    replay: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Do not explore: make this path again, as a violation printed it.", show_default=False
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Explore every interleaving of the merger with what may happen beside it, in a small world, and judge every state.

    What is explored is the engine that ships, compiled, breadth first. A step of the scanner has up to --inside events at any of its
    checkpoints; every event happens between steps, too. An invariant that is broken (exit code 1) is shown with a shortest path to it,
    the trees before and after, and the line that makes it again.

    The kernel's own rules (mainline) break two promises, so give `--ignore no-leak,converges` to look beyond them; classic breaks
    no-leak; the rules `pagefold` keep all. docs/checking.md says what is modelled and what not.

    Examples: `pagefold check --rules pagefold --budget 3`, `pagefold check --mms 3 --pages 2 --budget 3 --ignore no-leak,converges`.
    """
    import os

    from pagefold.check.explore import explore
    from pagefold.check.replay import decode
    from pagefold.check.worlds import SmallWorld, parse_knobs
    from pagefold.errors import UsageError
    from pagefold.view.check import print_replay, print_result

    for name, value, least in (("depth", depth, 0), ("states", states, 1), ("workers", workers, 1)):
        if value is not None and not least <= value <= 10**12:
            raise UsageError(f"--{name} {value} is not possible; use {least} or more")
    if workers is not None and workers > 256:
        raise UsageError(f"--workers {workers} is not possible; use 1 to 256")
    small = SmallWorld(
        rules=rules,
        nodes=nodes,
        mms=mms,
        pages=pages,
        contents=contents,
        frames=frames,
        events=tuple(events.split(",")),
        inside=inside,
        budget=budget,
        within=within,
        knobs=parse_knobs(knob or [], rules),
        ignore=tuple(ignore.split(",")) if ignore else (),
    )
    if replay is not None:
        broken = print_replay(small, decode(replay), as_json=as_json)
    else:
        with counting("compiling the explorer (once, half a minute) ...") as show:
            result = explore(
                small,
                depth=depth,
                states=states,
                workers=workers or os.cpu_count() or 1,
                show=lambda p: show(
                    f"{p.states:,} states, {p.frontier:,} to explore, {p.depth} steps deep, "
                    f"{p.transitions / max(p.seconds, 1e-9):,.0f} transitions/s"
                ),
            )
        print_result(result, as_json=as_json)
        broken = result.violation is not None
    if broken:
        raise typer.Exit(1)
