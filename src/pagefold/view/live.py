"""Own how live merging is shown: a daemon's figures, its clients, who shares what, what one command saved. JSON is the daemon's own."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from pagefold.live.savings import Savings
from pagefold.view.fields import FIELDS, seconds, show, size
from pagefold.view.line import one_line

TOTALS = (
    *(
        "saved_bytes",
        "store_bytes",
        "tracked_bytes",
        "pages_shared",
        "pages_sharing",
        "pages_unshared",
        "pages_volatile",
    ),
    *("ksm_zero_pages", "cow_breaks", "windows", "full_scans", "pages_scanned", "pages_skipped"),
    *("stable_node_chains", "stable_node_dups", "daemon_bytes", "cpu_seconds", "uptime_seconds", "settled_seconds"),
)
COLUMNS = {  # field of a client: short title
    "pages": "advised pages",
    "merged_pages": "merged",
    "zero_pages": "zero",
    "broken_pages": "written since",
    "refused_pages": "left alone",
    "mappings": "mappings",
}
_PIPE_WIDTH = 120  # columns, where there is no terminal to ask
_MOST_GROUPS = 8  # JSON has more
_MOST_PIDS = 8
_WHY = {  # statuses of windows, for people
    "differs": "were written in the meantime",
    "pinned": "are pinned by a device or io_uring",
    "shared": "are shared by fork",
    "unmanaged": "were not advised any more",
    "no_vma": "would need more mappings than vm.max_map_count leaves",
    "unsuitable": "are in a mapping that cannot be swapped",
    "broken": "were merged before and written since",
    "absent": "were not there",
    "busy": "were too busy",
    "off": "are in a process where no window is possible",
    "bad": "were asked for wrongly",
}


def new_console() -> Console:
    """Return a console on stdout; of a fixed width if that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH)


def print_json(value: dict[str, Any], *, lines: bool = False) -> None:
    """Print one JSON object, or (`lines`) one on a line of its own."""
    print(json.dumps(value, indent=None if lines else 2), flush=True)


def draw_stat(stat: dict[str, Any]) -> RenderableType:
    """Return a daemon's answer to "stat" as tables and lines."""
    parts: list[RenderableType] = [_totals(stat)]
    if stat["clients"]:
        parts.append(_clients(stat["clients"]))
    if stat["groups"]:
        parts.append(draw_groups(stat["groups"], [client["pid"] for client in stat["clients"]]))
    parts += [Text(line) for line in _said(stat)]
    return Group(*parts)


def _totals(stat: dict[str, Any]) -> Table:
    title = f"Domain {stat['domain']}, daemon {stat['pid']}: {_state(stat)}"
    table = Table(title=Text(one_line(title)), title_justify="left")
    table.add_column("counter")
    table.add_column("", justify="right")
    table.add_column("meaning", style="dim", overflow="fold")
    figures = {**stat, **stat["counters"]}
    for name in TOTALS:
        if figures.get(name) is not None:
            table.add_row(name, show(name, figures[name]), FIELDS[name].help)
    return table


def _state(stat: dict[str, Any]) -> str:
    if stat["knobs"].get("run") != 1:
        return f"run is {stat['knobs'].get('run')}, nothing is merged"
    if not stat["clients"]:
        return "no client"
    return "settled" if stat["settled"] else "merging"


def _clients(clients: Sequence[dict[str, Any]]) -> Table:
    nodes = sorted({node for client in clients for node in client["node_pages"]}, key=int)
    table = Table(title="Clients", title_justify="left")
    table.add_column("pid", justify="right", no_wrap=True)
    table.add_column("command", no_wrap=True, overflow="ellipsis", ratio=1)
    for title in COLUMNS.values():
        table.add_column(title, justify="right")
    for node in nodes if len(nodes) > 1 else []:
        table.add_column(f"on node {node}", justify="right")
    table.add_column("in the background")
    for client in clients:
        figures = [show(name, client.get(name, 0)) for name in COLUMNS]
        figures += [f"{client['node_pages'].get(node, 0):,}" for node in nodes if len(nodes) > 1]
        table.add_row(
            str(client["pid"]), Text(one_line(client["command"])), *figures, "yes" if client["background"] else "no"
        )
    return table


