"""The C functions of :mod:`tpirt.ops.native` on tensors; ``native.h`` has the formats.

Axes: T tokens, N rows, Np N rounded up to 16, K inputs, Kp K rounded up to 32, G = Kp / 32 groups.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_long, c_void_p
from pathlib import Path

import torch

_SIGNATURES = {
    "tp_round": [c_int, c_void_p, c_long, c_long, c_void_p, c_void_p, c_void_p],
    "tp_q4": [c_int, *[c_void_p] * 3, c_long, c_long, *[c_void_p] * 3, c_long, c_void_p, c_long],
    "tp_q8": [c_int, *[c_void_p] * 3, c_long, c_long, *[c_void_p] * 3, c_long, c_void_p, c_long],
    "tp_fit4": [c_int, c_void_p, c_long, c_long, c_void_p, c_void_p],
    "tp_dense": [c_int, c_void_p, c_int, c_void_p, c_void_p, c_long, c_long, c_void_p, c_int],
    "tp_pool_free": [c_void_p],
}


class NativeKernels:
    """One set of instructions of a library, and threads to use it with.

    Args:
        path: the library.
        chosen: index of the set.
        threads: that compute, with the calling one.
    """

    def __init__(self, path: Path, chosen: int, threads: int):
        self._library = ctypes.CDLL(str(path))
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, None
        self._library.tp_pool_new.restype = c_void_p
        self._set = chosen
        self._pool = self._library.tp_pool_new(threads)
        if self._pool is None:
            raise MemoryError(f"{threads} compute threads")

    def round(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Round inputs to 8 bits per 32.

        Args:
            x: (T, K) float32, contiguous.

        Returns:
            Codes int8 (T, Kp), scales and sums of codes float32 (T, G).
        """
        tokens, inputs = x.shape
        groups = -(-inputs // 32)
        codes = torch.empty(tokens, 32 * groups, dtype=torch.int8)
        scales, sums = torch.empty(2, tokens, groups).unbind()
        self._library.tp_round(
            self._set,
            x.data_ptr(),
            tokens,
            inputs,
            codes.data_ptr(),
            scales.data_ptr(),
            sums.data_ptr(),
        )
        return codes, scales, sums

    def product(
        self, bits: int, matrix: tuple[int, int], blocks: int, groups: int, x: torch.Tensor
    ) -> torch.Tensor:
        """Multiply a matrix in tiles with the rounded rows of ``x``.

        Args:
            bits: 4 or 8.
            matrix: addresses of codes and scales.
            blocks, groups: Np / 16 and G.
            x: (T, K) float32, contiguous.

        Returns:
            (T, Np) float32.
        """
        codes, scales, sums = self.round(x)
        out = torch.empty(len(x), 16 * blocks)
        multiply = self._library.tp_q4 if bits == 4 else self._library.tp_q8
        multiply(
            self._set,
            self._pool,
            *matrix,
            16 * blocks,
            groups,
            codes.data_ptr(),
            scales.data_ptr(),
            sums.data_ptr(),
            len(x),
            out.data_ptr(),
            out.shape[1],
        )
        return out

    def fit4(self, w: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> None:
        """Round weights to 4 bits, in the calling thread only.

        Args:
            w: (n, K) float32, contiguous and finite.
            codes, scales: contiguous, of n rows; overwritten.
        """
        self._library.tp_fit4(
            self._set, w.data_ptr(), *w.shape, codes.data_ptr(), scales.data_ptr()
        )

    def dense(
        self, bits: int, matrix: tuple[int, int], blocks: int, groups: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Dequantize blocks of 16 rows.

        Args:
            bits: 4 or 8; 8 without scales.
            matrix: addresses of the first block's codes and scales.
            dtype: float32 or bfloat16.

        Returns:
            (16 blocks, Kp).
        """
        out = torch.empty(16 * blocks, 32 * groups, dtype=dtype)
        half = dtype is torch.bfloat16
        self._library.tp_dense(
            self._set, self._pool, bits, *matrix, blocks, groups, out.data_ptr(), half
        )
        return out

    def __del__(self) -> None:
        if getattr(self, "_pool", None):
            self._library.tp_pool_free(self._pool)
