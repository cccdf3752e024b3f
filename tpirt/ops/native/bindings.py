"""The C functions of :mod:`tpirt.ops.native` on tensors; ``native.h`` has the formats.

Axes: T tokens, N rows, Np N rounded up to 16, K inputs, Kp K rounded up to 32, G = Kp / 32 groups.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_float, c_int, c_int8, c_long, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from tpirt.ops.buffers import scratch_address
from tpirt.ops.native.library import load

_SIGNATURES = {
    "tp_round": [c_int, c_void_p, c_void_p, c_long, c_long, c_void_p, c_void_p, c_void_p],
    "tp_norm": [c_int, c_void_p, c_void_p, c_void_p, c_float, c_long, c_long, c_void_p],
    "tp_gate": [c_int, c_void_p, c_void_p, c_long, c_long, c_void_p],
    "tp_product": [c_int, *[c_void_p] * 6, c_long, c_void_p],
    "tp_attend": [c_int, c_void_p, c_void_p],
    "tp_attend_each": [c_int, *[c_void_p] * 3, c_long, c_long, *[c_void_p] * 2],
    "tp_attention_scratch": [c_void_p],
    "tp_mlp_scratch": [c_void_p],
    "tp_layers_scratch": [c_void_p, c_long],
    "tp_attention": [c_int, c_void_p, c_void_p],
    "tp_mlp": [c_int, c_void_p, c_void_p],
    "tp_layers": [c_int, c_void_p, c_void_p, c_long, c_void_p],
    "tp_head_scratch": [c_void_p],
    "tp_head": [c_int, c_void_p, c_void_p],
    "tp_fit4": [c_int, c_void_p, c_long, c_long, c_char_p, c_void_p, c_void_p],
    "tp_dense": [c_int, c_void_p, c_void_p, c_long, c_long, c_void_p, c_int],
    "tp_narrow": [c_int, c_void_p, c_void_p, c_long, c_void_p],
    "tp_pool_free": [c_void_p],
}


# As ``native.h`` numbers them; the dtype of a matrix in 4 bits is that of its codes.
_KINDS = {torch.uint8: 0, torch.int8: 2, torch.bfloat16: 3, torch.float16: 4}
_CODEBOOK = 1


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Attention(ctypes.Structure):
    """The arguments of :meth:`NativeKernels.attend`; ``native.h`` explains all of these."""

    _fields_ = (
        *_fields(c_void_p, "qkv cos sin q_norm k_norm all_keys all_values"),
        *_fields(c_void_p, "key_scales value_scales groups parents out"),
        *_fields(c_long, "tokens past capacity queries keys dim window"),
        ("eps", c_float),
    )


class Matrix(ctypes.Structure):
    """A matrix and the bias of its product; see :meth:`of_tiles` and :meth:`of_rows`."""

    _fields_ = (
        *_fields(c_void_p, "codes scales bias"),
        *_fields(c_long, "rows inputs blocks groups"),
        ("kind", c_int),
        ("levels", c_int8 * 16),
    )

    @classmethod
    def of_tiles(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        rows: int,
        inputs: int,
        levels: Sequence[int] = (),
    ) -> Matrix:
        """A matrix (N, K) in 8 (int8) or 4 bits, as :mod:`tpirt.ops.quant` keeps it.

        Args:
            levels: 16 of a codebook, if codes are indices of them.
        """
        blocks, groups, _ = codes.shape
        kind = _CODEBOOK if levels else _KINDS[codes.dtype]
        places = codes.data_ptr(), scales.data_ptr(), None
        return cls(*places, rows, inputs, blocks, groups, kind, (c_int8 * 16)(*levels))

    @classmethod
    def of_rows(cls, weight: torch.Tensor) -> Matrix:
        """A matrix (N, K), bfloat16 or float16 and contiguous."""
        rows, inputs = weight.shape
        blocks, groups = -(-rows // 16), -(-inputs // 32)
        kind = _KINDS[weight.dtype]
        return cls(weight.data_ptr(), None, None, rows, inputs, blocks, groups, kind)

    @property
    def rounds(self) -> bool:
        """Whether its products take rounded rows."""
        return bool(self.kind < _KINDS[torch.bfloat16])


class AttentionBlock(ctypes.Structure):
    """The arguments of :meth:`NativeKernels.attention_block`."""

    _fields_ = (
        *_fields(c_void_p, "hidden norm"),
        *_fields(Matrix, "qk v out"),
        ("heads", Attention),
        *_fields(c_void_p, "partial scratch sequences"),
        *_fields(c_long, "count tokens layer"),
        ("eps", c_float),
    )


class MlpBlock(ctypes.Structure):
    """The arguments of :meth:`NativeKernels.mlp_block`."""

    _fields_ = (
        *_fields(c_void_p, "next hidden norm normed codes scales sums"),
        ("groups", c_long),
        *_fields(Matrix, "gate_up down"),
        *_fields(c_void_p, "partial scratch"),
        ("tokens", c_long),
        ("add", c_int),
        ("eps", c_float),
    )


class HeadBlock(ctypes.Structure):
    """The arguments of :meth:`NativeKernels.head`."""

    _fields_ = (
        *_fields(c_void_p, "hidden norm pieces out scratch"),
        *_fields(c_long, "count tokens width"),
        ("eps", c_float),
    )


class Layer(ctypes.Structure):
    """A layer of :meth:`NativeKernels.layers`: addresses of its blocks, and its window."""

    _fields_ = (*_fields(c_void_p, "attention mlp"), ("window", c_long))


class KVRoom(ctypes.Structure):
    """Where a layer of a sequence has its keys and values; see :class:`Attention`."""

    _fields_ = (*_fields(c_void_p, "keys values key_scales value_scales"), ("capacity", c_long))


class SequenceRows(ctypes.Structure):
    """A sequence's rows in a step; ``native.h`` explains it."""

    _fields_ = (*_fields(c_void_p, "rooms cos sin parents"), *_fields(c_long, "tokens past"))


