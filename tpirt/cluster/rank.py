"""One rank at work: its window, its decoder and its memory limit, on master and workers alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tpirt.batch import DEFAULT_COLLECTIVE, Collective
from tpirt.cluster.kernels import choose_kernels
from tpirt.cluster.machine import int4_layout, peak_resident_bytes, resident_bytes
from tpirt.cluster.stats import StepLog
from tpirt.collectives.base import Communicator, TimedCommunicator
from tpirt.config import ModelConfig
from tpirt.errors import MemoryLimitError, StoreError, TransportError
from tpirt.model.decoder import Decoder
from tpirt.model.memory import SLACK_BYTES, activation_bytes
from tpirt.sharding.blocks import mlp_pieces, rank_blocks
from tpirt.stopwatch import Recorder
from tpirt.types import ProgressCallback, RankStats
from tpirt.units import format_bytes
from tpirt.weights.store import StoredSlice
from tpirt.weights.streamer import MIN_SLOTS, WeightStreamer


@dataclass(frozen=True)
class Limits:
    """Bounds of one rank; None means no bound. ``memory_bytes`` is of the whole process.

    ``trace_spans`` is how many spans each lane of a trace may hold; 0 for no trace.
    """

    window_blocks: int | None
    memory_bytes: int | None
    chunk_tokens: int
    timeout_s: float
    trace_spans: int = 0


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
        _warm_up(form.dtype)
        blocks = rank_blocks(config, manifest.shard, form)
        kernels = choose_kernels(stored.path, blocks)
        self._shard = manifest.shard
        self._base_bytes = resident_bytes() + SLACK_BYTES
        self._reserved = (self._work_bytes(limits.chunk_tokens), 0)
        try:
            self.window = WeightStreamer(
                stored,
                blocks,
                max_blocks=limits.window_blocks,
                budget_bytes=self._budget(*self._reserved),
                recorder=self.recorder,
            )
        except MemoryLimitError as exc:
            raise self._too_little(exc, max(file.nbytes for file in manifest.blocks)) from exc
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
        self._make_room(start, hidden.shape[0])
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
        """Stop the threads and let go of the memory."""
        self.decoder.close()
        await self.window.aclose()

    def _work_bytes(self, tokens: int) -> int:
        """What a step of about so many tokens takes: of few sizes, so that plans rarely change."""
        rounded = 1 << (tokens - 1).bit_length()
        return activation_bytes(
            self._config,
            self._shard,
            self.comm.world_size,
            min(rounded, self._limits.chunk_tokens),
        )

    def _budget(self, work_bytes: int, kv_bytes: int) -> int | None:
        limit = self._limits.memory_bytes
        return None if limit is None else limit - self._base_bytes - work_bytes - kv_bytes

    def _too_little(self, exc: MemoryLimitError, block_bytes: int) -> MemoryLimitError:
        limit, rank = self._limits.memory_bytes, self.comm.rank
        if limit is None:
            return MemoryLimitError(f"rank {rank}: {exc}")
        fixed = self._base_bytes + self._reserved[0]
        needed = fixed + MIN_SLOTS * block_bytes
        return MemoryLimitError(
            f"rank {rank}: of the memory limit of {format_bytes(limit)}, "
            f"{format_bytes(fixed)} go to the process and a step's work; {exc}; "
            f"raise --memory to at least {format_bytes(needed)}, and some for the conversation"
        )

    def _make_room(self, start: int, tokens: int) -> None:
        """Let the step and the KV cache have what they need, at the expense of pinned blocks.

        A decoded token leaves a long prompt's working memory to the weights again.
        """
        kv_bytes = self.decoder.kv.bytes_for(start + tokens)
        reserved = (self._work_bytes(tokens), kv_bytes)
        budget = self._budget(*reserved)
        if budget is None or reserved == self._reserved:
            return
        try:
            self.window.set_budget(budget)
        except MemoryLimitError as exc:
            raise MemoryLimitError(
                f"rank {self.comm.rank}: {start + tokens} tokens of context need "
                f"{format_bytes(kv_bytes)} of KV cache, and then {exc}; raise --memory or shorten "
                "the conversation"
            ) from exc
        self._reserved = reserved


def _check_layout(stored: StoredSlice) -> None:
    """The kernel cannot tell codes in another order from its own: it would compute nonsense."""
    form, mine = stored.manifest.form, int4_layout()
    if form.quant.uses_layout and form.layout != mine:
        raise StoreError(
            f"{stored.path}: its weights are laid out for a CPU of layout {form.layout.name}, "
            f"this one wants {mine.name}; remove it, and have the slice made for this machine"
        )


def _warm_up(dtype: torch.dtype) -> None:
    """Have torch's kernels allocate what they keep, so that it counts as this process's base."""
    x = torch.ones(16, 64, dtype=dtype)
    x = F.silu(F.linear(x, torch.ones(64, 64, dtype=dtype)))
    heads = x.view(1, 1, 16, 64)
    F.scaled_dot_product_attention(heads, heads, heads, is_causal=True).float().sum().item()
