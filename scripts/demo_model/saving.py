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
from torch import nn

from .model import DemoConfig, DemoModel
from .tokens import END_OF_TEXT, IM_END, token_id, tokenizer_config


def round_to_bfloat16(model: nn.Module) -> None:
    """Round every weight to bfloat16, as the saved file holds it, and go on in float32."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.to(torch.bfloat16).float())


def hugging_face_config(config: DemoConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of `config.json`."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **dataclasses.asdict(config),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": token_id(tokenizer, IM_END),
        "pad_token_id": token_id(tokenizer, END_OF_TEXT),
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write readable JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(out: Path, model: DemoModel, tokenizer: Tokenizer) -> int:
    """Write the model in Hugging Face layout and return the size of the weights file in bytes."""
    out.mkdir(parents=True, exist_ok=True)
    end_ids = [token_id(tokenizer, IM_END), token_id(tokenizer, END_OF_TEXT)]
    write_json(out / "config.json", hugging_face_config(model.config, tokenizer))
    write_json(
        out / "generation_config.json",
        {"do_sample": False, "eos_token_id": end_ids, "pad_token_id": end_ids[1]},
    )
    write_json(
        out / "tokenizer_config.json", tokenizer_config(model.config.max_position_embeddings)
    )
    tokenizer.save(str(out / "tokenizer.json"))
    weights = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous()
        for name, weight in model.state_dict().items()
    }
    partial = out / "model.safetensors.partial"
    save_file(weights, partial, metadata={"format": "pt"})
    partial.chmod(0o644)  # save_file leaves it to its owner alone
    os.replace(partial, out / "model.safetensors")
    return (out / "model.safetensors").stat().st_size