@dataclass(frozen=True)
class LayerRun:
    """Some layers in turn.

    Attributes:
        layers: array of all layers, of which those that run have all that is in them.
        first, count: those that run.
        attention: of the first; it also has what is the same for all.
    """

    layers: ctypes.Array[Layer]
    first: int
    count: int
    attention: AttentionBlock


@dataclass(frozen=True)
class Rounded:
    """Rows of input, 8 bits per 32.

    Attributes:
        codes: int8 (T, Kp).
        scales, sums: float32 (T, G); sums are of the codes.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    sums: torch.Tensor

    @classmethod
    def empty(cls, tokens: int, inputs: int) -> Rounded:
        """Allocate (T, K)."""
        groups = -(-inputs // 32)
        return cls(
            torch.empty(tokens, 32 * groups, dtype=torch.int8),
            torch.empty(tokens, groups),
            torch.empty(tokens, groups),
        )

    def __len__(self) -> int:
        return self.codes.shape[0]

    @property
    def shape(self) -> torch.Size:
        """(T, Kp)."""
        return self.codes.shape

    @property
    def pointers(self) -> tuple[int, int, int]:
        """Addresses of codes, scales and sums."""
        return self.codes.data_ptr(), self.scales.data_ptr(), self.sums.data_ptr()


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
        for name in ("attention", "mlp", "layers", "head"):
            getattr(self._library, f"tp_{name}_scratch").restype = c_long
        self._set = chosen
        self._pool = self._library.tp_pool_new(threads)
        if self._pool is None:
            raise MemoryError(f"{threads} compute threads")

    def round(self, x: torch.Tensor) -> Rounded:
        """Round x (T, K), float32 and contiguous."""
        rounded = Rounded.empty(*x.shape)
        self._library.tp_round(self._set, self._pool, x.data_ptr(), *x.shape, *rounded.pointers)
        return rounded

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """``x / rms(x) * weight`` of x (T, K); all float32 and contiguous."""
        out = torch.empty_like(x)
        self._library.tp_norm(
            self._set, self._pool, x.data_ptr(), weight.data_ptr(), eps, *x.shape, out.data_ptr()
        )
        return out

    def gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        """``silu(gate) * up`` (T, K) of gate_up (T, 2 K), float32 and contiguous."""
        tokens, width = gate_up.shape
        out = torch.empty(tokens, width // 2)
        self._library.tp_gate(
            self._set, self._pool, gate_up.data_ptr(), tokens, width // 2, out.data_ptr()
        )
        return out

    def product(self, matrix: Matrix, x: torch.Tensor | Rounded) -> torch.Tensor:
        """Multiply a matrix (N, K) with rows.

        Args:
            x: (T, K), rounded if ``matrix.rounds``, else float32 and contiguous.

        Returns:
            (T, N) float32, a view of (T, Np).
        """
        assert isinstance(x, Rounded) == matrix.rounds
        out = torch.empty(len(x), 16 * matrix.blocks)
        inputs = (None, *x.pointers) if isinstance(x, Rounded) else (x.data_ptr(), None, None, None)
        self._library.tp_product(
            self._set, self._pool, byref(matrix), *inputs, len(x), out.data_ptr()
        )
        # Slicing costs microseconds.
        return out if out.shape[1] == matrix.rows else out[:, : matrix.rows]

    def attend(self, attention: Attention) -> None:
        """Turn queries and keys, append keys and values, and attend."""
        self._library.tp_attend(self._set, self._pool, byref(attention))

    def attend_each(
        self,
        heads: Attention,
        sequences: ctypes.Array[SequenceRows],
        layer: int,
        qkv: torch.Tensor,
        out: torch.Tensor,
    ) -> None:
        """Turn queries and keys, append keys and values, and attend within each sequence.

        Args:
            heads: what the sequences share.
            sequences: those of the rows, in order.
            layer: its number.
            qkv: (T, (Q + 2 K) D) float32; overwritten.
            out: (T, Q D) float32; overwritten.
        """
        count = len(sequences)
        self._library.tp_attend_each(
            *(self._set, self._pool, byref(heads), sequences, count, layer),
            *(qkv.data_ptr(), out.data_ptr()),
        )

    def attention_block(self, block: AttentionBlock) -> None:
        """Norm, products, attention, product."""
        nbytes = self._library.tp_attention_scratch(byref(block))
        block.scratch = scratch_address(nbytes)
        self._library.tp_attention(self._set, self._pool, byref(block))

    def mlp_block(self, block: MlpBlock) -> None:
        """Norm, product, activation, product; with the blocks that are ``next``."""
        nbytes = self._library.tp_mlp_scratch(byref(block))
        block.scratch = scratch_address(nbytes)
        self._library.tp_mlp(self._set, self._pool, byref(block))

    def layers(self, run: LayerRun, hidden: torch.Tensor) -> None:
        """Attention and MLP of layers in turn, added to ``hidden`` but for the last MLP.

        Args:
            run: which layers.
            hidden: (T, H) float32, contiguous.
        """
        layers = byref(run.layers[run.first])
        nbytes = self._library.tp_layers_scratch(layers, run.count)
        run.attention.scratch = scratch_address(nbytes)
        self._library.tp_layers(self._set, self._pool, layers, run.count, hidden.data_ptr())

    def head(self, block: HeadBlock) -> None:
        """Norm, and the products of all pieces."""
        block.scratch = scratch_address(self._library.tp_head_scratch(byref(block)))
        self._library.tp_head(self._set, self._pool, byref(block))

    def fit4(
        self, w: torch.Tensor, levels: Sequence[int], codes: torch.Tensor, scales: torch.Tensor
    ) -> None:
        """Round weights to 4 bits, in the calling thread only.

        Args:
            w: (n, K) float32, contiguous and finite.
            levels: 16 of a codebook, ascending; none for equal steps.
            codes, scales: contiguous, of n rows; overwritten.
        """
        book = bytes(level & 255 for level in levels) or None
        self._library.tp_fit4(
            self._set, w.data_ptr(), *w.shape, book, codes.data_ptr(), scales.data_ptr()
        )

    def dense(self, matrix: Matrix, first: int, last: int, out: torch.Tensor) -> torch.Tensor:
        """Dequantize some blocks of 16 rows; 8 bits without scales.

        Args:
            first, last: the first block, and the one after the last.
            out: float32 or bfloat16, at least 16 blocks x Kp elements; overwritten.

        Returns:
            (16 blocks, Kp): a view of ``out``.
        """
        half = out.dtype is torch.bfloat16
        self._library.tp_dense(
            self._set, self._pool, byref(matrix), first, last, out.data_ptr(), half
        )
        rows, width = 16 * (last - first), 32 * matrix.groups
        return out[: rows * width].view(rows, width)

    def narrow(self, weight: torch.Tensor, out: torch.Tensor) -> None:
        """Round float16 to bfloat16; both contiguous."""
        self._library.tp_narrow(
            self._set, self._pool, weight.data_ptr(), weight.numel(), out.data_ptr()
        )

    def __del__(self) -> None:
        if getattr(self, "_pool", None):
            self._library.tp_pool_free(self._pool)


@cache
def native_kernels(threads: int) -> NativeKernels | None:
    """The kernels of this machine with a pool of ``threads``; None if there are none.

    The first call in a process finds the library, see :func:`~tpirt.ops.native.library.load`.
    """
    native = load()
    return None if native.path is None else NativeKernels(native.path, native.index, threads)


def available_kernels() -> NativeKernels | None:
    """The kernels of this machine with as many threads as torch uses; None if there are none."""
    return native_kernels(torch.get_num_threads())


def present_kernels() -> NativeKernels:
    """:func:`available_kernels` of a machine that has them."""
    native = available_kernels()
    assert native is not None
    return native
