"""One rank at work: its window, its decoder and its memory limit, on master and workers alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tpirt.cluster.kernels import choose_kernels
from tpirt.cluster.machine import int4_layout, peak_resident_bytes, resident_bytes
from tpirt.collectives.base import Communicator
from tpirt.config import ModelConfig
from tpirt.errors import MemoryLimitError, StoreError, TransportError
from tpirt.model.decoder import Decoder
from tpirt.model.memory import SLACK_BYTES, activation_bytes
from tpirt.parallel.sharding import rank_blocks
from tpirt.types import ProgressCallback, RankStats
from tpirt.units import format_bytes
from tpirt.weights.store import StoredSlice
from tpirt.weights.window import MIN_SLOTS, Window


@dataclass(frozen=True)
class Limits:
    """Bounds of one rank; None means no bound. ``memory_bytes`` is of the whole process."""

    window_blocks: int | None
    memory_bytes: int | None
    chunk_tokens: int
    timeout_s: float


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
        self.comm = comm
        self._config = config
        self._limits = limits
        manifest = stored.manifest
        form = manifest.form
        _check_layout(stored)
        _warm_up(form.dtype)
        blocks = rank_blocks(config, manifest.shard, form)
        kernels = choose_kernels(stored.path, blocks)
        self._fixed_bytes = (
            resident_bytes()
            + SLACK_BYTES
            + activation_bytes(config, manifest.shard, comm.world_size, limits.chunk_tokens)
        )
        try:
            self.window = Window(
                stored,
                blocks,
                max_blocks=limits.window_blocks,
                budget_bytes=self._budget(0),
            )
        except MemoryLimitError as exc:
            raise self._too_little(exc, max(block.nbytes for block in blocks)) from exc
        self.decoder = Decoder(config, manifest.shard, form.dtype, self.window, comm, kernels)

    def check_step(self, start: int, tokens: int, rope_length: int) -> None:
        """Refuse a step that no master in its senses asks for.

        Raises:
            TransportError: names what is wrong.
        """
        context, cached = self._config.context_length, self.decoder.kv.length
        if not 1 <= tokens <= self._limits.chunk_tokens:
            raise TransportError(
                f"step of {tokens} tokens: expected 1 to {self._limits.chunk_tokens}"
            )
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

    async def step(
        self, step: int, hidden: torch.Tensor, start: int, rope_length: int
    ) -> torch.Tensor | None:
        """Run all layers over ``hidden`` (T, H) float32; see :meth:`Decoder.forward`.

        Raises:
            MemoryLimitError: the longer KV cache no longer fits beside two blocks.
        """
        self._make_room(start + hidden.shape[0])
        self.comm.begin(step)
        return await self.decoder.forward(hidden, start, rope_length)

    def stats(self, reset: bool = False) -> RankStats:
        """Measure since the last reset; see :class:`tpirt.types.RankStats`."""
        stats = RankStats(
            rank=self.comm.rank,
            peak_rss_bytes=peak_resident_bytes(),
            weights_bytes=self.window.weights_bytes,
            bytes_read=self.window.bytes_read,
            io_ms=self.window.clock.seconds * 1e3,
            compute_ms=self.decoder.clock.seconds * 1e3,
            comm_ms=self.comm.clock.seconds * 1e3,
        )
        if reset:
            self.window.bytes_read = 0
            for clock in (self.window.clock, self.decoder.clock, self.comm.clock):
                clock.seconds = 0.0
        return stats

    async def aclose(self) -> None:
        """Stop the threads and let go of the memory."""
        self.decoder.close()
        await self.window.aclose()

    def _budget(self, kv_bytes: int) -> int | None:
        limit = self._limits.memory_bytes
        return None if limit is None else limit - self._fixed_bytes - kv_bytes

    def _too_little(self, exc: MemoryLimitError, block_bytes: int) -> MemoryLimitError:
        limit, rank = self._limits.memory_bytes, self.comm.rank
        if limit is None:
            return MemoryLimitError(f"rank {rank}: {exc}")
        needed = self._fixed_bytes + MIN_SLOTS * block_bytes
        return MemoryLimitError(
            f"rank {rank}: of the memory limit of {format_bytes(limit)}, "
            f"{format_bytes(self._fixed_bytes)} go to the process and a step's work; {exc}; "
            f"raise --memory to at least {format_bytes(needed)}, and some for the conversation"
        )

    def _make_room(self, tokens: int) -> None:
        """Let the KV cache grow at the expense of pinned blocks, never of the limit."""
        kv = self.decoder.kv
        needed = kv.bytes_for(tokens)
        budget = self._budget(needed)
        if budget is None or needed == kv.nbytes:
            return
        try:
            self.window.set_budget(budget)
        except MemoryLimitError as exc:
            raise MemoryLimitError(
                f"rank {self.comm.rank}: {tokens} tokens of context need {format_bytes(needed)} "
                f"of KV cache, and then {exc}; raise --memory or shorten the conversation"
            ) from exc


def _check_layout(stored: StoredSlice) -> None:
    """The kernel cannot tell codes in another order from its own: it would compute nonsense."""
    form, mine = stored.manifest.form, int4_layout()
    if form.quant.kind == "int4" and form.layout != mine:
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
