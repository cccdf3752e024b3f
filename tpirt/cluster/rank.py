"""The runtime of one rank: weight streamer, decoder and memory limit, on master and workers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch

from tpirt.batch import MOST_TREE_ROWS, Batch, Segment
from tpirt.cancellation import finish, in_thread
from tpirt.cluster.kernels import choose_kernels
from tpirt.cluster.machine import (
    available_bytes,
    base_bytes,
    peak_resident_bytes,
    release_free_memory,
    resident_bytes,
)
from tpirt.cluster.spill_disk import SpillDisk
from tpirt.cluster.stats import Counters, StepLog
from tpirt.collectives.algorithms import GroupCommunicator
from tpirt.collectives.base import Communicator, SingleRankCommunicator, TimedCommunicator
from tpirt.collectives.context import StepContext
from tpirt.collectives.links import LinkSet
from tpirt.config import ModelConfig
from tpirt.errors import MemoryLimitError, TpirtError, TransportError
from tpirt.model.decoder import Decoder
from tpirt.planning import Limits, MemoryBudget, more_memory
from tpirt.refusals import refused_memory
from tpirt.sharding.blocks import rank_blocks
from tpirt.sharding.program import Program
from tpirt.stopwatch import Recorder
from tpirt.types import ProgressCallback, RankStats
from tpirt.units import format_bytes
from tpirt.weights.store import SliceStore, StoredSlice
from tpirt.weights.streamer import WeightStreamer

_LEAST_FRAME_LIMIT = 8 << 20  # traces, statistics of thousands of steps


def frame_limit(config: ModelConfig, limits: Limits) -> int:
    """Largest frame that the ranks of a session send each other, in bytes."""
    return max(_LEAST_FRAME_LIMIT, 4 * limits.chunk_tokens * config.hidden_size + (1 << 20))


class RankRuntime:
    """Executes the steps of one rank of one session."""

    def __init__(
        self,
        config: ModelConfig,
        stored: StoredSlice,
        world_size: int,
        links: LinkSet,
        limits: Limits,
        store: SliceStore,
    ):
        """Choose kernels and begin to read weights; takes a while, so call it in a thread.

        Args:
            config: the model.
            stored: this rank's shard.
            world_size: number of ranks.
            links: this rank's links to the others.
            limits: its bounds.
            store: on whose disk sequences may be spilled.

        Raises:
            MemoryLimitError: the limit is below what two blocks and a step need.
        """
        self.config = config
        self.recorder = Recorder(limits.trace_spans)
        comm: Communicator = SingleRankCommunicator()
        if world_size > 1:
            comm = GroupCommunicator(world_size, links)
        self.comm = TimedCommunicator(comm, self.recorder)
        self._links = links
        self._limits = limits
        self._disk = SpillDisk(store)
        manifest = stored.manifest
        form = manifest.form
        self._budget = MemoryBudget.of(
            config, manifest.shard, comm.world_size, form, base_bytes(), limits
        )
        # Tokens of a step, bytes of keys and values, tokens whose logits are wanted.
        self._reserved = (limits.chunk_tokens, 0, 1)
        blocks = rank_blocks(config, manifest.shard, form)
        kernels = choose_kernels(stored.path, blocks, form.dtype)
        release_free_memory()  # of trying kernels
        try:
            self.streamer = WeightStreamer(
                stored,
                blocks,
                max_blocks=limits.window_blocks,
                budget_bytes=self._budget.left_for_weights(),
                recorder=self.recorder,
            )
        except MemoryLimitError as exc:
            raise self._too_little(exc) from exc
        self.decoder = Decoder(
            config,
            manifest.shard,
            Program.of(blocks),
            form.run_dtype,
            self.streamer,
            self.comm,
            kernels,
            self.recorder,
            limits.kv_bits,
        )
        self.step_log = StepLog(self._counters, self._last_ns, self.recorder)

    @classmethod
    async def open(
        cls,
        config: ModelConfig,
        stored: StoredSlice,
        world_size: int,
        links: LinkSet,
        limits: Limits,
        store: SliceStore,
    ) -> RankRuntime:
        """Make a runtime without blocking the event loop; see the class for the arguments.

        Cancelled, nothing of it is left running.
        """
        made: list[RankRuntime] = []
        try:
            with refused_memory(f"rank {links.rank}"):
                await in_thread(
                    lambda: made.append(cls(config, stored, world_size, links, limits, store))
                )
        except BaseException:
            for runtime in made:
                await finish(runtime.aclose())
            raise
        return made[0]

    @property
    def weights_bytes(self) -> int:
        """Bytes of all this rank's weights, wherever they are."""
        return self.streamer.weights_bytes

    @property
    def held_bytes(self) -> int:
        """Most bytes of weights in memory at once."""
        return self.streamer.held_bytes

    def validate(self, batch: Batch) -> None:
        """Validate a step request.

        Raises:
            TransportError: out of range; names what.
        """
        context = self.config.context_length
        if not 1 <= batch.tokens <= self._limits.chunk_tokens:
            raise TransportError(
                f"step of {batch.tokens} tokens: expected 1 to {self._limits.chunk_tokens}"
            )
        positions = {segment.slot: segment.position for segment in batch.segments}
        if len(positions) < len(batch.segments):
            raise TransportError("step with two segments of one sequence")
        for segment in batch.segments:
            source = segment.slot if segment.source is None else segment.source
            cached = self.decoder.kv.length(source)
            if segment.source is not None:
                if source == segment.slot:
                    raise TransportError(f"step that copies slot {source} to itself")
                cached = min(cached, positions.get(source, cached))
            if segment.tokens < 1 or not 0 <= segment.num_logits <= segment.tokens:
                raise TransportError(
                    f"step of {segment.tokens} tokens: results of {segment.num_logits} are wanted"
                )
            _validate_tree(segment, cached)
            if not 0 <= segment.position <= cached:
                raise TransportError(
                    f"step at position {segment.position}: expected 0 to {cached}, which are cached"
                )
            if segment.end > context or segment.rope_length > context:
                raise TransportError(
                    f"step from {segment.position} to {segment.end} (rope "
                    f"{segment.rope_length}): the context ends at {context}"
                )

    async def load(self, progress: ProgressCallback) -> None:
        """Wait until what stays in memory is there. If cancelled, reading goes on.

        Raises:
            StoreError: a block could not be read.
        """
        await self.streamer.preload(progress, detail=f"rank {self.comm.rank}")

    def begin(self, step: StepContext) -> None:
        """Expect the step's tensors, and count what is done from here on as its own."""
        self._links.begin(step)
        self.comm.begin()
        self.step_log.begin(step.number, step.batch.tokens, step.batch.prefill)

    async def run(self, hidden: torch.Tensor, step: StepContext) -> torch.Tensor | None:
        """Run all layers over ``hidden`` (T, H); see :meth:`Decoder.forward`, also if cancelled.

        Raises:
            MemoryLimitError: the longer KV cache no longer fits with two blocks; the system refused
                memory. Each sequence has the positions before its segment.
        """
        completed = False
        try:
            with self._refused_memory(step.batch):
                if not self._has_room(step.batch):
                    await step.run(self._make_room(step.batch))
                out = await self.decoder.forward(hidden, step)
            completed = True
            return out
        finally:
            self.step_log.end_layers()
            self._links.end(completed=completed)

    async def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the LM head, on rank 0 only; see :meth:`Decoder.logits`.

        Raises:
            MemoryLimitError: the system refused memory.
        """
        with refused_memory(f"rank {self.comm.rank}: logits of {len(hidden)} tokens"):
            return await self.decoder.logits(hidden)

    async def free(self, slot: int) -> None:
        """Drop a sequence's keys and values; their memory goes to the weights.

        If cancelled, or a disk hangs, the weights may get that memory at the next step only.
        """
        self.decoder.kv.free(slot)
        with contextlib.suppress(TpirtError):  # the next step divides again, and says what fails
            await self._divide(1, self.decoder.kv.nbytes, 0)

    async def spill(self, slot: int, handle: int, tokens: int) -> None:
        """Write a sequence's first positions to disk, and drop it from memory in any case.

        Raises:
            StoreError: the disk refused, or hangs; nothing is kept.
            TransportError: it has not so many.
        """
        kv = self.decoder.kv
        if not 1 <= tokens <= (held := kv.length(slot)):
            raise TransportError(f"slot {slot}: {tokens} positions are to be spilled, of {held}")
        try:
            await self._disk.write(handle, kv.views(slot, tokens))
        finally:
            await self.free(slot)

    async def restore(self, slot: int, handle: int) -> None:
        """Read a spilled sequence into a slot, and delete it from disk in any case.

        Raises:
            StoreError: its file is missing or damaged, or cannot be read.
            MemoryLimitError: it does not fit any more. The slot is empty then, as with all errors.
        """
        kv = self.decoder.kv
        try:
            tokens = self._disk.tokens(handle)
            segment = Segment(slot, 0, tokens, 0, tokens)
            with self._refused_memory(Batch((segment,))):
                await finish(self._divide(1, kv.bytes_for([segment]), tokens))
                kv.prepare([segment])
            await self._disk.read(handle, kv.views(slot, tokens))
            kv.commit([segment])
        except BaseException:
            await self.free(slot)
            raise
        finally:
            await self.drop_spilled([handle])

    async def drop_spilled(self, handles: Sequence[int]) -> None:
        """Delete spilled sequences, where there are some."""
        await self._disk.drop(handles)

    def stats(self, since_step: int = 0) -> RankStats:
        """What was measured since step ``since_step`` began; 0: since the session began."""
        counted, steps = self.step_log.since(since_step)
        return RankStats(
            rank=self.comm.rank,
            peak_rss_bytes=peak_resident_bytes(),
            weights_bytes=self.streamer.weights_bytes,
            bytes_sent=counted.bytes_sent,
            bytes_received=counted.bytes_received,
            bytes_read=counted.bytes_read,
            io_ms=counted.io_ns / 1e6,
            compute_ms=counted.compute_ns / 1e6,
            comm_ms=counted.comm_ns / 1e6,
            read_ms=counted.read_ns / 1e6,
            steps=steps,
        )

    async def aclose(self) -> None:
        """Stop the threads and return the memory to the system."""
        self.decoder.close()
        await self.streamer.aclose()
        await self._disk.aclose()
        del self.decoder  # its keys and values
        release_free_memory()

    def _counters(self) -> Counters:
        sent, received = self._links.traffic
        compute_ns, io_ns, comm_ns = self.recorder.account.read()
        return Counters(
            compute_ns=compute_ns,
            io_ns=io_ns,
            comm_ns=comm_ns,
            read_ns=self.streamer.reads.total_ns,
            bytes_read=self.streamer.bytes_read,
            bytes_sent=sent,
            bytes_received=received,
        )

    def _last_ns(self) -> int:
        """The time up to which the rank's work is counted."""
        return self.recorder.account.last_ns

    def _too_little(self, exc: MemoryLimitError) -> MemoryLimitError:
        budget, rank = self._budget, self.comm.rank
        if budget.limits.memory_bytes is None:
            return MemoryLimitError(f"rank {rank}: {exc}")
        return MemoryLimitError(f"rank {rank}: {budget.shortage}; {self._advice()}")

    def _advice(self, context: int = 0) -> str:
        """What to do for ``context`` tokens."""
        free = available_bytes() + resident_bytes()
        return more_memory(self._budget.advised_bytes(context), free)

    def _has_room(self, batch: Batch) -> bool:
        """Whether memory is divided as the step needs it: so it is for most tokens."""
        kv_bytes = self.decoder.kv.bytes_for(batch.segments)
        left = self._budget.left_for_weights
        return left(*self._reserved) == left(batch.tokens, kv_bytes, batch.num_logits)

    async def _make_room(self, batch: Batch) -> None:
        """Give the step and the KV store what they need, and the weights the rest.

        The store can need less than before; after a long prompt, so does a step. Resident blocks
        are given up, or read again, accordingly.
        """
        kv_bytes = self.decoder.kv.bytes_for(batch.segments)
        longest = max(max(s.rope_length, s.end) for s in batch.segments)
        await self._divide(batch.tokens, kv_bytes, longest, batch.num_logits)

    @contextlib.contextmanager
    def _refused_memory(self, batch: Batch) -> Iterator[None]:
        longest = max(segment.end for segment in batch.segments)
        subject = f"rank {self.comm.rank}: a step of {batch.tokens} tokens, {longest} in all"
        try:
            with refused_memory(subject):
                yield
        except MemoryLimitError:
            release_free_memory()
            raise

    async def _divide(self, tokens: int, kv_bytes: int, context: int, logits: int = 1) -> None:
        """Divide the memory limit for steps of ``tokens`` tokens and a KV store of some size."""
        reserved = (tokens, kv_bytes, logits)
        before = self._budget.left_for_weights(*self._reserved)
        left = self._budget.left_for_weights(*reserved)
        if left is None or before is None or left == before:
            return
        if left > before:
            release_free_memory()  # for the weights
        try:
            await self.streamer.set_budget(left)
        except MemoryLimitError as exc:
            raise MemoryLimitError(
                f"rank {self.comm.rank}: {context} tokens of context need "
                f"{format_bytes(kv_bytes)} of KV cache, and then {exc}; {self._advice(context)}, "
                "or shorten the conversation"
            ) from exc
        self._reserved = reserved


def _validate_tree(segment: Segment, cached: int) -> None:
    """Validate a segment's tree of guesses, and what it keeps of the last one.

    Raises:
        TransportError: out of range; names what.
    """
    parents, keep = segment.parents, segment.keep
    first = segment.tokens - len(parents)
    if parents and not (
        segment.tokens <= MOST_TREE_ROWS
        and first >= 1
        and all(1 <= back <= row for row, back in enumerate(parents, first))
    ):
        raise TransportError(
            f"step with a tree of {segment.tokens} tokens and parents {parents}: expected at most "
            f"{MOST_TREE_ROWS} tokens, each parent before its child"
        )
    if not keep:
        return
    start = segment.position - len(keep)
    ascending = all(low < high for low, high in pairwise(keep))
    if segment.source is not None or start < 0 or not ascending or start + keep[-1] >= cached:
        raise TransportError(
            f"step that keeps {keep} from position {start} on: expected ascending numbers of the "
            f"{cached} cached positions"
        )
