"""Models of random weights for benchmarks that ask for a shape."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tpirt.errors import ConfigError
from tpirt.weights.synthetic import SLICES, is_synthetic


def model_of_shape(
    shape: str, quantize: str, dtype: str, world_size: int, folder: Path
) -> tuple[Path, Path]:
    """Make a model of a shape, unless ``folder`` has it; returns its directory and its slices'.

    Raises:
        ConfigError: it could not be made; ``tpirt synth`` has said why.
    """
    name = f"{Path(shape).stem}-{quantize}-{dtype}-{world_size}".replace(":", "-")
    model = folder / name
    if not is_synthetic(model):
        command = [sys.executable, "-m", "tpirt", "synth", "--shape", shape, "--out", str(model)]
        command += ["--world-size", str(world_size), "--quantize", quantize, "--dtype", dtype]
        if subprocess.run(command, stdin=subprocess.DEVNULL).returncode:
            raise ConfigError(f"no model of shape {shape} could be made")
    return model, model / SLICES
