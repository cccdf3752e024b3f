"""One rank at work: its window, its decoder and its memory limit, on master and workers alike."""

from __future__ import annotations

import torch

from tpirt.batch import DEFAULT_COLLECTIVE, Collective
from tpirt.cluster.kernels import choose_kernels
from tpirt.cluster.machine import (
    base_bytes,
    int4_layout,
    peak_resident_bytes,
    release_free_memory,
)
from tpirt.cluster.stats import StepLog
from tpirt.collectives.base import Communicator, TimedCommunicator
from tpirt.config import ModelConfig
from tpirt.errors import MemoryLimitError, StoreError, TransportError
from tpirt.model.decoder import Decoder
from tpirt.planning import Limits, MemoryBudget, format_limit
from tpirt.sharding.blocks import mlp_pieces, rank_blocks
from tpirt.stopwatch import Recorder
from tpirt.types import ProgressCallback, RankStats
from tpirt.units import format_bytes
from tpirt.weights.store import StoredSlice
from tpirt.weights.streamer import WeightStreamer


class RankRuntime:
    """Executes steps for one rank of one session."""

    def __init__(
        self, config: ModelConfig, stored: StoredSlice, comm: Communicator, limits: Limits
    ):
        """Begin reading weights.

        Raises:
            MemoryLimitError: the limit is below what two blocks and a step need.
            StoreError: the slice's 4-bit codes are in another CPU's order.
        """
        self.recorder = Recorder(limits.trace_spans)
        self.comm = TimedCommunicator(comm, self.recorder)
        self._config = config
        self._limits = limits
        manifest = stored.manifest
        form = manifest.form
        _check_layout(stored)
        self._budget = MemoryBudget.of(
            config, manifest.shard, comm.world_size, form, base_bytes(), limits
        )
        self._reserved = (limits.chunk_tokens, 0)  # tokens of a step, bytes of keys and values
        blocks = rank_blocks(config, manifest.shard, form)
        kernels = choose_kernels(stored.path, blocks)
        release_free_memory()  # of trying kernels
        try:
            self.window = WeightStreamer(
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
            len(mlp_pieces(config, manifest.shard, form)),
            form.dtype,
            self.window,
            self.comm,
            kernels,
            self.recorder,
        )
        self.step_log = StepLog(
            self.decoder.clock, self.window.clock, self.comm.clock, self.recorder
        )
        self._base = (0, 0)  # bytes read and nanoseconds of reading at the last reset

    def check_step(self, start: int, tokens: int, rope_length: int, outputs: int) -> None:
        """Refuse a step that no master in its senses asks for.

        Raises:
            TransportError: names what is wrong.
        """
        context, cached = self._config.context_length, self.decoder.kv.length
        if not 1 <= tokens <= self._limits.chunk_tokens:
            raise TransportError(
                f"step of {tokens} tokens: expected 1 to {self._limits.chunk_tokens}"
            )
        if not 1 <= outputs <= tokens:
            raise TransportError(f"step of {tokens} tokens: results of {outputs} are wanted")
        if start > cached:
            raise TransportError(f"step at position {start}: only {cached} are cached")
        if start + tokens > context or rope_length > context:
            raise TransportError(
                f"step from {start} to {start + tokens} (rope {rope_length}): "
                f"the context ends at {context}"
            )

    async def load(self, progress: ProgressCallback) -> None:
        """Wait until what stays in memory is there.

        Raises:
            StoreError: a block could not be read.
        """
        await self.window.preload(progress, detail=f"rank {self.comm.rank}")

    def begin(
        self, step: int, tokens: int, prefill: bool, collective: Collective = DEFAULT_COLLECTIVE
    ) -> None:
        """Number the collectives that follow, and count what is done as this step's."""
        self.comm.begin(step, collective)
        self.step_log.begin(step, tokens, prefill)

    async def step(
        self,
        hidden: torch.Tensor,
        start: int,
        rope_length: int,
        outputs: int,
        halves: bool = False,
    ) -> torch.Tensor | None:
        """Run all layers over ``hidden`` (T, H); see :meth:`Decoder.forward`.

        Raises:
            MemoryLimitError: the longer KV cache no longer fits beside two blocks.
        """
        await self._make_room(start, hidden.shape[0], rope_length)
        try:
            return await self.decoder.forward(hidden, start, rope_length, outputs, halves)
        finally:
            self.step_log.end_layers()

    def stats(self, reset: bool = False) -> RankStats:
        """Measure since the last reset, after which there are no steps to tell of."""
        bytes_read, read_ns = self.window.bytes_read, self.window.reads.total_ns
        compute_ms, io_ms, comm_ms = self.step_log.totals_ms()
        stats = RankStats(
            rank=self.comm.rank,
            peak_rss_bytes=peak_resident_bytes(),
            weights_bytes=self.window.weights_bytes,
            bytes_read=bytes_read - self._base[0],
            io_ms=io_ms,
            compute_ms=compute_ms,
            comm_ms=comm_ms,
            read_ms=(read_ns - self._base[1]) / 1e6,
            steps=[] if reset else self.step_log.steps(),
        )
        if reset:
            self._base = (bytes_read, read_ns)
            self.step_log.reset()
        return stats

    async def aclose(self) -> None:
        """Stop the threads and return the memory to the system."""
        self.decoder.close()
        await self.window.aclose()
        del self.decoder  # its keys and values
        release_free_memory()

    def _too_little(self, exc: MemoryLimitError) -> MemoryLimitError:
        budget, rank = self._budget, self.comm.rank
        if budget.limits.memory_bytes is None:
            return MemoryLimitError(f"rank {rank}: {exc}")
        enough = format_limit(budget.advised_bytes())
        return MemoryLimitError(
            f"rank {rank}: {budget.shortage}; raise --memory to at least {enough}"
        )

    async def _make_room(self, start: int, tokens: int, rope_length: int) -> None:
        """Give the step and the KV cache what they need, and the weights the rest.

        The cache can need less than before; after a long prompt, so does a step. Resident blocks
        are given up, or read again, accordingly.
        """
        kv_bytes = self.decoder.kv.bytes_for(start + tokens)
        reserved = (tokens, kv_bytes)
        before = self._budget.left_for_weights(*self._reserved)
        left = self._budget.left_for_weights(*reserved)
        if left is None or before is None or left == before:
            return
        if left > before:
            release_free_memory()  # what steps and the cache no longer need is the weights' now
        try:
            await self.window.set_budget(left)
        except MemoryLimitError as exc:
            context = max(start + tokens, rope_length)
            raise MemoryLimitError(
                f"rank {self.comm.rank}: {start + tokens} tokens of context need "
                f"{format_bytes(kv_bytes)} of KV cache, and then {exc}; raise --memory to at least "
                f"{format_limit(self._budget.advised_bytes(context))}, or shorten the conversation"
            ) from exc
        self._reserved = reserved


def _check_layout(stored: StoredSlice) -> None:
    """The kernel cannot tell codes in another order from its own: it would compute nonsense."""
    form, mine = stored.manifest.form, int4_layout()
    if form.quant.kind == "int4" and form.layout != mine:
        raise StoreError(
            f"{stored.path}: its weights are laid out for a CPU of layout {form.layout.name}, "
            f"this one wants {mine.name}; remove it, and have the slice made for this machine"
        )
