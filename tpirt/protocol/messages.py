"""The messages of ``protos/tpirt.proto`` as dataclasses, and their bytes.

Each dataclass names its protobuf message and has the same fields; :func:`encode` and
:func:`decode` convert between them field by field. Fields that only one side has keep their
default. Text that is read from a message is printable.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar

from google.protobuf.message import DecodeError
from google.protobuf.message import Message as ProtoMessage

from tpirt import errors
from tpirt.batch import Batch, Collective, Segment
from tpirt.errors import PeerError, PeerLostError, TpirtError, TransportError
from tpirt.printable import printable_line
from tpirt.protocol.pb import tpirt_pb2 as pb
from tpirt.types import RankStats, StepTimes

PROTOCOL_VERSION = 9

_T = TypeVar("_T")


@dataclass(frozen=True)
class HelloRequest:
    protocol_version: int
    tpirt_version: str
    master: int = 0


@dataclass(frozen=True)
class HelloReply:
    protocol_version: int
    tpirt_version: str
    host_name: str
    host_id: str
    memory_bytes: int | None
    available_bytes: int
    base_bytes: int
    threads: int
    cores: int
    bfloat16: bool
    busy: bool
    process: int
    busy_with: str = ""
    busy_s: int = 0


@dataclass(frozen=True)
class InventoryRequest:
    slice_id: str = ""
    order: str = ""


@dataclass(frozen=True)
class InventoryReply:
    whole: bool = False
    held: bytes = b""


@dataclass(frozen=True)
class UnitChunk:
    order: str = ""
    unit: int = 0
    offset: int = 0
    crc32: int = 0
    data: bytes = b""


@dataclass(frozen=True)
class PutUnitsReply:
    bytes_written: int


@dataclass(frozen=True)
class RenewRequest:
    certificate: bytes = b""


@dataclass(frozen=True)
class RenewReply:
    request: bytes = b""


@dataclass(frozen=True)
class StatusRequest:
    pass


@dataclass(frozen=True)
class StoredModel:
    name: str
    slices: int
    bytes: int


@dataclass(frozen=True)
class StatusReply:
    disk_free_bytes: int
    load: float
    models: tuple[StoredModel, ...] = ()
    last_error: str = ""
    last_error_s: int = 0


@dataclass(frozen=True)
class Setup:
    protocol_version: int
    model_fingerprint: str
    model_config: str
    slice_id: str
    rank: int
    world_size: int
    window_blocks: int | None
    memory_bytes: int | None
    chunk_tokens: int
    timeout_ms: int
    trace_spans: int
    session: int
    addresses: tuple[str, ...]
    master: int = 0
    kv_bits: int | None = None
    host_name: str = ""
    identities: tuple[str, ...] = ()


@dataclass(frozen=True)
class Loading:
    done_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class LinkState:
    """How a worker's link to ``rank`` turned out; ``carrier`` is empty if there is none."""

    rank: int
    carrier: str = ""
    reason: str = ""
    seal: str = ""


@dataclass(frozen=True)
class Ready:
    weights_bytes: int
    resident_bytes: int
    links: tuple[LinkState, ...] = ()


@dataclass(frozen=True)
class JoinLink:
    session: int
    rank: int


@dataclass(frozen=True)
class Joined:
    pass


@dataclass(frozen=True)
class Abort:
    step: int


@dataclass(frozen=True)
class StepEnded:
    step: int


@dataclass(frozen=True)
class Failure:
    """A peer's own failure: an exception of our tree on its way."""

    step: int
    kind: str
    message: str
    lost_rank: int | None = None

    @classmethod
    def of(cls, exc: TpirtError, step: int = 0) -> Failure:
        """Describe an exception."""
        lost = exc.rank if isinstance(exc, PeerLostError) else None
        return cls(step, type(exc).__name__, str(exc), lost)

    def error(self, peer_id: str) -> TpirtError:
        """Rebuild the exception, of the same class, naming the peer."""
        kind = getattr(errors, self.kind, PeerError)
        if not (isinstance(kind, type) and issubclass(kind, TpirtError)):
            kind = PeerError
        message = f"peer {peer_id}: {self.message}"
        if issubclass(kind, PeerLostError):
            return kind(message, rank=self.lost_rank)
        return kind(message)


@dataclass(frozen=True)
class FreeSlot:
    slot: int


@dataclass(frozen=True)
class SpillSlot:
    slot: int
    handle: int
    tokens: int


@dataclass(frozen=True)
class RestoreSlot:
    slot: int
    handle: int


@dataclass(frozen=True)
class DropSpilled:
    handles: tuple[int, ...]


@dataclass(frozen=True)
class Done:
    pass


@dataclass(frozen=True)
class StatsRequest:
    since_step: int


@dataclass(frozen=True)
class ClockRequest:
    pass


@dataclass(frozen=True)
class Clock:
    now_ns: int


@dataclass(frozen=True)
class TraceRequest:
    lane: str


@dataclass(frozen=True)
class Trace:
    lane: str
    names: tuple[str, ...] = ()
    dropped: int = 0


@dataclass(frozen=True)
class Leaving:
    pass


@dataclass(frozen=True)
class Probe:
    pass


@dataclass(frozen=True)
class MeasureLink:
    rank: int


@dataclass(frozen=True)
class LinkQuality:
    """The quality of a link.

    Attributes:
        latency_s: one way for a small message, our own work on it included.
        bytes_per_s: of a large one, beyond that latency.
    """

    latency_s: float
    bytes_per_s: float


