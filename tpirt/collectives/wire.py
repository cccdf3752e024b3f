"""How partial sums look on the wire: as they are, in bfloat16, or in 8 bits with scales.

Every rank must add the same numbers, so whoever sends a tensor goes on with what the others will
read of it: :func:`encode` returns both.
"""

from __future__ import annotations

import math
from enum import Enum

import torch
import torch.nn.functional as F

from tpirt.errors import TransportError
from tpirt.ops.buffers import tensor_bytes
from tpirt.transport.codec import read_tensor
from tpirt.transport.pb import tpirt_pb2 as pb

# Elements that share a scale in int8: 3 % more bytes, and an outlier spoils no more than these.
BLOCK = 128


class Wire(Enum):
    """Form of a tensor on the wire; the value is what users type."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    INT8 = "int8"

    @property
    def dtype(self) -> pb.DType:
        """Its name in the protocol."""
        return _DTYPES[self]

    @classmethod
    def keeping(cls, dtype: torch.dtype) -> Wire:
        """The form that loses nothing of a tensor that is float32 or bfloat16."""
        return cls.BFLOAT16 if dtype is torch.bfloat16 else cls.FLOAT32

    @classmethod
    def of(cls, dtype: int) -> Wire:
        """The form that the protocol calls ``dtype``.

        Raises:
            TransportError: none that this version knows.
        """
        for wire, known in _DTYPES.items():
            if known == dtype:
                return wire
        raise TransportError(f"tensor of unknown dtype {dtype}")

    def nbytes(self, elements: int) -> int:
        """Bytes that so many elements take."""
        if self is Wire.INT8:
            return elements + 4 * math.ceil(elements / BLOCK)
        return elements * (4 if self is Wire.FLOAT32 else 2)


_DTYPES = {Wire.FLOAT32: pb.FLOAT32, Wire.BFLOAT16: pb.BFLOAT16, Wire.INT8: pb.INT8}


def rounded(tensor: torch.Tensor, wire: Wire) -> torch.Tensor:
    """A tensor as the readers of its payload will have it; in float32 itself."""
    return tensor if wire is Wire.FLOAT32 else encode(tensor, wire)[1]


def encode(tensor: torch.Tensor, wire: Wire) -> tuple[memoryview, torch.Tensor]:
    """Serialise a contiguous tensor, float32 or bfloat16.

    Returns:
        The payload, and the tensor as its readers will have it, the same shape: in bfloat16 that
        dtype, else float32. It is the given one where nothing had to be done.
    """
    if wire is not Wire.INT8:
        form = tensor.float() if wire is Wire.FLOAT32 else tensor.to(torch.bfloat16)
        return tensor_bytes(form), form
    blocks = _blocks(tensor.float())
    scales = blocks.abs().amax(1) / 127
    inverse = scales.reciprocal().masked_fill_(scales == 0, 0)
    codes = (blocks * inverse.unsqueeze(1)).round_().to(torch.int8).view(-1)[: tensor.numel()]
    payload = torch.cat((codes.view(torch.uint8), scales.view(torch.uint8)))
    return tensor_bytes(payload), _scaled(codes, scales).view(tensor.shape)


def decode(payload: memoryview | bytes, wire: Wire, shape: tuple[int, ...]) -> torch.Tensor:
    """Read a payload of :func:`encode`: a tensor of the caller's own, of the dtype it tells.

    The payload's memory becomes the tensor's where that may be written to.

    Raises:
        TransportError: a payload whose length is not that of the shape.
    """
    if wire is not Wire.INT8:
        return read_tensor(payload, wire.dtype, shape)
    elements = math.prod(shape)
    if len(payload) != wire.nbytes(elements):
        raise TransportError(
            f"tensor {shape} in {wire.value}: expected {wire.nbytes(elements)} bytes, "
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
    return F.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)


def _scaled(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (_blocks(codes.float()) * scales.unsqueeze(1)).view(-1)[: len(codes)]
