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

from tpirt.collectives.base import Communicator
from tpirt.collectives.context import StepAborted
from tpirt.config import ModelConfig
from tpirt.errors import PeerLostError, TransportError
from tpirt.model.kv_cache import KVCache
from tpirt.ops.nn import ACTIVATIONS, attention, gated_mlp, rms_norm
from tpirt.ops.quant_linear import ROWS_UNIT, KernelChoice, MatrixShape, QuantMatrix, linear
from tpirt.ops.rope import inverse_frequencies, rotate, rotation
from tpirt.sharding.blocks import Block
from tpirt.sharding.partition import Shard, Span
from tpirt.stopwatch import COMPUTE, Recorder
from tpirt.weights.layout import Weights

# Up to this many tokens a block is computed inside the event loop: handing over to a thread and
# back costs more than it frees. Longer ones go to a thread, so that the loop stays responsive.
_INLINE_TOKENS = 8


class WeightSource(Protocol):
    """Where blocks come from; :class:`tpirt.weights.streamer.WeightStreamer` is one."""

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
        arriving: the broadcast that fills ``hidden``, where it does not come with the step.
        pending: the sum over ranks that is under way.
    """

    hidden: torch.Tensor
    outputs: int = 0
    offset: int = 0
    cos: torch.Tensor = _NOTHING
    sin: torch.Tensor = _NOTHING
    normed: torch.Tensor = _NOTHING
    partial: torch.Tensor = _NOTHING
    arriving: asyncio.Task[None] | None = None
    pending: asyncio.Task[torch.Tensor] | None = None

    async def settle(self) -> None:
        """Wait for what is under way, and add it if it is a sum."""
        if self.arriving is not None:
            arriving, self.arriving = self.arriving, None
            await arriving
            self.hidden = self.hidden.float()
        if self.pending is not None:
            pending, self.pending = self.pending, None
            self.hidden += await pending

    def narrow(self) -> None:
        """Go on with the outputs alone."""
        self.hidden = self.hidden[len(self.hidden) - self.outputs :]


_Compute = Callable[[Weights, int, _Part], torch.Tensor]


@dataclass(frozen=True, slots=True)
class _Stage:
    """What a part does with a block in one go.

    Attributes:
        block: index of the block.
        compute, number: makes the part's partial; the number is its own second argument.
        summed: whether partials are then summed over ranks.
        leaves: whether the part is done with the block.
    """

    block: int
    compute: _Compute
    number: int
    summed: bool = False
    leaves: bool = True


async def _settle(parts: Sequence[_Part], exc: BaseException) -> None:
    """Leave no sum behind when a step fails: the others' messages of it must be read, or never.

    Where a peer is lost, nothing more can be relied on to come.
    """
    pending = [task for part in parts for task in (part.arriving, part.pending) if task is not None]
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
        self._mlp_rows = 2 * shard.columns.size  # of gate and up together
        self._mlp_cut = self._mlp_rows * 3 // 4 // ROWS_UNIT * ROWS_UNIT
        self._activation = ACTIVATIONS[config.hidden_act]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tpirt-compute")
        self._whole_stages = self._stages(halves=False)
        self._half_stages = self._stages(halves=True)

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
            hidden: (T, H) float32 or bfloat16, the same bits on every rank; overwritten. With
                ``halves`` only rank 0's count, and the others' are filled with them.
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
        for part in parts:
            if halves:
                part.arriving = asyncio.create_task(self._comm.broadcast(part.hidden))
            else:
                part.hidden = part.hidden.float()
        try:
            await self._run(self._half_stages if halves else self._whole_stages, parts)
        except BaseException as exc:
            await _settle(parts, exc)
            raise
        wanted = [part for part in parts if part.outputs]
        reduced = await self._comm.reduce(_joined([part.partial for part in wanted]))
        self.kv.advance(tokens)
        return None if reduced is None else _joined([p.hidden for p in wanted]).add_(reduced)

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
            stage = _Stage(index + len(parts), self._head, len(parts))
            await self._run([stage], [rows])
            parts.append(rows.partial)
        return torch.cat(parts, dim=1)

    def close(self) -> None:
        """End the compute thread."""
        self._thread.shutdown()
        self._whole_stages.clear()  # they refer to this decoder, and so to its keys and values
        self._half_stages.clear()

    def _stages(self, halves: bool) -> list[_Stage]:
        """List the stages of all layers; the last one's partials are left for :meth:`forward`.

        Halves need two stages of every MLP at least: see :meth:`_run`.
        """
        stages: list[_Stage] = []
        for layer in range(self.config.num_hidden_layers):
            block = layer * (1 + self._mlp_pieces)
            summed = layer < self.config.num_hidden_layers - 1
            stages.append(_Stage(block, self._attention, layer, summed=True))
            if halves and self._mlp_pieces == 1:
                stages.append(_Stage(block + 1, self._mlp_begin, 0, leaves=False))
                stages.append(_Stage(block + 1, self._mlp_end, 0, summed=summed))
                continue
            for piece in range(self._mlp_pieces):
                last = piece == self._mlp_pieces - 1
                stages.append(_Stage(block + 1 + piece, self._mlp, piece, summed=summed and last))
        return stages

    async def _run(self, stages: Sequence[_Stage], parts: Sequence[_Part]) -> None:
        """Let every part through all stages, each one stage behind the part before it.

        While a part's sum is under way the other computes. Were both at the same stage, the sum
        of an attention, the shortest of all, would have but the other's attention to hide behind;
        so it has a piece of an MLP. Every rank sums in the same order, in however many pieces its
        MLPs are, if they are two at least.
        """
        in_use: dict[int, Weights] = {}
        try:
            for at in range(len(stages) + len(parts) - 1):
                for behind, part in enumerate(parts):
                    # A part without outputs has nothing left to do in the last layer.
                    if 0 <= at - behind < len(stages) and len(part.hidden):
                        await self._stage(stages[at - behind], part, parts, in_use)
        finally:
            for block in in_use:
                self._weights.release(block)

    async def _stage(
        self,
        stage: _Stage,
        part: _Part,
        parts: Sequence[_Part],
        in_use: dict[int, Weights],
    ) -> None:
        if self.aborted:
            raise StepAborted
        block = stage.block
        if block not in in_use:
            in_use[block] = await self._weights.acquire(block)
        tensors = in_use[block]
        await part.settle()
        with self.clock.running(self._weights.blocks[block].name, number=block):
            if len(part.hidden) <= _INLINE_TOKENS:
                part.partial = stage.compute(tensors, stage.number, part)
            else:
                part.partial = await asyncio.get_running_loop().run_in_executor(
                    self._thread, stage.compute, tensors, stage.number, part
                )
        if stage.leaves and part is parts[-1]:
            self._weights.release(block)
            del in_use[block]
        if not stage.summed or not len(part.partial):
            return
        if len(parts) == 1:
            part.hidden += await self._comm.all_reduce(part.partial)
        else:
            part.pending = asyncio.create_task(self._comm.all_reduce(part.partial))

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

    def _mlp_begin(self, w: Weights, _: int, part: _Part) -> torch.Tensor:
        """About half of an MLP's work: three quarters of the first of two products."""
        part.normed = self._normed(w, part)
        return self._project(part.normed, w, "gate_up_proj", Span(0, self._mlp_cut))

    def _mlp_end(self, w: Weights, _: int, part: _Part) -> torch.Tensor:
        """The rest of it."""
        rest = Span(self._mlp_cut, self._mlp_rows)
        others = self._project(part.normed, w, "gate_up_proj", rest)
        gate_up = torch.cat((part.partial, others), dim=1)
        return self._project(gated_mlp(gate_up, self._activation), w, "down_proj")

    def _head(self, w: Weights, number: int, part: _Part) -> torch.Tensor:
        if number == 0:
            part.normed = self._normed(w, part)
        return self._project(part.normed, w, "lm_head").float()

    def _normed(self, w: Weights, part: _Part) -> torch.Tensor:
        return _norm(w, part.hidden, "norm", self.config.rms_norm_eps).to(self._dtype)

    def _project(
        self, x: torch.Tensor, w: Weights, name: str, rows: Span | None = None
    ) -> torch.Tensor:
        """``x W^T + b`` with weights in whatever form they are stored; x's dtype.

        With ``rows``, which begin at a multiple of ``ROWS_UNIT``, of these outputs only.
        """
        weight, bias = w[f"{name}.weight"], _plain(w, f"{name}.bias")
        if rows is not None and bias is not None:
            bias = bias[slice(*rows)]
        if isinstance(weight, torch.Tensor):
            return F.linear(x, weight if rows is None else weight[slice(*rows)], bias)
        kernel = self._kernels[weight.shape]
        out = linear(x, weight if rows is None else weight.part(*rows), kernel)
        return out if bias is None else out.add_(bias)


def _joined(rows: list[torch.Tensor]) -> torch.Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(rows)


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
