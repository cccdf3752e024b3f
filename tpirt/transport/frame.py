"""The format of frames: a header of 64 bytes, a message, and a payload.

All numbers are little-endian. The message is padded with zeros to a multiple of 64 bytes, so that
the payload (the elements of a tensor) is aligned relative to the header. Messages are opaque here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from tpirt.errors import TransportError

HEADER_BYTES = 64
DEFAULT_LIMIT = 64 << 10  # of a frame from a peer that is not known yet

_MAGIC = b"tp"
_VERSION = 3
# magic, version, kind, dtype, flags, reserved, step, seq, rows, columns, message, payload bytes
_LAYOUT = struct.Struct("<2sBBBBHQIIIIQ24x")
_STAGING_BYTES = 64 << 10  # larger frames are read straight into their own memory


class Kind(IntEnum):
    """The purpose of a frame."""

    HEARTBEAT = 1
    MESSAGE = 2
    REQUEST = 3
    REPLY = 4
    PARTIAL = 5
    REDUCED = 6


class Header(NamedTuple):
    """The fields of a frame's header; the last two are the sizes of what follows, in bytes."""

    kind: int
    dtype: int = 0
    step: int = 0
    seq: int = 0
    rows: int = 0
    columns: int = 0
    message_bytes: int = 0
    payload_bytes: int = 0

    def pack(self) -> bytes:
        """Return the 64 bytes."""
        kind, dtype, *rest = self
        return _LAYOUT.pack(_MAGIC, _VERSION, kind, dtype, 0, 0, *rest)

    @classmethod
    def unpack(cls, buffer: bytes | bytearray | memoryview, offset: int = 0) -> Header:
        """Read the 64 bytes at ``offset``; kind and dtype may be values that nobody knows.

        Raises:
            TransportError: not the header of a frame, or one of another version.
        """
        if len(buffer) - offset < HEADER_BYTES:
            raise TransportError(f"a frame header of {len(buffer) - offset} bytes, expected 64")
        magic, version, kind, dtype, _, _, *rest = _LAYOUT.unpack_from(buffer, offset)
        if magic != _MAGIC:
            raise TransportError(f"expected a frame, got bytes that begin with {magic!r}")
        if version != _VERSION:
            raise TransportError(f"a frame of version {version}, expected version {_VERSION}")
        return cls(kind, dtype, *rest)


class Frame:
    """A header with its message and payload.

    Attributes:
        head: the header's 64 bytes; its sizes are those of the other two.
        message: opaque bytes.
        payload: opaque bytes; of a received frame a writable view of memory that belongs to this
            frame alone, aligned to 16 bytes at least.
    """

    __slots__ = ("_header", "head", "message", "payload")

    def __init__(self, head: bytes, message: bytes = b"", payload: memoryview | bytes = b""):
        self.head = head
        self.message = message
        self.payload = payload
        self._header: Header | None = None

    @classmethod
    def of(
        cls,
        kind: int,
        message: bytes = b"",
        payload: memoryview | bytes = b"",
        *,
        dtype: int = 0,
        step: int = 0,
        seq: int = 0,
        rows: int = 0,
        columns: int = 0,
    ) -> Frame:
        """Make a frame to send; the payload is not copied."""
        header = Header(kind, dtype, step, seq, rows, columns, len(message), len(payload))
        return cls(header.pack(), message, payload)

    @property
    def header(self) -> Header:
        """The header's fields, read when first asked for."""
        if self._header is None:
            self._header = Header.unpack(self.head)
        return self._header

    @property
    def nbytes(self) -> int:
        """Bytes on the wire."""
        return HEADER_BYTES + _padded(len(self.message)) + len(self.payload)

    def parts(self) -> tuple[memoryview | bytes, ...]:
        """Return the bytes on the wire, the payload uncopied."""
        if not self.message:
            return self.head, self.payload
        padding = bytes(-len(self.message) % HEADER_BYTES)
        return self.head, self.message + padding, self.payload


