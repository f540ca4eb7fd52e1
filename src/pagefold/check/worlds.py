"""Own small worlds: what they have, which events may happen in them, and their first state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from itertools import product
from typing import Any

import numpy as np

from pagefold import settings
from pagefold.check import bench as shipped
from pagefold.check import settle
from pagefold.check.engines import Explored
from pagefold.core import events, layout
from pagefold.core.layout import Records
from pagefold.errors import UsageError

KINDS = ("migrate", "write", "exit", "fork", "unmap", "pin", "offline", "knob", "advise", "swap", "lock")
KNOBS = {
    "merge_across_nodes": "merge_across_nodes",
    "max_page_sharing": "max_page_sharing",
    "use_zero_pages": "use_zero_pages",
    "smart_scan": "smart_scan",
    "stable_node_chains_prune_millisecs": "chains_prune_millisecs",
}  # by the names of their fields in the core
PROMISES = {"no-leak": settle.ASK_NO_LEAK, "converges": settle.ASK_CONVERGES}
DEFAULT_KINDS = ("migrate", "write", "exit", "fork")
_FIRST_VPN = 16  # docs/choices.md, 2
_ORDER = 40  # a content's bits begin here, so that its key (the top 31 bits) tells it from others


@dataclass(frozen=True)
class SmallWorld:
    """What a small world has: processes, each with as many MERGEABLE pages; contents they may write; frames on each node.

    At first every process lives, on node 0, and page i of each holds content i modulo `contents`.
    """

    rules: str = "mainline"
    nodes: int = 2
    mms: int = 2
    pages: int = 1
    contents: int = 2
    frames: int = 0  # on each node; 0: as many as can be wanted
    events: tuple[str, ...] = DEFAULT_KINDS
    inside: int = 2
    budget: int = 0  # events on any path, between steps and inside them; 0: as many as may be
    within: int = 3  # full scans
    knobs: tuple[tuple[str, int], ...] = field(default=())
    ignore: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        rules = settings.check_rules(self.rules)
        limits = {
            "nodes": (1, 4),
            "mms": (1, 6),
            "pages": (1, 8),
            "contents": (1, 6),
            "frames": (0, 64),
            "inside": (0, shipped.MOST_INSIDE),
            "budget": (0, 100),
            "within": (1, 20),
        }
        for name, (least, most) in limits.items():
            if not least <= getattr(self, name) <= most:
                raise UsageError(f"{name} {getattr(self, name)} is not possible; use {least} to {most}")
        for kind in self.events:
            if kind not in KINDS:
                raise UsageError(f"events {kind!r} are not known; use some of {','.join(KINDS)}")
        if self.frames and self.frames * self.nodes < self.mms * self.pages:
            least = -(-self.mms * self.pages // self.nodes)
            raise UsageError(f"{self.frames} frames on each node do not hold all pages at first; use {least} or more")
        for name in self.ignore:
            if name not in PROMISES:
                raise UsageError(f"{name!r} cannot be ignored; use some of {','.join(PROMISES)}")
        for name, value in self.knobs:
            settings.parse(settings.find(name, rules), value)

    @property
    def frames_each(self) -> int:
        """Frames on each node: if not given, one for every page, and one for a copy that is under way."""
        return self.frames or self.mms * self.pages + 1


def parse_knobs(words: Sequence[str], rules: str) -> tuple[tuple[str, int], ...]:
    """Return knobs as (name, value) from words NAME=VALUE; those that a world has are the ones by which the core merges."""
    knobs = []
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--knob {word!r} is not NAME=VALUE")
        knob = settings.find(name, settings.check_rules(rules))
        if name not in KNOBS:
            raise UsageError(f"--knob {name} means nothing in a small world; use {', '.join(KNOBS)}")
        knobs.append((name, settings.parse(knob, value)))
    return tuple(knobs)


def content_value(content: int) -> int:
    """Return the bits of content 1, 2 …: their order, their keys and their checksums all differ."""
    return content << (_ORDER + 64) | content


def moves_of(small: SmallWorld, slots: int, frames: int) -> Records:
    """Make the table of all moves; record 0 is none. `slots` is how many mms there can be, `frames` how many frames."""
    rows: list[tuple[int, int, tuple[int, ...]]] = []
    pages = range(_FIRST_VPN, _FIRST_VPN + small.pages)
    mms = range(1, slots)
    nids = range(small.nodes)
    kinds = set(small.events)
    if "write" in kinds:
        for mm, vpn, content in product(mms, pages, range(1, small.contents + 1)):
            value = content_value(content)
            rows.append((events.WRITE, 1, (mm, vpn, value & (2**64 - 1), value >> 64)))
    if "migrate" in kinds:
        rows += [(events.MOVE, 1, one) for one in product(mms, pages, nids)]
    if "exit" in kinds:
        rows += [(events.EXIT, 1, (mm,)) for mm in mms]
    if "fork" in kinds:
        rows += [(events.FORK, 1, (mm, -1)) for mm in mms]
    if "unmap" in kinds:
        rows += [(events.UNMAP, 1, (mm, vpn, 1)) for mm, vpn in product(mms, pages)]
    if "advise" in kinds:
        rows += [(events.ADVISE, 1, (mm, vpn, 1, on)) for mm, vpn, on in product(mms, pages, (0, 1))]
    if "pin" in kinds:
        rows += [(events.PIN, 1, one) for one in product(mms, pages)]
        rows += [(events.UNPIN, 1, (pfn,)) for pfn in range(1, frames)]
    if "lock" in kinds:
        rows += [(events.LOCK, 1, one) for one in product(mms, pages)]
        rows += [(events.UNLOCK, 0, (pfn,)) for pfn in range(1, frames)]  # inside, it might be the merger's own lock
    if "swap" in kinds:
        rows += [(code, 1, one) for code in (events.SWAP_OUT, events.TOUCH) for one in product(mms, pages)]
    if "offline" in kinds:
        rows += [(code, 0, (nid,)) for code in (shipped.OFFLINE, shipped.ONLINE) for nid in nids]
    if "knob" in kinds:
        rows += [(shipped.UNMERGE, 0, ()), (shipped.ACROSS, 0, (0,)), (shipped.ACROSS, 0, (1,))]
        if small.rules != "classic":
            rows += [(shipped.SHARING, 0, (most,)) for most in (2, 3)]
    if len(rows) > shipped.MOST_MOVES:
        raise UsageError(f"{len(rows)} different moves are more than {shipped.MOST_MOVES}; use a smaller world")
    table = np.zeros(len(rows) + 1, shipped.move)
    for index, (code, inside, args) in enumerate(rows, start=1):
        table[index]["code"], table[index]["inside"] = code, inside
        table[index]["args"][: len(args)] = args
    return table


def first_world(small: SmallWorld, engine: Explored) -> Any:
    """Build the first state with the engine's own doors: a world whose arrays have just the room that it can ever need."""
    slots = 2 * small.mms + 1  # an exited process keeps its slot until the scanner comes by
    pages = small.mms * small.pages
    frames = [small.frames_each] * small.nodes
    swap = pages if "swap" in small.events else 0
    world = engine.arena.new_world(frames, swap, shadow=True, pages=slots * small.pages)
    lengths = {
        "vmas": slots * small.pages + 1,
        "mms": slots,
        "stables": 2 * sum(frames) + pages + 4,
        "schedule": shipped.MOST_INSIDE + 1,
    }
    for name, length in lengths.items():
        world = world._replace(**{name: np.zeros(length, getattr(world, name).dtype)})
    ctl = world.ctl[0]
    ctl["rules"] = layout.RULES[small.rules]
    knobs = {"merge_across_nodes": int(small.nodes == 1), "max_page_sharing": 2, "smart_scan": 0} | dict(small.knobs)
    for name, field_ in KNOBS.items():
        ctl[field_] = knobs.get(name, 0)
    execute = engine.doors.execute
    for _ in range(small.mms):
        mm = execute(world, events.SPAWN, 0, 0, 0, 0)
        execute(world, events.MAP, mm, 0, small.pages, 0)
        for page in range(small.pages):
            value = content_value(1 + page % small.contents)
            low, high = value & (2**64 - 1), value >> 64
            status = execute(world, events.WRITE, mm, _FIRST_VPN + page, low, high)
            assert status == layout.OK
        execute(world, events.ADVISE, mm, _FIRST_VPN, small.pages, 1)
    return world


