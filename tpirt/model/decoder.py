"""The decoder, one rank of it: every family, every world size, streamed or resident.

Axes: T tokens, H hidden, Q local query heads, K local KV heads, D head_dim, I local MLP columns.
The residual stream and the partial sums are float32; matrix products run in the weights' dtype.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
import torch.nn.functional as F

from tpirt.collectives.base import Communicator, StepAborted
from tpirt.config import ModelConfig
from tpirt.model.kv_cache import KVCache
from tpirt.ops.nn import ACTIVATIONS, attention, gated_mlp, rms_norm
from tpirt.ops.quant_linear import KernelChoice, MatrixShape, QuantMatrix, linear
from tpirt.ops.rope import inverse_frequencies, rotate, rotation
from tpirt.parallel.partition import Shard
from tpirt.stopwatch import Stopwatch
from tpirt.weights.layout import Weights

_T = TypeVar("_T")

# Up to this many tokens a block is computed inside the event loop: handing over to a thread and
# back costs more than it frees. Longer ones go to a thread, so that the loop stays responsive.
_INLINE_TOKENS = 8


class WeightSource(Protocol):
    """Where blocks come from; :class:`tpirt.weights.window.Window` is one."""

    async def acquire(self, index: int) -> Weights:
        """Wait for a block's tensors."""

    def release(self, index: int) -> None:
        """Give them back."""


class Decoder:
    """Runs steps: hidden states of T tokens in, reduced hidden states of all layers out."""

    def __init__(
        self,
        config: ModelConfig,
        shard: Shard,
        dtype: torch.dtype,
        weights: WeightSource,
        comm: Communicator,
        kernels: Mapping[MatrixShape, KernelChoice],
    ):
        self.config = config
        self.clock = Stopwatch()
        self.aborted = False  # set from outside to give the running step up
        self.kv = KVCache(config.num_hidden_layers, shard.kv_heads.size, config.head_dim, dtype)
        self._shard = shard
        self._dtype = dtype
        self._weights = weights
        self._comm = comm
        self._kernels = kernels
        self._groups = _group_sizes(config, shard)
        self._activation = ACTIVATIONS[config.hidden_act]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tpirt-compute")

    async def forward(
        self, hidden: torch.Tensor, start: int, rope_length: int
    ) -> torch.Tensor | None:
        """Run all layers over new tokens.

        Positions from ``start`` on are forgotten first; when the step fails or is aborted, the
        cache is left with the positions before ``start``.

        Args:
            hidden: (T, H) float32, the same bits on every rank; overwritten.
            start: position of the first token.
            rope_length: sequence length that dynamic rope scaling is computed for.

        Returns:
            (T, H) float32 before the final norm on rank 0, None on the others.

        Raises:
            StepAborted: ``aborted`` was set, or the master gave the step up.
            TpirtError: weights could not be read or another rank is lost.
        """
        tokens = hidden.shape[0]
        frequencies = inverse_frequencies(self.config, rope_length)
        self._cos, self._sin = rotation(frequencies, start, tokens, self._dtype)
        self.kv.truncate(start)
        self.kv.reserve(start + tokens)
        last = self.config.num_hidden_layers - 1
        for layer in range(last + 1):
            partial = await self._block(2 * layer, self._attention, layer, hidden)
            hidden += await self._comm.all_reduce(partial)
            partial = await self._block(2 * layer + 1, self._mlp, layer, hidden)
            if layer < last:
                hidden += await self._comm.all_reduce(partial)
        reduced = await self._comm.reduce(partial)
        self.kv.advance(tokens)
        return None if reduced is None else hidden.add_(reduced)

    async def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the final norm and the LM head, rank 0 only.

        Args:
            hidden: (T, H) float32, as :meth:`forward` returned it.

        Returns:
            (T, V) float32.
        """
        first = 2 * self.config.num_hidden_layers
        parts: list[torch.Tensor] = []
        rows = index = 0
        while rows < self.config.vocab_size:
            part = await self._block(first + index, self._head, index, hidden)
            parts.append(part)
            rows += part.shape[1]
            index += 1
        return torch.cat(parts, dim=1)

    def close(self) -> None:
        """End the compute thread."""
        self._thread.shutdown()

    async def _block(
        self,
        index: int,
        compute: Callable[[Weights, int, torch.Tensor], torch.Tensor],
        number: int,
        hidden: torch.Tensor,
    ) -> torch.Tensor:
        if self.aborted:
            raise StepAborted
        tensors = await self._weights.acquire(index)
        try:
            return await self._run(lambda: compute(tensors, number, hidden), hidden.shape[0])
        finally:
            self._weights.release(index)

    async def _run(self, compute: Callable[[], _T], tokens: int) -> _T:
        with self.clock.running():
            if tokens <= _INLINE_TOKENS:
                return compute()
            return await asyncio.get_running_loop().run_in_executor(self._thread, compute)

    def _attention(self, w: Weights, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        config, shard = self.config, self._shard
        x = _norm(w, hidden, "norm", config.rms_norm_eps).to(self._dtype)
        qkv = self._project(x, w, "qkv_proj")  # (T, (Q + 2 K) D)
        heads = qkv.view(len(x), -1, config.head_dim).transpose(0, 1)  # (Q + 2 K, T, D)
        queries, keys = shard.q_heads.size, shard.kv_heads.size
        q, k, v = torch.split(heads, [queries, keys, keys])
        if config.qk_norm:
            q = _norm(w, q, "q_norm", config.rms_norm_eps).to(self._dtype)
            k = _norm(w, k, "k_norm", config.rms_norm_eps).to(self._dtype)
        q, k = rotate(q, self._cos, self._sin), rotate(k, self._cos, self._sin)
        k, v = self.kv.append(layer, k, v)
        out = attention(q, k, v, self._groups, config.sliding_windows[layer])
        flat = out.transpose(0, 1).reshape(len(x), -1)  # (T, Q D)
        return self._project(flat, w, "o_proj").float()

    def _mlp(self, w: Weights, _: int, hidden: torch.Tensor) -> torch.Tensor:
        x = _norm(w, hidden, "norm", self.config.rms_norm_eps).to(self._dtype)
        gate_up = self._project(x, w, "gate_up_proj")  # (T, 2 I)
        x = gated_mlp(gate_up, self._activation)
        return self._project(x, w, "down_proj").float()

    def _head(self, w: Weights, number: int, hidden: torch.Tensor) -> torch.Tensor:
        if number == 0:
            self._normed = _norm(w, hidden, "norm", self.config.rms_norm_eps)
        return self._project(self._normed.to(self._dtype), w, "lm_head").float()

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
