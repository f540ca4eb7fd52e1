"""Own the question who has files of the store open or mapped.

Files are known by their inodes: other daemons of this machine have some too.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

NAME = "/memfd:pagefold-"


def held_by(*pids: int) -> set[int]:
    """Return the files of the store that these processes have open or mapped."""
    found = set()
    for pid in pids:
        folder = Path(f"/proc/{pid}")
        with contextlib.suppress(OSError):
            lines = (folder / "maps").read_text().splitlines()
            found |= {int(line.split()[4]) for line in lines if NAME in line}
        for task in tasks(folder):  # an agent has a file table of its own
            with contextlib.suppress(OSError):
                for link in (task / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        if str(link.readlink()).startswith(NAME):
                            found.add(link.stat().st_ino)
    return found


def tasks(folder: Path) -> list[Path]:
    try:
        return list((folder / "task").iterdir())
    except OSError:
        return []


def anywhere(files: set[int]) -> set[int]:
    """Return those of these files that any process still has open or mapped."""
    pids = [int(folder.name) for folder in Path("/proc").iterdir() if folder.name.isdecimal()]
    return held_by(*pids) & files
