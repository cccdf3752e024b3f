"""The C functions of a library of native kernels, as ``native.h`` declares them.

:class:`tpirt.ops.native.bindings.NativeKernels` has those that a model needs, of one set of
instructions. This has any set, the products alone, and the read rate to compare them with.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int, c_long, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

_SIGNATURES = {
    "tp_pool_free": [c_void_p],
    "tp_read": [c_void_p, c_void_p, c_long],
    "tp_round": [c_int, c_void_p, c_void_p, c_long, c_long, *[c_void_p] * 3],
    "tp_norm": [c_int, c_void_p, c_void_p, c_void_p, c_float, c_long, c_long, c_void_p],
    "tp_gate": [c_int, c_void_p, c_void_p, c_long, c_long, c_void_p],
    "tp_attend": [c_int, c_void_p, c_void_p],
    "tp_product": [c_int, *[c_void_p] * 6, c_long, c_void_p],
}


class NativeFunctions:
    """A library and a pool of threads; a context manager that ends the threads."""

    def __init__(self, path: Path, threads: int):
        self.library = ctypes.CDLL(str(path))
        self.library.tp_set_name.restype = c_char_p
        self.library.tp_pool_new.restype = c_void_p
        for name, arguments in _SIGNATURES.items():
            function = getattr(self.library, name)
            function.argtypes, function.restype = arguments, None
        self.pool = self.library.tp_pool_new(threads)
        if self.pool is None:
            raise MemoryError(f"{threads} threads")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self.library.tp_pool_free(self.pool)

    def sets(self) -> dict[str, int]:
        """The index of each set of instructions that runs here, by name."""
        return {
            self.library.tp_set_name(index).decode(): index
            for index in range(self.library.tp_sets())
            if self.library.tp_set_runs(index)
        }

    def read(self, memory: torch.Tensor) -> None:
        """Read flat uint8 memory once."""
        self.library.tp_read(self.pool, memory.data_ptr(), memory.numel() // 64)
