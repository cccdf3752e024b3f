"""Blocks of a step: each that was acquired is released, however the step ends."""

from __future__ import annotations

import asyncio

import pytest

from tpirt.batch import Batch, Segment
from tpirt.collectives.context import StepContext
from tpirt.model.pipeline import Pipeline
from tpirt.sharding.blocks import Block
from tpirt.weights.layout import Weights


class Source:
    """Hands out blocks, and cancels ``consumer`` once it has."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.in_use: list[int] = []
        self.consumer: asyncio.Task[Weights] | None = None

    def take(self, index: int) -> Weights | None:
        return None

    async def acquire(self, index: int) -> Weights:
        self.in_use.append(index)
        assert self.consumer is not None
        asyncio.get_running_loop().call_soon(self.consumer.cancel)
        return {}

    def release(self, index: int) -> None:
        self.in_use.remove(index)


async def test_a_block_that_comes_as_its_consumer_is_cancelled_is_released() -> None:
    source = Source()
    pipeline = Pipeline(source, StepContext(1, Batch((Segment(0, 0, 1, 1, 1),))), 1)
    source.consumer = asyncio.ensure_future(pipeline.enter(0, 7))
    with pytest.raises(asyncio.CancelledError):
        await source.consumer
    assert source.in_use == [7]
    pipeline.finish(0)
    assert source.in_use == []
