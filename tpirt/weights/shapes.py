"""Shapes of published models by name: the part of ``config.json`` that determines the computation.

Special tokens are omitted: they belong to a tokenizer, and synthetic models have their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpirt.config import ModelConfig
from tpirt.errors import ConfigError
from tpirt.files import read_regular

Shape = Mapping[str, Any]  # the content of a config.json

_LLAMA: Shape = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}

_LLAMA2: Shape = {
    **_LLAMA,
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
    "torch_dtype": "float16",
}

_LLAMA3: Shape = {
    **_LLAMA,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "torch_dtype": "bfloat16",
}

_QWEN2: Shape = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}


def _sizes(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> Shape:
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def _llama3_rope(factor: float) -> Shape:
    return {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    }


SHAPES: Mapping[str, Shape] = {
    "llama-2-7b": {**_LLAMA2, **_sizes(4096, 11_008, 32, 32, 32)},
    "llama-2-13b": {**_LLAMA2, **_sizes(5120, 13_824, 40, 40, 40)},
    "llama-2-70b": {**_LLAMA2, **_sizes(8192, 28_672, 80, 64, 8)},
    "llama-3.1-8b": {**_LLAMA3, **_sizes(4096, 14_336, 32, 32, 8), **_llama3_rope(8.0)},
    "llama-3.1-70b": {**_LLAMA3, **_sizes(8192, 28_672, 80, 64, 8), **_llama3_rope(8.0)},
    "llama-3.2-1b": {
        **_LLAMA3,
        **_sizes(2048, 8192, 16, 32, 8),
        **_llama3_rope(32.0),
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "yi-34b": {
        **_LLAMA,
        **_sizes(7168, 20_480, 60, 56, 8),
        "vocab_size": 64_000,
        "max_position_embeddings": 4096,
        "rope_theta": 5_000_000.0,
        "torch_dtype": "bfloat16",
    },
    "mistral-7b": {  # v0.3
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_act": "silu",
        **_sizes(4096, 14_336, 32, 32, 8),
        "vocab_size": 32_768,
        "max_position_embeddings": 32_768,
        "rope_theta": 1_000_000.0,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    "qwen2.5-1.5b": {
        **_QWEN2,
        **_sizes(1536, 8960, 28, 12, 2),
        "vocab_size": 151_936,
        "max_position_embeddings": 32_768,
        "sliding_window": 32_768,
        "max_window_layers": 21,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        **_QWEN2,
        **_sizes(3584, 18_944, 28, 28, 4),
        "vocab_size": 152_064,
        "max_position_embeddings": 131_072,
        "sliding_window": 131_072,
        "max_window_layers": 28,
        "tie_word_embeddings": False,
    },
    # Not a published model: 1.10 B weights, for benchmarks of tpirt and llama.cpp.
    "bench-1.1b": {
        **_LLAMA2,
        **_sizes(2048, 8192, 16, 32, 8),
        "torch_dtype": "bfloat16",
    },
}

_OF_ITS_TOKENIZER = ("bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class")


def find_shape(name: str) -> Shape:
    """Return the content of a ``config.json``: of a known shape, or of the file ``name``.

    Raises:
        ConfigError: neither a known shape nor a file (the message lists the known shapes), or an
            unsupported model.
    """
    content = SHAPES.get(name.lower()) or _read(Path(name))
    shape = {key: value for key, value in content.items() if key not in _OF_ITS_TOKENIZER}
    try:
        ModelConfig.from_hf(shape)
    except ConfigError as exc:
        raise ConfigError(f"shape {name}: {exc}") from exc
    return shape


def _read(file: Path) -> Shape:
    if file.is_dir():
        file = file / "config.json"
    try:
        content = json.loads(read_regular(file))
    except FileNotFoundError as exc:
        raise ConfigError(
            f"shape {file}: neither a file nor a known shape; known: {', '.join(SHAPES)}"
        ) from exc
    except (OSError, ValueError, RecursionError) as exc:
        raise ConfigError(f"shape {file}: not a readable config.json ({exc})") from exc
    if not isinstance(content, dict):
        raise ConfigError(f"shape {file}: expected a config.json with a JSON object in it")
    return content
