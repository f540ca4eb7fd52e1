"""Own red-black trees over records with `rb_left`, `rb_right`, `rb_parent` and `rb_red`.

Must not know what is ordered: the caller descends and says where a node is to hang. Every function that may change
the root returns it. Source: any textbook; shapes are those of insertion and erasure with the in-order successor.
"""

from __future__ import annotations

from pagefold.core.compiler import jit
from pagefold.core.layout import Records


@jit
def child(a: Records, node: int, right: int) -> int:
    """Return the left (0) or right (1) child."""
    return a[node]["rb_right"] if right else a[node]["rb_left"]


@jit
def set_child(a: Records, node: int, right: int, to: int) -> None:
    """Set the left (0) or right (1) child; the child's parent link is the caller's."""
    if right:
        a[node]["rb_right"] = to
    else:
        a[node]["rb_left"] = to


@jit
def put_in_place(a: Records, root: int, old: int, new: int) -> int:
    """Let `new` (or nothing) hang where `old` hung; return the root."""
    parent = a[old]["rb_parent"]
    if new:
        a[new]["rb_parent"] = parent
    if parent == 0:
        return new
    set_child(a, parent, 1 if a[parent]["rb_right"] == old else 0, new)
    return root


@jit
def rotate(a: Records, root: int, node: int, right: int) -> int:
    """Move `node` down to its `right` (1) or left (0) side; the other child rises. Return the root."""
    rising = child(a, node, 1 - right)
    inner = child(a, rising, right)
    root = put_in_place(a, root, node, rising)
    set_child(a, node, 1 - right, inner)
    if inner:
        a[inner]["rb_parent"] = node
    set_child(a, rising, right, node)
    a[node]["rb_parent"] = rising
    return root


@jit
def insert(a: Records, root: int, parent: int, right: int, node: int) -> int:
    """Hang `node` under `parent` (0: empty tree) and rebalance; return the root."""
    a[node]["rb_left"] = 0
    a[node]["rb_right"] = 0
    a[node]["rb_parent"] = parent
    a[node]["rb_red"] = 1
    if parent == 0:
        a[node]["rb_red"] = 0
        return node
    set_child(a, parent, right, node)
    while parent and a[parent]["rb_red"]:
        grand = a[parent]["rb_parent"]
        side = 1 if a[grand]["rb_right"] == parent else 0
        uncle = child(a, grand, 1 - side)
        if uncle and a[uncle]["rb_red"]:
            a[parent]["rb_red"] = 0
            a[uncle]["rb_red"] = 0
            a[grand]["rb_red"] = 1
            node = grand
            parent = a[node]["rb_parent"]
            continue
        if child(a, parent, 1 - side) == node:
            root = rotate(a, root, parent, side)
            parent = node
        a[parent]["rb_red"] = 0
        a[grand]["rb_red"] = 1
        root = rotate(a, root, grand, 1 - side)
        break
    a[root]["rb_red"] = 0
    return root


@jit
def first_below(a: Records, node: int) -> int:
    """Return the leftmost node of the subtree."""
    while a[node]["rb_left"]:
        node = a[node]["rb_left"]
    return node


@jit
def following(a: Records, node: int) -> int:
    """Return the next node in order, 0 after the last."""
    if a[node]["rb_right"]:
        return first_below(a, a[node]["rb_right"])
    parent = a[node]["rb_parent"]
    while parent and a[parent]["rb_right"] == node:
        node = parent
        parent = a[node]["rb_parent"]
    return parent


@jit
def erase(a: Records, root: int, node: int) -> int:
    """Take `node` out and rebalance; return the root."""
    left = a[node]["rb_left"]
    right = a[node]["rb_right"]
    if left == 0 or right == 0:
        heir = left if left else right
        parent = a[node]["rb_parent"]
        lost_red = a[node]["rb_red"]
        root = put_in_place(a, root, node, heir)
    else:
        next_ = first_below(a, right)
        lost_red = a[next_]["rb_red"]
        heir = a[next_]["rb_right"]
        parent = a[next_]["rb_parent"]
        if parent == node:
            parent = next_
        else:
            root = put_in_place(a, root, next_, heir)
            a[next_]["rb_right"] = right
            a[right]["rb_parent"] = next_
        root = put_in_place(a, root, node, next_)
        a[next_]["rb_left"] = left
        a[left]["rb_parent"] = next_
        a[next_]["rb_red"] = a[node]["rb_red"]
    if not lost_red:
        root = _restore_black(a, root, heir, parent)
    return root


@jit
def _restore_black(a: Records, root: int, node: int, parent: int) -> int:
    """Mend the path through `node` (may be 0, child of `parent`), which lacks one black node; return the root."""
    while node != root and (node == 0 or not a[node]["rb_red"]):
        side = 1 if a[parent]["rb_right"] == node else 0
        sibling = child(a, parent, 1 - side)
        if a[sibling]["rb_red"]:
            a[sibling]["rb_red"] = 0
            a[parent]["rb_red"] = 1
            root = rotate(a, root, parent, side)
            sibling = child(a, parent, 1 - side)
        near = child(a, sibling, side)
        far = child(a, sibling, 1 - side)
        near_red = near and a[near]["rb_red"]
        far_red = far and a[far]["rb_red"]
        if not near_red and not far_red:
            a[sibling]["rb_red"] = 1
            node = parent
            parent = a[node]["rb_parent"]
            continue
        if not far_red:
            a[near]["rb_red"] = 0
            a[sibling]["rb_red"] = 1
            root = rotate(a, root, sibling, 1 - side)
            far = sibling
            sibling = near
        a[sibling]["rb_red"] = a[parent]["rb_red"]
        a[parent]["rb_red"] = 0
        a[far]["rb_red"] = 0
        root = rotate(a, root, parent, side)
        node = root
        break
    if node:
        a[node]["rb_red"] = 0
    return root


@jit
def replace(a: Records, root: int, old: int, new: int) -> int:
    """Let `new` take the very place and colour of `old`; return the root."""
    a[new]["rb_left"] = a[old]["rb_left"]
    a[new]["rb_right"] = a[old]["rb_right"]
    a[new]["rb_red"] = a[old]["rb_red"]
    if a[old]["rb_left"]:
        a[a[old]["rb_left"]]["rb_parent"] = new
    if a[old]["rb_right"]:
        a[a[old]["rb_right"]]["rb_parent"] = new
    return put_in_place(a, root, old, new)
