"""ModelConfig against transformers' own configuration and model classes, family by family."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.nightly import nightly_but
from tpirt.config import ACTIVATION_NAMES, ModelConfig, RopeConfig
from tpirt.weights.names import expected_tensors

transformers = pytest.importorskip("transformers")
activations = pytest.importorskip("transformers.activations")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
ROPE_TYPES: list[dict[str, Any]] = [
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 1e6},
    {"rope_scaling": {"type": "dynamic", "factor": 3.0}, "max_position_embeddings": 64},
    {"rope_scaling": LLAMA3, "rope_theta": 5e5},
]
COMMON: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 2},
    {"head_dim": 16, "num_key_value_heads": 1},
    {"hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-5},
    {"tie_word_embeddings": True},
    {"dtype": "bfloat16"},
    {"torch_dtype": "float16"},
    {"max_position_embeddings": 1000, "rope_theta": 5e5},
    *ROPE_TYPES,
    {"rope_scaling": {"rope_type": "linear", "factor": 2, "type": "dynamic"}},
    {"rope_parameters": LLAMA3 | {"rope_theta": 7e5}, "rope_theta": 1.0},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 128},
    {"rope_parameters": {"rope_theta": 3e4}},
    {"rope_parameters": {k: v for k, v in LLAMA3.items() if "original" not in k}},
    {"rope_parameters": {"rope_theta": 3e4}, "rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    {"rope_scaling": None, "rope_theta": 12345.0, "partial_rotary_factor": 1.0},
]
BIASES: list[dict[str, Any]] = [{"attention_bias": True}, {"attention_bias": False}]
QWEN_WINDOWS: list[dict[str, Any]] = [
    {"sliding_window": 8},
    {"use_sliding_window": True},
    {"use_sliding_window": True, "sliding_window": None},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
    {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    {
        "use_sliding_window": True,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "attention"],
    },
]
FAMILIES: dict[str, list[dict[str, Any]]] = {
    "llama": [*BIASES, {"num_key_value_heads": None}, {"mlp_bias": True}, {"sliding_window": 8}],
    "mistral": [*BIASES, {"sliding_window": None}, {"sliding_window": 8}, {"mlp_bias": True}],
    "qwen2": [*BIASES, {"num_key_value_heads": None}, *QWEN_WINDOWS],
    "qwen3": [*BIASES, {"num_key_value_heads": None}, *QWEN_WINDOWS],
}
# What a family says where there is no number of KV heads would not fit so small a model.
BASE: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "mistral": SIZES | {"num_attention_heads": 8},
    "qwen2": SIZES | {"num_key_value_heads": 2},
    "qwen3": SIZES | {"num_key_value_heads": 2},
}
CASES = [
    (family, BASE[family] | options) for family, own in FAMILIES.items() for options in COMMON + own
]


# How rope is written is read alike in all families: one tries all ways, the others every type.
QUICK_ROPE = [
    *((family, options) for family, options in CASES if family == "llama"),
    *((family, BASE[family] | options) for family in FAMILIES for options in ({}, *ROPE_TYPES)),
]


def ours_and_theirs(family: str, options: dict[str, Any]) -> tuple[ModelConfig, Any]:
    """Parse the same config.json content with both."""
    content = json.loads(json.dumps({"model_type": family} | options))
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(content)))
    return ModelConfig.from_hf(content), theirs


def their_windows(config: Any) -> list[int | None]:
    """Sliding windows as the attention layers of the models get them."""
    layers = range(config.num_hidden_layers)
    if config.model_type in ("qwen2", "qwen3"):
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
        return [config.sliding_window if sliding[layer] else None for layer in layers]
    return [config.sliding_window if config.model_type == "mistral" else None for _ in layers]


def check_derived(ours: ModelConfig, theirs: Any) -> None:
    for name in (*SIZES, "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"):
        assert getattr(ours, name) == getattr(theirs, name), name
    head_dim = getattr(theirs, "head_dim", None)
    assert ours.head_dim == (head_dim or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.hidden_act == ACTIVATION_NAMES[theirs.hidden_act]
    assert ours.tie_word_embeddings is theirs.tie_word_embeddings
    assert list(ours.sliding_windows) == their_windows(theirs)
    assert ours.dtype == str(theirs.dtype or torch.float32).removeprefix("torch.")


def inverse_frequencies(rope: RopeConfig, config: ModelConfig, tokens: int) -> torch.Tensor:
    """The formulas of Su et al. 2104.09864, NTK and Llama 3.1, written out from RopeConfig."""
    dim, theta = config.head_dim, rope.theta
    original = rope.original_max_position_embeddings
    if rope.kind == "dynamic":
        length = max(tokens, original)
        theta *= (rope.factor * length / original - (rope.factor - 1)) ** (dim / (dim - 2))
    freq = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if rope.kind == "linear":
        return freq / rope.factor
    if rope.kind != "llama3":
        return freq
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = original * freq / (2 * torch.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * freq / rope.factor + smooth * freq


def build(theirs: Any) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(theirs)


@pytest.mark.parametrize(("family", "options"), CASES)
def test_derived_fields(family: str, options: dict[str, Any]) -> None:
    check_derived(*ours_and_theirs(family, options))


@pytest.mark.parametrize(("family", "options"), CASES)
def test_saved_by_transformers(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = ours_and_theirs(family, options)
    theirs.architectures = [type(build(theirs)).__name__]
    theirs.save_pretrained(tmp_path)
    assert ModelConfig.from_dir(tmp_path) == ours


@pytest.mark.parametrize(("family", "options"), CASES)
def test_tensor_names_and_shapes(family: str, options: dict[str, Any]) -> None:
    ours, theirs = ours_and_theirs(family, options)
    shapes = {name: tuple(t.shape) for name, t in build(theirs).state_dict().items()}
    if ours.tie_word_embeddings:
        assert shapes.pop("lm_head.weight") == shapes["model.embed_tokens.weight"]
    assert expected_tensors(ours) == shapes


@pytest.mark.parametrize(("family", "options"), nightly_but(QUICK_ROPE, CASES))
def test_rope_frequencies(family: str, options: dict[str, Any]) -> None:
    ours, theirs = ours_and_theirs(family, options)
    rotary_class = type(build(theirs).model.rotary_emb)
    rotary = rotary_class(theirs)
    torch.testing.assert_close(inverse_frequencies(ours.rope, ours, 1), rotary.inv_freq)
    tokens = ours.context_length
    rotary(torch.zeros(1), torch.arange(tokens)[None])
    torch.testing.assert_close(inverse_frequencies(ours.rope, ours, tokens), rotary.inv_freq)
    assert rotary.attention_scaling == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_stated_original_length_of_dynamic_rope(family: str) -> None:
    options = SIZES | {
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_scaling": {
            "type": "dynamic",
            "factor": 2.1,
            "original_max_position_embeddings": 32,
        },
    }
    ours, theirs = ours_and_theirs(family, options)
    rotary = type(build(theirs).model.rotary_emb)(theirs)
    rotary(torch.zeros(1), torch.arange(ours.context_length)[None])
    torch.testing.assert_close(inverse_frequencies(ours.rope, ours, 64), rotary.inv_freq)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_defaults(family: str) -> None:
    sizes = {"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 100}
    sizes |= {"intermediate_size": 11008, "num_hidden_layers": 32}
    check_derived(*ours_and_theirs(family, sizes))


@pytest.mark.parametrize(("spelling", "name"), ACTIVATION_NAMES.items())
def test_activation_names_mean_the_same(spelling: str, name: str) -> None:
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "silu": torch.nn.functional.silu,
        "relu": torch.nn.functional.relu,
        "gelu": torch.nn.functional.gelu,
        "gelu_pytorch_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    }
    x = torch.linspace(-8, 8, 1001)
    torch.testing.assert_close(functions[name](x), activations.ACT2FN[spelling](x))
