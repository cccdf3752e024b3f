"""ModelConfig: what is refused and how it is worded, JSON round trip, derived properties."""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest

from tpirt.config import ACTIVATION_NAMES, ModelConfig, RopeConfig
from tpirt.errors import CheckpointError, ConfigError

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}


def parse(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf(LLAMA | changes)


def test_llama_with_defaults() -> None:
    assert parse() == ModelConfig(
        model_type="llama",
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=100,
        max_position_embeddings=512,
        rms_norm_eps=1e-6,
        hidden_act="silu",
        rope=RopeConfig(10_000.0),
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        sliding_windows=(None, None, None),
        dtype="float32",
    )
    assert parse().q_heads_per_kv == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mixtral"}, ['model_type "mixtral"', "llama, mistral, qwen2, qwen3"]),
        ({"model_type": "qwen3_moe"}, ['"qwen3_moe"', "supported"]),
        ({"model_type": None}, ["model_type null", "supported"]),
        ({"model_type": ["llama"]}, ["model_type", "supported"]),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            ['"LlamaForSequenceClassification"', "LlamaForCausalLM"],
        ),
        ({"architectures": ["MistralForCausalLM"]}, ['"MistralForCausalLM"', "LlamaForCausalLM"]),
        ({"architectures": "LlamaForCausalLM"}, ["architectures", "list"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "original"]),
        ({"per_layer_config": {"0": {}}}, ["per_layer_config"]),
        ({"is_causal": False}, ["is_causal"]),
        ({"hidden_act": "mish"}, ['hidden_act "mish"', "silu"]),
        ({"hidden_act": None}, ["hidden_act null"]),
        ({"dtype": "float8_e4m3fn"}, ['dtype "float8_e4m3fn"', "bfloat16"]),
        ({"torch_dtype": 32}, ["torch_dtype 32"]),
        ({"hidden_size": 0}, ["hidden_size", "got 0"]),
        ({"hidden_size": -64}, ["hidden_size", "got -64"]),
        ({"hidden_size": 64.0}, ["hidden_size", "whole number", "64.0"]),
        ({"hidden_size": "64"}, ["hidden_size", '"64"']),
        ({"vocab_size": True}, ["vocab_size", "true"]),
        ({"vocab_size": None}, ["vocab_size", "null"]),
        ({"vocab_size": 2**40}, ["vocab_size", str(2**40)]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", str(10**9)]),
        ({"max_position_embeddings": 0}, ["max_position_embeddings"]),
        ({"num_key_value_heads": 3}, ["num_attention_heads", "(3)", "got 8"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads"]),
        ({"num_attention_heads": 7}, ["hidden_size", "(7)", "got 64"]),
        ({"head_dim": 7}, ["head_dim", "even", "got 7"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps", '"1e-5"']),
        ({"rms_norm_eps": math.inf}, ["rms_norm_eps", "finite"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps", "positive"]),
        ({"tie_word_embeddings": None}, ["tie_word_embeddings", "true or false", "null"]),
        ({"attention_bias": 1}, ["attention_bias", "got 1"]),
        ({"rope_theta": None}, ["rope_theta", "null"]),
        ({"rope_theta": math.nan}, ["rope_theta", "finite"]),
        ({"rope_theta": 10**400}, ["rope_theta", "finite"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ['"yarn"', "default, dynamic, linear"]),
        ({"rope_parameters": {"rope_type": "longrope"}}, ['"longrope"', "llama3"]),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, ['"mrope"']),
        ({"rope_scaling": {"rope_type": ["x"]}}, ["rope type"]),
        ({"rope_scaling": "linear"}, ["rope_scaling", "object"]),
        ({"rope_scaling": {"type": "linear"}}, ["rope_scaling", "linear", "factor"]),
        ({"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor", ">= 1", "0.5"]),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, ["factor", '"2"']),
        ({"rope_scaling": {"type": "dynamic"}}, ["dynamic", "factor"]),
        ({"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, ["high_freq_factor", "1.0"]),
        (
            {"rope_scaling": {k: v for k, v in LLAMA3.items() if k != "low_freq_factor"}},
            ["llama3", "low_freq_factor"],
        ),
        (
            {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": "x"}},
            ["original_max_position_embeddings", '"x"'],
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, ["differs by layer"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.25}}, ["partial_rotary_factor", "0.25"]),
        ({"layer_types": ["full_attention", "sliding_attention", "attention"]}, ["layer_types"]),
        ({"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["head_dim"]),
    ],
)
def test_refuses_by_name(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(**changes)
    for word in ["config.json", *words]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"use_sliding_window": None}, ["use_sliding_window", "null"]),
        ({"use_sliding_window": True, "sliding_window": 0}, ["sliding_window", "got 0"]),
        ({"use_sliding_window": True, "max_window_layers": -1}, ["max_window_layers"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "list of 3"]),
        ({"layer_types": "full_attention"}, ["layer_types"]),
        ({"layer_types": ["full_attention", "mamba", "full_attention"]}, ['"mamba"']),
        ({"layer_types": ["sliding_attention"] * 3}, ["use_sliding_window"]),
    ],
)
def test_refuses_qwen_windows_by_name(changes: dict[str, Any], words: list[str]) -> None:
    qwen = LLAMA | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(qwen | changes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "model_type",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "vocab_size",
    ],
)
def test_names_a_missing_key(key: str) -> None:
    with pytest.raises(ConfigError, match=f"config.json: missing key {key}"):
        ModelConfig.from_hf({k: v for k, v in LLAMA.items() if k != key})


def test_refuses_what_is_no_object() -> None:
    with pytest.raises(ConfigError, match="JSON object"):
        ModelConfig.from_hf([])  # type: ignore[arg-type]


def test_mistral_refuses_alternating_layers() -> None:
    changes = {
        "model_type": "mistral",
        "architectures": None,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    }
    with pytest.raises(ConfigError, match="layer_types"):
        parse(**changes)


def test_qwen3_refuses_null_head_dim() -> None:
    with pytest.raises(ConfigError, match="head_dim"):
        parse(model_type="qwen3", architectures=["Qwen3ForCausalLM"], head_dim=None)


@pytest.mark.parametrize(("spelling", "name"), ACTIVATION_NAMES.items())
def test_activation_spellings(spelling: str, name: str) -> None:
    assert parse(hidden_act=spelling).hidden_act == name


@pytest.mark.parametrize(
    ("keys", "dtype"),
    [
        ({}, "float32"),
        ({"dtype": None, "torch_dtype": None}, "float32"),
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "auto"}, "float32"),
        ({"dtype": "auto", "torch_dtype": "float16"}, "float16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
    ],
)
def test_dtype_keys(keys: dict[str, Any], dtype: str) -> None:
    assert parse(**keys).dtype == dtype


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (None, 512),
        ({"type": "default"}, 512),
        ({"type": "linear", "factor": 4.0}, 2048),
        ({"type": "linear", "factor": 2.5}, 1280),
        ({"type": "linear", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"type": "linear", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        ({"type": "dynamic", "factor": 2.0}, 1024),
        ({"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256}, 512),
        (LLAMA3, 512),
    ],
)
def test_context_length(rope: dict[str, Any] | None, length: int) -> None:
    assert parse(rope_scaling=rope).context_length == length


def test_dynamic_rope_within_the_stretched_length_is_plain() -> None:
    rope = {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 256}
    assert parse(rope_scaling=rope).rope == RopeConfig(10_000.0)


ROUND_TRIPS = [
    parse(),
    parse(rope_scaling=LLAMA3, rope_theta=500_000, rms_norm_eps=1e-5, dtype="bfloat16"),
    parse(rope_scaling={"type": "linear", "factor": 1 + 1e-15}, rms_norm_eps=0.1 + 0.2),
    ModelConfig.from_hf(
        LLAMA | {"model_type": "mistral", "architectures": [], "sliding_window": 17}
    ),
]


@pytest.mark.parametrize("config", ROUND_TRIPS)
def test_json_round_trip_is_exact(config: ModelConfig) -> None:
    text = config.to_json()
    again = ModelConfig.from_json(text)
    assert again == config
    assert again.to_json() == text
    assert "\n" not in text


def test_a_field_that_is_missing_in_stored_text_has_its_default() -> None:
    """Text from before the field: a slice of that time stays usable."""
    stored = json.loads(parse().to_json())
    for field in fields(RopeConfig):
        if field.default is not MISSING:
            del stored["rope"][field.name]
    assert ModelConfig.from_json(json.dumps(stored)) == parse()


def broken_json() -> list[str]:
    good = json.loads(parse().to_json())
    changed: list[Any] = [
        None,
        [],
        {},
        good | {"surprise": 1},
        {k: v for k, v in good.items() if k != "dtype"},
        *(good | {name: "x"} for name in good),
        *(good | {name: [[]]} for name in good),
        *(good | {name: None} for name in good),
        *(good | {name: -1} for name in good),
        *(good | {"rope": good["rope"] | {name: "x"}} for name in good["rope"]),
        good | {"rope": {"kind": "default"}},
        good | {"sliding_windows": [None, None]},
        good | {"sliding_windows": [None, [1], None]},
        good | {"sliding_windows": [None, 0, None]},
        good | {"head_dim": 7},
    ]
    deep = "[" * 100_000
    return ["", "{", "\udcff", "NaN", deep, "1" * 10_000, *(json.dumps(c) for c in changed)]


@pytest.mark.parametrize("text", broken_json(), ids=lambda text: text[:20])
def test_from_json_refuses_rubbish(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^model configuration: "):
        ModelConfig.from_json(text)


def test_from_json_refuses_nan() -> None:
    text = parse().to_json().replace('"rms_norm_eps":1e-06', '"rms_norm_eps":NaN')
    with pytest.raises(ConfigError, match="rms_norm_eps"):
        ModelConfig.from_json(text)


def test_instances_are_checked_on_construction() -> None:
    with pytest.raises(ConfigError, match="sliding_windows"):
        replace(parse(), num_hidden_layers=4)
    with pytest.raises(ConfigError, match="rope"):
        replace(parse(), rope=None)  # type: ignore[arg-type]


def test_from_dir_reads_and_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(LLAMA))
    assert ModelConfig.from_dir(tmp_path) == parse()
    file.write_text(json.dumps(LLAMA | {"hidden_act": "mish"}))
    with pytest.raises(ConfigError, match=str(file)):
        ModelConfig.from_dir(tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[]", "JSON object"),
        (None, "no such file"),
    ],
)
def test_from_dir_reports_a_broken_file(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=words) as caught:
        ModelConfig.from_dir(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_from_dir_reports_what_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="directory"):
        ModelConfig.from_dir(tmp_path / "absent")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        ModelConfig.from_dir(tmp_path)
