"""Own the layout of exploration: a small world in one piece of memory, the moves that can be made in it, and what is remembered.

A state is the memory of a world's arrays, copied as a whole. How a state was reached is one number (`how`), so that a path is a
list of numbers and can be made again. Must not know which rules are explored: the same source is compiled over the shipped core
and over the one with planted bugs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pagefold.core.compiler import jit
from pagefold.core.layout import Records, World

# --- a move: something that processes, the kernel or the operator may do ---------------------------------------------
move = np.dtype(
    [
        ("code", "i4"),  # of core/events.py, or one of the codes below
        ("inside", "i4"),  # 1: may happen in the middle of a step, too
        ("args", "i8", (4,)),
    ],
    align=True,
)
OFFLINE = 101  # node: begin and finish, or cancel
ONLINE = 102  # node
UNMERGE = 103  # run = 2, then 1 again
ACROSS = 104  # merge_across_nodes = value
SHARING = 105  # max_page_sharing = value
CODE_NAMES = {OFFLINE: "offline", ONLINE: "online", UNMERGE: "unmerge", ACROSS: "across", SHARING: "sharing"}

# --- how a state was reached from the one before: 4 bits for the kind, and up to three (checkpoint, move) pairs --------
MOVE = 1  # the first pair's move, between two steps
STEP = 2  # one page step of the scanner, with moves at its checkpoints (checkpoint 0: none)
MOST_INSIDE = 3
MOST_MOVES = 2**12 - 1  # move 0 is none
MOST_CHECKPOINTS = 2**8 - 1
_FOUR = np.uint64(4)
_TWELVE = np.uint64(12)
_KIND = np.uint64(0xF)

# --- the moves inside a step that is being tried, by depth ---------------------------------------------------------------
choice = np.dtype(
    [
        ("how", "u8"),  # of the step without this choice
        ("at", "i8"),  # its checkpoint
        ("number", "i8"),  # its move
        ("passed", "i8"),  # checkpoints that the step passes without this choice
        ("living", "i8"),  # processes at that point, as bits
        ("room", "i8"),  # for so many children
    ]
)

# --- how far a worker has come ------------------------------------------------------------------------------------------
tally = np.dtype(
    [
        ("next", "i8"),  # the state to go on with
        ("found", "i8"),  # new states written out
        ("transitions", "i8"),  # made
        ("seen", "i8"),  # in the worker's own set
        ("checkpoints", "i8"),  # the most that one step passed
        ("how", "u8"),  # of the transition that broke an invariant
        ("broken", "i4"),  # which (invariants.NAMES, or one of settle.py), 0: none
        ("where", "i4"),
    ],
    align=True,
)


class Bench(NamedTuple):
    """A small world, its memory, and the room one worker needs."""

    world: World
    image: Records  # u8 words: the memory of all arrays of the world but its schedule, and of `made`
    moves: Records
    names: Records  # i4, scratch of fingerprint.py: (3, longest of frames, stables, mms and rmaps)
    choices: Records
    made: Records  # i8 (1,), a part of the image: events that happened on the way here, counted while there is a budget
    budget: int  # the most that may, 0: no limit
    most_live: int  # processes at a time
    inside: int  # events within a step
    promises: int  # which promises of settle.py are asked of every state, as bits
    settle_scans: int  # full scans within which all must have settled


class Found(NamedTuple):
    """Room for new states: their memory, the state (of this layer) each was reached from, how, and its fingerprint."""

    images: Records  # u8 (room, words)
    parents: Records  # i4
    hows: Records  # u8
    prints: Records  # u8


@jit
def load_image(bench: Bench, image: Records) -> None:
    """Make a remembered state the present one."""
    for index in range(len(image)):
        bench.image[index] = image[index]


@jit
def how_of(kind: int, at: int, number: int) -> np.uint64:
    """Return how a move (kind MOVE), or a step with at most one move inside, leads on."""
    return np.uint64(kind) | np.uint64(at) << _FOUR | np.uint64(number) << _TWELVE


@jit
def with_inside(how: np.uint64, place: int, at: int, number: int) -> np.uint64:
    """Return a step with one more move inside, as pair `place` (0 to 2)."""
    shift = np.uint64(4 + 20 * place)
    return how | np.uint64(at) << shift | np.uint64(number) << (shift + np.uint64(8))


@jit
def kind_of(how: np.uint64) -> int:
    """Return MOVE or STEP."""
    return int(np.int64(how & _KIND))


@jit
def pair_of(how: np.uint64, place: int) -> tuple[int, int]:
    """Return (checkpoint, move) of a pair; move 0: there is none."""
    bits = how >> np.uint64(4 + 20 * place)
    return int(np.int64(bits & np.uint64(0xFF))), int(np.int64((bits >> np.uint64(8)) & np.uint64(0xFFF)))
