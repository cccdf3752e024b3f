"""Opening a model directory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tpirt.config import ModelConfig
from tpirt.dtypes import dtype_name
from tpirt.engine.defaults import GenerationDefaults
from tpirt.text import Tokenizer
from tpirt.weights.checkpoint import Checkpoint, check_tensors, resolve_tied
from tpirt.weights.hub import find_model
from tpirt.weights.names import EMBEDDING
from tpirt.weights.source import ModelSource
from tpirt.weights.synthetic import SyntheticCheckpoint, is_synthetic

BUNDLED_MODEL = Path(__file__).parent.parent / "demo"


@dataclass(frozen=True)
class Model:
    """An open model directory: configuration, weights, tokenizer.

    ``embedding`` is the checkpoint's name of that matrix; ``store`` is where this machine keeps
    the model's slices unless told otherwise; None for the default store.
    """

    config: ModelConfig
    checkpoint: ModelSource
    embedding: str
    store: Path | None
    tokenizer: Tokenizer
    defaults: GenerationDefaults


def open_model(model: str | Path | None = None) -> Model:
    """Open a model directory and check that it is whole; reads no weights.

    Args:
        model: as for :meth:`Engine.connect`.

    Raises:
        ConfigError, CheckpointError, TokenizerError: something is missing, damaged, unsupported.
    """
    path = BUNDLED_MODEL if model is None else find_model(model)
    config = ModelConfig.from_dir(path)
    tokenizer = Tokenizer.from_dir(path)
    defaults = GenerationDefaults.from_dir(path, tokenizer.end_ids())
    if is_synthetic(path):
        drawn = SyntheticCheckpoint.open(path)
        return Model(config, drawn, EMBEDDING, drawn.slices, tokenizer, defaults)
    checkpoint = Checkpoint.open(path)
    try:
        check_tensors(checkpoint, config)
        embedding, _ = resolve_tied(checkpoint, config)
        dtype = dtype_name(checkpoint.tensors[embedding].dtype)
        config = ModelConfig.from_dir(path, default_dtype=dtype)
        matrices = (info.dtype for info in checkpoint.tensors.values() if len(info.shape) == 2)
        if config.dtype == "float16" and any(each is not torch.float16 for each in matrices):
            config = replace(config, dtype="bfloat16")  # float16 may not hold their numbers
    except BaseException:
        checkpoint.close()
        raise
    return Model(config, checkpoint, embedding, None, tokenizer, defaults)
