"""Judge the search for bytes at other offsets: windows against their plain twin, and real processes with known shifts."""

from __future__ import annotations

import mmap
import random
from collections.abc import Callable

import numpy as np
import pytest
from tests.plan.conftest import Specimen
from tests.plan.test_explain import LONE, found, judged, look, row, state

from pagefold.plan.explanation import explain
from pagefold.plan.reasons import Reason
from pagefold.plan.windows import WINDOW, mark, mark_plainly

PAGE = mmap.PAGESIZE
Make = Callable[[str], Specimen]
HOLD = """
import random
def put(pages, offset, seed, length, advised=True, advice=mmap.MADV_NOHUGEPAGE):
    memory = lone(pages, advised, advice)
    for at_byte in range(0, pages * PAGE, 256): memory[at_byte : at_byte + 256] = os.urandom(256)
    for at_byte in range(0, length, 256):  # in pieces: what is left of them in the heap is no page
        piece = random.Random(f"{seed} {at_byte}").randbytes(min(256, length - at_byte))
        memory[offset + at_byte : offset + at_byte + len(piece)] = piece
    return at(memory)
"""


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_windows_agree_with_their_twin(bits: int) -> None:
    chance = np.random.default_rng(bits)
    for length in (0, 1, WINDOW - 1, WINDOW, 5000):
        for values in (1, 2, 256):
            data = chance.integers(0, values, length).astype(np.uint8)
            for one, other in zip(mark(data, bits), mark_plainly(data, bits), strict=True):
                assert one.tolist() == other.tolist()


def test_windows_depend_on_content_alone() -> None:
    data = np.random.default_rng(1).integers(0, 256, 20_000).astype(np.uint8)
    shifted = np.concatenate([np.random.default_rng(2).integers(0, 256, 777).astype(np.uint8), data])
    places, hashes = mark(data, 6)
    there, others = mark(shifted, 6)
    assert 200 < len(places) < 450
    assert set(zip((places + 777).tolist(), hashes.tolist(), strict=True)) <= set(
        zip(there.tolist(), others.tolist(), strict=True)
    )


@pytest.mark.parametrize("advised", [True, False])
def test_the_same_bytes_at_another_offset(specimen: Make, advised: bool) -> None:
    """20 pages and a bit: 16 bytes into the first page, 1,040 into the second; so 20 whole pages on one side, 20 on the other."""
    length = 20 * PAGE + PAGE - 16 + 100
    one = specimen(LONE + HOLD + f"RESULT = put(23, 16, 7, {length}, {advised})")
    two = specimen(LONE + HOLD + f"RESULT = put(23, 1040, 7, {length}, {advised})")
    answer = judged(explain(look(one.pid, two.pid), state()))
    rows = answer.rows if advised else row(answer, Reason.NOT_ADVISED).would
    whole = [(offset + length) // PAGE - -(-offset // PAGE) for offset in (16, 1040)]
    assert found(rows, *one.addresses) == {Reason.MISALIGNED: whole[0], Reason.UNIQUE: 23 - whole[0]}
    assert found(rows, *two.addresses) == {Reason.MISALIGNED: whole[1], Reason.UNIQUE: 23 - whole[1]}
    misaligned = next(row for row in rows if row.reason is Reason.MISALIGNED)
    beside = misaligned.pages - sum(whole)  # what the interpreter itself has of the kind; it is not advised
    assert beside == 0 or not advised
    assert whole[1] <= misaligned.frees <= whole[1] + beside, "the first in order stays"
    place = next(place for place in misaligned.details["places"] if place["pid"] == one.pid)
    assert place == {
        "pid": one.pid,
        "address": one.addresses[0] + PAGE,
        "other_pid": two.pid,
        "other_address": two.addresses[0] + PAGE + 1024,
        "bytes": whole[0] * PAGE,
    }
    assert "numpy.frombuffer(mmap.mmap(-1, size), dtype)" in misaligned.remedy


def test_within_one_process(specimen: Make) -> None:
    program = "RESULT = f'{put(6, 0, 3, 6 * PAGE)} {put(7, 8, 3, 6 * PAGE)}'"
    one = specimen(LONE + HOLD + program)
    answer = judged(explain(look(one.pid), state()))
    assert found(answer.rows, *one.addresses) == {Reason.MISALIGNED: 6 + 5, Reason.UNIQUE: 2}


def test_equal_offsets_merge_and_are_no_matter_of_alignment(specimen: Make) -> None:
    one, two = (specimen(LONE + HOLD + "RESULT = put(6, 16, 3, 6 * PAGE - 16)") for _ in range(2))
    answer = judged(explain(look(one.pid, two.pid), state()))
    assert found(answer.rows, *one.addresses) == {Reason.WOULD_MERGE: 5, Reason.UNIQUE: 1}


@pytest.mark.parametrize("seed", range(3))
def test_any_offsets(specimen: Make, seed: int) -> None:
    """Bytes of equal content at random offsets in three processes: just the pages that lie wholly in them."""
    chance = random.Random(seed)
    offsets = [0, *sorted(chance.sample(range(1, PAGE), 2))]
    length = chance.randint(5, 12) * PAGE + chance.randrange(PAGE)
    calls = [f"put(16, {offset}, 5, {length})" for offset in offsets]
    children = [specimen(f"{LONE}{HOLD}RESULT = {call}") for call in calls]
    answer = judged(explain(look(*(child.pid for child in children)), state()))
    for offset, child in zip(offsets, children, strict=True):
        whole = (offset + length) // PAGE - -(-offset // PAGE)
        assert found(answer.rows, *child.addresses) == {Reason.MISALIGNED: whole, Reason.UNIQUE: 16 - whole}
