"""Tensors on the wire: the frame that carries one, and its payload in float32, bfloat16 or int8.

Every rank must add the same numbers, so a sender continues with its tensor as the receivers decode
it: :func:`encode` returns both.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from tpirt.batch import SCALE_BLOCK, CommDtype
from tpirt.errors import TransportError
from tpirt.ops.buffers import tensor_bytes
from tpirt.transport.frame import Header, Kind

_NUMBERS = {CommDtype.FLOAT32: 1, CommDtype.BFLOAT16: 2, CommDtype.INT8: 3}
_BY_NUMBER = {number: dtype for dtype, number in _NUMBERS.items()}


def tensor_head(
    kind: Kind, step: int, seq: int, dtype: CommDtype, shape: torch.Size | tuple[int, ...]
) -> bytes:
    """The header of a tensor's frame; the receiver compares it with the expected one.

    Args:
        kind: PARTIAL or REDUCED.
        step: number of the step.
        seq: number of the collective within the step.
        dtype: comm dtype of the payload.
        shape: (rows, columns), or (elements,) for a share of a flattened tensor.
    """
    rows, columns = (1, *shape) if len(shape) == 1 else shape
    nbytes = dtype.nbytes(rows, columns)
    return Header(kind, _NUMBERS[dtype], step, seq, rows, columns, 0, nbytes).pack()


def dtype_number(dtype: CommDtype) -> int:
    """The number of a comm dtype in headers."""
    return _NUMBERS[dtype]


def hidden_dtype(number: int) -> CommDtype:
    """The comm dtype of hidden states by its number in a header.

    Raises:
        TransportError: neither float32 nor bfloat16.
    """
    dtype = _BY_NUMBER.get(number)
    if dtype is None or dtype is CommDtype.INT8:
        raise TransportError(f"hidden states of unknown dtype {number}; refused")
    return dtype


def rounded(tensor: torch.Tensor, dtype: CommDtype) -> torch.Tensor:
    """Round a tensor to what its receivers decode."""
    return encode(tensor, dtype)[1] if dtype is CommDtype.INT8 else _in(dtype, tensor)


def encode(tensor: torch.Tensor, dtype: CommDtype) -> tuple[memoryview, torch.Tensor]:
    """Serialise a contiguous tensor, float32 or bfloat16.

    Returns:
        The payload, and the tensor as its receivers decode it, of the same shape, in bfloat16 or
        float32. Without a conversion it is the given tensor, and the payload shares its memory.
    """
    if dtype is not CommDtype.INT8:
        form = _in(dtype, tensor)
        return tensor_bytes(form), form
    blocks = _blocks(tensor.float())
    scales = blocks.abs().amax(-1) / 127
    inverse = scales.reciprocal().masked_fill_(scales == 0, 0)
    codes = _rows((blocks * inverse.unsqueeze(-1)).round_().to(torch.int8), tensor.shape)
    parts = (part.view(-1).view(torch.uint8) for part in (codes, scales))
    return tensor_bytes(torch.cat(tuple(parts))), _scaled(codes, scales)


def decode(
    payload: memoryview | bytes, dtype: CommDtype, shape: torch.Size | tuple[int, ...]
) -> torch.Tensor:
    """Decode a payload of :func:`encode` to a tensor that the caller owns.

    Returns:
        bfloat16 for a bfloat16 payload, else float32. It shares the payload's memory if that is
        writable.

    Raises:
        TransportError: the payload's length is not that of the shape.
    """
    if len(payload) != _nbytes(dtype, shape):
        raise TransportError(
            f"tensor {tuple(shape)} in {dtype.value}: expected {_nbytes(dtype, shape)} bytes, "
            f"got {len(payload)}"
        )
    elements = math.prod(shape)
    if not elements:
        return torch.empty(shape, dtype=dtype.torch_dtype)
    if dtype is not CommDtype.INT8:
        # A tensor of a read-only buffer warns.
        own = isinstance(payload, memoryview) and not payload.readonly
        buffer = payload if own else bytearray(payload)
        if dtype is CommDtype.FLOAT32:  # numpy's view costs less than torch's
            return torch.from_numpy(np.frombuffer(buffer, np.float32).reshape(shape))
        return torch.frombuffer(buffer, dtype=dtype.torch_dtype).view(shape)
    data = bytearray(payload)
    codes = torch.frombuffer(data, dtype=torch.int8, count=elements).view(shape)
    scales = torch.frombuffer(data[elements:], dtype=torch.float32)
    return _scaled(codes, scales.view(*shape[:-1], -1))


def values(
    payload: memoryview | bytes, dtype: CommDtype, shape: torch.Size | tuple[int, ...]
) -> np.ndarray:
    """Decode a payload of :func:`encode` to float32, for numpy to add; raises as :func:`decode`."""
    if dtype is CommDtype.INT8 or len(payload) != _nbytes(dtype, shape):
        return decode(payload, dtype, shape).numpy()
    if dtype is CommDtype.FLOAT32:
        return np.frombuffer(payload, np.float32).reshape(shape)
    upper = np.frombuffer(payload, np.uint16)  # bfloat16 is the upper half of float32
    return np.left_shift(upper, 16, dtype=np.uint32).view(np.float32).reshape(shape)


def _in(dtype: CommDtype, tensor: torch.Tensor) -> torch.Tensor:
    """Convert to the dtype; ``to`` takes 40 us on cold caches even if there is nothing to do."""
    wanted = dtype.torch_dtype
    return tensor if tensor.dtype is wanted else tensor.to(wanted)


def _nbytes(dtype: CommDtype, shape: torch.Size | tuple[int, ...]) -> int:
    return dtype.nbytes(math.prod(shape[:-1]), shape[-1])


def _blocks(tensor: torch.Tensor) -> torch.Tensor:
    """Cut every row into blocks that share a scale, the last one padded with zeros."""
    columns = tensor.shape[-1]
    blocks = math.ceil(columns / SCALE_BLOCK)
    padded = F.pad(tensor, (0, blocks * SCALE_BLOCK - columns))
    return padded.view(*tensor.shape[:-1], blocks, SCALE_BLOCK)


def _rows(blocks: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The rows that :func:`_blocks` cut."""
    return blocks.flatten(-2)[..., : shape[-1]].contiguous()


def _scaled(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return _rows(_blocks(codes.float()) * scales.unsqueeze(-1), codes.shape)