class FrameReader:
    """Turns a stream of bytes into frames; does no input or output of its own.

    Bytes are written to :meth:`space`, then announced with :meth:`filled`; :meth:`next` returns the
    frames that are complete. :meth:`feed` does all three. A header is checked before anything is
    allocated.

    Attributes:
        limit: largest message plus payload that is accepted.
    """

    def __init__(self, peer_id: str, limit: int = DEFAULT_LIMIT):
        """Read what a peer sends; ``peer_id`` is its name in errors."""
        self.limit = limit
        self._peer_id = peer_id
        self._staging = memoryview(bytearray(_STAGING_BYTES))
        self._start = self._stop = 0  # the bytes in staging that no frame has taken yet
        self._large: Frame | None = None  # a frame that does not fit staging
        self._body = memoryview(b"")  # what is still to come of it

    @property
    def missing(self) -> int:
        """Bytes still to come of a frame larger than 64 KiB; 0 while none is being read."""
        return len(self._body)

    def close(self) -> None:
        """Give the memory back; nothing more is read. Garbage collection may take its time."""
        self._start = self._stop = 0
        self._staging = self._body = memoryview(b"")
        self._large = None

    def space(self) -> memoryview:
        """Return where the next bytes go; empty only when closed."""
        if self._body:
            return self._body
        left = self._stop - self._start
        if left:
            self._staging[:left] = self._staging[self._start : self._stop]
        self._start, self._stop = 0, left
        return self._staging[left:]

    def filled(self, count: int) -> None:
        """Take over the first ``count`` bytes of :meth:`space`."""
        if self._body:
            self._body = self._body[count:]
        else:
            self._stop += count

    def next(self) -> Frame | None:
        """Return the next frame, None if it is not complete.

        Raises:
            TransportError: not a frame, or one above the limit.
        """
        if self._body:
            return None
        if self._large is not None:
            return self._finish()
        there = self._stop - self._start
        if there < HEADER_BYTES:
            return None
        header = self._checked_header(self._staging, self._start)
        end = self._start + _frame_bytes(header)
        if end - self._start > _STAGING_BYTES:
            self._begin(header)  # one that does not fit staging cannot be complete in it
            return None
        if end > self._stop:
            return None
        memory = bytearray(self._staging[self._start : end])
        self._start = end
        return _frame_in(memory, header)

    def whole(self, memory: bytearray) -> Frame | None:
        """Take the next bytes, which have memory of their own, as a frame without a copy.

        Returns None, and takes nothing, if they are not just one frame. Raises as :meth:`next`.
        """
        if self._start < self._stop or self._large is not None or len(memory) < HEADER_BYTES:
            return None
        header = self._checked_header(memory, 0)
        return _frame_in(memory, header) if _frame_bytes(header) == len(memory) else None

    def feed(self, data: bytes | bytearray | memoryview) -> Iterator[Frame]:
        """Read ``data``, of any length; yield the frames that it completes. Raises as `next`."""
        view = memoryview(data)
        while view:
            if not (space := self.space()):  # closed
                return
            count = min(len(space), len(view))
            space[:count] = view[:count]
            self.filled(count)
            view = view[count:]
            while (frame := self.next()) is not None:
                yield frame

    def _checked_header(self, memory: bytearray | memoryview, offset: int) -> Header:
        try:
            header = Header.unpack(memory, offset)
        except TransportError as exc:
            raise TransportError(f"peer {self._peer_id}: {exc}") from None
        size = header.message_bytes + header.payload_bytes
        if size > self.limit:
            raise TransportError(
                f"peer {self._peer_id}: a frame of {size} bytes, at most {self.limit} expected here"
            )
        return header

    def _begin(self, header: Header) -> None:
        """Allocate a large frame's memory and move there what has come of it."""
        head = bytes(self._staging[self._start : self._start + HEADER_BYTES])
        rest = self._staging[self._start + HEADER_BYTES : self._stop]
        # Memory that nothing has been written to takes no room: a size that is a lie costs nothing.
        size = _padded(header.message_bytes) + header.payload_bytes
        body = np.empty(size, np.uint8).data
        body[: len(rest)] = rest
        self._start = self._stop = 0
        self._large = Frame(head, payload=body)
        self._large._header = header
        self._body = body[len(rest) :]

    def _finish(self) -> Frame:
        frame, self._large = self._large, None
        assert frame is not None
        size = frame.header.message_bytes
        frame.message = bytes(frame.payload[:size])
        frame.payload = frame.payload[_padded(size) :]
        return frame


def _frame_bytes(header: Header) -> int:
    return HEADER_BYTES + _padded(header.message_bytes) + header.payload_bytes


def _frame_in(memory: bytearray, header: Header) -> Frame:
    """The frame that has all of ``memory``."""
    end = HEADER_BYTES + header.message_bytes
    payload = memoryview(memory)[HEADER_BYTES + _padded(header.message_bytes) :]
    frame = Frame(bytes(memory[:HEADER_BYTES]), bytes(memory[HEADER_BYTES:end]), payload)
    frame._header = header
    return frame


def _padded(size: int) -> int:
    return size + -size % HEADER_BYTES
