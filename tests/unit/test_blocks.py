"""In which form each matrix of a layer is stored."""

from __future__ import annotations

import pytest
import torch

from tpirt.config import ModelConfig
from tpirt.ops.quant import QuantSpec
from tpirt.sharding.blocks import layer_blocks, weight_bits
from tpirt.sharding.format import WeightFormat
from tpirt.sharding.partition import make_partition
from tpirt.weights.shapes import find_shape


def form(quantize: str) -> WeightFormat:
    return WeightFormat(torch.bfloat16, QuantSpec.parse(quantize))


def forms(config: ModelConfig, quantize: str, rank: int = 0) -> dict[tuple[int, str], str]:
    """By layer and matrix, the same in all blocks of a layer."""
    found: dict[tuple[int, str], str] = {}
    for block in layer_blocks(config, make_partition(config, 2).shards[rank], form(quantize)):
        for tensor in block.tensors:
            if len(tensor.shape) == 2:
                key = int(block.name.split(".")[1]), tensor.name.removesuffix(".weight")
                assert found.setdefault(key, str(tensor.quant)) == str(tensor.quant)
    return found


def model(name: str) -> ModelConfig:
    return ModelConfig.from_hf(find_shape(name))


@pytest.mark.parametrize("rank", [0, 1])
def test_with_int4_values_and_the_first_down_projection_are_in_8_bits(rank: int) -> None:
    found = forms(model("llama-3.1-8b"), "int4", rank)
    in_8 = {key for key, quant in found.items() if quant == "int8"}
    assert in_8 == {(layer, "v_proj") for layer in range(32)} | {(0, "down_proj")}
    assert set(found.values()) == {"int4", "int8"}


def test_values_of_as_many_heads_as_queries_stay_in_4_bits() -> None:
    """They are 8 % of a layer."""
    config = ModelConfig.from_hf({**find_shape("llama-3.1-8b"), "num_key_value_heads": 32})
    found = forms(config, "int4")
    assert {key for key, quant in found.items() if quant == "int8"} == {(0, "down_proj")}


@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_other_formats_have_one_form(quantize: str) -> None:
    assert set(forms(model("llama-3.1-8b"), quantize).values()) == {quantize}


@pytest.mark.parametrize(
    ("name", "quantize", "bits"),
    [
        ("llama-3.1-8b", "int4", 4.597),
        ("llama-3.1-70b", "int4", 4.5465),
        ("llama-3.1-8b", "int8", 8.012),
        ("llama-3.1-8b", "none", 16),
    ],
)
def test_bits_of_a_weight_count_scales(name: str, quantize: str, bits: float) -> None:
    assert weight_bits(model(name), form(quantize)) == pytest.approx(bits, abs=5e-4)
