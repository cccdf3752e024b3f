"""How a rank keeps and multiplies its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpirt.errors import ConfigError
from tpirt.ops.quant import AS_THEY_ARE, Int8, QuantSpec
from tpirt.ops.quant_layout import PORTABLE_LAYOUT, Layout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class WeightFormat:
    """The form of a slice's weights.

    Attributes:
        dtype: of what is not quantized, of the KV cache and of attention.
        quant: how the projections are stored.
        layout: where a 4-bit kernel of the rank's CPU wants the codes.
    """

    dtype: torch.dtype
    quant: QuantSpec = AS_THEY_ARE
    layout: Layout = PORTABLE_LAYOUT

    @property
    def head_quant(self) -> QuantSpec:
        """How the LM head is stored: in 8 bits at least, because every token depends on it."""
        return AS_THEY_ARE if self.quant == AS_THEY_ARE else Int8()

    @property
    def names(self) -> tuple[str, str, str]:
        """dtype, quantization and layout as a manifest has them; no layout without 4-bit codes."""
        layout = self.layout.name if self.quant.uses_layout else ""
        return str(self.dtype).removeprefix("torch."), str(self.quant), layout

    @classmethod
    def named(cls, dtype: str, quantize: str, layout: str) -> WeightFormat:
        """The format that :attr:`names` is of.

        Raises:
            ConfigError: a name that this version does not know.
        """
        known = Layout.named(layout) if layout else PORTABLE_LAYOUT
        if dtype not in DTYPES or known is None:
            raise ConfigError(f"weights in {dtype} {quantize} {layout}: not a format known here")
        return cls(DTYPES[dtype], QuantSpec.parse(quantize), known)
