"""Own the reading of one running process: its pages, their content, frames and nodes, at one or more looks.

Why it disturbs nobody:
1. Every file is opened for reading and every call only reads; nothing is attached to, stopped or signalled.
   Pages that are shared stay shared (`memory_reader` says what would part them).
2. Only pages that a survey just found present are read, because reading an absent page makes the kernel map
   one (the zero page) into the process. That can still happen to a page that goes between survey and read: it
   reads as zeros, as it would for the process, and is recognised and dropped where frames can be seen.
3. A page that goes is a count, a process that goes is `NoSuchProcess`; neither is a traceback.

Must not know: what the pages are wanted for.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagefold.sources.areas import Area
from pagefold.sources.hashing import Progress, read_pages
from pagefold.sources.identity import PROC, list_mine
from pagefold.sources.memory_reader import MemoryReader
from pagefold.sources.nodes import SYS, page_nodes
from pagefold.sources.pagemap import (
    KPF_KSM,
    KPF_ZERO_PAGE,
    ScanMissing,
    open_kpageflags,
    read_entries,
    scan_areas,
    walk_areas,
)
from pagefold.sources.pages import Bool, Contents, Int64, Mapped, Pages, system_page_size
from pagefold.sources.process_files import ProcessFiles

__all__ = ["ProcessReader", "list_mine"]


@dataclass(slots=True)
class _Survey:
    """What a process has at one moment, before any content is read."""

    areas: list[Area]  # those whose pages are wanted
    mapped: Mapped
    incompatible: int
    unadvised: int


class ProcessReader:
    """Read the pages of one running process that KSM could merge, without writing to it or stopping it.

    Making one checks that the process is there and may be read: raises `NoSuchProcess`, `NotPermitted`, or
    `NotReadable` for what has no pages to read (kernel threads, ourselves). Any method may raise
    `NoSuchProcess` later. `use_scan` chooses the faster of two equal ways to find pages, where the kernel has it.
    """

    def __init__(
        self,
        pid: int,
        *,
        proc: Path = PROC,
        sys: Path = SYS,
        advised_only: bool = False,
        use_scan: bool = True,
    ) -> None:
        self.pid = pid
        self.proc = proc
        self.sys = sys
        self.advised_only = advised_only
        self.use_scan = use_scan
        self.page_size = system_page_size()
        self.files = ProcessFiles(pid, proc)
        self._survey: _Survey | None = None

    @property
    def label(self) -> str:
        """Return the process's name and PID, for people."""
        return self.files.identity.label

    def areas(self) -> list[Area]:
        """Return all areas of the process, compatible or not, by address."""
        return self.files.areas()

    def count(self) -> int:
        """Return how many pages `read` will read: survey the process now, for the next `read` to use."""
        self._survey = self._look_around()
        return len(self._survey.mapped)

    def read(self, progress: Progress | None = None) -> Pages:
        """Read and hash every present anonymous page; `progress` gets the pages done since its last call."""
        survey, self._survey = self._survey or self._look_around(), None
        return self._read(survey, progress)

    def second_look(self, pages: Pages, progress: Progress | None = None) -> Pages:
        """Read the same addresses again and mark as volatile what changed since; pages that went are dropped.

        The result shows the process as it is now (content, frames, flags), without pages that came since.
        """
        survey = self._look_around()
        position, same = _find(survey.mapped.address, pages.address)
        before = pages.select(same)
        mapped = survey.mapped
        survey.mapped = Mapped(
            before.address,
            mapped.huge[position[same]],
            mapped.area[position[same]],
            mapped.zero_mapped,
            mapped.swapped,
            mapped.zero_unknown,
        )
        told = _Told(progress)
        after = self._read(survey, told)
        told.rest(len(pages))
        position, same = _find(before.address, after.address)
        assert same.all(), "a second look reads no address that the first did not"
        before = before.select(position)
        after.volatile = before.volatile | (after.high != before.high) | (after.low != before.low)
        after.vanished = pages.vanished + len(pages) - len(after) - after.unreadable
        after.unreadable += pages.unreadable
        return after

    def _look_around(self) -> _Survey:
        areas = self.areas()
        compatible = [area for area in areas if area.compatible]
        wanted = [area for area in compatible if area.advised or not self.advised_only]
        kib = self.page_size // 1024
        incompatible = sum(area.kib.get("Rss", 0) for area in areas if not area.compatible) // kib
        left_out = sum(area.kib.get("Anonymous", 0) for area in compatible) - sum(
            area.kib.get("Anonymous", 0) for area in wanted
        )
        with self.files.errors(), self.files.opened("pagemap") as fd:
            mapped = self._find_pages(fd, wanted)
        return _Survey(wanted, mapped, incompatible, left_out // kib)

    def _find_pages(self, fd: int, areas: list[Area]) -> Mapped:
        if self.use_scan:
            try:
                return scan_areas(fd, areas, self.page_size)
            except ScanMissing:
                self.use_scan = False
        kpageflags = open_kpageflags(self.proc)
        try:
            return walk_areas(fd, areas, self.page_size, kpageflags)
        finally:
            if kpageflags is not None:
                os.close(kpageflags)

    def _read(self, survey: _Survey, progress: Progress | None) -> Pages:
        address = survey.mapped.address
        with self.files.errors(), self.files.opened("pagemap") as pagemap:
            contents = self._contents(address, progress)
            frame, exclusive, present = read_entries(pagemap, address, self.page_size)
        advised = np.array([area.advised for area in survey.areas], np.bool_)
        keep = contents.ok & present
        # Zeros in a frame that others map too may be the zero page. The survey left that out, so the page
        # went meanwhile and reading put the zero page there; unless the survey could not tell.
        suspects = np.flatnonzero(keep & ~exclusive & (contents.high == 0) & (contents.low == 0))
        if survey.mapped.zero_unknown:
            survey.mapped.zero_mapped += len(suspects)
            keep[suspects] = False
        else:
            zero = suspects[self.files.has_flag(frame[suspects], KPF_ZERO_PAGE)]
            keep[zero] = present[zero] = False
        pages = Pages(
            label=self.label,
            pid=self.pid,
            page_size=self.page_size,
            address=address,
            high=contents.high,
            low=contents.low,
            node=np.zeros(len(address), np.int16),
            frame=frame,
            exclusive=exclusive,
            ksm=self._merged(survey, frame),
            huge=survey.mapped.huge,
            volatile=np.zeros(len(address), np.bool_),
            advised=advised[survey.mapped.area] if len(address) else np.zeros(0, np.bool_),
            zero_mapped=survey.mapped.zero_mapped,
            swapped=survey.mapped.swapped,
            unreadable=int((~contents.ok & present).sum()),
            vanished=int((~present).sum()),
            incompatible=survey.incompatible,
            unadvised=survey.unadvised,
        )
        if not keep.all():
            pages = pages.select(keep)
        pages.node = page_nodes(self.pid, pages.address, self.sys)
        self.files.still_there()
        return pages

    def _contents(self, address: Int64, progress: Progress | None) -> Contents:
        with self.files.opened("mem") as fd:
            return read_pages(MemoryReader(fd, living=True), address, self.page_size, progress)

    def _merged(self, survey: _Survey, frame: Int64) -> Bool:
        """Tell which pages are KSM pages; asks only in areas where smaps counts some or does not say."""
        merged = np.zeros(len(frame), np.bool_)
        may = np.array([area.kib.get("KSM", 1) > 0 for area in survey.areas], np.bool_)
        if not may.any() or not len(frame):
            return merged
        suspects = np.flatnonzero(may[survey.mapped.area])
        merged[suspects] = self.files.has_flag(frame[suspects], KPF_KSM)
        return merged


class _Told:
    """Pass progress on, and remember how much of it there was."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.pages = 0

    def __call__(self, pages: int) -> None:
        self.pages += pages
        if self.progress:
            self.progress(pages)

    def rest(self, total: int) -> None:
        """Tell what is missing to the total: pages there was nothing to do for."""
        if self.progress and total > self.pages:
            self.progress(total - self.pages)


def _find(haystack: Int64, needles: Int64) -> tuple[Int64, Bool]:
    """Return where each needle stands in ascending `haystack`, and whether it is there at all."""
    position = np.searchsorted(haystack, needles)
    there = np.zeros(len(needles), np.bool_)
    inside = position < len(haystack)
    there[inside] = haystack[position[inside]] == needles[inside]
    return position, there
