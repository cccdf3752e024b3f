"""The format of a rank's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tpirt.dtypes import WEIGHT_DTYPES, dtype_name
from tpirt.errors import ConfigError
from tpirt.ops.quant import AS_THEY_ARE, Int8, QuantSpec


@dataclass(frozen=True)
class WeightFormat:
    """The format of a slice's weights.

    Attributes:
        dtype: of unquantized matrices.
        quant: of the projections; see :attr:`sensitive_quant`.
    """

    dtype: torch.dtype
    quant: QuantSpec = AS_THEY_ARE

    @property
    def run_dtype(self) -> torch.dtype:
        """Of attention, sums, and the KV cache if it is not in int8: never float16.

        Numbers between layers can be too large for it; weights that were published so are not.
        """
        return torch.bfloat16 if self.dtype is torch.float16 else self.dtype

    @property
    def sensitive_quant(self) -> QuantSpec:
        """Quantization of the matrices that lose the most: at least 8 bits.

        Which ones, :mod:`tpirt.sharding.blocks` says: the LM head, and a few within the layers.
        """
        return Int8() if 0 < self.quant.bits < Int8().bits else self.quant

    @property
    def numbers(self) -> str:
        """How the numbers of a projection are stored: ``int4``, ``bfloat16``."""
        return dtype_name(self.dtype) if self.quant == AS_THEY_ARE else str(self.quant)

    @property
    def names(self) -> tuple[str, str]:
        """dtype and quantization as in manifests."""
        return dtype_name(self.dtype), str(self.quant)

    @classmethod
    def named(cls, dtype: str, quantize: str) -> WeightFormat:
        """The format with these :attr:`names`.

        Raises:
            ConfigError: an unknown name.
        """
        if dtype not in WEIGHT_DTYPES:
            raise ConfigError(f"weights in {dtype} {quantize}: unknown format")
        return cls(WEIGHT_DTYPES[dtype], QuantSpec.parse(quantize))
