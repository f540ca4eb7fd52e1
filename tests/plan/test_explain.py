"""Judge the reasons: one real process (or two) for each, with its exact count of pages, and sums that are the resident set."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.conftest import scaled
from tests.plan.conftest import Specimen
from tests.plan.tables import source

from pagefold.errors import NoSuchProcess, UsageError
from pagefold.plan.diagnosis import OPT_IN
from pagefold.plan.explanation import Explanation, Row, explain
from pagefold.plan.looks import Looked, take_looks
from pagefold.plan.machine_state import MachineState
from pagefold.plan.reading import Reader
from pagefold.plan.reasons import BESIDE, Reason, words
from pagefold.sources.areas import parse_smaps

PAGE = mmap.PAGESIZE
KNOBS = {
    "run": 1,
    "merge_across_nodes": 1,
    "max_page_sharing": 256,
    "use_zero_pages": 0,
    "full_scans": 1,
    "pages_to_scan": 100,
}
Make = Callable[[str], Specimen]
# Areas are said by their address; `lone` keeps a page that nobody may touch behind each, so that no two become one.
LONE = """
def lone(pages, advised=True, advice=mmap.MADV_NOHUGEPAGE):
    memory = area(pages, advice)
    if advised: memory.madvise(12)
    kept.append((memory, mmap.mmap(-1, PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)))
    return memory
def hold(contents, advised=True):
    memory = lone(len(contents), advised)
    for page, content in enumerate(contents): fill(memory, page, content)
    return address(memory)
def at(memory):
    kept.append(memory)
    return address(memory)
def change(place, page, content):
    ctypes.memmove(place + page * PAGE, content.to_bytes(8, "little"), 8)
    return "done"
