"""Choose the kernels for a slice's matrices. Measured once and kept with the slice.

The bits of a product depend on the choice, and measurements are noisy: they are not repeated at
every start, so that reruns are bit-identical.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from tpirt.errors import ConfigError
from tpirt.files import read_regular, write_atomically
from tpirt.ops.native.library import load
from tpirt.ops.plain_kernels import PLAIN_KERNELS
from tpirt.ops.quant import QuantSpec, Scheme
from tpirt.ops.quant_kernels import KERNELS
from tpirt.ops.quant_linear import FEW_ROWS, KernelChoice, MatrixShape
from tpirt.ops.quant_probe import probe_kernels
from tpirt.sharding.blocks import Block

_FILE = "kernels.json"


def choose_kernels(
    folder: Path, blocks: Iterable[Block], dtype: torch.dtype
) -> Mapping[MatrixShape, KernelChoice]:
    """Choose kernels for each shape of matrix: recorded in ``folder``, or measured.

    Plain float32 weights have torch's alone; with ``dtype``, the weights' own, float32, quantized
    weights have the one that rounds no inputs.

    Measuring takes up to 0.2 s per shape, seconds on a small device: call it from a worker thread.
    Choices and timings are recorded for the next start; failure to write them is not an error.
    They are measured again with another CPU capability, torch version or set of kernels in C, or if
    the record is unreadable.
    """
    shapes = {
        MatrixShape(tensor.quant, *tensor.shape)
        for block in blocks
        for tensor in block.tensors
        if isinstance(tensor.quant, Scheme)
        or (len(tensor.shape) == 2 and tensor.dtype is not torch.float32)
    }
    if not shapes:
        return {}
    machine = _machine()
    chosen = _read(folder / _FILE, machine)
    if shapes <= chosen.keys():
        return chosen
    for shape in sorted(shapes - chosen.keys(), key=str):
        chosen[shape] = probe_kernels(*shape, dtype)
    _write(folder / _FILE, machine, chosen)
    return chosen


def _machine() -> str:
    native = load().set_name or "no kernels in C"
    return f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, {native}"


def _records(path: Path) -> dict[str, Any]:
    """What is recorded, by machine: a store may serve several, or one with other kernels in C."""
    try:
        records = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError):
        return {}
    return records if isinstance(records, dict) else {}


def _read(path: Path, machine: str) -> dict[MatrixShape, KernelChoice]:
    try:
        return dict(map(_parse, _records(path)[machine]))
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError):
        return {}


def _parse(entry: dict[str, Any]) -> tuple[MatrixShape, KernelChoice]:
    """Parse one entry of the file; raises if this machine cannot use it."""
    spec = QuantSpec.parse(entry["quantize"])
    steps = tuple((int(rows), str(name)) for rows, name in entry["steps"])
    if steps and steps[0][0] < FEW_ROWS:
        raise ValueError(f"{spec}: another kernel from {steps[0][0] + 1} rows on: an old record")
    timings = {
        name: {int(rows): float(ms) for rows, ms in times.items()}
        for name, times in entry["timings_ms"].items()
    }
    names = [*(name for _, name in steps), entry["rest"]]
    known = KERNELS if isinstance(spec, Scheme) else PLAIN_KERNELS
    if not all(known[n].accepts(spec) for n in names):
        raise ValueError(f"{spec}: not all of {names} are kernels of this machine")
    shape = MatrixShape(spec, entry["out_features"], entry["in_features"])
    return shape, KernelChoice(steps, entry["rest"], timings)


def _write(path: Path, machine: str, chosen: Mapping[MatrixShape, KernelChoice]) -> None:
    entries = [
        {
            "quantize": str(shape.spec),
            "out_features": shape.out_features,
            "in_features": shape.in_features,
            "steps": choice.steps,
            "rest": choice.rest,
            "timings_ms": choice.timings_ms,
        }
        for shape, choice in chosen.items()
    ]
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps({**_records(path), machine: entries}, indent=1))
