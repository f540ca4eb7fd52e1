"""Judge the books of who holds what, with an agent that only remembers: overlaps, owners that go, interruptions. And whose turn it is."""

from __future__ import annotations

import errno
import gc
import mmap
import random
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagefold.live import buffers, vmas
from pagefold.live.buffers import PAGE
from pagefold.live.hold import Hold
from pagefold.live.holds import ADVISED_TWICE, Holds
from pagefold.live.turn import Turn


class Books:
    """Be the agent: refuse what the real one refuses, and remember."""

    def __init__(self) -> None:
        self.regions: dict[int, tuple[int, int, bool]] = {}
        self.ended: list[tuple[int, str]] = []
        self.numbers = 0
        self.refusal = 0
        self.unsuited: set[int] = set()
        self.blind = 0

    def advise(self, start: int, size: int, quietly: int) -> int:
        if self.refusal:
            return -self.refusal
        assert start % PAGE == size % PAGE == 0 < size
        for low, high, _ in self.regions.values():
            if low < start + size and start < high:
                return -errno.EEXIST
        self.numbers += 1
        self.regions[self.numbers] = (start, start + size, bool(quietly))
        return self.numbers

    def suits(self, region: int) -> int:
        if self.blind:
            return -self.blind
        return -errno.EOPNOTSUPP if region in self.unsuited else 0 if region in self.regions else -errno.ENOENT

    def find(self, address: int) -> tuple[int, int, int]:
        for number, (low, high, _) in self.regions.items():
            if low <= address < high:
                return number, low, high
        return -errno.ENOENT, 0, 0

    def unadvise(self, region: int, *, quietly: bool) -> int:
        return self.end(region, "plainly" if quietly else "unadvised")

    def discard(self, region: int) -> int:
        return self.end(region, "discarded")

    def end(self, region: int, how: str) -> int:
        if self.regions.pop(region, None) is None:
            return -errno.ENOENT
        self.ended.append((region, how))
        return 0

    def pages(self, *, loud: bool = False) -> set[int]:
        return {
            page
            for low, high, quiet in self.regions.values()
            if not (loud and quiet)
            for page in range(low // PAGE, high // PAGE)
        }


def take(holds: Holds, thing: Any, *, quiet: bool = False) -> Hold:
    return holds.take(buffers.find(thing, holds.let_go).pieces, quiet=quiet)


def pages_of(thing: Any) -> set[int]:
    found = buffers.find(thing, lambda address, size: None)
    return {page for piece in found.pieces for page in range(piece.start // PAGE, piece.end // PAGE)}


@pytest.fixture
def books() -> Books:
    return Books()


@pytest.fixture
def holds(books: Books) -> Holds:
    return Holds(books)


def array(pages: int = 20) -> np.ndarray[Any, Any]:
    return np.zeros(pages * PAGE, np.uint8)


# --- advice -------------------------------------------------------------------------------------------------------------


def test_what_is_advised_twice_ends_with_the_second(holds: Holds, books: Books) -> None:
    one = array()
    first, second = take(holds, one), take(holds, one)
    assert books.pages() == pages_of(one)
    assert holds.release(first) == 0
    assert books.pages() == pages_of(one)
    assert not books.ended
    holds.release(second)
    assert not books.regions
    assert not holds.regions()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_each_page_is_advised_as_long_as_somebody_wants_it(holds: Holds, books: Books, order: tuple[int, ...]) -> None:
    one = array()
    views = [one[: 12 * PAGE], one[5 * PAGE : 15 * PAGE], one]
    taken = [take(holds, view) for view in views]
    wanted = [pages_of(view) for view in views]
    left = {0, 1, 2}
    for number in order:
        holds.release(taken[number])
        left.remove(number)
        assert books.pages() == set().union(*(wanted[one] for one in left))
    assert not books.regions


def test_release_again_does_nothing(holds: Holds, books: Books) -> None:
    one = array()
    first, second = take(holds, one), take(holds, one)
    holds.release(first)
    holds.release(first)
    assert books.pages() == pages_of(one)
    holds.release(second)


def test_random_holds_keep_the_books_right(books: Books) -> None:
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    chance = random.Random(seed)
    holds = Holds(books)
    arrays = [array(chance.randrange(2, 40)) for _ in range(4)]
    taken: list[tuple[Hold, set[int], bool]] = []
    for _ in range(400):
        if taken and chance.random() < 0.5:
            hold, _, _ = taken.pop(chance.randrange(len(taken)))
            holds.release(hold)
        else:
            one = chance.choice(arrays)
            begin = chance.randrange(one.size)
            view = one[begin : begin + chance.randrange(one.size)]
            quiet = chance.random() < 0.3
            taken.append((take(holds, view, quiet=quiet), pages_of(view), quiet))
        loud = {page for _, pages, quiet in taken if not quiet for page in pages}
        assert loud <= books.pages(loud=True), "what is advised is so in the background"
        known = [(region.start, region.end, region.quiet) for region in holds.regions()]
        assert sorted(books.regions.values()) == known, "the agent knows what we know"
        assert all(region.holds for region in holds.regions())
        for hold, _, _ in taken:
            assert all(hold in region.holds for region in hold.regions)
    for hold, _, _ in taken:
        holds.release(hold)
    assert not books.regions
    assert all(weakref.getweakrefcount(one) == 0 for one in arrays)


# --- merge, and both ----------------------------------------------------------------------------------------------------


def test_advice_takes_what_was_merged_and_ends_both(holds: Holds, books: Books) -> None:
    one = array()
    merged = take(holds, one, quiet=True)
    assert books.pages(loud=True) == set()
    advised = take(holds, one[: 5 * PAGE])
    assert books.pages(loud=True) == pages_of(one)
    assert [(region.start, region.end) for region in advised.begun_anew] == [
        (min(pages_of(one)) * PAGE, (max(pages_of(one)) + 1) * PAGE)
    ]
    holds.release(advised)
    assert not books.regions, "after unadvise pages are private, also those that merge merged"
    assert holds.release(merged) == 0


def test_a_merge_of_what_is_advised_changes_nothing(holds: Holds, books: Books) -> None:
    one = array()
    advised = take(holds, one)
    merged = take(holds, one, quiet=True)
    assert len(books.regions) == 1
    holds.release(merged)
    assert books.pages(loud=True) == pages_of(one)
    holds.release(advised)
    assert not books.regions


# --- owners -------------------------------------------------------------------------------------------------------------


def test_merge_keeps_no_array_alive_and_ends_with_it(holds: Holds, books: Books) -> None:
    one = array()
    take(holds, one[7:], quiet=True)
    assert books.regions
    gone = weakref.ref(one)
    del one
    assert gone() is None
    assert [how for _, how in books.ended] == ["discarded"]
    assert not holds.regions()
    assert not holds._watches


def test_objects_and_subclasses_are_given_back_whole(holds: Holds, books: Books) -> None:
    class Subclass(np.ndarray[Any, Any]):
        pass

    one: Any = np.array([object()] * 9000)
    two: Any = Subclass((9000,), np.int64)
    take(holds, [one, two], quiet=True)
    del one, two
    gc.collect()
    assert [how for _, how in books.ended] == ["plainly", "plainly"]


def test_content_can_be_read_until_the_very_end(holds: Holds) -> None:
    """The collector tells weak references before __del__ of the garbage, which may still read the array."""

    class Subclass(np.ndarray[Any, Any]):
        pass

    class Reader:
        def __del__(self) -> None:
            assert books.ended == [(1, "plainly")]
            read.append(int(self.array[5]))

    books, read = Books(), []
    holds = Holds(books)
    reader = Reader()
    reader.array = Subclass((9000,), np.int64)
    reader.array[:] = 7
    reader.itself = reader
    take(holds, reader.array, quiet=True)
    del reader
    gc.collect()
    assert read == [7]


def test_advice_keeps_an_array_alive(holds: Holds, books: Books) -> None:
    one = array()
    gone = weakref.ref(one)
    hold = take(holds, one[5:])
    del one
    gc.collect()
    assert gone() is not None
    assert books.regions
    holds.release(hold)
    assert gone() is None
    assert [how for _, how in books.ended] == ["unadvised"]


def test_an_array_cannot_resize_while_it_is_held_and_can_after(holds: Holds) -> None:
    for quiet in (True, False):
        one = array()
        hold = take(holds, one[:], quiet=quiet)
        for refcheck in (True, False):
            with pytest.raises(ValueError, match="cannot resize"):
                one.resize(5, refcheck=refcheck)
        holds.release(hold)
        one.resize(5, refcheck=False)


def test_what_cannot_be_merged_is_not_kept(holds: Holds, books: Books) -> None:
    shared = mmap.mmap(-1, 10 * PAGE)
    hold = take(holds, shared)
    assert hold.why_not == {"shared memory: other processes may see it change": 10}
    assert not hold.keeps
    shared.close()
    one = array()
    books.refusal = errno.ENOMEM
    hold = take(holds, one)
    assert sum(hold.why_not.values()) == len(pages_of(one))
    assert not hold.keeps
    assert weakref.getweakrefcount(one) == 0


def test_what_somebody_else_advised_says_so(holds: Holds, books: Books) -> None:
    one = array()
    books.advise(min(pages_of(one)) * PAGE, PAGE, 0)
    hold = take(holds, one)
    assert hold.why_not == {ADVISED_TWICE: len(pages_of(one))}, "only a part of it"


def test_what_the_agent_advised_itself_is_named_and_not_ended(holds: Holds, books: Books) -> None:
    one = array()
    pages = pages_of(one)
    number = books.advise(min(pages) * PAGE, len(pages) * PAGE, 0)
    hold, quiet = take(holds, one), take(holds, one, quiet=True)
    for taken in (hold, quiet):
        assert [end - start for start, end in taken.spans] == [len(pages) * PAGE]
        assert not taken.why_not
        holds.look(taken)
        assert taken.others[0].number == number
    with pytest.raises(ValueError, match="resize"):
        one.resize(2 * one.size, refcheck=False)
    assert hold.keeps
    assert not quiet.keeps
    holds.release(hold)
    holds.release(quiet)
    assert list(books.regions) == [number]
    one.resize(2 * one.size, refcheck=False)


@pytest.mark.parametrize("quiet", [False, True])
def test_what_the_agent_refuses_when_it_looks_is_let_go(holds: Holds, books: Books, quiet: bool) -> None:
    one, two = array(), array()
    first, second = take(holds, one), take(holds, [one, two], quiet=quiet)
    books.unsuited.add(next(number for number, (low, _, _) in books.regions.items() if low // PAGE in pages_of(one)))
    holds.look(second)
    for taken in (first, second):
        assert sum(taken.why_not.values()) == len(pages_of(one)), "all who want it are told"
    assert books.pages() == pages_of(two)
    holds.look(first)
    assert not first.spans
    assert not first.keeps
    holds.release(first)
    holds.release(second)
    assert not books.regions
    assert weakref.getweakrefcount(one) == 0


def test_a_look_that_fails_for_now_lets_nothing_go(holds: Holds, books: Books) -> None:
    one = array()
    hold = take(holds, one)
    for books.blind in (errno.EMFILE, errno.ENOBUFS, errno.EIO):
        holds.look(hold)
        assert not hold.why_not
        assert books.pages() == pages_of(one)
    books.blind, books.unsuited = 0, set(books.regions)
    holds.look(hold)
    assert sum(hold.why_not.values()) == len(pages_of(one))
    assert not books.regions


def test_memory_that_moves_is_let_go_first(holds: Holds, books: Books) -> None:
    one, two = array(), array()
    first, second = take(holds, [one, two]), take(holds, one, quiet=True)
    holds.let_go(one.ctypes.data, one.nbytes)
    assert books.pages() == pages_of(two)
    holds.release(first)
    holds.release(second)
    assert not books.regions


def test_memory_that_is_used_again_is_no_longer_of_the_past(holds: Holds, books: Books) -> None:
    """An array's region ends before its memory is freed, and books are put right later: the next array at its place is new."""
    for _ in range(50):
        one = array()
        hold = take(holds, one, quiet=True)
        assert books.pages() == pages_of(one)
        assert not hold.why_not
        with holds.turn._lock:  # nobody can sweep meanwhile but by coming back
            holds.turn._busy = True
            del one
            holds.turn._busy = False
        assert not books.regions


def test_at_the_end_of_the_interpreter_nothing_is_asked(holds: Holds, books: Books) -> None:
    one = array()
    take(holds, one, quiet=True)
    holds.closed = True
    del one
    assert books.regions


# --- interruptions ------------------------------------------------------------------------------------------------------


class Interrupting(Books):
    """Ctrl-C comes in the middle of the n-th call."""

    def __init__(self, at: int, *, before: bool) -> None:
        super().__init__()
        self.left = at
        self.before = before

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in ("advise", "unadvise", "discard"):
            return method

        def interrupted(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0 and self.before:
                raise KeyboardInterrupt
            answer = method(*arguments, **named)
            if self.left == 0:
                raise KeyboardInterrupt
            return answer

        return interrupted


@pytest.mark.parametrize("at", range(1, 9))
def test_ctrl_c_leaves_no_region_without_its_memory(at: int) -> None:
    """Before the agent acts: what comes after its answer is another test, for it needs the agent's own function."""
    books = Interrupting(at, before=True)
    holds = Holds(books)
    arrays = [array() for _ in range(3)]
    taken: list[Hold] = []

    def overlap() -> None:
        taken.append(take(holds, arrays))
        taken.append(take(holds, arrays[0], quiet=True))
        taken.append(take(holds, arrays[0][: 5 * PAGE]))

    def end() -> None:
        for hold in taken:
            holds.release(hold)

    works = [overlap, end, end]
    interrupted = 0
    for work in works:
        try:
            work()
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == 1
    assert set(books.regions.values()) <= {(region.start, region.end, region.quiet) for region in holds.regions()}
    kept = {page for hold in taken for page in pages_of(hold.keeps)}
    works.clear()
    gone = weakref.ref(arrays[0])
    arrays.clear()
    gc.collect()
    assert books.pages() <= kept
    for hold in taken:
        holds.release(hold)
    assert gone() is None


def test_ctrl_c_while_an_array_goes_is_put_off() -> None:
    for before in (True, False):
        books = Interrupting(2, before=before)
        holds = Holds(books)
        one = array()
        take(holds, one, quiet=True)
        with pytest.raises(KeyboardInterrupt):
            del one
            for _ in range(1 << 40):
                pass
        assert not books.regions


# --- turns --------------------------------------------------------------------------------------------------------------


def test_a_job_in_the_middle_of_another_comes_after_it() -> None:
    turn, done = Turn(), []

    def outer() -> str:
        assert turn.run(lambda: done.append("inner")) is None
        done.append("outer")
        return "answer"

    assert turn.run(outer) == "answer"
    assert done == ["outer", "inner"]


def test_errors_go_to_who_asked() -> None:
    turn, done = Turn(), []

    def fail() -> None:
        raise ValueError("mine")

    def outer() -> None:
        turn.try_run(fail)
        turn.try_run(lambda: done.append(1))

    turn.run(outer)
    assert done == [1]
    with pytest.raises(ValueError, match="mine"):
        turn.run(fail)


def test_jobs_of_many_threads_are_done_once_each_and_one_at_a_time() -> None:
    turn, inside, done = Turn(), [0], []

    def job(number: int) -> int:
        inside[0] += 1
        assert inside[0] == 1
        done.append(number)
        inside[0] -= 1
        return number

    def work(first: int) -> None:
        for number in range(first, first + 300):
            assert turn.run(lambda number=number: job(number)) == number
            turn.try_run(lambda number=number: job(-number))

    threads = [threading.Thread(target=work, args=(1 + 1000 * one,)) for one in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    turn.run(lambda: None)
    wanted = [number for one in range(4) for number in range(1 + 1000 * one, 301 + 1000 * one)]
    assert sorted(done) == sorted([*wanted, *(-number for number in wanted)])


def test_a_forked_child_does_what_must_be_done_and_no_more() -> None:
    turn, done = Turn(), []
    turn.before_fork()
    turn._jobs.extend([])
    turn.after_fork(child=False)
    turn.after_fork(child=False)  # made in the middle of a fork: nothing to give back
    turn.before_fork()
    other = threading.Thread(
        target=lambda: (turn.try_run(lambda: done.append("sweep")), turn.run(lambda: done.append("job")))
    )
    other.start()
    while len(turn._jobs) < 2:
        pass
    turn.after_fork(child=True)
    other.join()
    assert done == ["sweep"]


# --- mappings -----------------------------------------------------------------------------------------------------------


def test_memory_is_split_by_what_can_be_merged(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * PAGE))
    with (tmp_path / "file").open("r+b") as file:
        shared, private = mmap.mmap(file.fileno(), 0), mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE)
    protected = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ)
    plain = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    gone = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    places = {name: at(one) for name, one in locals().items() if isinstance(one, mmap.mmap)}
    gone.close()
    said = {}
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        ((start, end, said[name]),) = vmas.split([(place, place + 4 * PAGE)])
        assert (start, end) == (place, place + 4 * PAGE)
    assert said["shared"].startswith("shared memory")
    assert said["private"].startswith("memory of a file")
    assert said["protected"] == "protected memory (r--)"
    assert said["gone"] == "not mapped"
    assert said["plain"] == ""


def at(mapped: mmap.mmap) -> int:
    return int(np.frombuffer(mapped, np.uint8).ctypes.data)


def test_the_two_ways_to_ask_agree() -> None:
    with vmas._Maps() as asked, vmas._Maps(query=False) as read:
        table = vmas.parse(Path("/proc/self/maps").read_text())
        compared = 0
        for vma in table:
            for place in (vma.start, vma.end - 1, vma.end):
                one, other = asked.find(place), read.find(place)
                # Memory of malloc comes and goes; of files it stays.
                if one and other and one.inode and other.inode:
                    assert one == other
                    compared += 1
    assert compared > 20


def test_locked_memory_is_explained() -> None:
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    plain = mmap.mmap(-1, 4 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    place = at(plain)
    assert libc.mlock(ctypes.c_void_p(place), ctypes.c_size_t(4 * PAGE)) == 0
    assert vmas.Marks().explain(place, place + PAGE) == "this memory is locked (mlock)"
    assert libc.munlock(ctypes.c_void_p(place), ctypes.c_size_t(4 * PAGE)) == 0


def test_pages_are_counted_by_how_they_are_mapped() -> None:
    plain = mmap.mmap(-1, 40 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    place = at(plain)
    plain[3 * PAGE] = plain[9 * PAGE] = 1
    assert vmas.census([(place, place + 40 * PAGE)]) == (0, 0, 2, 38)
    assert vmas.census([]) == (0, 0, 0, 0)
