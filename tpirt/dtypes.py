"""Dtypes by name, in options and manifests (``bfloat16``) and in safetensors files (``BF16``)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# Dtypes of products, attention and the KV cache.
RUN_DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Dtypes of weights that are not quantized.
WEIGHT_DTYPES: Mapping[str, torch.dtype] = {**RUN_DTYPES, "float16": torch.float16}

# Dtypes of checkpoints.
CHECKPOINT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# All dtypes of the safetensors format.
SAFETENSORS_DTYPES: Mapping[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "I64": torch.int64,
    "U64": torch.uint64,
    "F64": torch.float64,
    "C64": torch.complex64,
}
SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype without ``torch.``."""
    return str(dtype).removeprefix("torch.")
