"""Kernels that do not depend on what is faster at this moment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tpirt.cluster import kernels, rank
from tpirt.model import attention
from tpirt.ops.native.bindings import native_kernels
from tpirt.ops.plain_kernels import NATIVE_HALF, TorchHalf
from tpirt.ops.quant import Scheme
from tpirt.ops.quant_kernels import DENSE, NATIVE
from tpirt.ops.quant_linear import FEW_ROWS, KernelChoice, MatrixShape


def multiply_in_c(patch: pytest.MonkeyPatch) -> None:
    """Have all products with stored weights of 16 bits or less computed in C, of any rows."""
    _choose(patch, lambda shape: KernelChoice((), _native(shape)))


def multiply_few_rows_in_c(patch: pytest.MonkeyPatch, chooser: Any = rank) -> None:
    """Have products of few rows computed in C, others by torch in bfloat16.

    Args:
        patch: of the test.
        chooser: the module whose kernels are chosen.
    """

    def choice(shape: MatrixShape) -> KernelChoice:
        return KernelChoice(((FEW_ROWS, _native(shape)),), _by_torch(shape).rest)

    _choose(patch, choice, chooser)


def multiply_by_torch(patch: pytest.MonkeyPatch, chooser: Any = rank) -> None:
    """Have all products computed by torch in bfloat16, as where the probe finds that faster.

    Args:
        patch, chooser: see :func:`multiply_few_rows_in_c`.
    """
    _choose(patch, _by_torch, chooser)


def attend_in_c(patch: pytest.MonkeyPatch) -> None:
    """Have attention in bfloat16 computed in C, as on CPUs without bfloat16 units."""
    patch.setattr(attention, "bfloat16_units", lambda: False)


def _native(shape: MatrixShape) -> str:
    return NATIVE.name if isinstance(shape.spec, Scheme) else NATIVE_HALF.name


def _by_torch(shape: MatrixShape) -> KernelChoice:
    return KernelChoice((), DENSE[0].name if isinstance(shape.spec, Scheme) else TorchHalf.name)


def _choose(
    patch: pytest.MonkeyPatch, choice: Callable[[MatrixShape], KernelChoice], chooser: Any = rank
) -> None:
    if native_kernels(1) is None:
        pytest.skip("no kernels in C here")
    choose = chooser.choose_kernels

    def chosen(*args: Any) -> dict[MatrixShape, KernelChoice]:
        return {shape: choice(shape) for shape in choose(*args)}

    patch.setattr(chooser, "choose_kernels", chosen)
    # What it measures would not be used.
    patch.setattr(kernels, "probe_kernels", lambda *shape: choice(MatrixShape(*shape[:3])))