def draw_groups(groups: Sequence[dict[str, Any]], everybody: Sequence[int]) -> Table:
    """Return who shares what with whom, the most first; a set of processes that is everybody is called all."""
    table = Table(title="Who shares what", title_justify="left")
    table.add_column("node", justify="right")
    table.add_column("the same", justify="right")
    table.add_column("pages", justify="right")
    table.add_column("in processes")
    for group in groups[:_MOST_GROUPS]:
        pids = sorted(group["pids"])
        names = ", ".join(map(str, pids[:_MOST_PIDS])) + (
            f" and {len(pids) - _MOST_PIDS} more" if len(pids) > _MOST_PIDS else ""
        )
        if len(pids) > 2 and set(pids) == set(everybody):
            names = f"all {len(pids)}"
        table.add_row(str(group["node"]), size(group["bytes"]), f"{group['pages']:,}", names)
    if len(groups) > _MOST_GROUPS:
        table.caption = f"and {len(groups) - _MOST_GROUPS} more sets of processes (--json has them)"
        table.caption_justify = "left"
    return table


def _said(stat: dict[str, Any]) -> Iterator[str]:
    """Yield what went not as wished: pages that were refused, clients without background, the daemon's notes."""
    refused = {name: count for name, count in stat["refused"].items() if count}
    if refused:
        parts = [f"{count:,} {_WHY.get(name, one_line(name))}" for name, count in refused.items()]
        yield f"Pages that were not swapped when tried: {'; '.join(parts)}."
    why = Counter(client["why"] for client in stat["clients"] if not client["background"])
    for reason, count in why.items():
        yield one_line(
            f"No background merging in {count} client{'s' if count > 1 else ''}: {reason or 'it did not say why'}."
        )
    for note in stat["notes"]:
        yield one_line(f"Note: {note}.")


def savings_json(savings: Savings, **more: Any) -> dict[str, Any]:
    """Return what a command saved as one JSON object."""
    stat = savings.stat
    names = ("saved_bytes", "peak_saved_bytes", "peak_seconds", "settled_seconds")
    kept = (
        *("knobs", "counters", "store_bytes", "tracked_bytes", "daemon_bytes", "cpu_seconds", "windows"),
        *("refused", "cow_breaks", "clients", "groups", "notes"),
    )
    return {**more, **{name: getattr(savings, name) for name in names}, **{name: stat.get(name) for name in kept}}


def draw_savings(savings: Savings) -> list[str]:
    """Return what a command saved, as lines."""
    stat = savings.stat
    if not stat:
        return ["nothing was saved: no process enabled pagefold, or none lived long enough to be asked"]
    lines = []
    if savings.peak_saved_bytes <= 0:
        lines.append(f"nothing was saved in {_processes(stat)}: {_why_nothing(stat)}")
    else:
        settled = savings.settled_seconds
        lines.append(
            f"saved {size(savings.peak_saved_bytes)} at most"
            + (f" (after {seconds(savings.peak_seconds)})" if savings.peak_seconds is not None else "")
            + f", {size(savings.saved_bytes)} at the end, in {_processes(stat)}; "
            + (f"settled after {seconds(settled)}" if settled is not None else "it had not settled yet")
        )
    return [one_line(line) for line in (*lines, *(line.rstrip(".") for line in _said({**stat, "refused": {}})))]


def _processes(stat: dict[str, Any]) -> str:
    count = len(stat["clients"])
    return f"{count} process{'es' if count != 1 else ''}"


def _why_nothing(stat: dict[str, Any]) -> str:
    if not stat["tracked_bytes"]:
        return "no memory was advised (NumPy arrays of 64 KiB and more are, once they have lived a second)"
    if stat["knobs"].get("run") != 1:
        return f"run is {stat['knobs'].get('run')}"
    if not any(client["background"] for client in stat["clients"]):
        return "background merging was off"
    return f"of {size(stat['tracked_bytes'])} that were advised no two pages were equal, or it ended too soon"
