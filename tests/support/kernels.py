"""Kernels that do not depend on what is faster at this moment."""

from __future__ import annotations

from typing import Any

import pytest

from tpirt.cluster import rank
from tpirt.ops.native.bindings import native_kernels
from tpirt.ops.quant_kernels import NATIVE
from tpirt.ops.quant_linear import KernelChoice


def multiply_in_c(patch: pytest.MonkeyPatch) -> None:
    """Have all products with quantized weights computed in C, however many rows."""
    if native_kernels(1) is None:
        pytest.skip("no kernels in C here")
    choose = rank.choose_kernels

    def in_c(*args: Any) -> dict[Any, KernelChoice]:
        return dict.fromkeys(choose(*args), KernelChoice((), NATIVE.name, {}))

    patch.setattr(rank, "choose_kernels", in_c)
