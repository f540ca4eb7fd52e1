"""Own the shape of a red-black tree: textbook linking, insert and erase, and nothing about contents.

A search prunes the stale nodes it walks past, so what the merger counts depends on the *path* of a search and
with it on the shape of the tree. The standard algorithms give one shape for one history, whoever writes them:

* insert: a red leaf; red uncle: recolour and go up two; else one or two rotations;
* erase: a node with two children is replaced by its in-order successor, which takes over place and colour;
* replace: shape and colour stay.

Nothing here compares values: an unstable tree may be out of order and must still keep its balance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


class RbNode:
    """One place in one tree; `value` is whatever the caller hangs there."""

    __slots__ = ("left", "parent", "red", "right", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.left: RbNode | None = None
        self.right: RbNode | None = None
        self.parent: RbNode | None = None
        self.red = True


def is_red(node: RbNode | None) -> bool:
    """Tell the colour of a link: a missing child is black."""
    return node is not None and node.red


class RbTree:
    """A red-black tree whose callers descend by themselves and say where a new node goes."""

    def __init__(self) -> None:
        self.root: RbNode | None = None

    def insert(self, node: RbNode, parent: RbNode | None, side: str) -> None:
        """Link `node` as the missing child `side` ("left"/"right") of `parent` (None: as the root)."""
        node.left = node.right = None
        node.parent = parent
        node.red = True
        if parent is None:
            assert self.root is None
            self.root = node
        else:
            assert getattr(parent, side) is None
            setattr(parent, side, node)
        self._mend_insert(node)

    def erase(self, node: RbNode) -> None:
        """Take `node` out; its in-order successor takes its place when it has two children."""
        lost_black = not node.red
        if node.left is None or node.right is None:
            child = node.right if node.left is None else node.left
            above = node.parent
            self._put(child, node)
        else:
            heir = node.right
            while heir.left is not None:
                heir = heir.left
            lost_black = not heir.red
            child = heir.right
            if heir.parent is node:
                above = heir
            else:
                above = heir.parent
                self._put(child, heir)
                heir.right = node.right
                heir.right.parent = heir
            self._put(heir, node)
            heir.left = node.left
            heir.left.parent = heir
            heir.red = node.red
        node.left = node.right = node.parent = None
        if lost_black:
            self._mend_erase(child, above)

    def replace(self, old: RbNode, new: RbNode) -> None:
        """Let `new` stand where `old` stood: same links, same colour."""
        new.left, new.right, new.red = old.left, old.right, old.red
        self._put(new, old)
        for child in (new.left, new.right):
            if child is not None:
                child.parent = new
        old.left = old.right = old.parent = None

    def __iter__(self) -> Iterator[RbNode]:
        """Walk the nodes from left to right (a list is made first, so the tree may change meanwhile)."""
        out: list[RbNode] = []
        pending: list[RbNode] = []
        node = self.root
        while pending or node is not None:
            while node is not None:
                pending.append(node)
                node = node.left
            node = pending.pop()
            out.append(node)
            node = node.right
        return iter(out)

    def check(self) -> None:
        """Assert: root black, no red child of a red node, equal black heights, parent links agree."""
        assert not is_red(self.root)
        assert self.root is None or self.root.parent is None
        self._black_height(self.root)

    def _black_height(self, node: RbNode | None) -> int:
        if node is None:
            return 1
        for child in (node.left, node.right):
            assert child is None or child.parent is node
            assert not (node.red and is_red(child))
        height = self._black_height(node.left)
        assert height == self._black_height(node.right)
        return height + (not node.red)

    def _put(self, new: RbNode | None, old: RbNode) -> None:
        """Make `old`'s parent point to `new` instead."""
        if old.parent is None:
            self.root = new
        elif old.parent.left is old:
            old.parent.left = new
        else:
            old.parent.right = new
        if new is not None:
            new.parent = old.parent

    def _rotate(self, node: RbNode, to: str) -> None:
        """Turn `node` down towards `to`; its other child comes up."""
        away = opposite(to)
        up = getattr(node, away)
        inner = getattr(up, to)
        setattr(node, away, inner)
        if inner is not None:
            inner.parent = node
        self._put(up, node)
        setattr(up, to, node)
        node.parent = up

    def _mend_insert(self, node: RbNode) -> None:
        while is_red(node.parent):
            parent = node.parent
            grand = parent.parent
            side = "left" if grand.left is parent else "right"
            uncle = getattr(grand, opposite(side))
            if is_red(uncle):
                parent.red = uncle.red = False
                grand.red = True
                node = grand
                continue
            if getattr(parent, opposite(side)) is node:
                self._rotate(parent, side)
                parent = node
            parent.red = False
            grand.red = True
            self._rotate(grand, opposite(side))
            break
        self.root.red = False

    def _mend_erase(self, node: RbNode | None, parent: RbNode | None) -> None:
        """Restore the black heights: `node` below `parent` (it may be missing) is one black short."""
        while parent is not None and not is_red(node):
            side = "left" if parent.left is node else "right"
            other = opposite(side)
            sibling = getattr(parent, other)
            if sibling.red:
                sibling.red = False
                parent.red = True
                self._rotate(parent, side)
                sibling = getattr(parent, other)
            if not is_red(sibling.left) and not is_red(sibling.right):
                sibling.red = True
                node, parent = parent, parent.parent
                continue
            if not is_red(getattr(sibling, other)):
                getattr(sibling, side).red = False
                sibling.red = True
                self._rotate(sibling, other)
                sibling = getattr(parent, other)
            sibling.red = parent.red
            parent.red = False
            getattr(sibling, other).red = False
            self._rotate(parent, side)
            return
        if node is not None:
            node.red = False


def opposite(side: str) -> str:
    """Name the other side."""
    return "right" if side == "left" else "left"
