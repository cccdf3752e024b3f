"""Published shapes: right to the last weight; broken ones refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tpirt.config import ModelConfig
from tpirt.errors import ConfigError
from tpirt.weights.names import expected_tensors
from tpirt.weights.shapes import SHAPES, find_shape

# Numbers of weights as the models' publishers and transformers count them.
WEIGHTS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "yi-34b": 34_388_917_248,
    "mistral-7b": 7_248_023_552,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
    "bench-1.1b": 1_104_218_112,
}


@pytest.mark.parametrize("name", SHAPES)
def test_shape_has_as_many_weights_as_the_model(name: str) -> None:
    config = ModelConfig.from_hf(find_shape(name))
    assert sum(map(math.prod, expected_tensors(config).values())) == WEIGHTS[name]


def test_file_is_taken_without_its_tokenizers_ids(tmp_path: Path) -> None:
    content = {**SHAPES["bench-1.1b"], "eos_token_id": 2, "bos_token_id": 1}
    (tmp_path / "config.json").write_text(json.dumps(content))
    for name in (tmp_path, tmp_path / "config.json"):
        assert find_shape(str(name)) == SHAPES["bench-1.1b"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "known: llama-2-7b"),
        ("{", "not a readable config.json"),
        ("[]", "JSON object"),
        ('{"model_type": "llama"}', "missing key"),
        ('{"model_type": "bert"}', "not supported"),
    ],
)
def test_what_is_no_shape_is_refused(tmp_path: Path, content: str | None, says: str) -> None:
    file = tmp_path / "shape.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=says) as error:
        find_shape(str(file))
    assert str(file) in str(error.value)