kept = []
"""


def state(**knobs: int) -> MachineState:
    return MachineState(built=True, page_size=PAGE, knobs={**KNOBS, **knobs})


def quiet(what: str, done: int, total: int) -> None:
    pass


def look(*pids: int, looks: int = 1, rest: Callable[[float], None] = lambda seconds: None) -> list[Looked]:
    reader = Reader(interval=1)
    reader.add([str(pid) for pid in pids], [])
    looked = take_looks(reader, looks, quiet, rest)
    assert not reader.skipped
    return looked


def rss(pid: int) -> int:
    """Return the pages of Rss as smaps adds them up."""
    return sum(area.kib["Rss"] for area in parse_smaps(Path(f"/proc/{pid}/smaps").read_text())) * 1024 // PAGE


def judged(answer: Explanation) -> Explanation:
    """Hold every answer to what must be true of all: sums to the page, one row a reason, the largest first."""
    assert answer.rss == sum(rss(pid) for _, pid, _ in answer.processes if pid) == sum(row.pages for row in answer.rows)
    assert len({row.reason for row in answer.rows}) == len(answer.rows)
    assert not {row.reason for row in answer.rows} & {*BESIDE, Reason.MOVED, Reason.UNREADABLE}
    assert [row.pages for row in answer.rows] == sorted((row.pages for row in answer.rows), reverse=True)
    for row in answer.rows:
        assert sum(area.pages for area in row.areas) == row.pages
        assert not row.would or sum(part.pages for part in row.would) == row.pages
        assert row.frees <= row.pages
    return answer


def found(rows: tuple[Row, ...], *places: int) -> dict[Reason, int]:
    """Return the pages of each reason in the areas at these addresses."""
    counts: dict[Reason, int] = {}
    for row in rows:
        inside = [area.pages for area in row.areas if any(area.start <= place < area.end for place in places)]
        if inside:
            counts[row.reason] = sum(inside)
    return counts


def row(answer: Explanation, reason: Reason) -> Row:
    return next(row for row in answer.rows if row.reason is reason)


def test_would_merge_and_unique(specimen: Make) -> None:
    one = specimen(LONE + "RESULT = hold([1, 2, 3, 3, 4])")
    two = specimen(LONE + "RESULT = hold([1, 2, 5])")
    answer = judged(explain(look(one.pid, two.pid), state()))
    assert found(answer.rows, *one.addresses) == {Reason.WOULD_MERGE: 4, Reason.UNIQUE: 1}
    assert found(answer.rows, *two.addresses) == {Reason.WOULD_MERGE: 2, Reason.UNIQUE: 1}
    assert (row(answer, Reason.WOULD_MERGE).pages, row(answer, Reason.WOULD_MERGE).frees) == (6, 3)
    assert row(answer, Reason.UNIQUE).frees == 0


def test_alone_nothing_merges(specimen: Make) -> None:
    one = specimen(LONE + "RESULT = hold([1, 2, 3])")
    assert found(judged(explain(look(one.pid), state())).rows, *one.addresses) == {Reason.UNIQUE: 3}


def test_zero(specimen: Make) -> None:
    one = specimen(LONE + "RESULT = hold([0] * 5 + [1])")
    answer = judged(explain(look(one.pid), state()))
    assert found(answer.rows, *one.addresses) == {Reason.ZERO: 5, Reason.UNIQUE: 1}
    assert row(answer, Reason.ZERO).frees == 5
    assert "use_zero_pages" in row(answer, Reason.ZERO).remedy
    assert row(explain(look(one.pid), state(use_zero_pages=1)), Reason.ZERO).remedy == ""


def test_the_zero_page_is_beside_the_resident_set(specimen: Make) -> None:
    one = specimen(LONE + "memory = lone(7)\nmemory[:]\nRESULT = at(memory)")
    two = specimen(LONE + "memory = lone(7)\nRESULT = at(memory)")
    seen = [judged(explain(look(child.pid), state())) for child in (one, two)]
    zero = [sum(row.pages for row in answer.beside if row.reason is Reason.ZERO_PAGE) for answer in seen]
    assert zero[0] - zero[1] == 7
    assert found(seen[0].rows, *one.addresses) == {}


def test_over_the_limit(specimen: Make) -> None:
    one = specimen(LONE + "RESULT = hold([1] * 7 + [2, 2])")
    answer = judged(explain(look(one.pid), state(max_page_sharing=3)))
    assert found(answer.rows, *one.addresses) == {Reason.WOULD_MERGE: 5, Reason.OVER_LIMIT: 4}
    assert row(answer, Reason.OVER_LIMIT).frees == 2  # four pages on two further copies
    assert "max_page_sharing" in row(answer, Reason.OVER_LIMIT).remedy


def on_nodes(one: Looked, *pages: int) -> Looked:
    """Return the same look as of a machine where these listed pages are on node 1."""
    node = one.pages.node.copy()
    node[list(pages)] = 1
    return replace(one, pages=replace(one.pages, node=node))


def test_other_node(specimen: Make) -> None:
    one, two = (specimen(LONE + "RESULT = hold([1, 2, 3, 3])") for _ in range(2))
    first, second = look(one.pid, two.pid)
    places = np.searchsorted(second.pages.address, two.addresses[0]) + np.arange(4)
    parts = [first, on_nodes(second, *places.tolist())]
    apart = judged(explain(parts, state(merge_across_nodes=0)))
    expected = {Reason.OTHER_NODE: 2, Reason.WOULD_MERGE: 2}
    assert found(apart.rows, *one.addresses) == found(apart.rows, *two.addresses) == expected
    assert (row(apart, Reason.OTHER_NODE).frees, row(apart, Reason.WOULD_MERGE).frees) == (2, 2)
    assert "echo 1 > /sys/kernel/mm/ksm/merge_across_nodes" in row(apart, Reason.OTHER_NODE).remedy
    assert found(judged(explain(parts, state())).rows, *one.addresses) == {Reason.WOULD_MERGE: 4}


def test_volatile_and_how_often(specimen: Make) -> None:
    one = specimen(LONE + "RESULT = hold([1, 1, 2, 2, 3])")
    turns: list[int] = []

    def rest(seconds: float) -> None:
        turns.append(len(turns) + 100)
        one.do(f"change({one.addresses[0]}, 0, {turns[-1]})")
        if len(turns) == 2:
            one.do(f"change({one.addresses[0]}, 4, {turns[-1]})")

    looked = look(one.pid, looks=4, rest=rest)
    assert len(turns) == 3
    answer = explain(looked, state(), looks=4)
    assert found(answer.rows, *one.addresses) == {Reason.VOLATILE: 2, Reason.UNIQUE: 1, Reason.WOULD_MERGE: 2}
    place = looked[0].pages.address - one.addresses[0]
    assert looked[0].changes[(place >= 0) & (place < 5 * PAGE)].tolist() == [3, 0, 0, 0, 1]
    often = row(answer, Reason.VOLATILE).details["changed_in_looks"]
    assert sum(often.values()) == row(answer, Reason.VOLATILE).pages


def test_not_advised_says_what_would_become_of_it(specimen: Make) -> None:
    one = specimen(LONE + "RESULT = hold([1, 2, 0], advised=False)")
    two = specimen(LONE + "RESULT = hold([1, 3], advised=False)")
    answer = judged(explain(look(one.pid, two.pid), state()))
    row_ = row(answer, Reason.NOT_ADVISED)
    assert found(answer.rows, *one.addresses) == {Reason.NOT_ADVISED: 3}
    assert found(row_.would, *one.addresses) == {Reason.WOULD_MERGE: 1, Reason.UNIQUE: 1, Reason.ZERO: 1}
    assert found(row_.would, *two.addresses) == {Reason.WOULD_MERGE: 1, Reason.UNIQUE: 1}
    assert row_.remedy == OPT_IN


def test_equals_that_nobody_advised_do_not_count(specimen: Make) -> None:
    one = specimen(LONE + "RESULT = hold([1, 2, 3, 3])")
    two = specimen(LONE + "RESULT = hold([1, 3], advised=False)")
    answer = judged(explain(look(one.pid, two.pid), state()))
    expected = {Reason.EQUAL_UNADVISED: 1, Reason.UNIQUE: 1, Reason.WOULD_MERGE: 2}
    assert found(answer.rows, *one.addresses) == expected
    assert found(row(answer, Reason.NOT_ADVISED).would, *two.addresses) == {Reason.WOULD_MERGE: 2}


FORK = (
    LONE
    + """