def in_one_piece(world: Any) -> tuple[Any, Records]:
    """Copy a world's arrays into one piece of memory: return the world over it, and the memory as words. The schedule stays apart."""
    offsets, size = {}, 0
    for name, array in world._asdict().items():
        if name != "schedule":
            offsets[name] = size
            size += -(-array.nbytes // 8) * 8
    image = np.zeros(size // 8 + 1, np.uint64)  # the last word is bench.made
    raw = image.view(np.uint8)
    for name, offset in offsets.items():
        array = getattr(world, name)
        view = raw[offset : offset + array.nbytes].view(array.dtype)
        view[:] = array
        world = world._replace(**{name: view})
    return world, image


def new_bench(small: SmallWorld, engine: Explored, bug: int = 0) -> Any:
    """Make the bench of one worker, over the shipped engine or one with a planted bug, in the world's first state."""
    world, image = in_one_piece(first_world(small, engine))
    if bug:
        world.ctl[0]["bug"] = bug
    longest = max(len(world.frames), len(world.stables), 2 * len(world.mms) + 2)
    return engine.bench.Bench(
        world=world,
        image=image,
        moves=moves_of(small, len(world.mms), len(world.frames)),
        names=np.zeros((3, longest), np.int32),
        choices=np.zeros(shipped.MOST_INSIDE + 1, shipped.choice),
        made=image[-1:].view(np.int64),
        budget=small.budget,
        most_live=small.mms,
        inside=small.inside,
        promises=sum(bit for name, bit in PROMISES.items() if name not in small.ignore),
        settle_scans=small.within,
    )


def as_options(small: SmallWorld) -> str:
    """Return the options of `pagefold check` that name this world, those that differ from the defaults."""
    words = []
    for one in fields(small):
        value = getattr(small, one.name)
        if value == one.default:
            continue
        if one.name == "knobs":
            words += [f"--knob {name}={setting}" for name, setting in value]
        else:
            words.append(f"--{one.name} {','.join(value) if isinstance(value, tuple) else value}")
    return " ".join(words)
