"""Own the lines of the agent on which it rests that nothing is lost, each with a way to break it and who meets that soonest.

The barrier of window.c has no mutant: without it a thread inside /proc/PID/mem would have to lose its processor between two
instructions of the kernel, which a kernel that is not preemptible does not do.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

COMPARED_BEFORE = """
    uint8_t before[PF_WINDOW_PAGES];
    for (uint32_t i = 0; i < run->pages; i++)
        before[i] = pf_run_compare(run, i, pf_run_address(run, i));
"""


# So many pages that nobody comes by soon to wake those who were forgotten.
ASLEEP = ["--pages", "65536", "--run", "1"]


@dataclass
class Mutant:
    """One file of the agent, what to replace in it, and the words for torture."""

    name: str
    file: str
    changes: list[tuple[str, str]]
    kinds: str
    words: list[str] = field(default_factory=list)
    code: int = 1

    def make(self, agent: Path, copy: Path) -> None:
        """Copy the agent's sources with this change; times stay, so that only one file is compiled anew."""
        shutil.copytree(agent, copy)
        path = copy / self.file
        text = path.read_text()
        for old, new in self.changes:
            assert text.count(old) == 1, f"{self.file} has changed: say anew in {__name__} how {self.name!r} is broken"
            text = text.replace(old, new)
        path.write_text(text)


MUTANTS = [
    Mutant(
        "bytes are compared before the move",
        "window.c",
        [
            ("    PF_FAULT(PF_FAULT_WINDOW, 1);\n", COMPARED_BEFORE),
            ("pf_run_compare(run, i, scratch + (uint64_t)i * PF_PAGE)", "before[i]"),
        ],
        "store,look",
    ),
    Mutant(
        "what MOVE returns is believed",
        "window.c",
        [("count_moved(to, from, rest, error)", "error ? 0 : rest")],
        "store,look",
        ["--lie", "8"],
    ),
    Mutant(
        "pages that differ do not go back",
        "window.c",
        [
            (
                "return moved[page] && run->status[page] != PF_MERGED && run->status[page] != PF_ABSENT;",
                "return 0 * moved[page];",
            )
        ],
        "store,look",
    ),
    Mutant(
        "those who wait are not woken",
        "window.c",
        [("pf_uffd_wake(pf_kit.track, run->start, (uint64_t)run->pages * PF_PAGE);", ";")],
        "store,read,look",
        ASLEEP,
        code=3,
    ),
    Mutant(
        "fork is not held up",
        "regions.c",
        [("pthread_atfork(before_fork, after_fork_in_parent,", "pthread_atfork(NULL, NULL,")],
        "store,fork",
    ),
    Mutant(
        "merged pages change slots while they may be written",
        "remap.c",
        [("pf_uffd_protect(pf_kit.hold, run->start, bytes, true)", "0")],
        "store,look",
    ),
    Mutant(
        "pages written since their merge change slots too",
        "remap.c",
        [("if (pf_run_broken(entries[i]))", "if (0)"), ("entries[i] & PF_PM_PRESENT && entries[i] & PF_PM_FILE", "1")],
        "store,uring",
    ),
    Mutant(
        "pages are given back while they may be written",
        "restore.c",
        [("!pf_uffd_protect(pf_kit.hold, stretch->start, bytes, true)", "1")],
        "store,look",
    ),
    Mutant(
        "pinned pages are given back",
        "restore.c",
        [("is_private(entries[i]) && (!cloned || entries[i] & PF_PM_EXCLUSIVE)", "0")],
        "store,uring",
    ),
]
