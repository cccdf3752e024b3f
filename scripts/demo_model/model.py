"""The demo model: a small Llama, written out in plain torch.

Module names follow the Hugging Face checkpoint (`model.layers.0.self_attn.q_proj.weight`), so that
the state dict can be saved as it is. Shapes in comments: B rows, T tokens, N query heads, K
key/value heads, D head size, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WRITTEN_OUT = 384  # the longest row whose attention scores are written out


@dataclass(frozen=True)
class DemoConfig:
    """The sizes of the model, under their Hugging Face names."""

    vocab_size: int = 1280
    hidden_size: int = 192
    intermediate_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5


def rotate_half(x: Tensor) -> Tensor:
    """Return (-second half, first half): the pairs of channels that Hugging Face rotates."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rope_tables(config: DemoConfig) -> tuple[Tensor, Tensor]:
    """Return cos and sin for every position, each (max_position_embeddings, head_dim)."""
    exponents = torch.arange(0, config.head_dim, 2).float() / config.head_dim
    angles = (
        torch.arange(config.max_position_embeddings).float()[:, None]
        * config.rope_theta**-exponents
    )
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Causal self-attention with grouped key/value heads."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        query_size = config.num_attention_heads * config.head_dim
        key_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, causal: Tensor) -> Tensor:
        """Attend within each row."""
        rows, length, _ = x.shape
        n, k = self.config.num_attention_heads, self.config.num_key_value_heads
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)).to(x.dtype)
        projected = F.linear(x, weight).view(rows, length, n + 2 * k, -1).transpose(1, 2)
        turned, value = torch.split(projected, [n + k, k], dim=1)
        turned = turned * cos + rotate_half(turned) * sin
        query, key = torch.split(turned, [n, k], dim=1)
        if length <= WRITTEN_OUT:
            mixed = attend(query, key, value, causal)
        else:
            mixed = attend_in_blocks(query, key, value)
        joined = mixed.transpose(1, 2).reshape(rows, length, -1)
        return F.linear(joined, self.o_proj.weight.to(x.dtype))


def attend(query: Tensor, key: Tensor, value: Tensor, causal: Tensor) -> Tensor:
    """Return softmax(q k / sqrt(D)) v, (B, N, T, D), for short rows.

    With heads this small the products written out are twice as fast on a CPU, forward and backward,
    as `scaled_dot_product_attention`.
    """
    rows, n, length, d = query.shape
    k = key.shape[1]
    # Query heads of one group are folded into the rows: (B*K, N/K*T, D) against (B*K, T, D).
    query = (query * d**-0.5).reshape(rows * k, n // k * length, d)
    key, value = key.reshape(rows * k, length, d), value.reshape(rows * k, length, d)
    scores = torch.bmm(query, key.transpose(1, 2)).view(rows * k, n // k, length, length) + causal
    mixed = torch.bmm(scores.softmax(dim=-1).view(rows * k, -1, length), value)
    return mixed.view(rows, n, length, d)


def attend_in_blocks(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return the same for long rows, without ever holding all the scores."""
    mixed = F.scaled_dot_product_attention(
        query.float(), key.float(), value.float(), is_causal=True, enable_gqa=True
    )
    return mixed.to(query.dtype)


class MLP(nn.Module):
    """The SwiGLU feed-forward part: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat((self.gate_proj.weight, self.up_proj.weight)).to(x.dtype)
        gate, up = F.linear(x, weight).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down_proj.weight.to(x.dtype))


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind an RMS norm and added to the residual stream."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, causal: Tensor) -> Tensor:
        dtype = cos.dtype  # the residual stream stays float32, the products run in this type
        attended: Tensor = self.self_attn(self.input_layernorm(x).to(dtype), cos, sin, causal)
        x = x + attended
        mapped: Tensor = self.mlp(self.post_attention_layernorm(x).to(dtype))
        return x + mapped


class Decoder(nn.Module):
    """Embedding, layers and final norm (the part Hugging Face calls `model`)."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class DemoModel(nn.Module):
    """The language model; its output matrix is the embedding matrix."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Draw small normal weights; what writes to the residual stream starts at zero."""
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)
            elif weight.ndim == 2:
                nn.init.normal_(weight, std=weight.shape[1] ** -0.5 * 0.5)

    def forward(self, ids: Tensor, positions: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the logits where `positions` is true.

        Args:
            ids: Token ids (B, T); rows begin at position 0 and may be padded at the end.
            positions: Boolean (B, T), the places whose next token is wanted.
            dtype: The type of the matrix products.
        """
        length = ids.shape[1]
        cos, sin = self.cos[:length].to(dtype), self.sin[:length].to(dtype)
        causal = torch.full((length, length), float("-inf"), dtype=dtype, device=ids.device).triu(1)
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin, causal)
        chosen = self.model.norm(x[positions]).to(dtype)
        return F.linear(chosen, self.model.embed_tokens.weight.to(dtype)).float()
