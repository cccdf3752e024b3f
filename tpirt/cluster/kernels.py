"""Which kernels multiply a slice's quantized matrices here: measured once, kept with the slice.

The bits of a product depend on the choice, and a measurement is noisy: it is not repeated at every
start, so that reruns repeat exactly.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from tpirt.ops.quant import QuantSpec
from tpirt.ops.quant_layout import local_layout
from tpirt.ops.quant_linear import KernelChoice, MatrixShape, probe_kernels
from tpirt.sharding.blocks import Block

_FILE = "kernels.json"


def choose_kernels(folder: Path, blocks: Iterable[Block]) -> Mapping[MatrixShape, KernelChoice]:
    """Choose a kernel for each shape of quantized matrix: as noted in ``folder``, else measured.

    What is measured (up to 0.2 s per shape) is noted there for the next start; a folder that
    cannot be written to is no error. Another CPU or torch measures anew.
    """
    shapes = {
        MatrixShape(tensor.quant, *tensor.shape)
        for block in blocks
        for tensor in block.tensors
        if tensor.quant.kind != "none"
    }
    if not shapes:
        return {}
    machine = _machine()
    chosen = _read(folder / _FILE, machine)
    if shapes <= chosen.keys():
        return chosen
    layout = local_layout()
    for shape in sorted(shapes - chosen.keys(), key=str):
        chosen[shape] = probe_kernels(shape.spec, shape.rows, shape.inputs, layout)
    _write(folder / _FILE, machine, chosen)
    return chosen


def _machine() -> str:
    return f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def _read(path: Path, machine: str) -> dict[MatrixShape, KernelChoice]:
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))[machine]
        return {
            MatrixShape(QuantSpec.parse(entry["quantize"]), entry["rows"], entry["inputs"]): (
                KernelChoice(entry["packed_rows"], entry["dense_dtype"])
            )
            for entry in noted
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write(path: Path, machine: str, chosen: Mapping[MatrixShape, KernelChoice]) -> None:
    entries = [
        {
            "quantize": str(shape.spec),
            "rows": shape.rows,
            "inputs": shape.inputs,
            "packed_rows": choice.packed_rows,
            "dense_dtype": choice.dense_dtype,
        }
        for shape, choice in chosen.items()
    ]
    with contextlib.suppress(OSError):
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps({machine: entries}, indent=1), encoding="utf-8")
        beside.replace(path)
