"""Own the state of this machine's KSM: its knobs and counters, the memory advised to it, nodes, huge pages; only read.

Must not know: what of that is good or bad, or the pages of any process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pagefold.errors import PagefoldError
from pagefold.sources.identity import PROC, list_mine
from pagefold.sources.nodes import SYS, online_nodes
from pagefold.sources.pages import system_page_size
from pagefold.sources.process_files import ProcessFiles

KSM = "kernel/mm/ksm"
Progress = Callable[[str, int, int], None]  # what is being done, processes done, processes in all


@dataclass(frozen=True, slots=True)
class Advised:
    """The memory that is advised MERGEABLE, as far as this user may see."""

    pages: int  # present anonymous pages in such areas
    processes: int  # that have such areas
    looked_at: int  # processes that could be read


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineState:
    """What sysfs says; a knob or counter that this kernel does not have is not in `knobs`."""

    built: bool  # the folder of KSM is there
    page_size: int  # bytes
    knobs: dict[str, int] = field(default_factory=dict)  # knobs and counters that are numbers, by their file's name
    advisor: str = ""  # the mode chosen; '' where the kernel has no advisor
    nodes: tuple[int, ...] = (0,)
    huge: str = ""  # the mode of transparent huge pages; '' where the kernel has none
    advised: Advised | None = None  # None: not counted

    def get(self, name: str, default: int = 0) -> int:
        """Return a knob or counter, or `default` where the kernel has none of this name."""
        return self.knobs.get(name, default)


def read_machine(sys: Path = SYS, advised: Advised | None = None) -> MachineState:
    """Read the state from sysfs; what cannot be read is left out."""
    folder = sys / KSM
    texts = {path.name: text for path in sorted(folder.glob("*")) if (text := _text(path)) is not None}
    return MachineState(
        built=folder.is_dir(),
        page_size=system_page_size(),
        knobs={name: int(text) for name, text in texts.items() if text.lstrip("-").isdecimal()},
        advisor=_chosen(texts.get("advisor_mode", "")),
        nodes=tuple(online_nodes(sys)),
        huge=_chosen(_text(sys / "kernel/mm/transparent_hugepage/enabled") or ""),
        advised=advised,
    )


def count_advised(proc: Path = PROC, progress: Progress | None = None) -> Advised:
    """Count what is advised MERGEABLE in all processes this user may read; processes that end meanwhile are not counted."""
    pids = list_mine(proc)
    kib = system_page_size() // 1024
    pages = processes = looked_at = 0
    for number, pid in enumerate(pids):
        if progress:
            progress("looking for advised memory", number, len(pids))
        # Since Linux 6.14 one small file says that nothing is advised: far quicker than smaps.
        if "ksm_mergeable: no" in (_text(proc / str(pid) / "ksm_stat") or ""):
            looked_at += 1
            continue
        try:
            areas = [area for area in ProcessFiles(pid, proc).areas() if area.advised]
        except PagefoldError:
            continue
        looked_at += 1
        processes += bool(areas)
        pages += sum(area.kib.get("Anonymous", 0) for area in areas) // kib
    return Advised(pages, processes, looked_at)


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _chosen(text: str) -> str:
    """Return of '[none] scan-time' the word in brackets, '' if there is none."""
    return text.partition("[")[2].partition("]")[0]
