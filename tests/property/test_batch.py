"""Micro-batches are the batch: the same rows, positions and wanted rows, in the same order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tpirt.batch import Batch, Collective, Segment


@st.composite
def segments(draw: st.DrawFn, slot: int) -> Segment:
    tokens = draw(st.integers(1, 9))
    position = draw(st.integers(0, 20))
    return Segment(slot, position, tokens, draw(st.integers(0, tokens)), position + tokens)


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    count = draw(st.integers(1, 6))
    parts = tuple(draw(segments(slot)) for slot in range(count))
    return Batch(parts, collective=Collective(micro_batches=True))


def tokens_of(batch: Batch) -> list[tuple[int, int, bool]]:
    """Slot and position of each row, and whether its hidden state is wanted."""
    wanted = set(batch.wanted_rows)
    return [
        (segment.slot, segment.position + offset, row in wanted)
        for segment, rows in zip(batch.segments, batch.rows, strict=True)
        for offset, row in enumerate(rows)
    ]


@given(batches())
def test_micro_batches_are_the_batch_in_two(batch: Batch) -> None:
    parts = batch.micro_batches()
    assert [row for part in parts for row in tokens_of(part)] == tokens_of(batch)
    assert sum(part.num_logits for part in parts) == batch.num_logits == len(batch.wanted_rows)
    if batch.tokens > 1:
        assert [part.tokens for part in parts] == [batch.tokens // 2, (batch.tokens + 1) // 2]
    for part in parts:
        for segment in part.segments:
            assert 0 <= segment.num_logits <= segment.tokens
            assert segment.tokens


@given(batches(), st.data())
def test_split_segments_put_together_are_the_segment(batch: Batch, data: st.DataObject) -> None:
    segment = batch.segments[0]
    if segment.tokens > 1:
        at = data.draw(st.integers(1, segment.tokens - 1))
        first, rest = segment.split(at)
        assert (first.tokens, rest.end) == (at, segment.end)
        assert tokens_of(Batch((first, rest))) == tokens_of(Batch((segment,)))
