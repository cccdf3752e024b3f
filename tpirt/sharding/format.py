"""The format of a rank's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpirt.dtypes import RUN_DTYPES, dtype_name
from tpirt.errors import ConfigError
from tpirt.ops.quant import AS_THEY_ARE, Int8, QuantSpec
from tpirt.ops.quant_layout import PORTABLE_LAYOUT, Layout


@dataclass(frozen=True)
class WeightFormat:
    """The format of a slice's weights.

    Attributes:
        dtype: of unquantized weights, the KV cache and attention.
        quant: of the projections.
        layout: the order of 4-bit codes for the rank's CPU.
    """

    dtype: torch.dtype
    quant: QuantSpec = AS_THEY_ARE
    layout: Layout = PORTABLE_LAYOUT

    @property
    def head_quant(self) -> QuantSpec:
        """Quantization of the LM head: at least 8 bits, because it decides every token."""
        return AS_THEY_ARE if self.quant == AS_THEY_ARE else Int8()

    @property
    def numbers(self) -> str:
        """How the numbers of a projection are stored: ``int4:64``, ``bfloat16``."""
        return dtype_name(self.dtype) if self.quant == AS_THEY_ARE else str(self.quant)

    @property
    def names(self) -> tuple[str, str, str]:
        """dtype, quantization and layout as in manifests; no layout without 4-bit codes."""
        layout = self.layout.name if self.quant.uses_layout else ""
        return dtype_name(self.dtype), str(self.quant), layout

    @classmethod
    def named(cls, dtype: str, quantize: str, layout: str) -> WeightFormat:
        """The format with these :attr:`names`.

        Raises:
            ConfigError: an unknown name.
        """
        known = Layout.named(layout) if layout else PORTABLE_LAYOUT
        if dtype not in RUN_DTYPES or known is None:
            raise ConfigError(f"weights in {dtype} {quantize} {layout}: unknown format")
        return cls(RUN_DTYPES[dtype], QuantSpec.parse(quantize), known)
