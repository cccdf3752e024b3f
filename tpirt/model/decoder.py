"""The decoder, one rank of it: every family, every world size, streamed or resident.

Axes: T tokens, H hidden, Q local query heads, K local KV heads, D head_dim, I MLP columns of
a block. The residual stream and the partial sums are float32; matrix products run in the weights'
dtype.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F

from tpirt.collectives.base import Communicator, StepAborted
from tpirt.config import ModelConfig
from tpirt.errors import PeerLostError, TransportError
from tpirt.model.kv_cache import KVCache
from tpirt.ops.nn import ACTIVATIONS, attention, gated_mlp, rms_norm
from tpirt.ops.quant_linear import KernelChoice, MatrixShape, QuantMatrix, linear
from tpirt.ops.rope import inverse_frequencies, rotate, rotation
from tpirt.parallel.partition import Shard
from tpirt.parallel.sharding import Block
from tpirt.stopwatch import COMPUTE, Recorder
from tpirt.weights.layout import Weights

# Up to this many tokens a block is computed inside the event loop: handing over to a thread and
# back costs more than it frees. Longer ones go to a thread, so that the loop stays responsive.
_INLINE_TOKENS = 8


class WeightSource(Protocol):
    """Where blocks come from; :class:`tpirt.weights.window.Window` is one."""

    blocks: Sequence[Block]

    async def acquire(self, index: int) -> Weights:
        """Wait for a block's tensors."""

    def release(self, index: int) -> None:
        """Give them back."""


_NOTHING = torch.empty(0)


@dataclass
class _Part:
    """Tokens that go through the layers together: a step's, or half of them.

    Attributes:
        hidden: (T, H) float32, the residual stream; of the ``outputs`` alone once no other token's
            is needed.
        outputs: how many of the last tokens the step's result is wanted of.
        offset: of the first token within the step.
        cos, sin: rotation of its positions.
        normed: what the pieces of an MLP or of the head multiply, (T, H).
        partial: what the last block made of it; of an MLP in pieces their sum so far, float32.
        pending: the sum over ranks that is under way.
    """

    hidden: torch.Tensor
    outputs: int = 0
    offset: int = 0
    cos: torch.Tensor = _NOTHING
    sin: torch.Tensor = _NOTHING
    normed: torch.Tensor = _NOTHING
    partial: torch.Tensor = _NOTHING
    pending: asyncio.Task[torch.Tensor] | None = None

    async def settle(self) -> None:
        """Wait for the sum that is under way, and add it."""
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self.hidden += await pending

    def narrow(self) -> None:
        """Go on with the outputs alone."""
        self.hidden = self.hidden[len(self.hidden) - self.outputs :]


async def _settle(parts: Sequence[_Part], exc: BaseException) -> None:
    """Leave no sum behind when a step fails: the others' messages of it must be read, or never.

    Where a peer is lost, nothing more can be relied on to come.
    """
    pending = [part.pending for part in parts if part.pending is not None]
    if isinstance(exc, (PeerLostError, TransportError)):
        for task in pending:
            task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


