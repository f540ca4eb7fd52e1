"""Own the making of small tables of pages: each page says its content, and who else is on its frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pagefold.plan import PageTable
from pagefold.sources import Pages

PAGE = 4096


class Page(NamedTuple):
    """One page; pages of equal `frame` are on one, as fork leaves them."""

    content: int  # below 2**128
    frame: int
    node: int = 0
    exclusive: bool = True
    volatile: bool = False
    ksm: bool = False
    address: int = 0  # 0: by place
    huge: bool = False


def source(pages: Sequence[Page], pid: int | None = 100) -> Pages:
    """Make one source of pages in the order given."""
    count = len(pages)
    default = np.arange(1, count + 1, dtype=np.int64) * PAGE
    given = np.array([page.address for page in pages], np.int64)
    return Pages(
        label="image" if pid is None else f"worker [{pid}]",
        pid=pid,
        page_size=PAGE,
        address=np.where(given > 0, given, default),
        high=np.array([page.content >> 64 for page in pages], np.uint64),
        low=np.array([page.content & 2**64 - 1 for page in pages], np.uint64),
        node=np.array([page.node for page in pages], np.int16),
        frame=np.array([page.frame for page in pages], np.int64),
        exclusive=np.array([page.exclusive for page in pages], np.bool_),
        ksm=np.array([page.ksm for page in pages], np.bool_),
        huge=np.array([page.huge for page in pages], np.bool_),
        volatile=np.array([page.volatile for page in pages], np.bool_),
        advised=np.ones(count, np.bool_),
    )


def table(*sources: Sequence[Page]) -> PageTable:
    """Make the table of several processes."""
    return PageTable.of([source(pages, 100 + number) for number, pages in enumerate(sources)])


def named(*sources: str) -> PageTable:
    """Make a table of words like 'a1 a2 b3!': a letter for the content (z: zeroes), a number for the frame, '!' for volatile.

    Frames that several sources name are shared as fork does.
    """
    words = [text.split() for text in sources]
    users = [word.strip("!")[1:] for line in words for word in line]
    return table(
        *(
            [
                Page(
                    content=0 if word[0] == "z" else ord(word[0]) << 64 | 1,
                    frame=1000 + int(word.strip("!")[1:]),
                    exclusive=users.count(word.strip("!")[1:]) == 1,
                    volatile=word.endswith("!"),
                )
                for word in line
            ]
            for line in words
        )
    )
