"""Compare the red-black trees with a sorted list, and look at colours and links after every step."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagefold.core import judge_merger, layout, rbtree
from pagefold.core.compiler import entry
from pagefold.core.layout import Records
from tests.conftest import scaled


# The functions of the core have no Python wrapper when compiled: these doors have.
@entry
def insert(a: Records, root: int, parent: int, right: int, node: int) -> int:
    return rbtree.insert(a, root, parent, right, node)


@entry
def erase(a: Records, root: int, node: int) -> int:
    return rbtree.erase(a, root, node)


@entry
def replace(a: Records, root: int, old: int, new: int) -> int:
    return rbtree.replace(a, root, old, new)


@entry
def first(a: Records, root: int) -> int:
    return rbtree.first_below(a, root)


@entry
def following(a: Records, node: int) -> int:
    return rbtree.following(a, node)


@entry
def nodes_if_sound(a: Records, root: int) -> int:
    return judge_merger.tree_is_sound(a, root)


class Tree:
    """A tree over fresh records and the sorted list that it must agree with; every slot holds one key."""

    def __init__(self, dtype: np.dtype[Any], slots: int) -> None:
        self.a = np.zeros(slots + 1, dtype)
        self.root = 0
        self.key_of: dict[int, int] = {}
        self.slot_of: dict[int, int] = {}
        self.keys: list[int] = []
        self.free = list(range(slots, 0, -1))

    def place(self, key: int) -> tuple[int, int]:
        """Return where a new key is to hang: (parent, right)."""
        parent, right, here = 0, 0, self.root
        while here:
            parent, right = here, int(key > self.key_of[here])
            here = int(self.a[here]["rb_right" if right else "rb_left"])
        return parent, right

    def insert(self, key: int) -> None:
        if key in self.slot_of or not self.free:
            return
        slot = self.free.pop()
        self.root = insert(self.a, self.root, *self.place(key), slot)
        self.know(key, slot)
        insort(self.keys, key)

    def erase(self, key: int) -> None:
        if self.keys:
            key = self.nearest(key)
            slot = self.slot_of.pop(key)
            self.root = erase(self.a, self.root, slot)
            del self.key_of[slot]
            self.keys.remove(key)
            self.free.insert(0, slot)

    def replace(self, key: int) -> None:
        """Let a fresh slot take the place of the one that holds the key."""
        if self.keys and self.free:
            key = self.nearest(key)
            old, new = self.slot_of[key], self.free.pop()
            shape = nodes_if_sound(self.a, self.root)
            self.root = replace(self.a, self.root, old, new)
            assert nodes_if_sound(self.a, self.root) == shape
            del self.key_of[old]
            self.know(key, new)
            self.free.insert(0, old)

    def know(self, key: int, slot: int) -> None:
        self.key_of[slot], self.slot_of[key] = key, slot

    def nearest(self, key: int) -> int:
        return self.keys[bisect_left(self.keys, key) % len(self.keys)]

    def check(self) -> None:
        assert nodes_if_sound(self.a, self.root) == len(self.keys)
        walked, node = [], first(self.a, self.root) if self.root else 0
        while node:
            walked.append(self.key_of[node])
            node = following(self.a, node)
        assert walked == self.keys
        assert self.a[0] == np.zeros(1, self.a.dtype)[0], "record 0 means none and is never written"


@pytest.mark.parametrize("dtype", [layout.stable, layout.rmap], ids=["stable", "rmap"])
@settings(max_examples=scaled(150), deadline=None, derandomize=True, database=None)
@given(steps=st.lists(st.tuples(st.sampled_from(("insert", "insert", "erase", "replace")), st.integers(0, 40))))
def test_any_sequence_agrees_with_a_sorted_list(dtype: np.dtype[Any], steps: list[tuple[str, int]]) -> None:
    tree = Tree(dtype, slots=24)
    for name, key in steps:
        getattr(tree, name)(key)
        tree.check()


@pytest.mark.parametrize("seed", range(scaled(20)))
def test_growing_and_shrinking_many_times(seed: int) -> None:
    generator = random.Random(seed)
    tree = Tree(layout.rmap, slots=200)
    for phase in range(6):
        mostly = "insert" if phase % 2 == 0 else "erase"
        for _ in range(60):
            name = mostly if generator.random() < 0.8 else generator.choice(("insert", "erase", "replace"))
            getattr(tree, name)(generator.randrange(1000))
            tree.check()
    while tree.keys:
        tree.erase(generator.randrange(1000))
        tree.check()
    assert tree.root == 0


@pytest.mark.parametrize("keys", [range(100), range(100, 0, -1)], ids=["rising", "falling"])
def test_height_stays_logarithmic_for_sorted_input(keys: range) -> None:
    tree = Tree(layout.rmap, slots=128)
    for key in keys:
        tree.insert(key)
    tree.check()
    depths = []
    for node in tree.key_of:
        depth = 0
        while node:
            node = int(tree.a[node]["rb_parent"])
            depth += 1
        depths.append(depth)
    assert max(depths) <= 2 * 7  # 2 * log2(n + 1)


BREAKS = {
    "red root": lambda a, root: ("rb_red", root, 1),
    "root with a parent": lambda a, root: ("rb_parent", root, int(a[root]["rb_left"])),
    "red below red": lambda a, root: ("rb_red", red_parent(a, root), 1),
    "black instead of red": lambda a, root: ("rb_red", leaf(a, root), 0),
    "wrong parent link": lambda a, root: ("rb_parent", leaf(a, root), root),
    "two parents": lambda a, root: ("rb_right", root, int(a[root]["rb_left"])),
    "a ring": lambda a, root: ("rb_left", leaf(a, root), root),
    "out of the array": lambda a, root: ("rb_left", leaf(a, root), len(a)),
    "negative": lambda a, root: ("rb_left", leaf(a, root), -1),
}


def leaf(a: Records, root: int) -> int:
    """Return a red leaf that does not hang on the root."""
    for node in range(1, len(a)):
        record = a[node]
        if record["rb_red"] and not record["rb_left"] and not record["rb_right"] and record["rb_parent"] != root:
            return node
    raise AssertionError("the specimen has no such leaf")


def red_parent(a: Records, root: int) -> int:
    """Return the black parent of a red leaf."""
    return int(a[leaf(a, root)]["rb_parent"])


@pytest.mark.parametrize("name", BREAKS)
def test_the_judge_sees_each_broken_tree(name: str) -> None:
    tree = Tree(layout.stable, slots=12)
    for key in range(10):
        tree.insert(key)
    tree.check()
    field, node, value = BREAKS[name](tree.a, tree.root)
    tree.a[node][field] = value
    assert nodes_if_sound(tree.a, tree.root) == -1
