"""The wire format: ``tpirt.v1.Frame``, written and read without copying the payload twice.

A frame's bytes are exactly those of the protobuf message ``Frame`` (any generated code reads
them), but they are laid out by hand: header, then payload last. Encoding copies a tensor once,
into the message that gRPC sends; decoding leaves the payload in place as a ``memoryview``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError

from tpirt.errors import TransportError
from tpirt.transport.pb import tpirt_pb2 as pb

PROTOCOL_VERSION = 1

_HEADER_TAG = 0x0A  # field 1, length-delimited
_PAYLOAD_TAG = 0x12  # field 2, length-delimited

_TO_WIRE: dict[torch.dtype, pb.DType] = {torch.float32: pb.FLOAT32, torch.bfloat16: pb.BFLOAT16}
_FROM_WIRE: dict[int, torch.dtype] = {wire: dtype for dtype, wire in _TO_WIRE.items()}


@dataclass(slots=True)
class Frame:
    """One message of a session: a header and, for hidden states, their raw bytes."""

    header: pb.FrameHeader
    payload: memoryview | bytes = b""
    encoded: bytes = b""  # what :func:`encode_frame` made of it

    @property
    def kind(self) -> str:
        """Which message it is: ``step``, ``partial``, ... as in ``FrameHeader.body``."""
        return self.header.WhichOneof("body") or "empty"


def encode_frame(frame: Frame) -> bytes:
    """Serialise to the bytes of ``tpirt.v1.Frame``; once, however many it is sent to."""
    if frame.encoded:
        return frame.encoded
    header = frame.header.SerializeToString()
    parts: list[bytes | memoryview] = [b"\x0a", _varint(len(header)), header]
    if len(frame.payload):
        parts += [b"\x12", _varint(len(frame.payload)), frame.payload]
    frame.encoded = b"".join(parts)
    return frame.encoded


def decode_frame(data: bytes) -> Frame:
    """Parse the bytes of ``tpirt.v1.Frame``; the payload is a view of ``data``.

    Raises:
        TransportError: the bytes are not one whole frame.
    """
    view = memoryview(data)
    fields: dict[int, memoryview] = {}
    position = 0
    while position < len(view):
        tag = view[position]
        length, start = _read_varint(view, position + 1)
        known = tag in (_HEADER_TAG, _PAYLOAD_TAG) and tag not in fields
        if not known or start + length > len(view):
            raise TransportError(f"malformed frame of {len(view)} bytes at byte {position}")
        fields[tag] = view[start : start + length]
        position = start + length
    try:
        header = pb.FrameHeader.FromString(bytes(fields.get(_HEADER_TAG, b"")))
    except DecodeError as exc:
        raise TransportError(f"malformed frame header: {exc}") from exc
    return Frame(header, fields.get(_PAYLOAD_TAG, b""))


def received_frame(data: bytes, peer_id: str) -> Frame:
    """Parse what came from a peer; as :func:`decode_frame`, and the error names the peer."""
    try:
        return decode_frame(data)
    except TransportError as exc:
        raise TransportError(f"peer {peer_id}: {exc}; refused") from exc


def tensor_header(step: int, seq: int, tensor: torch.Tensor) -> pb.Tensor:
    """Describe ``tensor`` as the ``seq``-th collective of ``step``."""
    return pb.Tensor(step=step, seq=seq, dtype=_TO_WIRE[tensor.dtype], shape=tensor.shape)


def read_tensor(payload: memoryview | bytes, dtype: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Copy a payload into a new tensor.

    Raises:
        TransportError: unknown dtype, or a payload whose length is not that of the shape.
    """
    kind = _FROM_WIRE.get(dtype)
    if kind is None:
        raise TransportError(f"tensor of unknown dtype {dtype}")
    expected = kind.itemsize
    for size in shape:
        expected *= size
    if len(payload) != expected:
        raise TransportError(
            f"tensor {shape} of {kind}: expected {expected} bytes, got {len(payload)}"
        )
    if not expected:
        if max(shape) >> 31:
            raise TransportError(f"tensor {shape} of {kind}: no such shape")
        return torch.empty(shape, dtype=kind)
    # frombuffer on a read-only buffer warns; the copy costs less than the wire did.
    return torch.frombuffer(bytearray(payload), dtype=kind).view(shape)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(view: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(view) and shift < 64:
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise TransportError(f"malformed frame of {len(view)} bytes: a length is cut off")
