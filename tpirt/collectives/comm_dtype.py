"""How partial sums look on the wire: as they are, in bfloat16, or in 8 bits with scales.

Every rank must add the same numbers, so whoever sends a tensor goes on with what the others will
read of it: :func:`encode` returns both.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tpirt.batch import SCALE_BLOCK, CommDtype
from tpirt.errors import TransportError
from tpirt.ops.buffers import tensor_bytes
from tpirt.transport.codec import read_tensor
from tpirt.transport.pb import tpirt_pb2 as pb


def comm_dtype_of(dtype: int) -> CommDtype:
    """The form that the protocol calls ``dtype``.

    Raises:
        TransportError: none that this version knows.
    """
    for known, number in _DTYPES.items():
        if number == dtype:
            return known
    raise TransportError(f"tensor of unknown dtype {dtype}")


def number_of(comm_dtype: CommDtype) -> pb.DType:
    """A form's name in the protocol."""
    return _DTYPES[comm_dtype]


_DTYPES = {CommDtype.FLOAT32: pb.FLOAT32, CommDtype.BFLOAT16: pb.BFLOAT16, CommDtype.INT8: pb.INT8}


def rounded(tensor: torch.Tensor, comm_dtype: CommDtype) -> torch.Tensor:
    """A tensor as the readers of its payload will have it; in float32 itself."""
    return tensor if comm_dtype is CommDtype.FLOAT32 else encode(tensor, comm_dtype)[1]


def encode(tensor: torch.Tensor, comm_dtype: CommDtype) -> tuple[memoryview, torch.Tensor]:
    """Serialise a contiguous tensor, float32 or bfloat16.

    Returns:
        The payload, and the tensor as its readers will have it, the same shape: in bfloat16 that
        dtype, else float32. It is the given one where nothing had to be done.
    """
    if comm_dtype is not CommDtype.INT8:
        form = tensor.float() if comm_dtype is CommDtype.FLOAT32 else tensor.to(torch.bfloat16)
        return tensor_bytes(form), form
    blocks = _blocks(tensor.float())
    scales = blocks.abs().amax(1) / 127
    inverse = scales.reciprocal().masked_fill_(scales == 0, 0)
    codes = (blocks * inverse.unsqueeze(1)).round_().to(torch.int8).view(-1)[: tensor.numel()]
    payload = torch.cat((codes.view(torch.uint8), scales.view(torch.uint8)))
    return tensor_bytes(payload), _scaled(codes, scales).view(tensor.shape)


def decode(
    payload: memoryview | bytes, comm_dtype: CommDtype, shape: tuple[int, ...]
) -> torch.Tensor:
    """Read a payload of :func:`encode`: a tensor of the caller's own, of the dtype it tells.

    The payload's memory becomes the tensor's where that may be written to.

    Raises:
        TransportError: a payload whose length is not that of the shape.
    """
    if comm_dtype is not CommDtype.INT8:
        return read_tensor(payload, number_of(comm_dtype), shape)
    elements = math.prod(shape)
    if len(payload) != comm_dtype.nbytes(elements):
        raise TransportError(
            f"tensor {shape} in {comm_dtype.value}: expected {comm_dtype.nbytes(elements)} bytes, "
            f"got {len(payload)}"
        )
    if not elements:
        return torch.empty(shape)
    # frombuffer on a read-only buffer warns; the copy costs less than the wire did.
    data = bytearray(payload)
    codes = torch.frombuffer(data, dtype=torch.int8, count=elements)
    scales = torch.frombuffer(data[elements:], dtype=torch.float32)
    return _scaled(codes, scales).view(shape)


def _blocks(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    return F.pad(flat, (0, -len(flat) % SCALE_BLOCK)).view(-1, SCALE_BLOCK)


def _scaled(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (_blocks(codes.float()) * scales.unsqueeze(1)).view(-1)[: len(codes)]
