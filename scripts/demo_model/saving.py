"""The files of the demo model, in Hugging Face layout."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from .model import DemoModel
from .tokens import CHAT_TEMPLATE, END_OF_TEXT, IM_END, token_id


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(out: Path, model: DemoModel, tokenizer: Tokenizer) -> int:
    """Write the model in Hugging Face layout and return the size of the weights file in bytes."""
    out.mkdir(parents=True, exist_ok=True)
    end, filler = token_id(tokenizer, IM_END), token_id(tokenizer, END_OF_TEXT)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dataclasses.asdict(model.config),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": end,
        "pad_token_id": filler,
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }
    generation = {"do_sample": False, "eos_token_id": [end, filler], "pad_token_id": filler}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "unk_token": None,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", generation)
    write_json(out / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(str(out / "tokenizer.json"))
    weights = {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }
    partial = out / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # save_file makes it readable by its owner only
    os.replace(partial, out / "model.safetensors")
    return (out / "model.safetensors").stat().st_size
