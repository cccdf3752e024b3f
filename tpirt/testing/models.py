"""Tiny random model directories of every family, with a byte-level tokenizer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tpirt.config import ModelConfig
from tpirt.dtypes import dtype_name
from tpirt.weights.names import expected_tensors

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
EOS_IDS = (256, 258)  # <|endoftext|> and <|im_end|>, after the 256 bytes
VOCAB_SIZE = 264  # of the models: more than the tokenizer's 259, like padded real ones

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": EOS_IDS[0],
}

_FAMILIES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "rope_theta": 10_000.0},
    "mistral": {
        "architectures": ["MistralForCausalLM"],
        "rope_theta": 10_000.0,
        "sliding_window": None,
    },
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "rope_theta": 1_000_000.0},
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "rope_theta": 1_000_000.0,
        "head_dim": 16,
        "attention_bias": False,
    },
}

# Standard deviation of the logits. The best two of 264 then differ by about one, so rounding does
# not change the greedy token.
_LOGIT_SCALE = 4.0


def make_model(
    path: Path,
    family: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
    template: str | None = CHATML,
    **config_overrides: Any,
) -> Path:
    """Write a complete model directory of random weights, in at most a second.

    Greedy answers do not end by themselves: end tokens have the logit 0.

    Args:
        path: the directory, created if missing.
        family: ``llama``, ``mistral``, ``qwen2`` or ``qwen3``.
        seed: of the weights; the same seed and sizes give the same bytes.
        dtype: of the checkpoint.
        shards: number of weight files; more than one have an index.
        template: chat template; None for no template.
        config_overrides: entries of ``config.json`` to change or add.

    Returns:
        ``path``.

    Raises:
        ConfigError: invalid overrides.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {**_SIZES, **_FAMILIES[family], "model_type": family, **config_overrides}
    config["dtype"] = dtype_name(dtype)
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {"eos_token_id": list(EOS_IDS)})
    make_tokenizer(path, template)
    tensors = random_tensors(ModelConfig.from_hf(config), seed)
    _write_tensors(path, {name: t.to(dtype) for name, t in tensors.items()}, shards)
    return path


def make_tokenizer(path: Path, template: str | None = CHATML) -> Path:
    """Write a byte-level tokenizer: id = rank of the byte's letter, then the special tokens."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    fast = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    fast.save(str(path / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL_TOKENS[0],
        "pad_token": SPECIAL_TOKENS[0],
    }
    if template is not None:
        config["chat_template"] = template
    _write_json(path / "tokenizer_config.json", config)
    return path


def random_tensors(config: ModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Draw a checkpoint's float32 tensors, scaled so that every part affects the logits."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in expected_tensors(config).items():
        values = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif name.endswith(".bias"):
            values *= 0.5
        elif name.endswith(("lm_head.weight", "embed_tokens.weight")):
            values *= _LOGIT_SCALE / math.sqrt(shape[1])
            if name.startswith("lm_head") or config.tie_word_embeddings:
                values[min(EOS_IDS) : VOCAB_SIZE] = 0
        else:
            values *= 1.5 / math.sqrt(shape[1])
        tensors[name] = values
    return tensors


def _write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    if shards == 1:
        save_file(dict(tensors), path / "model.safetensors", metadata={"format": "pt"})
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(path / "model.safetensors.index.json", index)


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")
