"""Products with quantized matrices: the packed kernel for few rows, blocks of floats for many.

Axes: T rows of input, N out_features, K in_features, Kp padded K, g group size, G = Kp / g.

**Packed**: torch's ``_weight_int4pack_mm_for_cpu`` and ``_weight_int8pack_mm`` read the weights
once for four rows, so their time grows with T. They take and return bfloat16 and sum in float32,
one output after the other: their bits depend on nothing but their input. (Both also accept
float32, in a scalar loop some 70 times slower.)

**Dense**: pieces of the matrix are de-quantised into a scratch of a few MiB and multiplied by
torch's matrix product, in bfloat16 or float32, whichever is faster here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F

from tpirt.ops.buffers import ALIGN
from tpirt.ops.quant import QuantSpec
from tpirt.ops.quant_layout import (
    PORTABLE_LAYOUT,
    Layout,
    find_kernel,
    local_regions,
    regions_nbytes,
    view_regions,
)

# Elements de-quantised at once: 2 MiB in bfloat16; a single block of rows may be more.
PIECE_ELEMENTS = 1 << 20

# A multiple of every layout's block: where a matrix can be cut.
ROWS_UNIT = 64

INT4_KERNEL = "_weight_int4pack_mm_for_cpu"
INT8_KERNEL = "_weight_int8pack_mm"

# Numbers of rows at which the probe measures, and those its threshold can be.
_PROBED_ROWS = (1, 4, 8, 32, 128)
_THRESHOLDS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Weights the probe multiplies at most; the least time per measurement.
_PROBED_WEIGHTS = 1 << 22
_PROBE_S = 0.006


@dataclass(frozen=True)
class KernelChoice:
    """Which kernel multiplies how many rows: all that the bits of a product depend on.

    Up to ``packed_rows`` rows go through the packed kernel, 0 for none; more through the dense
    product in ``dense_dtype``. ``timings_ms`` is the CPU time that the probe saw, by kernel
    and rows.
    """

    packed_rows: int
    dense_dtype: str
    timings_ms: dict[str, dict[int, float]] = field(default_factory=dict, compare=False, repr=False)


class MatrixShape(NamedTuple):
    """What a choice is made for: how a matrix is stored, its out_features and in_features."""

    spec: QuantSpec
    rows: int
    inputs: int


@dataclass(frozen=True)
class QuantMatrix:
    """An (N, K) matrix as two tensors in local form: codes and scales (see ``quant_layout``).

    Attributes:
        width: inputs as stored, Kp.
        operand: the codes as the packed kernel wants to see them.
    """

    spec: QuantSpec
    rows: int
    inputs: int
    layout: Layout
    codes: torch.Tensor
    scales: torch.Tensor
    width: int
    operand: torch.Tensor

    @classmethod
    def of_buffer(
        cls, spec: QuantSpec, rows: int, inputs: int, layout: Layout, buffer: torch.Tensor
    ) -> QuantMatrix:
        """View a matrix in flat uint8 memory that starts at a multiple of 64 bytes: no copy."""
        assert buffer.data_ptr() % ALIGN == 0
        codes, scales = view_regions(local_regions(spec, rows, inputs, layout), buffer)
        return cls._of(spec, rows, inputs, layout, codes, scales)

    @classmethod
    def _of(
        cls,
        spec: QuantSpec,
        rows: int,
        inputs: int,
        layout: Layout,
        codes: torch.Tensor,
        scales: torch.Tensor,
    ) -> QuantMatrix:
        width = spec.padded_inputs(inputs)
        # The 4-bit kernel takes N from the codes' first axis and knows its blocks by itself.
        operand = codes if spec.kind == "int8" else codes.view(scales.shape[1], width // 2)
        return cls(spec, rows, inputs, layout, codes, scales, width, operand)

    def part(self, start: int, stop: int) -> QuantMatrix:
        """Rows ``start`` to ``stop``, of codes a view; ``start`` is a multiple of ``ROWS_UNIT``."""
        if self.spec.kind == "int8":
            codes, scales = self.codes[start:stop], self.scales[start:stop]
        else:
            size = self.layout.block
            codes = self.codes[start // size : -(-stop // size)]
            scales = self.scales[:, start : start + size * len(codes)].contiguous()
        return self._of(self.spec, stop - start, self.inputs, self.layout, codes, scales)

    @property
    def shape(self) -> MatrixShape:
        """What :class:`KernelChoice` is made for."""
        return MatrixShape(self.spec, self.rows, self.inputs)


def linear(x: torch.Tensor, matrix: QuantMatrix, choice: KernelChoice) -> torch.Tensor:
    """``x w^T`` for the weights ``w`` that ``matrix`` stands for.

    Bits depend on x, the matrix and the choice only, not on where the matrix lies. Packed and
    in bfloat16 they do not depend on the number of threads either, as measured; in float32 MKL's
    may, with few rows. Packed, a row's bits do not depend on the rows beside it.

    Args:
        x: (T, K), any float dtype.

    Returns:
        (T, N) in x's dtype, as exact as bfloat16 (packed; dense in bfloat16) or float32. Beside
        it memory is x in another dtype and, dense, twice a piece of 1 Mi weights or 64 rows.
    """
    if not (x.shape[0] and matrix.inputs and matrix.rows):
        return x.new_zeros(x.shape[0], matrix.rows)
    if x.shape[0] <= choice.packed_rows:
        kernel = find_kernel(INT8_KERNEL if matrix.spec.kind == "int8" else INT4_KERNEL)
        if kernel is not None:
            return _packed(kernel, _fitted(x, matrix.width, torch.bfloat16), matrix).to(x.dtype)
    dtype = getattr(torch, choice.dense_dtype)
    return _dense(_fitted(x, matrix.width, dtype), matrix, x.dtype)


def dequantize(matrix: QuantMatrix) -> torch.Tensor:
    """The whole matrix in float32, (N, K): for tests and for embeddings, not for products."""
    out = torch.empty(matrix.rows, matrix.inputs)
    for start, piece in _pieces(matrix, torch.float32):
        part = out[start : start + piece.shape[0]]
        part.copy_(piece[: part.shape[0], : matrix.inputs])
    if matrix.spec.kind == "int8":
        out *= matrix.scales.float().unsqueeze(1)
    return out


def default_choice(spec: QuantSpec, layout: Layout | None, *, bfloat16: bool) -> KernelChoice:
    """A choice without measuring: what was best on an AVX-512 machine with bfloat16.

    Args:
        layout: what ``local_layout`` says; None where torch has no 4-bit kernel.
        bfloat16: whether this CPU multiplies it natively.
    """
    rows = {"int4": 64, "int8": 16}[spec.kind] if bfloat16 else 64
    if not _has_packed(spec, layout):
        rows = 0
    return KernelChoice(rows, "bfloat16" if bfloat16 else "float32")


def probe_kernels(spec: QuantSpec, rows: int, inputs: int, layout: Layout | None) -> KernelChoice:
    """Measure on this machine which kernel a shape wants.

    At most 4 Mi weights are multiplied: 0.15 s of work. A measurement is noisy and the bits hang
    on it: probe once per shape and keep the answer beside the weights. Thresholds are powers of
    two, so that most noise does not show. Other processes may be busy meanwhile, such as ranks
    that probe too: what counts is CPU time, of one thread, for several wait for each other.

    Args:
        layout: what ``local_layout`` says; None where torch has no 4-bit kernel.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _probe(spec, rows, inputs, layout)
    finally:
        torch.set_num_threads(threads)


