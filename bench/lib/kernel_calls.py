"""Calls for ``bench.kernels`` to time: products with matrices in cold memory, and what is between.

Axes: T rows of input, N out_features, K in_features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
import torch.nn.functional as F

from bench.lib.native_functions import NativeFunctions
from tpirt.errors import ConfigError
from tpirt.ops.buffers import ALIGN, page_buffer, round_up
from tpirt.ops.native.bindings import Attention, Matrix, Rounded
from tpirt.ops.quant import SCHEMES, Scheme
from tpirt.ops.quant_kernels import DENSE, Dense
from tpirt.ops.quant_matrix import QuantMatrix
from tpirt.ops.quant_regions import matrix_regions, regions_nbytes

Call = Callable[[], object]
Prepare = Callable[[torch.Tensor], Call]

_DENSE_ROWS = 16  # fewer are never dequantized for

_HIDDEN, _INTERMEDIATE, _QUERIES, _KEYS, _HEAD = 2048, 8192, 32, 8, 64  # of bench-1.1b
_CONTEXTS = (128, 1024)
_EPS = 1e-5


class Weights:
    """Memory full of matrices of any shape and format: the same bytes serve all of them.

    As bfloat16 they are normally distributed. As codes, scales and float16 they are finite, and
    time does not depend on them.
    """

    def __init__(self, size: int):
        self.memory = page_buffer(size)  # as a model's weights lie in memory
        self.memory.view(torch.bfloat16).normal_(0, 0.02)

    def pieces(self, size: int) -> list[torch.Tensor]:
        """All pieces of ``size`` bytes, one after another.

        Raises:
            ConfigError: not one fits.
        """
        starts = range(0, len(self.memory) - size + 1, round_up(size, ALIGN))
        if not starts:
            raise ConfigError(f"--memory: a matrix of {size >> 20} MiB does not fit")
        return [self.memory[start : start + size] for start in starts]


@dataclass(frozen=True)
class Kernel:
    """One way to multiply with matrices of one shape and format.

    Attributes:
        format: of the matrices.
        name: a set of instructions, or torch's kernel.
        weights_bytes: of one matrix.
        fewest_rows: of input, below which it is not measured.
        prepare: makes of x (T, K) a function that multiplies it with the next matrix.
    """

    format: str
    name: str
    weights_bytes: int
    fewest_rows: int
    prepare: Prepare


def tile_kernels(
    functions: NativeFunctions, weights: Weights, format: str, n: int, k: int, sets: Sequence[str]
) -> list[Kernel]:
    """Kernels for 4- and 8-bit weights: in C, and torch's."""
    scheme = SCHEMES[format]
    assert isinstance(scheme, Scheme)
    size = regions_nbytes(matrix_regions(scheme, n, k))
    matrices = [QuantMatrix.of_buffer(scheme, n, k, piece) for piece in weights.pieces(size)]

    def torchs(dense: Dense) -> Prepare:
        def prepare(x: torch.Tensor) -> Call:
            turns = cycle(matrices)
            return lambda: dense(x, next(turns))

        return prepare

    found = _native_kernels(functions, format, size, [m.native for m in matrices], sets)
    return found + [Kernel(format, dense.name, size, _DENSE_ROWS, torchs(dense)) for dense in DENSE]


def half_kernels(
    functions: NativeFunctions, weights: Weights, format: str, n: int, k: int, sets: Sequence[str]
) -> list[Kernel]:
    """Kernels for 16-bit weights: in C, and torch's for bfloat16."""
    dtype = torch.bfloat16 if format == "bf16" else torch.float16
    matrices = [piece.view(dtype).view(n, k) for piece in weights.pieces(2 * n * k)]

    def linear(x: torch.Tensor) -> Call:
        x, turns = x.to(dtype), cycle(matrices)
        return lambda: F.linear(x, next(turns))

    natives = [Matrix.of_rows(matrix) for matrix in matrices]
    found = _native_kernels(functions, format, 2 * n * k, natives, sets)
    return [*found, Kernel(format, "torch", 2 * n * k, 1, linear)]


def _native_kernels(
    functions: NativeFunctions,
    format: str,
    size: int,
    matrices: Sequence[Matrix],
    sets: Sequence[str],
) -> list[Kernel]:
    product, pool = functions.library.tp_product, functions.pool

    def native(chosen: int) -> Prepare:
        def prepare(x: torch.Tensor) -> Call:
            rounded = Rounded.empty(*x.shape)
            out = torch.empty(len(x), 16 * matrices[0].blocks)
            functions.library.tp_round(chosen, pool, x.data_ptr(), *x.shape, *rounded.pointers)
            after = (x.data_ptr(), *rounded.pointers, len(x), out.data_ptr())
            turns = cycle([ctypes.byref(matrix) for matrix in matrices])
            # What the addresses belong to must live as long as the function.
            return lambda _keep=(x, rounded, out): product(chosen, pool, next(turns), *after)

        return prepare

    indices = functions.sets()
    return [Kernel(format, name, size, 1, native(indices[name])) for name in sets]


def between(functions: NativeFunctions, chosen: int, rows: int) -> Iterator[tuple[str, int, Call]]:
    """Functions by name, with the width of their rows or the number of past tokens."""
    x, weight = torch.randn(rows, 2 * _INTERMEDIATE), torch.ones(_HIDDEN)
    rounded = Rounded.empty(rows, _INTERMEDIATE)
    library, pool, to = functions.library, functions.pool, rounded.pointers
    for width in (_HIDDEN, _INTERMEDIATE):
        shape = (rows, width)
        arguments = (chosen, pool, x.data_ptr(), *shape, *to)
        yield "round", width, lambda a=arguments, _keep=(x, rounded): library.tp_round(*a)
    out = torch.empty(rows, _INTERMEDIATE)
    norm = (chosen, pool, x.data_ptr(), weight.data_ptr(), _EPS, rows, _HIDDEN, out.data_ptr())
    yield "norm", _HIDDEN, lambda _keep=(x, weight, out): library.tp_norm(*norm)
    gate = (chosen, pool, x.data_ptr(), rows, _INTERMEDIATE, out.data_ptr())
    yield "gate", _INTERMEDIATE, lambda _keep=(x, out): library.tp_gate(*gate)
    for past in _CONTEXTS:
        yield "attend", past, _attend(functions, chosen, rows, past)


def _attend(functions: NativeFunctions, chosen: int, rows: int, past: int) -> Call:
    qkv = torch.randn(rows, _QUERIES + 2 * _KEYS, _HEAD)
    cos, sin = torch.ones(rows, _HEAD), torch.zeros(rows, _HEAD)  # turned by 0, again and again
    keys, cached = torch.randn(2, _KEYS, past + rows, _HEAD).bfloat16().unbind()
    groups = torch.full((_KEYS,), _QUERIES // _KEYS, dtype=torch.int32)
    out = torch.empty(rows, _QUERIES, _HEAD)
    arguments = Attention(
        qkv=qkv.data_ptr(),
        cos=cos.data_ptr(),
        sin=sin.data_ptr(),
        all_keys=keys.data_ptr(),
        all_values=cached.data_ptr(),
        groups=groups.data_ptr(),
        out=out.data_ptr(),
        tokens=rows,
        past=past,
        capacity=past + rows,
        queries=_QUERIES,
        keys=_KEYS,
        dim=_HEAD,
        window=0,
        eps=_EPS,
    )
    address = ctypes.byref(arguments)
    return lambda _keep=(qkv, cos, sin, keys, cached, groups, out): functions.library.tp_attend(
        chosen, functions.pool, address
    )
