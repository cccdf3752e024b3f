"""Models of random weights for benchmarks that ask for a shape."""

from __future__ import annotations

from pathlib import Path

from bench.lib.command import run_tpirt
from tpirt.weights.synthetic import SLICES, is_synthetic


def model_of_shape(
    shape: str, quantize: str, dtype: str, world_size: int, folder: Path
) -> tuple[Path, Path]:
    """Make a model of a shape, unless ``folder`` has it; returns its directory and its slices'.

    Raises:
        ConfigError: it could not be made; the reason is on standard error already.
    """
    name = f"{Path(shape).stem}-{quantize}-{dtype}-{world_size}".replace(":", "-")
    model = folder / name
    if not is_synthetic(model):
        options = ["--world-size", str(world_size), "--quantize", quantize, "--dtype", dtype]
        run_tpirt("synth", "--shape", shape, "--out", str(model), *options)
    return model, model / SLICES
