"""Blocks in one call of C, and the choice of kernels that leads there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tpirt.cluster import kernels
from tpirt.model.native_blocks import NativeBlocks
from tpirt.ops.buffers import page_buffer
from tpirt.ops.native.bindings import native_kernels
from tpirt.ops.native.library import NativeLibrary
from tpirt.ops.quant import Int4
from tpirt.ops.quant_linear import KernelChoice, QuantMatrix
from tpirt.ops.quant_regions import matrix_regions, regions_nbytes
from tpirt.sharding.blocks import Block, StoredTensor

needs_native = pytest.mark.skipif(native_kernels(1) is None, reason="no kernels in C here")


def matrix(rows: int, inputs: int) -> QuantMatrix:
    nbytes = regions_nbytes(matrix_regions(Int4(), rows, inputs))
    return QuantMatrix.of_buffer(Int4(), rows, inputs, page_buffer(nbytes))


def blocks() -> NativeBlocks:
    config: Any = SimpleNamespace(rms_norm_eps=1e-5, hidden_size=32, hidden_act="silu")
    products: Any = SimpleNamespace(rounds=lambda *_: True)
    heads: Any = None
    return NativeBlocks(config, products, heads)


def further_block() -> dict[str, Any]:
    """An MLP's second block: only the first one has the norm."""
    return {"gate_up_proj.weight": matrix(64, 32), "down_proj.weight": matrix(32, 32)}


@needs_native
def test_an_mlp_that_another_kernel_began_is_not_continued_in_c() -> None:
    x = torch.randn(1, 32)
    assert blocks().mlp(further_block(), x, torch.zeros(1, 32)) is None


@needs_native
def test_a_sum_with_gaps_is_not_added_to_in_c() -> None:
    native = native_kernels(1)
    assert native is not None
    x = native.round(torch.randn(2, 32))
    assert blocks().mlp(further_block(), x, torch.zeros(2, 48)[:, :32]) is None
    assert blocks().mlp(further_block(), x, torch.zeros(2, 32)) is not None


def test_kernels_are_measured_again_when_there_are_others_in_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[object] = []

    def probe(*shape: object, exact: bool) -> KernelChoice:
        measured.append(shape)
        return KernelChoice((), "dense-float32")

    monkeypatch.setattr(kernels, "probe_kernels", probe)
    tensor = StoredTensor("w", (32, 32), torch.bfloat16, (), Int4())
    for found in ("", "", "avx2", "avx2"):
        monkeypatch.setattr(kernels, "load", lambda found=found: NativeLibrary(set_name=found))
        kernels.choose_kernels(tmp_path, [Block("b", (tensor,))], torch.bfloat16)
    assert len(measured) == 2