class Decoder:
    """Runs steps: hidden states of T tokens in, those of the last N behind all layers out."""

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        mlp_pieces: int,
        dtype: torch.dtype,
        weights: WeightSource,
        comm: Communicator,
        kernels: Mapping[MatrixShape, KernelChoice],
        recorder: Recorder,
    ):
        self.config = config
        self.clock = recorder.stopwatch(COMPUTE)
        self.aborted = False  # set from outside to give the running step up
        self.kv = KVCache(config.num_hidden_layers, shard.kv_heads.size, config.head_dim, dtype)
        self._shard = shard
        self._dtype = dtype
        self._weights = weights
        self._comm = comm
        self._kernels = kernels
        self._groups = _group_sizes(config, shard)
        self._mlp_pieces = mlp_pieces
        self._activation = ACTIVATIONS[config.hidden_act]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tpirt-compute")

    async def forward(
        self,
        hidden: torch.Tensor,
        start: int,
        rope_length: int,
        outputs: int,
        halves: bool = False,
    ) -> torch.Tensor | None:
        """Run all layers over new tokens.

        Positions from ``start`` on are forgotten first; when the step fails or is aborted, the
        cache is left with the positions before ``start``. Of the last layer, tokens before the
        outputs need no more than their keys and values.

        Args:
            hidden: (T, H) float32, the same bits on every rank; overwritten.
            start: position of the first token.
            rope_length: sequence length that dynamic rope scaling is computed for.
            outputs: N, how many of the last tokens' results are wanted, at least 1.
            halves: take the tokens in two halves, and compute one while the other's sum is under
                way. Which of two products a token is in can change its last bits.

        Returns:
            (N, H) float32 before the final norm on rank 0, None on the others.

        Raises:
            StepAborted: ``aborted`` was set, or the master gave the step up.
            TpirtError: weights could not be read or another rank is lost.
        """
        tokens = hidden.shape[0]
        frequencies = inverse_frequencies(self.config, rope_length)
        cos, sin = rotation(frequencies, start, tokens, self._dtype)
        self.kv.truncate(start)
        self.kv.reserve(start + tokens)
        cuts = [0, tokens // 2, tokens] if halves and tokens > 1 else [0, tokens]
        first = tokens - outputs  # of those that are wanted
        parts = [
            _Part(
                hidden[low:high], max(0, high - max(low, first)), low, cos[low:high], sin[low:high]
            )
            for low, high in pairwise(cuts)
        ]
        try:
            await self._layers(parts)
        except BaseException as exc:
            await _settle(parts, exc)
            raise
        partials = [part.partial for part in parts if part.outputs]
        reduced = await self._comm.reduce(
            partials[0] if len(partials) == 1 else torch.cat(partials)
        )
        self.kv.advance(tokens)
        return None if reduced is None else hidden[first:].add_(reduced)

    async def _layers(self, parts: Sequence[_Part]) -> None:
        """Run all layers; the last one's partials stay in ``parts``, not summed over ranks."""
        last_layer, last_piece = self.config.num_hidden_layers - 1, self._mlp_pieces - 1
        for layer in range(last_layer + 1):
            first = layer * (1 + self._mlp_pieces)
            await self._block(first, self._attention, layer, parts, summed=True)
            if layer == last_layer:
                parts = [part for part in parts if part.outputs]
            for piece in range(self._mlp_pieces):
                summed = piece == last_piece and layer < last_layer
                await self._block(first + 1 + piece, self._mlp, piece, parts, summed=summed)

    async def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the final norm and the LM head, rank 0 only.

        Args:
            hidden: (T, H) float32, as :meth:`forward` returned it.

        Returns:
            (T, V) float32.
        """
        index = self.config.num_hidden_layers * (1 + self._mlp_pieces)
        rows = _Part(hidden)
        parts: list[torch.Tensor] = []
        while sum(part.shape[1] for part in parts) < self.config.vocab_size:
            await self._block(index + len(parts), self._head, len(parts), [rows], summed=False)
            parts.append(rows.partial)
        return torch.cat(parts, dim=1)

    def close(self) -> None:
        """End the compute thread."""
        self._thread.shutdown()

    async def _block(
        self,
        index: int,
        compute: Callable[[Weights, int, _Part], torch.Tensor],
        number: int,
        parts: Sequence[_Part],
        *,
        summed: bool,
    ) -> None:
        """Let every part through a block, and sum what comes out over ranks if it is to be.

        Of several parts, one is computed while the other's sum is under way; it is added when the
        part's turn comes again.
        """
        if self.aborted:
            raise StepAborted
        tensors = await self._weights.acquire(index)
        try:
            for part in parts:
                await part.settle()
                with self.clock.running(self._weights.blocks[index].name, number=index):
                    if part.hidden.shape[0] <= _INLINE_TOKENS:
                        part.partial = compute(tensors, number, part)
                    else:
                        loop = asyncio.get_running_loop()
                        part.partial = await loop.run_in_executor(
                            self._thread, compute, tensors, number, part
                        )
                if summed and len(parts) > 1 and len(part.partial):
                    part.pending = asyncio.create_task(self._comm.all_reduce(part.partial))
        finally:
            self._weights.release(index)
        if summed and len(parts) == 1:
            parts[0].hidden += await self._comm.all_reduce(parts[0].partial)

    def _attention(self, w: Weights, layer: int, part: _Part) -> torch.Tensor:
        config, shard = self.config, self._shard
        x = _norm(w, part.hidden, "norm", config.rms_norm_eps).to(self._dtype)
        qkv = self._project(x, w, "qkv_proj")  # (T, (Q + 2 K) D)
        heads = qkv.view(len(x), -1, config.head_dim).transpose(0, 1)  # (Q + 2 K, T, D)
        queries, keys = shard.q_heads.size, shard.kv_heads.size
        turning, v = torch.split(heads, [queries + keys, keys])  # queries and keys, then values
        if config.qk_norm:
            q, k = torch.split(turning, [queries, keys])
            q = _norm(w, q, "q_norm", config.rms_norm_eps)
            k = _norm(w, k, "k_norm", config.rms_norm_eps)
            turning = torch.cat((q, k)).to(self._dtype)
        q, k = torch.split(rotate(turning, part.cos, part.sin), [queries, keys])
        k, v = self.kv.append(layer, k, v, part.offset)
        if layer == config.num_hidden_layers - 1:
            part.narrow()
            if not part.outputs:
                return part.hidden
            q = q[:, len(x) - part.outputs :]
        out = attention(q, k, v, self._groups, config.sliding_windows[layer])
        flat = out.transpose(0, 1).reshape(len(part.hidden), -1)  # (T, Q D)
        return self._project(flat, w, "o_proj")

    def _mlp(self, w: Weights, piece: int, part: _Part) -> torch.Tensor:
        if piece == 0:
            part.normed = self._normed(w, part)
        gate_up = self._project(part.normed, w, "gate_up_proj")  # (T, 2 I)
        x = gated_mlp(gate_up, self._activation)
        out = self._project(x, w, "down_proj")
        if self._mlp_pieces == 1:
            return out
        return out.float() if piece == 0 else part.partial.add_(out)

    def _head(self, w: Weights, number: int, part: _Part) -> torch.Tensor:
        if number == 0:
            part.normed = self._normed(w, part)
        return self._project(part.normed, w, "lm_head").float()

    def _normed(self, w: Weights, part: _Part) -> torch.Tensor:
        return _norm(w, part.hidden, "norm", self.config.rms_norm_eps).to(self._dtype)

    def _project(self, x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
        """``x W^T + b`` with weights in whatever form they are stored; x's dtype."""
        weight, bias = w[f"{name}.weight"], _plain(w, f"{name}.bias")
        if isinstance(weight, torch.Tensor):
            return F.linear(x, weight, bias)
        out = linear(x, weight, self._kernels[weight.shape])
        return out if bias is None else out.add_(bias)


def _plain(w: Weights, name: str) -> torch.Tensor | None:
    """A tensor that is never quantized: a norm or a bias; None if the block has none."""
    tensor = w.get(name)
    assert not isinstance(tensor, QuantMatrix)
    return tensor


def _norm(w: Weights, x: torch.Tensor, name: str, eps: float) -> torch.Tensor:
    weight = _plain(w, f"{name}.weight")
    assert weight is not None
    return rms_norm(x, weight, eps)


def _group_sizes(config: ModelConfig, shard: Shard) -> list[int]:
    """Number of local query heads that read each local KV head."""
    group = config.num_attention_heads // config.num_key_value_heads
    sizes = [0] * shard.kv_heads.size
    for head in range(*shard.q_heads):
        sizes[head // group - shard.kv_heads.start] += 1
    return sizes
