"""The wire format: ``tpirt.v1.Frame``, written and read without copying the payload twice.

A frame's bytes are exactly those of the protobuf message ``Frame`` (any generated code reads
them), but they are laid out by hand: header, then payload last. Writing copies a tensor once,
into the message that gRPC sends; reading leaves the payload in place as a ``memoryview``.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from google.protobuf.message import DecodeError

from tpirt.errors import TransportError
from tpirt.transport.pb import tpirt_pb2 as pb

PROTOCOL_VERSION = 2

_HEADER_TAG = 0x0A  # field 1, length-delimited
_PAYLOAD_TAG = 0x12  # field 2, length-delimited

_FROM_WIRE: dict[int, torch.dtype] = {pb.FLOAT32: torch.float32, pb.BFLOAT16: torch.bfloat16}


class Frame:
    """One message of a session: a header and, for hidden states, their raw bytes.

    Made of these two, or of the bytes that they are on the wire; each is made of the other when
    it is first asked for.
    """

    __slots__ = ("_data", "_header", "_payload", "_source")

    def __init__(self, header: pb.FrameHeader, payload: memoryview | bytes = b""):
        self._header: pb.FrameHeader | None = header
        self._payload: memoryview | bytes = payload
        self._data: bytes | bytearray | None = None
        self._source = ""

    @classmethod
    def of(cls, data: bytes | bytearray, source: str = "") -> Frame:
        """Take a frame's bytes; nothing is known of them yet. ``source`` is whom errors name."""
        frame = cls.__new__(cls)
        frame._header, frame._payload, frame._data, frame._source = None, b"", data, source
        return frame

    @property
    def header(self) -> pb.FrameHeader:
        """What the message is.

        Raises:
            TransportError: the bytes that came are not one whole frame; names the peer.
        """
        return self._parse() if self._header is None else self._header

    @property
    def payload(self) -> memoryview | bytes:
        """The raw bytes; a view of the frame's, if it came. Raises as :attr:`header`."""
        if self._header is None:
            self._parse()
        return self._payload

    @property
    def data(self) -> bytes | bytearray:
        """The bytes of ``tpirt.v1.Frame``; made once, however many they are sent to."""
        if self._data is None:
            assert self._header is not None
            self._data = _join(self._header.SerializeToString(), self._payload)
        return self._data

    @property
    def kind(self) -> str:
        """Which message it is: ``step``, ``partial``, ... as in ``FrameHeader.body``."""
        return self.header.WhichOneof("body") or "empty"

    def _parse(self) -> pb.FrameHeader:
        try:
            assert self._data is not None
            header, self._payload = _split(self._data)
            self._header = pb.FrameHeader.FromString(header)
        except TransportError as exc:
            raise TransportError(f"{self._of_peer()}{exc}; refused") from exc
        except DecodeError as exc:
            raise TransportError(f"{self._of_peer()}malformed frame header: {exc}") from exc
        return self._header

    def _of_peer(self) -> str:
        return f"peer {self._source}: " if self._source else ""


class Envelope:
    """A tensor's frame but for its payload: known before it comes to whoever expects it.

    Some hundred tensors a token are sent and taken. Their headers are written here by hand, the
    same bytes that protobuf would write, and what comes is compared instead of parsed.

    Attributes:
        kind: ``partial`` or ``reduced``.
        step, seq, dtype, shape: as in the protocol's ``Tensor``.
        nbytes: of the payload.
        head: the frame's bytes up to the payload.
    """

    __slots__ = ("dtype", "head", "kind", "nbytes", "seq", "shape", "step")

    def __init__(
        self, kind: str, step: int, seq: int, dtype: pb.DType, shape: tuple[int, ...], nbytes: int
    ):
        """Describe the ``seq``-th collective of ``step``, whose payload has ``nbytes``."""
        self.kind = kind
        self.step = step
        self.seq = seq
        self.dtype = dtype
        self.shape = shape
        self.nbytes = nbytes
        tensor = _field(b"\x08", step) + _field(b"\x10", seq) + _rest(dtype, shape)
        header = _tag(kind) + _varint(len(tensor)) + tensor
        self.head = b"\x0a" + _varint(len(header)) + header + _field(b"\x12", nbytes)

    @property
    def tensor(self) -> pb.Tensor:
        """What the header says."""
        return pb.Tensor(step=self.step, seq=self.seq, dtype=self.dtype, shape=self.shape)

    def following(self) -> Envelope:
        """The next collective's, of a tensor that is like this one's."""
        return Envelope(self.kind, self.step, self.seq + 1, self.dtype, self.shape, self.nbytes)

    def seal(self, payload: memoryview | bytes) -> Frame:
        """Make the whole frame; copies the payload, once."""
        return Frame.of(b"".join((self.head, payload)))

    def open(self, frame: Frame) -> memoryview | None:
        """The payload of a frame that is just what is expected; None for any other."""
        data, head = frame.data, self.head
        if len(data) != len(head) + self.nbytes or not data.startswith(head):
            return None
        return memoryview(data)[len(head) :]


def _field(tag: bytes, value: int) -> bytes:
    return tag + _varint(value) if value else b""


@lru_cache
def _tag(kind: str) -> bytes:
    return _varint(pb.FrameHeader.DESCRIPTOR.fields_by_name[kind].number << 3 | 2)


@lru_cache
def _rest(dtype: pb.DType, shape: tuple[int, ...]) -> bytes:
    """The fields of a tensor's header that come after its step and number."""
    return pb.Tensor(dtype=dtype, shape=shape).SerializeToString()


def _join(header: bytes, payload: memoryview | bytes) -> bytes:
    parts: list[bytes | memoryview] = [b"\x0a", _varint(len(header)), header]
    if len(payload):
        parts += [b"\x12", _varint(len(payload)), payload]
    return b"".join(parts)


def _split(data: bytes | bytearray) -> tuple[bytes, memoryview | bytes]:
    """Cut a frame's bytes into the header's and the payload's, a view.

    Raises:
        TransportError: they are not one whole frame.
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
    return bytes(fields.get(_HEADER_TAG, b"")), fields.get(_PAYLOAD_TAG, b"")


def empty_tensor(dtype: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Make room for a tensor that will come.

    Raises:
        TransportError: unknown dtype.
    """
    return torch.empty(shape, dtype=_known(dtype))


def read_tensor(payload: memoryview | bytes, dtype: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Make a payload a tensor: in its own memory if that may be written to, else in a copy.

    Raises:
        TransportError: unknown dtype, or a payload whose length is not that of the shape.
    """
    kind = _known(dtype)
    expected = kind.itemsize * math.prod(shape)
    if len(payload) != expected:
        raise TransportError(
            f"tensor {shape} of {kind}: expected {expected} bytes, got {len(payload)}"
        )
    if not expected:
        if max(shape) >> 31:
            raise TransportError(f"tensor {shape} of {kind}: no such shape")
        return torch.empty(shape, dtype=kind)
    # frombuffer on a read-only buffer warns.
    own = isinstance(payload, memoryview) and not payload.readonly
    return torch.frombuffer(payload if own else bytearray(payload), dtype=kind).view(shape)


def _known(dtype: int) -> torch.dtype:
    kind = _FROM_WIRE.get(dtype)
    if kind is None:
        raise TransportError(f"tensor of unknown dtype {dtype}")
    return kind


def _varint(value: int) -> bytes:
    if value <= 0x7F:
        return bytes((value,))
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
