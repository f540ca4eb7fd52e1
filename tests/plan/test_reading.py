"""Judge the reading of many sources: order, what is left out and why, the second look, and refusals."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.sources.conftest import Specimen

from pagefold.errors import KnobInvalid, NoSuchProcess, NotAnImage, NotPermitted, PagefoldError, UsageError
from pagefold.plan.reading import Reader
from pagefold.sources import Pages

PAGE = mmap.PAGESIZE
NO_PID = str(int(Path("/proc/sys/kernel/pid_max").read_text()) + 1)
KNOWN = """
memory = area(8)
for page in range(8): fill(memory, page, page + 1)
RESULT = address(memory)
def change(page, value):
    fill(memory, page, value)
    return "done"
"""
Make = Callable[[str], Specimen]


def no_rest(seconds: float) -> None:
    raise AssertionError("there is nothing to wait for")


def quiet(what: str, done: int, total: int) -> None:
    pass


def image(tmp_path: Path, name: str = "image", pages: int = 3) -> Path:
    path = tmp_path / name
    path.write_bytes(b"".join(bytes([number + 1]) * PAGE for number in range(pages)))
    return path


def known(child: Specimen, pages: Pages) -> Pages:
    """Return the entries of the child's known area."""
    start = child.addresses[0]
    return pages.select((pages.address >= start) & (pages.address < start + 8 * PAGE))


def test_processes_come_first_in_the_order_given_and_once(specimen: Make, tmp_path: Path) -> None:
    one, two = specimen(KNOWN), specimen(KNOWN)
    path = image(tmp_path)
    reader = Reader()
    reader.add([str(two.pid), str(one.pid), str(two.pid), f"00{one.pid}"], [path, path])
    sources = reader.read(quiet, no_rest)
    assert [pages.pid for pages in sources] == [two.pid, one.pid, None]
    assert sources[2].label == "image"
    assert reader.skipped == []


def fake_proc(tmp_path: Path, *pids: int) -> Path:
    """Make a /proc where only these processes live."""
    proc = tmp_path / "proc"
    proc.mkdir()
    for pid in pids:
        (proc / str(pid)).symlink_to(f"/proc/{pid}")
    return proc


def test_all_mine_follow_the_ones_named(specimen: Make, tmp_path: Path) -> None:
    pids = sorted(specimen("RESULT = 0").pid for _ in range(3))
    reader = Reader(proc=fake_proc(tmp_path, *pids))
    reader.add([str(pids[1])], [], all_mine=True)
    assert [pages.pid for pages in reader.read(quiet, no_rest)] == [pids[1], pids[0], pids[2]]


def test_all_mine_of_nobody_names_the_permission(tmp_path: Path) -> None:
    with pytest.raises(NotPermitted, match="CAP_SYS_PTRACE"):
        Reader(proc=fake_proc(tmp_path)).add([], [], all_mine=True)


def test_ourselves_are_not_among_all_mine(tmp_path: Path) -> None:
    with pytest.raises(NotPermitted, match="no process that can be read"):
        Reader(proc=fake_proc(tmp_path, os.getpid())).add([], [], all_mine=True)


def test_what_cannot_be_read_is_said_and_the_rest_goes_on(specimen: Make, tmp_path: Path) -> None:
    child = specimen(KNOWN)
    torn = tmp_path / "torn"
    torn.write_bytes(b"x" * 100)
    reader = Reader()
    reader.add([NO_PID, str(child.pid), str(os.getpid())], [torn, image(tmp_path), tmp_path / "missing"])
    sources = reader.read(quiet, no_rest)
    assert [pages.pid for pages in sources] == [child.pid, None]
    assert [one.source for one in reader.skipped] == [NO_PID, str(os.getpid()), str(torn), str(tmp_path / "missing")]
    for one, reason in zip(
        reader.skipped, ("no such process", "cannot read itself", "100 bytes", "No such"), strict=True
    ):
        assert reason in one.why
        assert "\n" not in one.why


