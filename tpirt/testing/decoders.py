"""The decoders of all ranks in one process, without a transport."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tpirt.batch import Batch, Collective, Segment
from tpirt.cluster.kernels import choose_kernels
from tpirt.cluster.provision import write_slice
from tpirt.cluster.slice_maker import SliceMaker
from tpirt.collectives.context import StepContext
from tpirt.config import ModelConfig
from tpirt.model.decoder import Decoder
from tpirt.sharding.blocks import rank_blocks
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import make_partition
from tpirt.sharding.program import Program
from tpirt.stopwatch import Recorder
from tpirt.types import ignore_progress
from tpirt.weights.checkpoint import Checkpoint, resolve_tied
from tpirt.weights.store import SliceStore
from tpirt.weights.streamer import WeightStreamer

_Key = tuple[int, int, int]  # step, micro-batch (-1 for the last sum), number within it


class Exchange:
    """Exchanges partials between the ranks of one process."""

    def __init__(self, world_size: int):
        self.world_size = world_size
        self._given: dict[_Key, dict[int, torch.Tensor]] = {}
        self._waiting: dict[_Key, list[asyncio.Future[dict[int, torch.Tensor]]]] = {}

    async def gather(
        self, step: StepContext, key: _Key, rank: int, value: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        """Contribute a tensor and wait for all; raises the reason if ``step`` is aborted."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[dict[int, torch.Tensor]] = loop.create_future()
        given = self._given.setdefault(key, {})
        waiting = self._waiting.setdefault(key, [])
        given[rank] = value.clone()
        waiting.append(future)
        step.on_abort(lambda exc: None if future.done() else future.set_exception(exc))
        if len(given) == self.world_size:
            for other in waiting:
                if not other.done():
                    other.set_result(given)
            del self._given[key], self._waiting[key]
        return await future


class ExchangeCommunicator:
    """See :class:`tpirt.collectives.base.Communicator`; adds in rank order, in float32.

    Attributes:
        calls: calls so far, as pairs of a name and a micro-batch, in order.
    """

    def __init__(self, rank: int, exchange: Exchange):
        self.rank = rank
        self.world_size = exchange.world_size
        self.calls: list[tuple[str, int]] = []
        self._exchange = exchange
        self._numbers: Counter[tuple[int, int]] = Counter()

    async def broadcast(self, step: StepContext, part: int, rows: torch.Tensor) -> None:
        """See :class:`tpirt.collectives.base.Communicator`."""
        self.calls.append(("broadcast", part))
        rows.copy_((await self._gather(step, part, rows))[0])

    async def all_reduce(self, step: StepContext, part: int, partial: torch.Tensor) -> torch.Tensor:
        """See :class:`tpirt.collectives.base.Communicator`."""
        self.calls.append(("all_reduce", part))
        return _total(await self._gather(step, part, partial))

    async def reduce(self, step: StepContext, partial: torch.Tensor) -> torch.Tensor | None:
        """See :class:`tpirt.collectives.base.Communicator`."""
        self.calls.append(("reduce", -1))
        total = _total(await self._gather(step, -1, partial))
        return None if self.rank else total

    async def _gather(
        self, step: StepContext, part: int, value: torch.Tensor
    ) -> dict[int, torch.Tensor]:
        number = self._numbers[step.number, part]
        self._numbers[step.number, part] += 1
        return await self._exchange.gather(step, (step.number, part, number), self.rank, value)


def _total(values: dict[int, torch.Tensor]) -> torch.Tensor:
    total = values[0].float().clone()
    for rank in range(1, len(values)):
        total += values[rank]
    return total


@dataclass
class DecoderRank:
    """The decoder of one rank and its dependencies."""

    decoder: Decoder
    streamer: WeightStreamer
    comm: ExchangeCommunicator


class DecoderGroup:
    """Runs steps on all ranks at once.

    Attributes:
        ranks: rank 0 first.
    """

    def __init__(self, ranks: list[DecoderRank], checkpoint: Checkpoint, embedding: str):
        self.ranks = ranks
        self._checkpoint = checkpoint
        self._embedding = embedding
        self._steps = itertools.count(1)

    def embed(self, ids: Sequence[int]) -> torch.Tensor:
        """Look ids up: (T, H) float32."""
        return self._checkpoint.gather_rows(self._embedding, ids).float()

    def contexts(
        self, segments: Sequence[Segment], *, micro_batches: bool = False
    ) -> list[StepContext]:
        """Create the next step, one context per rank."""
        number = next(self._steps)
        batch = Batch(tuple(segments), collective=Collective(micro_batches=micro_batches))
        return [StepContext(number, batch) for _ in self.ranks]

    async def run(self, ids: Sequence[int], steps: Sequence[StepContext]) -> torch.Tensor:
        """Run a step on all ranks; returns the wanted rows after all layers."""
        rows = self.embed(ids)
        inputs = [rows.clone() for _ in self.ranks]
        if steps[0].batch.collective.micro_batches:  # the others receive them from rank 0
            inputs = [rows, *(torch.full_like(rows, torch.nan) for _ in self.ranks[1:])]
        runs = (
            rank.decoder.forward(hidden, step)
            for rank, hidden, step in zip(self.ranks, inputs, steps, strict=True)
        )
        results = await asyncio.gather(*runs, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        out = results[0]
        assert isinstance(out, torch.Tensor)
        return out

    async def logits(
        self, ids: Sequence[int], segments: Sequence[Segment], *, micro_batches: bool = False
    ) -> torch.Tensor:
        """Run a step and the LM head: (wanted rows, V)."""
        out = await self.run(ids, self.contexts(segments, micro_batches=micro_batches))
        return await self.ranks[0].decoder.logits(out)


@asynccontextmanager
async def decoder_group(
    path: Path,
    world_size: int = 1,
    *,
    ratio: Sequence[float] | None = None,
    window: int | None = None,
    dtype: torch.dtype = torch.float32,
    kv_bits: int | None = None,
) -> AsyncIterator[DecoderGroup]:
    """Split a model directory into slices and load a decoder for every rank."""
    config = ModelConfig.from_dir(path)
    partition = make_partition(config, world_size, ratio)
    exchange = Exchange(world_size)
    ranks: list[DecoderRank] = []
    with ExitStack() as stack:
        store = SliceStore(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        checkpoint = stack.enter_context(Checkpoint.open(path))
        form = WeightFormat(dtype)
        for number, shard in enumerate(partition.shards):
            maker = SliceMaker(checkpoint, config, form)
            stored = write_slice(maker, partition, number, store, ignore_progress)
            blocks = rank_blocks(config, shard, form)
            streamer = WeightStreamer(stored, blocks, max_blocks=window)
            comm = ExchangeCommunicator(number, exchange)
            decoder = Decoder(
                config,
                shard,
                Program.of(blocks),
                dtype,
                streamer,
                comm,
                choose_kernels(stored.path, blocks, dtype),
                Recorder(),
                kv_bits,
            )
            ranks.append(DecoderRank(decoder, streamer, comm))
        try:
            yield DecoderGroup(ranks, checkpoint, resolve_tied(checkpoint, config)[0])
        finally:
            for rank in ranks:
                rank.decoder.close()
                await rank.streamer.aclose()
