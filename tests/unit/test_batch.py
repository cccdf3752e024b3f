"""The description of a step: rows of segments, wanted rows, micro-batches."""

from __future__ import annotations

from tpirt.batch import Batch, Collective, Segment

HALVES = Collective(micro_batches=True)


def test_rows_lie_one_segment_after_another() -> None:
    batch = Batch((Segment(4, 0, 3, 1, 3), Segment(2, 7, 1, 1, 8), Segment(0, 5, 4, 0, 9)))
    assert batch.tokens == 8
    assert batch.rows == (range(3), range(3, 4), range(4, 8))
    assert batch.num_logits == 2
    assert batch.wanted_rows == (2, 3)


def test_a_split_segment_keeps_its_wanted_rows() -> None:
    segment = Segment(1, 10, 6, 4, 99)
    assert segment.split(4) == (Segment(1, 10, 4, 2, 99), Segment(1, 14, 2, 2, 99))
    assert segment.split(1) == (Segment(1, 10, 1, 0, 99), Segment(1, 11, 5, 4, 99))


def test_micro_batches_cut_the_rows_in_the_middle() -> None:
    first, across, last = Segment(0, 0, 2, 1, 2), Segment(1, 3, 5, 2, 8), Segment(2, 1, 1, 1, 2)
    batch = Batch((first, across, last), prefill=True, collective=HALVES)
    low, high = batch.micro_batches()
    assert low.segments == (first, Segment(1, 3, 2, 0, 8))
    assert high.segments == (Segment(1, 5, 3, 2, 8), last)
    assert (low.prefill, low.collective) == (high.prefill, high.collective) == (True, HALVES)


def test_no_micro_batches_of_a_single_row_or_unasked() -> None:
    single = Batch((Segment(0, 5, 1, 1, 6),), collective=HALVES)
    assert single.micro_batches() == (single,)
    whole = Batch((Segment(0, 0, 8, 1, 8),))
    assert whole.micro_batches() == (whole,)