def test_nothing_readable_raises_the_first_error(tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    torn.write_bytes(b"x" * 100)
    reader = Reader()
    reader.add([NO_PID, str(os.getpid())], [torn])
    with pytest.raises(NoSuchProcess, match=f"PID {NO_PID}: no such process"):
        reader.read(quiet, no_rest)
    reader = Reader()
    reader.add([], [torn])
    with pytest.raises(NotAnImage, match="torn: 100 bytes"):
        reader.read(quiet, no_rest)


def test_pages_that_change_between_the_looks_are_volatile(specimen: Make) -> None:
    child, still = specimen(KNOWN), specimen(KNOWN)
    rests: list[float] = []

    def rest(seconds: float) -> None:
        rests.append(seconds)
        assert child.do("change(2, 77)") == child.do("change(5, 78)") == "done"
        assert child.do("change(6, 7)") == "done"  # the value it has: no change of content

    reader = Reader(interval=2.5)
    reader.add([str(child.pid), str(still.pid)], [])
    changed, same = reader.read(quiet, rest)
    assert rests == [2.5]
    assert np.flatnonzero(known(child, changed).volatile).tolist() == [2, 5]
    assert not known(still, same).volatile.any()


def test_without_interval_there_is_one_look(specimen: Make) -> None:
    child = specimen(KNOWN)
    reader = Reader(interval=0)
    reader.add([str(child.pid)], [])
    (pages,) = reader.read(quiet, no_rest)
    assert not pages.volatile.any()


def test_images_alone_are_read_without_rest(tmp_path: Path) -> None:
    reader = Reader(interval=5)
    reader.add([], [image(tmp_path)])
    assert [len(pages) for pages in reader.read(quiet, no_rest)] == [3]


def test_a_process_that_ends_between_the_looks_is_left_out(specimen: Make) -> None:
    child, other = specimen(KNOWN), specimen(KNOWN)
    reader = Reader(interval=1)
    reader.add([str(child.pid), str(other.pid)], [])
    sources = reader.read(quiet, lambda seconds: child.end())
    assert [pages.pid for pages in sources] == [other.pid]
    assert [one.source for one in reader.skipped] == [str(child.pid)]
    assert "ended while it was being read" in reader.skipped[0].why


def test_all_processes_ending_between_the_looks_is_an_error(specimen: Make) -> None:
    child = specimen(KNOWN)
    reader = Reader(interval=1)
    reader.add([str(child.pid)], [])
    with pytest.raises(NoSuchProcess, match="ended while it was being read"):
        reader.read(quiet, lambda seconds: child.end())


def test_advised_only(specimen: Make) -> None:
    child = specimen(
        "memory = area(4)\nother = area(3)\n"
        "for page in range(4): fill(memory, page, page + 1)\n"
        "for page in range(3): fill(other, page, page + 1)\n"
        "memory.madvise(12)\nRESULT = address(memory)"
    )
    reader = Reader(advised_only=True)
    reader.add([str(child.pid)], [])
    (pages,) = reader.read(quiet, no_rest)
    assert pages.address.tolist() == [child.addresses[0] + number * PAGE for number in range(4)]
    assert pages.unadvised >= 3


def test_progress_counts_up_to_all_pages(specimen: Make, tmp_path: Path) -> None:
    child = specimen(KNOWN)
    steps: dict[str, list[tuple[int, int]]] = {}
    reader = Reader(interval=1)
    reader.add([str(child.pid)], [image(tmp_path)])
    pages, _ = reader.read(
        lambda what, done, total: steps.setdefault(what, []).append((done, total)), lambda seconds: None
    )
    assert [what.split(" ")[0] for what in steps] == ["reading", "reading", "waiting", "second"]
    for what, told in steps.items():
        done = [one for one, _ in told]
        assert done == sorted(done)
        if what != "waiting for the second look":
            assert told[-1][0] == told[-1][1] > 0
    assert steps[f"reading {pages.label}"][-1][1] == len(pages)


@pytest.mark.parametrize("interval", [-1, -0.001, float("nan"), float("inf"), 86401])
def test_bad_interval(interval: float) -> None:
    with pytest.raises(UsageError, match=f"^an interval of {interval} seconds cannot be; use 0 to 86400$"):
        Reader(interval=interval)


@pytest.mark.parametrize(
    "word", ["", " ", "abc", "-1", "+5", "0", "000", "1.5", "1e3", "0x10", "²", "٣", "1 2", str(2**31), "9" * 5000]
)
def test_words_that_are_no_pid(word: str) -> None:
    with pytest.raises(UsageError) as caught:
        Reader().add([word], [])
    assert str(caught.value) == f"{word!r} is not a PID; give the number of a running process"


def test_one_bad_word_spoils_all(specimen: Make) -> None:
    reader = Reader()
    with pytest.raises(UsageError, match="'x' is not a PID"):
        reader.add([str(specimen("RESULT = 0").pid), "x"], [])
    assert reader.readers == []


def test_nothing_asked_for() -> None:
    with pytest.raises(UsageError, match="nothing to plan: give PIDs, --all-mine, or --image FILE"):
        Reader().add([], [])


def test_the_sharing_limit_is_the_kernels(tmp_path: Path) -> None:
    (tmp_path / "max_page_sharing").write_text("77\n")
    assert Reader(ksm=tmp_path).max_page_sharing == 77
    assert Reader(ksm=tmp_path, max_page_sharing="5").max_page_sharing == 5
    assert Reader(ksm=tmp_path, max_page_sharing=6).max_page_sharing == 6
    assert Reader(ksm=tmp_path / "missing").max_page_sharing == 256
    (tmp_path / "max_page_sharing").write_text("")
    assert Reader(ksm=tmp_path).max_page_sharing == 256


@pytest.mark.parametrize("wanted", ["1", "0", "-3", "abc", "", "2.5", 1, 2**31, str(10**20)])
def test_bad_sharing_limits(wanted: str | int) -> None:
    with pytest.raises(KnobInvalid) as caught:
        Reader(max_page_sharing=wanted)
    assert str(caught.value).startswith("max_page_sharing: ")
    assert str(wanted) in str(caught.value)
    assert isinstance(caught.value, PagefoldError)
