"""Own the drawing of an engine's trees as text."""

from __future__ import annotations

from collections.abc import Iterable

from pagefold.engine import Engine, StableNode


def draw(engine: Engine) -> str:
    """Draw all trees and migrate_nodes: content, where the frame is, and who shares it (process:page number).

    A tree lies on its side: indentation is depth, reading down is the order of contents. Frames are named f1, f2 … as they are
    numbered by the machine; `misplaced` is a frame on another node than its tree's.
    """
    names = {process.mm: f"p{process.pid}" for process in engine.machine.processes if process.alive}
    across = engine.get("merge_across_nodes") == 1
    nodes = list(engine.stable_nodes())
    lines = []
    for nid in range(1 if across else engine.machine.nodes):
        title = "stable tree (all nodes)" if across else f"stable tree of node {nid}"
        lines += _block(title, (n for n in nodes if n.place != "migrating" and n.tree == nid), names, across)
    lines += _block("migrate_nodes", (n for n in nodes if n.place == "migrating"), names, across)
    for page in engine.unstable_pages():
        what = "gone" if page.content is None else f"content {page.content}, now on node {page.frame_node}"
        tree = "unstable tree" if across else f"unstable tree of node {page.tree}"
        lines.append(f"{tree}: {names.get(page.mm, 'exited')}:{page.vpn}, {what}")
    return "\n".join(lines)


def _block(title: str, nodes: Iterable[StableNode], names: dict[int, str], across: bool) -> list[str]:
    rows = [_row(node, names, across) for node in nodes]
    return [f"{title}:", *rows] if rows else [f"{title}: empty"]


def _row(node: StableNode, names: dict[int, str], across: bool) -> str:
    indent = "  " + "    " * node.depth
    dup = "dup of the chain, " if node.place == "dup" else ""
    if node.content is None:
        return f"{indent}{dup}stale: its page is gone"
    misplaced = "" if across or node.place == "migrating" or node.frame_node == node.tree else "  MISPLACED"
    sharers = ", ".join(f"{names.get(mm, 'exited')}:{vpn}" for mm, vpn in node.sharers) or "nobody"
    return f"{indent}{dup}content {node.content}, frame f{node.frame} on node {node.frame_node}, shared by {sharers}{misplaced}"
