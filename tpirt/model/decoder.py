"""The decoder of one rank, for all model families, world sizes and weight sources.

Axes: T tokens, H hidden, Q local query heads, K local KV heads, D head_dim, I MLP columns of
a block. The residual stream is float32; the dtype of a product depends on its kernel.

What a micro-batch does, on every rank::

    for layer in layers:
        with block(layer.attention):
            partial = attention(norm(hidden)) @ o_proj      # local heads
        hidden += all_reduce(partial)
        partial = 0
        for piece in layer.mlp:
            with block(piece):                              # norm: once, by the first piece
                partial += mlp(norm(hidden))                # local columns
        hidden += all_reduce(partial)                       # last layer: reduce, to rank 0 only

A few rows of one rank, where there is nothing to sum, go through several layers in one call of C.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from tpirt.batch import Batch
from tpirt.cancellation import finish
from tpirt.collectives.base import Communicator
from tpirt.collectives.context import StepContext
from tpirt.config import ModelConfig
from tpirt.model.attention import Heads, Turn, wanted_rows
from tpirt.model.kv_store import KVLayout, KVStore
from tpirt.model.native_blocks import NativeBlocks
from tpirt.model.pipeline import Pipeline, WeightSource
from tpirt.model.products import Products
from tpirt.ops.buffers import join_rows, split_rows
from tpirt.ops.native.bindings import Rounded
from tpirt.ops.quant_linear import FEW_ROWS, ROWS_UNIT, KernelChoice, MatrixShape
from tpirt.ops.rope import RotaryEmbedding
from tpirt.sharding.blocks import Block
from tpirt.sharding.partition import Shard, Span
from tpirt.sharding.program import Layer, Program
from tpirt.stopwatch import COMPUTE, Recorder
from tpirt.weights.layout import Weights

# Of the weights of a chain of layers, which are computed by one call: some 10 to 20 ms. An abort is
# heard in between. Each call costs 0.2 to 0.3 ms around it, as the weights have passed the caches.
CHAIN_BYTES = 320 << 20

_T = TypeVar("_T")


@dataclass(slots=True)
class _RowGroup:
    """Rows of a micro-batch that are multiplied together.

    Attributes:
        count: number of rows; after the last attention, of wanted ones.
        turn: rotation by the rows' positions.
    """

    batch: Batch
    turn: Turn
    count: int


@dataclass(slots=True)
class _Part:
    """The state of a micro-batch in the layers.

    Attributes:
        index: 0 or 1.
        hidden: (T, H) float32, the residual stream; after the last attention only wanted rows.
        groups: its rows, in order.
        pipeline: shared with the other micro-batch.
        alone: whether there is no other micro-batch.
    """

    index: int
    step: StepContext
    batch: Batch
    hidden: torch.Tensor
    groups: list[_RowGroup]
    pipeline: Pipeline
    alone: bool

    def rows(self) -> Sequence[torch.Tensor]:
        """Views of ``hidden``, by group."""
        return split_rows(self.hidden, [group.count for group in self.groups])


class Decoder:
    """Runs steps: hidden states of new tokens in, hidden states of the wanted rows out."""

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        program: Program,
        dtype: torch.dtype,
        weights: WeightSource,
        comm: Communicator,
        kernels: Mapping[MatrixShape, KernelChoice],
        recorder: Recorder,
        kv_bits: int | None = None,
    ):
        self.config = config
        self.clock = recorder.stopwatch(COMPUTE)
        layout = KVLayout(shard.kv_heads.size, config.head_dim, dtype, kv_bits)
        self.kv = KVStore(config.num_hidden_layers, layout)
        self._program = program
        self._dtype = dtype
        self._weights = weights
        self._comm = comm
        self._rotary = RotaryEmbedding(config)
        self._heads = Heads(config, shard, self.kv, dtype)
        self._products = Products(config, kernels)
        self._native = NativeBlocks(config, self._products, self._heads)
        self._head_bytes = sum(weights.blocks[block].nbytes for block in program.head)
        self._chains = _chains(program.layers, weights.blocks) if comm.world_size == 1 else {}
        self._mlp_rows = 2 * shard.columns.size  # of gate and up together
        self._mlp_cut = self._mlp_rows * 3 // 4 // ROWS_UNIT * ROWS_UNIT
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tpirt-compute")

    async def forward(self, hidden: torch.Tensor, step: StepContext) -> torch.Tensor | None:
        """Run all layers over the rows of a step's batch.

        Each sequence has its own positions, rotation, keys and values and causal mask. Matrix
        products are over the rows of several sequences, and a prompt's number of rows can change
        their last bits. So equal batches give equal bits; in different batches a prompt's results
        are equal to within rounding. Those of an answer are equal: see :meth:`_groups`.

        If the step fails, is aborted or cancelled, each sequence keeps the positions before its
        segment, no block is held and nothing is left running.

        Args:
            hidden: (T, H) float32 or bfloat16, the same bits on every rank; overwritten. With
                micro-batches, other ranks receive rank 0's.
            step: has the batch of segments and wanted rows.

        Returns:
            (``batch.num_logits``, H) float32 before the final norm on rank 0, None on the others.

        Raises:
            StepAborted: the step was aborted.
            TpirtError: weights could not be read, or another rank is lost.
        """
        segments = step.batch.segments
        self.kv.prepare(segments)
        parts = self._parts(hidden, step)
        if len(parts) == 1:
            partials = [await self._run(parts[0])]
        else:
            partials = await _all(step, [self._run(part) for part in parts])
        reduced = await self._comm.reduce(step, join_rows(partials))
        self.kv.commit(segments)
        return None if reduced is None else join_rows([part.hidden for part in parts]).add_(reduced)

    async def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the final norm and the LM head, rank 0 only. If cancelled, no block is held.

        Args:
            hidden: (T, H) float32, from :meth:`forward`.

        Returns:
            (T, V) float32.
        """
        whole = self._resident_head(hidden)
        if whole is not None:
            return whole
        x: torch.Tensor | Rounded = hidden
        pieces = []
        for block in self._program.head:
            weights = await self._weights.acquire(block)
            try:
                x, piece = await self._compute(len(x), block, self._head, weights, x)
            finally:
                self._weights.release(block)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)

    def _resident_head(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """All pieces of the head in one call; None if that would take long, or cannot be."""
        head, rows = self._program.head, len(hidden)
        if self._head_bytes > CHAIN_BYTES or rows > FEW_ROWS:
            return None
        weights = self._taken(head)
        if weights is None or not self._native.suits_head(weights, rows):
            return None
        with self.clock.running(_joint_name("head", 0, len(head)), number=head[0]):
            return self._native.head(weights, hidden)

    def close(self) -> None:
        """End the compute thread."""
        self._thread.shutdown()

    # -- the schedule ----------------------------------------------------------------------

    def _parts(self, hidden: torch.Tensor, step: StepContext) -> list[_Part]:
        batches = step.batch.micro_batches()
        pipeline = Pipeline(self._weights, step, len(batches))
        rows = split_rows(hidden, [batch.tokens for batch in batches])
        return [
            _Part(
                index,
                step,
                batch,
                rows[index],
                self._groups(batch),
                pipeline,
                len(batches) == 1,
            )
            for index, batch in enumerate(batches)
        ]

    def _groups(self, batch: Batch) -> list[_RowGroup]:
        """The rows of answers apart from those of prompts, if all together have other bits.

        Up to ``FEW_ROWS`` rows of answers have the same bits in every step, so an answer has those
        that it has alone. The weights are read once more, but from a cache.
        """
        answers = sum(segment.tokens for segment in batch.segments if not segment.prompt)
        if not 0 < answers <= FEW_ROWS < batch.tokens or self._products.alike(batch.tokens):
            return [self._group(batch)]
        return [self._group(group) for _, group, _ in batch.by(lambda segment: segment.prompt)]

    def _group(self, batch: Batch) -> _RowGroup:
        cos, sin = self._rotary.tables(batch.segments)
        return _RowGroup(batch, Turn(cos, sin, self._dtype), batch.tokens)

    async def _run(self, part: _Part) -> torch.Tensor:
        """Run a micro-batch through all layers; returns its last partial sum."""
        try:
            if part.batch.collective.micro_batches:
                await self._comm.broadcast(part.step, part.index, part.hidden)
            part.hidden = part.hidden.float()
            return await self._layers(part)
        except Exception as exc:
            part.step.abort(exc)  # ends the other one
            raise
        finally:
            part.pipeline.finish(part.index)

    async def _layers(self, part: _Part) -> torch.Tensor:
        number, count = 0, len(self._program.layers)
        while True:
            partial = await self._chain(part, number)
            if partial is not None:
                number = self._chains[number]
            else:
                partial = await self._layer(part, number)
                number += 1
            if number == count:
                return partial
            part.hidden += await self._comm.all_reduce(part.step, part.index, partial)

    async def _layer(self, part: _Part, number: int) -> torch.Tensor:
        layer = self._program.layers[number]
        groups = [
            (rows, group.batch, group.turn, number)
            for rows, group in zip(part.rows(), part.groups, strict=True)
        ]
        done = await self._stage(part, layer.attention, self._attention, groups)
        if self._heads.is_last(number):
            # All tokens' keys and values are cached. From here on, only the wanted rows matter:
            # the residual stream that their sums are added to, the last MLP.
            part.hidden = join_rows([rows for rows, _ in done])
            for group, (rows, _) in zip(part.groups, done, strict=True):
                group.count = len(rows)
            part.groups = [group for group in part.groups if group.count] or part.groups[:1]
        partial = join_rows([own for _, own in done])
        if not partial.shape[0]:  # the last layer, and no row is wanted
            return partial
        part.hidden += await self._comm.all_reduce(part.step, part.index, partial)
        return await self._mlp(part, layer.mlp)

    async def _chain(self, part: _Part, number: int) -> torch.Tensor | None:
        """Several layers in one call; returns the last partial sum.

        None if no chain begins here, or its blocks or rows take single calls.
        """
        end = self._chains.get(number)
        if end is None or not part.alone or part.hidden.shape[0] > FEW_ROWS:
            return None
        layers = []
        for layer in self._program.layers[number:end]:
            attention, mlp = self._weights.take(layer.attention), self._taken(layer.mlp)
            if attention is None or mlp is None:
                return None
            layers.append((attention, mlp))
        if number:
            await asyncio.sleep(0)  # an abort is heard between calls
        part.step.check()
        (group,) = part.groups  # so few rows are never divided
        run = self._native.chain(layers, part.batch, group.turn, number)
        if run is None:
            return None
        part.hidden = part.hidden.contiguous()
        block = self._program.layers[number].attention
        with self.clock.running(_joint_name("layers", number, end), number=block):
            return self._native.layers(run, part.hidden)

    async def _mlp(self, part: _Part, blocks: tuple[int, ...]) -> torch.Tensor:
        """At least two stages if there are two micro-batches: see :class:`Pipeline`."""
        if len(blocks) > 1:
            if part.alone and part.hidden.shape[0] <= FEW_ROWS:
                total = await self._resident_mlp(part, blocks)
                if total is not None:
                    return total
            sums: Sequence[tuple[torch.Tensor | Rounded, torch.Tensor | None]]
            sums = [(rows, None) for rows in part.rows()]
            for block in blocks:
                sums = await self._stage(part, block, self._mlp_piece, sums)
            return join_rows([total for _, total in sums if total is not None])
        whole = [(rows,) for rows in part.rows()]
        if part.alone:
            return join_rows(await self._stage(part, blocks[0], self._mlp_whole, whole))
        begun = await self._stage(part, blocks[0], self._mlp_begin, whole, keep=True)
        return join_rows(await self._stage(part, blocks[0], self._mlp_end, begun))

    async def _resident_mlp(self, part: _Part, blocks: tuple[int, ...]) -> torch.Tensor | None:
        """All blocks of an MLP in one call; None if one is not in memory or that cannot be."""
        weights = self._taken(blocks)
        if weights is None:
            return None
        part.step.check()
        hidden = part.hidden
        done = await self._compute(
            hidden.shape[0], blocks[0], self._native.mlp, weights, hidden, None
        )
        return None if done is None else done[1]

    def _taken(self, blocks: Sequence[int]) -> list[Weights] | None:
        """The blocks' weights; None if one is not in memory."""
        taken = [weights for block in blocks if (weights := self._weights.take(block)) is not None]
        return taken if len(taken) == len(blocks) else None

    async def _stage(
        self,
        part: _Part,
        block: int,
        compute: Callable[..., _T],
        groups: Iterable[Sequence[Any]],
        *,
        keep: bool = False,
    ) -> list[_T]:
        """Compute each group with a block on ``part``'s turn; ``keep`` it for the next stage."""

        def each(weights: Weights) -> list[_T]:
            return [compute(weights, *group) for group in groups]

        weights = await part.pipeline.enter(part.index, block)
        results = await self._compute(part.hidden.shape[0], block, each, weights)
        part.pipeline.leave(part.index, block, keep=keep)
        return results

    async def _compute(
        self,
        rows: int,
        block: int,
        compute: Callable[..., _T],
        weights: Weights | Sequence[Weights],
        *args: Any,
    ) -> _T:
        with self.clock.running(self._weights.blocks[block].name, number=block):
            if rows <= FEW_ROWS:  # else in a thread, so that the loop stays responsive
                return compute(weights, *args)
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._thread, compute, weights, *args)
            return await finish(running)  # the thread uses the block until it ends

    # -- computation -----------------------------------------------------------------------

    def _attention(
        self, w: Weights, hidden: torch.Tensor, batch: Batch, turn: Turn, layer: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The rows that the sum is added to, in the last layer the wanted ones, and their sum."""
        partial = self._native.attention(w, hidden, batch, turn, layer)
        if partial is not None:
            return hidden, partial
        products = self._products
        x = products.normed(w, hidden, "qk_proj")
        qk = products.project(x, w, "qk_proj")  # (T, (Q + K) D)
        v = products.project(x, w, "v_proj")  # (T, K D)
        if self._heads.is_last(layer):
            hidden = wanted_rows(hidden, batch)
        out = self._heads.attend(w, qk, v, batch, turn, layer)  # (T, Q D)
        if not out.shape[0]:
            return hidden, hidden  # no rows: nothing to sum
        return hidden, products.project(out, w, "o_proj")

    def _mlp_whole(self, w: Weights, hidden: torch.Tensor) -> torch.Tensor:
        done = self._native.mlp((w,), hidden, None)
        if done is not None:
            return done[1]
        x = self._products.normed(w, hidden, "gate_up_proj")
        return self._down(w, self._products.project(x, w, "gate_up_proj"))  # (T, 2 I) between

    def _mlp_piece(
        self, w: Weights, x: torch.Tensor | Rounded, total: torch.Tensor | None
    ) -> tuple[torch.Tensor | Rounded, torch.Tensor]:
        """Add the result of some columns to ``total``, float32; the first one normalises ``x``."""
        done = self._native.mlp((w,), x, total)
        if done is not None:
            return done
        if total is None:
            assert isinstance(x, torch.Tensor)
            x = self._products.normed(w, x, "gate_up_proj")
        out = self._down(w, self._products.project(x, w, "gate_up_proj"))
        return x, out.float() if total is None else total.add_(out)

    def _mlp_begin(
        self, w: Weights, hidden: torch.Tensor
    ) -> tuple[torch.Tensor | Rounded, torch.Tensor]:
        """About half of an MLP's work: three quarters of the first of two products.

        An MLP of one block is two stages where there are two micro-batches: while one of them sums
        its attention, the other computes half an MLP; see :class:`Pipeline`. The first product has
        two thirds of the MLP's weights, so three quarters of it are half of the whole.
        """
        x = self._products.normed(w, hidden, "gate_up_proj")
        return x, self._products.project(x, w, "gate_up_proj", Span(0, self._mlp_cut))

    def _mlp_end(self, w: Weights, x: torch.Tensor | Rounded, begun: torch.Tensor) -> torch.Tensor:
        """The other half: the remaining columns of gate and up, the activation, down."""
        rest = self._products.project(x, w, "gate_up_proj", Span(self._mlp_cut, self._mlp_rows))
        return self._down(w, torch.cat((begun, rest), dim=1))

    def _down(self, w: Weights, gate_up: torch.Tensor) -> torch.Tensor:
        return self._products.project(self._products.gated(w, gate_up, "down_proj"), w, "down_proj")

    def _head(
        self, w: Weights, x: torch.Tensor | Rounded
    ) -> tuple[torch.Tensor | Rounded, torch.Tensor]:
        """Logits of a part of the vocabulary; the first piece normalises ``x``."""
        if "norm.weight" in w:
            assert isinstance(x, torch.Tensor)
            x = self._products.normed(w, x, "lm_head")
        return x, self._products.project(x, w, "lm_head").float()


def _chains(layers: Sequence[Layer], blocks: Sequence[Block]) -> dict[int, int]:
    """Chains of layers: the number after the last one of each, by the number of its first."""
    ends: dict[int, int] = {}
    first = nbytes = 0
    for number, layer in enumerate(layers):
        own = sum(blocks[block].nbytes for block in (layer.attention, *layer.mlp))
        if nbytes + own > CHAIN_BYTES:
            first, nbytes = number, 0
        nbytes += own
        if nbytes <= CHAIN_BYTES:
            ends[first] = number + 1
    return ends


def _joint_name(kind: str, first: int, end: int) -> str:
    """For a trace: that of one call for several blocks."""
    return f"{kind}.{first}" if end - first == 1 else f"{kind}.{first}-{end - 1}"


async def _all(step: StepContext, runs: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    """Wait until all have ended; raises why the step failed.

    Not a task group: a run that fails aborts the step, which ends the others with its reason.
    """
    results = await asyncio.gather(*runs, return_exceptions=True)
    step.check()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return cast("list[_T]", results)