_PROTO: dict[type, type[ProtoMessage]] = {
    HelloRequest: pb.HelloRequest,
    HelloReply: pb.HelloReply,
    InventoryRequest: pb.InventoryRequest,
    InventoryReply: pb.InventoryReply,
    UnitChunk: pb.UnitChunk,
    PutUnitsReply: pb.PutUnitsReply,
    RenewRequest: pb.RenewRequest,
    RenewReply: pb.RenewReply,
    StatusRequest: pb.StatusRequest,
    StoredModel: pb.StoredModel,
    StatusReply: pb.StatusReply,
    Setup: pb.Setup,
    Loading: pb.Loading,
    Ready: pb.Ready,
    LinkState: pb.LinkState,
    Batch: pb.Step,
    Segment: pb.Segment,
    Collective: pb.Collective,
    Abort: pb.Abort,
    StepEnded: pb.StepEnded,
    Failure: pb.Failure,
    FreeSlot: pb.FreeSlot,
    SpillSlot: pb.SpillSlot,
    RestoreSlot: pb.RestoreSlot,
    DropSpilled: pb.DropSpilled,
    Done: pb.Done,
    Leaving: pb.Leaving,
    StatsRequest: pb.StatsRequest,
    RankStats: pb.Stats,
    StepTimes: pb.StepTimes,
    ClockRequest: pb.ClockRequest,
    Clock: pb.Clock,
    TraceRequest: pb.TraceRequest,
    Trace: pb.Trace,
    JoinLink: pb.JoinLink,
    Joined: pb.Joined,
    Probe: pb.Probe,
    MeasureLink: pb.MeasureLink,
    LinkQuality: pb.LinkQuality,
}

_BODY = {
    kind: member.name
    for member in pb.Message.DESCRIPTOR.fields
    for kind, proto in _PROTO.items()
    if proto.DESCRIPTOR is member.message_type
}
_KIND = {name: kind for kind, name in _BODY.items()}


def encode(value: object) -> bytes:
    """Serialise a message of a session or link."""
    message = pb.Message()
    body = getattr(message, _BODY[type(value)])
    body.SetInParent()
    _fill(value, body)
    return message.SerializeToString()


def decode(data: bytes, peer_id: str) -> Any:
    """Parse a message of a session or link; returns one of the dataclasses above.

    Raises:
        TransportError: not a message that this version knows; names the peer.
    """
    message = _parse(pb.Message, data, peer_id)
    name = message.WhichOneof("body")
    if name is None:
        raise TransportError(f"peer {peer_id}: an empty or unknown message; refused")
    return _read(_KIND[name], getattr(message, name), peer_id)


def encode_call(value: object) -> bytes:
    """Serialise the request or reply of a call."""
    message = _PROTO[type(value)]()
    _fill(value, message)
    return message.SerializeToString()


def decode_call(kind: type[_T], data: bytes, peer_id: str) -> _T:
    """Parse the request or reply of a call.

    Raises:
        TransportError: not such a message; names the peer.
    """
    result: _T = _read(kind, _parse(_PROTO[kind], data, peer_id), peer_id)
    return result


def _parse(kind: type[ProtoMessage], data: bytes, peer_id: str) -> Any:
    message = kind()
    try:
        message.ParseFromString(data)
    except DecodeError as exc:
        raise TransportError(f"peer {peer_id}: malformed message: {exc}") from exc
    return message


@cache
def _shared_fields(kind: type) -> tuple[tuple[str, Callable[[Any, str], Any], bool], ...]:
    """Fields that the dataclass and its message have: name, how to read a value, optional?"""
    hints = typing.get_type_hints(kind)
    known = _PROTO[kind].DESCRIPTOR.fields_by_name
    return tuple(
        (name, _reader(hints[name]), typing.get_origin(hints[name]) is types.UnionType)
        for name in (member.name for member in dataclasses.fields(kind))
        if name in known
    )


def _reader(hint: Any) -> Callable[[Any, str], Any]:
    """How a protobuf value becomes one of the dataclass's."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:  # X | None
        return _reader(next(a for a in arguments if a is not type(None)))
    if origin in (tuple, list):
        read = _reader(arguments[0])
        return lambda values, peer: origin(read(value, peer) for value in values)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return lambda number, peer: _member(hint, number, peer)
    if hint in _PROTO:
        return lambda message, peer: _read(hint, message, peer)
    if hint is str:  # it reaches logs and terminals
        return lambda text, _: printable_line(text)
    return lambda value, _: value


def _read(kind: type, message: Any, peer_id: str) -> Any:
    values = {}
    for name, read, optional in _shared_fields(kind):
        absent = optional and not message.HasField(name)
        values[name] = None if absent else read(getattr(message, name), peer_id)
    return kind(**values)


def _fill(value: Any, message: Any) -> None:
    kind: type = type(value)
    for name, _, _ in _shared_fields(kind):
        _set(message, name, getattr(value, name))


def _set(message: Any, name: str, item: Any) -> None:
    if item is None:
        return
    if isinstance(item, (tuple, list)):
        values = getattr(message, name)
        for each in item:
            if type(each) in _PROTO:
                _fill(each, values.add())
            else:
                values.append(each)
    elif isinstance(item, Enum):
        setattr(message, name, item.name)
    elif type(item) in _PROTO:
        inner = getattr(message, name)
        inner.SetInParent()
        _fill(item, inner)
    else:
        setattr(message, name, item)


def _member(kind: type[Enum], number: int, peer_id: str) -> Enum:
    """The member of a Python enum that has the name of a protobuf enum's value."""
    proto = pb.DESCRIPTOR.enum_types_by_name[kind.__name__]
    known = proto.values_by_number.get(number)
    if known is None or known.name not in kind.__members__:
        raise TransportError(f"peer {peer_id}: unknown {kind.__name__} {number}; refused")
    return kind[known.name]
