"""Judge predictions by hand: small tables whose answer anyone can count."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.plan.tables import PAGE, Page, named, source, table

from pagefold.errors import UsageError
from pagefold.plan import PageTable, Prediction, predict
from pagefold.plan.replay import replay

A = 5 << 64 | 9
B = 6
HIDDEN = Page(A, -1, exclusive=False, address=8 * PAGE)


def counts(prediction: Prediction) -> tuple[int, int, int, int]:
    """Return (shared, sharing, unshared, volatile)."""
    return (
        prediction.pages_shared,
        prediction.pages_sharing,
        prediction.pages_unshared,
        prediction.pages_volatile,
    )


@pytest.mark.parametrize("pages", [PageTable.of([]), table(), table([]), table([], [])])
@pytest.mark.parametrize("zero", [0, 1])
def test_no_pages(pages: PageTable, zero: int) -> None:
    answer = predict(pages, use_zero_pages=zero, merge_across_nodes=0)
    assert counts(answer) == (0, 0, 0, 0)
    assert (answer.saved_bytes, answer.metadata_bytes, answer.general_profit) == (0, 0, 0)
    assert len(answer.processes) == len(pages.sources)
    assert counts(replay(pages, use_zero_pages=zero)) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("words", "zero_pages", "expected", "zeroes"),
    [
        ("a1", 0, (0, 0, 1, 0), 0),
        ("a1!", 0, (0, 0, 0, 1), 0),
        ("z1", 0, (0, 0, 1, 0), 0),
        ("z1", 1, (0, 0, 0, 0), 1),
        ("z1!", 1, (0, 0, 0, 1), 0),
    ],
)
def test_one_page(words: str, zero_pages: int, expected: tuple[int, ...], zeroes: int) -> None:
    answer = predict(named(words), use_zero_pages=zero_pages)
    assert counts(answer) == expected
    assert answer.ksm_zero_pages == zeroes
    assert answer.saved_bytes == zeroes * PAGE
    assert answer.general_profit == (zeroes and PAGE) - 64 * (1 - zeroes)
    assert answer.metadata_bytes == 64 * (1 - zeroes)


# Letters are contents (z: zeroes), numbers are frames; expected: (shared, sharing, unshared, volatile), chains, dups, pages saved.
CASES = {
    "all different": (["a1 b2 c3"], 256, (0, 0, 3, 0), 0, 0, 0),
    "three equal": (["a1 a2", "a3"], 256, (1, 2, 0, 0), 0, 0, 2),
    "a volatile one stays out": (["a1 a2", "a3!"], 256, (1, 1, 0, 1), 0, 0, 1),
    "forked only": (["a1", "a1", "a1"], 256, (0, 0, 1, 2), 0, 0, 0),
    "forked and one equal": (["a1", "a1", "a2"], 256, (1, 2, 0, 0), 0, 0, 1),
    "two forked families": (["a1", "a1", "a2", "a2"], 256, (1, 3, 0, 0), 0, 0, 1),
    "zeroes are a content": (["z1 z2"], 256, (1, 1, 0, 0), 0, 0, 1),
    "exactly full": (["a1 a2 a3"], 3, (1, 2, 0, 0), 0, 0, 2),
    "one too many waits": (["a1 a2 a3 a4"], 3, (1, 2, 1, 0), 0, 0, 2),
    "two too many found a dup": (["a1 a2 a3 a4 a5"], 3, (2, 3, 0, 0), 1, 2, 3),
    "two chains": (["a1 a2 a3 a4 b5", "b6 b7 b8 b9"], 2, (4, 4, 1, 0), 2, 4, 4),
    # 1 and 2 found a KSM page, which is full: the frame of 2, so the others of 2 are on it whatever the limit.
    "fork goes over the limit": (["a1", "a2", "a2", "a2"], 2, (1, 3, 0, 0), 0, 0, 1),
    # 1 and 2 found a KSM page on frame 2; what is left on frame 1 keeps it in use: nothing is saved.
    "fork keeps a frame": (["a1", "a1", "a1", "a2"], 2, (1, 1, 1, 1), 0, 0, 0),
    # As before, and 3 is a partner for the next of frame 1.
    "fork keeps a frame until partners come": (["a1", "a1", "a2", "a3"], 2, (2, 2, 0, 0), 1, 2, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_small_cases_by_hand(case: str) -> None:
    words, limit, expected, chains, dups, saved = CASES[case]
    pages = named(*words)
    answer = predict(pages, max_page_sharing=limit)
    assert counts(answer) == expected
    assert (answer.stable_node_chains, answer.stable_node_dups) == (chains, dups)
    assert answer.saved_bytes == saved * PAGE
    assert answer.metadata_bytes == 64 * (len(pages) + expected[0] + chains)
    assert answer.general_profit == expected[1] * PAGE - 64 * len(pages)
    assert counts(replay(pages, max_page_sharing=limit)) == expected


def test_nodes_keep_equals_apart() -> None:
    pages = table([Page(A, 1, 0), Page(A, 2, 0)], [Page(A, 3, 1), Page(A, 4, 1), Page(B, 5, 1)])
    assert counts(predict(pages, merge_across_nodes=1)) == (1, 3, 1, 0)
    assert counts(predict(pages, merge_across_nodes=0)) == (2, 2, 1, 0)
    assert predict(pages, merge_across_nodes=0).stable_node_chains == 0


def test_unknown_nodes_count_as_node_0() -> None:
    pages = table([Page(A, 1, -1)], [Page(A, 2, 0)])
    assert counts(predict(pages, merge_across_nodes=0)) == (1, 1, 0, 0)


def test_a_process_that_maps_the_zero_page_is_looked_at_no_more() -> None:
    answer = predict(named("z1 z2 a3", "z1 a4"), use_zero_pages=1)
    first, second = answer.processes
    assert (first.pages, first.ksm_rmap_items, first.ksm_zero_pages, first.ksm_merging_pages) == (3, 1, 2, 1)
    assert (second.pages, second.ksm_rmap_items, second.ksm_zero_pages, second.ksm_merging_pages) == (2, 1, 1, 1)
    assert (first.ksm_process_profit, second.ksm_process_profit) == (3 * PAGE - 64, 2 * PAGE - 64)
    assert answer.saved_bytes == 3 * PAGE  # the frames z1 and z2, and one of a3 and a4
    assert answer.general_profit == 4 * PAGE - 2 * 64


HUGE = 512 * PAGE


def test_zeroes_in_a_huge_page_go_when_it_is_split() -> None:
    split = [Page(A, 1, huge=True, address=HUGE), Page(0, 2, huge=True, address=HUGE + PAGE)]
    split.append(Page(0, 3, huge=True, volatile=True, address=HUGE + 2 * PAGE))
    whole = [Page(B, 4, huge=True, address=2 * HUGE), Page(0, 5, huge=True, address=2 * HUGE + PAGE)]
    pages = table(split, [Page(A, 6)], [Page(B, 7)])
    assert pages.huge_page.tolist() == [0, 0, 0, -1, -1]
    answer = predict(pages)
    assert counts(answer) == (1, 1, 1, 1)
    assert (answer.split_zero_pages, answer.ksm_zero_pages, answer.saved_bytes) == (1, 0, 2 * PAGE)
    assert [one.split_zero_pages for one in answer.processes] == [1, 0, 0]
    assert predict(pages, splits_drop_zeroes=False).split_zero_pages == 0
    pages = table(split, [Page(A, 6), *whole])
    assert pages.huge_page.tolist() == [0, 0, 0, -1, 4, 4]
    # The two of zeroes are equal: both of their huge pages are split, and no KSM page is left of them.
    assert counts(predict(pages)) == (1, 1, 1, 1)
    assert predict(pages).split_zero_pages == 2
    assert predict(pages, splits_drop_zeroes=False).pages_shared == 2
    with_zero_pages = predict(pages, use_zero_pages=1)
    assert (with_zero_pages.ksm_zero_pages, with_zero_pages.split_zero_pages) == (0, 2)
    # A huge page in which nothing merges stays as it is.
    assert predict(table(whole, [Page(A, 6)])).split_zero_pages == 0


def test_hidden_frames_are_told_by_address_and_content() -> None:
    other_address = HIDDEN._replace(address=9 * PAGE)
    other_content = HIDDEN._replace(content=B)
    alone = HIDDEN._replace(exclusive=True)
    assert table([HIDDEN], [HIDDEN]).frame.tolist() == [0, 0]
    assert table([HIDDEN], [other_address]).frame.tolist() == [0, 1]
    assert table([HIDDEN], [other_content]).frame.tolist() == [0, 1]
    assert table([HIDDEN], [alone]).frame.tolist() == [0, 1]
    assert counts(predict(table([HIDDEN], [HIDDEN]))) == (0, 0, 1, 1)
    assert counts(predict(table([HIDDEN], [other_address]))) == (1, 1, 0, 0)


def test_frames_are_named_by_their_first_page() -> None:
    pages = named("a7 b8", "b8 a7", "c9 a7")
    assert pages.frame.tolist() == [0, 1, 1, 0, 4, 0]


def test_equal_frame_numbers_mean_nothing_where_a_page_is_mapped_once() -> None:
    """Two processes read one after the other may show one frame: it was given to the second meanwhile."""
    assert table([Page(A, 3)], [Page(A, 3)]).frame.tolist() == [0, 1]


def test_merged_pages_count_as_apart() -> None:
    """What is merged already is planned as if it were not."""
    merged = Page(A, 3, exclusive=False, ksm=True)
    after = table([merged, Page(B, 4)], [merged], [merged])
    before = table([Page(A, 1), Page(B, 2)], [Page(A, 3)], [Page(A, 4)])
    assert after.frame.tolist() == [0, 1, 2, 3]
    assert predict(after) == predict(before)


def test_images_are_pages_apart() -> None:
    """Page numbers of images are no frames: two images and a process may have equal ones."""
    image = [Page(A, 0), Page(B, 1)]
    pages = PageTable.of([source(image, None), source(image, None), source([Page(A, 0, exclusive=False)])])
    assert pages.frame.tolist() == [0, 1, 2, 3, 4]
    assert counts(predict(pages)) == (2, 3, 0, 0)
    assert [one.pid for one in predict(pages).processes] == [None, None, 100]


def test_page_sizes_do_not_mix() -> None:
    small, big = source([Page(A, 1)]), replace(source([Page(A, 1)]), page_size=65536)
    with pytest.raises(UsageError, match=r"^sources with pages of \[4096, 65536\] bytes cannot be planned together"):
        PageTable.of([small, big])
    assert predict(PageTable.of([big, big])).saved_bytes == 65536