def _probe(spec: QuantSpec, rows: int, inputs: int, layout: Layout | None) -> KernelChoice:
    probe = _probe_matrix(spec, rows, inputs, layout or PORTABLE_LAYOUT)

    def measure(choice: KernelChoice, count: int) -> float:
        x = torch.full((count, inputs), 0.5)
        return _time_ms(lambda: linear(x, probe, choice))

    dtypes = {name: measure(KernelChoice(0, name), 32) for name in ("bfloat16", "float32")}
    dtype = min(dtypes, key=lambda name: dtypes[name])
    timings = {dtype: {rows: measure(KernelChoice(0, dtype), rows) for rows in _PROBED_ROWS}}
    if not _has_packed(spec, layout):
        return KernelChoice(0, dtype, timings)
    packed = KernelChoice(max(_PROBED_ROWS), dtype)
    timings["packed"] = {rows: measure(packed, rows) for rows in _PROBED_ROWS}
    return KernelChoice(_crossing(timings["packed"], timings[dtype]), dtype, timings)


def _has_packed(spec: QuantSpec, layout: Layout | None) -> bool:
    if spec.kind == "int4":
        return layout is not None and find_kernel(INT4_KERNEL) is not None
    return find_kernel(INT8_KERNEL) is not None


def _fitted(x: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
    """``x`` (T, K) as the kernels want it: padded with zeros, contiguous, aligned."""
    x = x.to(dtype)
    if x.shape[1] != width:
        return F.pad(x, (0, width - x.shape[1]))
    x = x.contiguous()
    # The 8-bit kernel loads whole vectors of activations by aligned instructions.
    return x if x.data_ptr() % ALIGN == 0 else x.clone()


def _packed(
    kernel: Callable[..., torch.Tensor], x: torch.Tensor, matrix: QuantMatrix
) -> torch.Tensor:
    if matrix.spec.kind == "int8":
        return kernel(x, matrix.operand, matrix.scales)
    out = kernel(x, matrix.operand, matrix.spec.group_size, matrix.scales)
    return out if out.shape[1] == matrix.rows else out[:, : matrix.rows]


def _dense(x: torch.Tensor, matrix: QuantMatrix, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(x.shape[0], matrix.rows, dtype=dtype)
    scales = matrix.scales.float() if matrix.spec.kind == "int8" else None
    for start, piece in _pieces(matrix, x.dtype):
        part = out[:, start : start + piece.shape[0]]
        product = torch.mm(x, piece.t())[:, : part.shape[1]]
        if scales is not None:
            product = product * scales[start : start + part.shape[1]]
        part.copy_(product)
    return out


def _pieces(matrix: QuantMatrix, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    """De-quantise rows from ``start`` on, piece after piece, into one scratch: (n, Kp) views.

    What int8 yields are the codes, exact in both dtypes: scales go onto the product. An int4
    piece may go past the last row, with zeros.
    """
    step = max(1, PIECE_ELEMENTS // matrix.width)
    if matrix.spec.kind == "int8":
        scratch = torch.empty(min(step, matrix.rows), matrix.width, dtype=dtype)
        for start in range(0, matrix.rows, step):
            codes = matrix.codes[start : start + step]
            yield start, scratch[: codes.shape[0]].copy_(codes)
        return
    layout, blocks = matrix.layout, matrix.codes.shape[0]
    step = min(max(1, step // layout.block), blocks)
    scratch = torch.empty(step * layout.block * matrix.width, dtype=dtype)
    for first in range(0, blocks, step):
        codes = matrix.codes[first : first + step]
        rows = codes.shape[0] * layout.block
        start = first * layout.block
        turned = scratch[: rows * matrix.width].view(matrix.width, rows)
        _unpack_levels(codes, layout, turned)
        levels = turned.view(-1, matrix.spec.group_size, rows)
        pairs = matrix.scales[:, start : start + rows]
        # Rounded once: torch computes bfloat16 addcmul in float32.
        scale, zero = (pairs[..., i].to(dtype).unsqueeze(1).contiguous() for i in (0, 1))
        torch.addcmul(zero, levels, scale, out=levels)
        yield start, turned.t()


def _unpack_levels(codes: torch.Tensor, layout: Layout, out: torch.Tensor) -> None:
    """Local codes (n, Kp, B / 2) to levels -8..7 in ``out`` (Kp, n B)."""
    target = out.view(out.shape[0], codes.shape[0], layout.block).permute(1, 0, 2)
    low, high = layout.split(target)
    low.copy_((codes & 15).view(torch.int8).sub_(8))
    high.copy_((codes >> 4).view(torch.int8).sub_(8))


def _probe_matrix(spec: QuantSpec, rows: int, inputs: int, layout: Layout) -> QuantMatrix:
    width = spec.padded_inputs(inputs)
    rows = min(rows, max(layout.block, _PROBED_WEIGHTS // width // layout.block * layout.block))
    regions = local_regions(spec, rows, inputs, layout)
    buffer = torch.arange(regions_nbytes(regions), dtype=torch.int32).remainder_(251)
    matrix = QuantMatrix.of_buffer(spec, rows, inputs, layout, buffer.to(torch.uint8))
    matrix.scales.fill_(0.01)
    return matrix


def _time_ms(work: Callable[[], object]) -> float:
    """CPU time of the shortest of at least two runs after a first one."""
    work()
    shortest, spent = float("inf"), 0.0
    for count in range(50):
        start = time.thread_time()
        work()
        lasted = time.thread_time() - start
        shortest, spent = min(shortest, lasted), spent + lasted
        if count and spent > _PROBE_S:
            break
    return shortest * 1e3


def _crossing(packed: Mapping[int, float], dense: Mapping[int, float]) -> int:
    """The largest threshold up to which packed is no slower, times taken linear in between."""
    best = 0
    for rows in _THRESHOLDS:
        if _at(packed, rows) > _at(dense, rows):
            break
        best = rows
    return best


def _at(times: Mapping[int, float], rows: int) -> float:
    counts = sorted(times)
    above = min((i for i, count in enumerate(counts) if count >= rows), default=len(counts) - 1)
    low, high = counts[max(0, above - 1)], counts[max(1, above)]
    return times[low] + (times[high] - times[low]) * (rows - low) / (high - low)