place = hold([1, 2, 3, 4])
ready, tell = os.pipe()
child = os.fork()
if child == 0:
    if WRITES: change(place, 0, 77)
    os.write(tell, b"x")
    import signal; signal.pause()
os.read(ready, 1)
RESULT = f"{place} {child}"
import atexit, signal
"""
)


@pytest.mark.parametrize("writes", [False, True])
def test_forked(specimen: Make, writes: bool) -> None:
    one = specimen(FORK.replace("WRITES", str(writes)))
    place, child = one.addresses
    try:
        both = judged(explain(look(one.pid, child), state()))
        alone = judged(explain(look(one.pid), state()))
    finally:
        one.do(f"os.kill({child}, signal.SIGKILL), os.waitpid({child}, 0)")
    pages = 3 if writes else 4
    assert found(both.rows, place) == {Reason.FORKED: 2 * pages} | ({Reason.UNIQUE: 2} if writes else {})
    assert found(alone.rows, place)[Reason.FORKED] == pages, "the other end of a frame need not be named"


MAKE_KINDS = """
import tempfile
file = tempfile.NamedTemporaryFile(dir=FOLDER)
file.write(bytes(range(256)) * (PAGE // 256 * 6)); file.flush()
private = mmap.mmap(file.fileno(), 6 * PAGE, flags=mmap.MAP_PRIVATE)
private[0 : 6 * PAGE]
private[0] = 9
both = mmap.mmap(file.fileno(), 6 * PAGE, flags=mmap.MAP_SHARED)
both[0 : 2 * PAGE] = bytes(2 * PAGE)
anonymous = mmap.mmap(-1, 9 * PAGE, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)
anonymous[0 : 3 * PAGE] = b"s" * (3 * PAGE)
fd = os.memfd_create("model")
os.ftruncate(fd, 8 * PAGE)
memory = mmap.mmap(fd, 8 * PAGE, flags=mmap.MAP_SHARED)
memory[0 : 5 * PAGE] = b"m" * (5 * PAGE)
RESULT = " ".join(str(at(one)) for one in (private, both, anonymous, memory))
"""


def test_kinds_that_never_merge(specimen: Make, tmp_path: Path) -> None:
    one = specimen(LONE + MAKE_KINDS.replace("FOLDER", repr(str(tmp_path))))
    private, both, anonymous, memory = one.addresses
    answer = judged(explain(look(one.pid), state()))
    assert found(answer.rows, private) == {Reason.FILE: 5, Reason.NOT_ADVISED: 1}, "a copied page is a page like others"
    assert found(answer.rows, both) in ({Reason.FILE: count} for count in range(2, 7)), "the kernel maps neighbours too"
    assert found(answer.rows, anonymous) == {Reason.SHARED_MEMORY: 3}
    assert found(answer.rows, memory) == {Reason.MEMFD: 5}
    assert row(answer, Reason.DEVICE).areas[0].name == "[vdso]"


FAKE = """
7f0000000000-7f0000200000 rw-s 00000000 00:0f 1 /anon_hugepage (deleted)
Rss: 0 kB
Shared_Hugetlb: 0 kB
Private_Hugetlb: 2048 kB
VmFlags: rd wr sh mr mw me ms de ht
7f0000400000-7f0000404000 rw-s 00000000 00:05 9 /dev/gpu
Rss: 8 kB
VmFlags: rd wr sh mr mw me ms pf io de
7f0000500000-7f0000504000 rw-s 00000000 00:05 9 /dev/snd
Rss: 12 kB
VmFlags: rd wr sh mr mw me ms de
7f0000600000-7f0000604000 rw-p 00000000 00:00 0
Rss: 16 kB
Anonymous: 16 kB
VmFlags: rd wr mr mw me dp
7f0000700000-7f0000704000 rw-s 00000000 00:01 4 /SYSV00000000 (deleted)
Rss: 4 kB
VmFlags: rd wr sh mr mw me ms lo
7f0000800000-7f0000804000 rw-p 00000000 00:00 0
Rss: 16 kB
Anonymous: 16 kB
VmFlags: rd wr mr mw me mg
"""


@pytest.mark.skipif(PAGE != 4096, reason="the sizes of this text are for pages of 4 KiB")
def test_kinds_that_few_machines_have() -> None:
    """From a text as smaps has it: huge-TLB, drivers' frames, devices, droppable memory, System V; and what cannot be read."""
    nothing = replace(source([]), unreadable=3, zero_mapped=5, swapped=2)
    looked = Looked(nothing, np.zeros(0, np.int32), tuple(parse_smaps(FAKE)))
    answer = explain([looked], state())
    expected = {
        Reason.PFN_MAPPED: 2,
        Reason.DEVICE: 3,
        Reason.OTHER_KIND: 4,
        Reason.SHARED_MEMORY: 1,
        Reason.UNREADABLE: 3,
        Reason.MOVED: 1,
    }
    assert {row.reason: row.pages for row in answer.rows} == expected
    assert sum(expected.values()) == answer.rss
    assert row(answer, Reason.SHARED_MEMORY).locked == 1
    beside = {row.reason: row.pages for row in answer.beside}
    assert beside == {Reason.HUGE_TLB: 512, Reason.ZERO_PAGE: 5, Reason.SWAPPED: 2}


def test_huge_pages_are_counted_with_their_reason(specimen: Make) -> None:
    program = """
memory = area(1024, mmap.MADV_HUGEPAGE)
start = -(-address(memory) // (512 * PAGE)) * 512 * PAGE
for page in range(512): change(start, page, page + 1)
memory.madvise(12)
RESULT = start
"""
    one = specimen(LONE + program)
    looked = look(one.pid)
    if int(looked[0].pages.huge.sum()) < 512:
        pytest.skip("this machine gave no transparent huge page")
    answer = judged(explain(looked, state()))
    assert row(answer, Reason.UNIQUE).huge == 512
    assert sum(row.huge for row in answer.rows) == int(looked[0].pages.huge.sum())


def test_locked_is_told_and_no_hindrance(specimen: Make) -> None:
    lock = "\nif ctypes.CDLL(None).mlock(ctypes.c_void_p(RESULT), 4 * PAGE): RESULT = 0"
    one = specimen(LONE + "RESULT = hold([1, 1, 2, 3])" + lock)
    if not one.addresses[0]:
        pytest.skip("mlock is refused here")
    answer = judged(explain(look(one.pid), state()))
    assert found(answer.rows, *one.addresses) == {Reason.WOULD_MERGE: 2, Reason.UNIQUE: 2}
    assert (row(answer, Reason.WOULD_MERGE).locked, row(answer, Reason.UNIQUE).locked) == (2, 2)


@pytest.mark.parametrize("seed", range(scaled(12)))
def test_mixtures_add_up(specimen: Make, seed: int, tmp_path: Path) -> None:
    """Whatever processes hold, advised or not, the sums are Rss to the page, under any setting."""
    chance = random.Random(seed)
    children = []
    for _ in range(chance.randint(1, 3)):
        lines = []
        for _ in range(chance.randint(1, 6)):
            contents = [chance.choice([0, 0, 1, 2, 3, chance.randrange(9999)]) for _ in range(chance.randint(1, 40))]
            lines.append(f"hold({contents}, {chance.random() < 0.6})")
        kinds = MAKE_KINDS.replace("FOLDER", repr(str(tmp_path))) if chance.random() < 0.5 else "RESULT = 0"
        children.append(specimen(LONE + "\n".join(lines) + "\n" + kinds))
    knobs: dict[str, Any] = {"merge_across_nodes": chance.randint(0, 1), "max_page_sharing": chance.choice([2, 3, 256])}
    looked = look(*(child.pid for child in children), looks=chance.randint(1, 2))
    some = [np.random.default_rng(seed).choice(len(one.pages), 20) for one in looked]
    judged(explain([on_nodes(one, *pages.tolist()) for one, pages in zip(looked, some, strict=True)], state(**knobs)))


def test_what_comes_while_being_read_is_a_line_of_its_own(specimen: Make) -> None:
    one = specimen(LONE + "memory = lone(8)\nRESULT = at(memory)")
    grown = f"[change({one.addresses[0]}, page, page + 1) for page in range(8)]"
    looked = look(one.pid, looks=2, rest=lambda seconds: one.do(grown) and None)
    answer = explain(looked, state(), looks=2)
    assert sum(row.pages for row in answer.rows) == answer.rss == rss(one.pid)
    assert row(answer, Reason.MOVED).pages >= 8


def test_a_process_that_ends_is_left_out(specimen: Make) -> None:
    one, two = specimen("RESULT = 0"), specimen("RESULT = 0")
    reader = Reader(interval=1)
    reader.add([str(one.pid), str(two.pid)], [])
    looked = take_looks(reader, 2, quiet, lambda seconds: one.end())
    assert [part.pages.pid for part in looked] == [two.pid]
    assert "ended while it was being read" in reader.skipped[0].why
    reader = Reader(interval=1)
    reader.add([str(two.pid)], [])
    with pytest.raises(NoSuchProcess, match="ended"):
        take_looks(reader, 3, quiet, lambda seconds: two.end())


@pytest.mark.parametrize("looks", [0, -1, 101])
def test_bad_numbers_of_looks(looks: int) -> None:
    with pytest.raises(UsageError, match=f"^{looks} looks cannot be taken; use 1 to 100$"):
        take_looks(Reader(), looks, quiet, lambda seconds: None)


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_words(reason: Reason) -> None:
    for run in (0, 1):
        assert words(reason, state(run=run)).text[:1].islower()
