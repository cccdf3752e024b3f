"""Models whose answers are known."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file, save_file

from tpirt.testing.models import make_model


def make_exclaimer(path: Path, **options: object) -> Path:
    """Write a model whose logits are all alike: the first id wins, which is ``!``."""
    make_model(path, max_position_embeddings=1 << 20, **options)  # type: ignore[arg-type]
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    tensors["lm_head.weight"].zero_()
    save_file(tensors, file)
    return path
