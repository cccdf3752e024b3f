"""Sealed frames: what goes over a TCP connection that belongs to a protected call.

The offer in the call has 32 random bytes; both sides derive a key for each direction from them. The
stream of frames is cut into records: 4 bytes with the length of what follows, little-endian, which
are authenticated with it, and up to 64 KiB under an AEAD. Its nonce is the number of the record. So
a record that is changed, repeated, left out or moved does not verify.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Sequence
from functools import cache

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from tpirt.errors import DamagedLinkError, TransportError
from tpirt.transport.frame import Frame, FrameReader
from tpirt.transport.stream import Buffer, cut
from tpirt.transport.tickets import OVERHEAD_BYTES, SECRET_BYTES

RECORD_BYTES = 64 << 10  # of plain text; also the memory that each direction takes

_LENGTH = struct.Struct("<I")
_TAG_BYTES = 16
_KEY_BYTES = 32
_TRIAL_BYTES = 16 << 10
_CIPHERS: dict[str, type[AESGCM] | type[ChaCha20Poly1305]] = {
    "AES-GCM": AESGCM,
    "ChaCha20-Poly1305": ChaCha20Poly1305,
}
# Where one side lacks instructions for AES: a third as fast as AES with them, ten times as fast as
# AES without.
_WITHOUT_AES = "ChaCha20-Poly1305"


@cache
def costs() -> dict[str, float]:
    """What each cipher takes here to seal 16 KiB, in seconds; takes a millisecond to measure."""
    plain, sealed = bytes(_TRIAL_BYTES), bytearray(_TRIAL_BYTES + _TAG_BYTES)
    found = {}
    for name, kind in _CIPHERS.items():
        cipher = kind(bytes(_KEY_BYTES))
        times = []
        for number in range(20):
            began = time.perf_counter()
            cipher.encrypt_into(_nonce(number), plain, None, sealed)
            times.append(time.perf_counter() - began)
        found[name] = min(times)
    return found


def fastest() -> str:
    """The cipher that this CPU does faster."""
    return min(costs(), key=costs().__getitem__)


def agreed(theirs: str) -> str:
    """The cipher for two sides, given the other's fastest: AES only where both have instructions.

    Raises:
        ValueError: not a cipher.
    """
    if theirs not in _CIPHERS:
        raise ValueError(f"no cipher {theirs!r}")
    return theirs if theirs == fastest() else _WITHOUT_AES


class Seal:
    """The two directions of one connection.

    Attributes:
        cipher: its name.
    """

    def __init__(self, secret: bytes, ticket: bytes, cipher: str, *, served: bool):
        """Derive the keys; ``served`` is true on the side that made the offer.

        Raises:
            ValueError: not a secret, or not a cipher.
        """
        if len(secret) != SECRET_BYTES or cipher not in _CIPHERS:
            raise ValueError("not an offer of a sealed connection")
        self.cipher = cipher
        info = b"tpirt sealed frames 1, " + cipher.encode()
        keys = HKDF(SHA256(), 2 * _KEY_BYTES, salt=ticket, info=info).derive(secret)
        kind = _CIPHERS[cipher]
        ours, theirs = kind(keys[:_KEY_BYTES]), kind(keys[_KEY_BYTES:])
        if served:
            ours, theirs = theirs, ours
        self._encrypt_into, self._decrypt_into = ours.encrypt_into, theirs.decrypt_into
        self._sealed = self._opened = 0  # records

    def seal_into(self, plain: bytes, space: memoryview) -> memoryview:
        """Make the next record, in ``space``; returns it."""
        size = len(plain) + _TAG_BYTES
        _LENGTH.pack_into(space, 0, size)
        record = space[: _LENGTH.size + size]
        self._encrypt_into(_nonce(self._sealed), plain, record[:4], record[4:])
        self._sealed += 1
        return record

    def open_into(self, record: memoryview, plain: memoryview | bytearray) -> None:
        """Verify and decrypt the next record.

        Raises:
            TransportError: it is not the one that the other side sealed.
        """
        try:
            self._decrypt_into(_nonce(self._opened), record[4:], record[:4], plain)
        except InvalidTag:
            raise TransportError(
                "a sealed record does not verify; it was damaged or tampered with on its way"
            ) from None
        self._opened += 1

    def seal(self, plain: bytes) -> bytes:
        """Make the next record."""
        return bytes(self.seal_into(plain, memoryview(bytearray(len(plain) + OVERHEAD_BYTES))))

    def open(self, record: bytes) -> bytes:
        """Verify and decrypt the next record. Raises as :meth:`open_into`."""
        plain = bytearray(max(0, len(record) - OVERHEAD_BYTES))
        self.open_into(memoryview(record), memoryview(plain))
        return bytes(plain)


class SealedWriter:
    """Sends frames in records; in the place of a socket's ``sendmsg``."""

    def __init__(self, connection: socket.socket, seal: Seal):
        self._connection = connection
        self._seal = seal
        self._memory = memoryview(bytearray(RECORD_BYTES + OVERHEAD_BYTES))  # of one record
        self._rest = self._memory[:0]  # of a record that is not sent yet
        self._plain = 0  # bytes in that record

    def sendmsg(self, parts: Sequence[Buffer]) -> int:
        """Send what the socket takes; returns the bytes of ``parts`` whose records are out.

        The bytes of a record that went out in part come again at the start of the next call, and
        are not sealed again.

        Raises:
            OSError: as of a socket; nothing more can be sent.
        """
        done = 0
        while True:
            if not self._rest:
                plain = cut(_skipped(parts, done) if done else parts, RECORD_BYTES)
                if not plain:
                    return done
                self._rest, self._plain = self._seal.seal_into(plain, self._memory), len(plain)
            try:
                self._rest = self._rest[self._connection.send(self._rest) :]
            except (BlockingIOError, InterruptedError):
                return done
            if self._rest:
                return done
            done += self._plain


class SealedReader(FrameReader):
    """Turns a stream of records into frames; see :class:`FrameReader`."""

    def __init__(self, peer_id: str, seal: Seal):
        """Read what a peer sends; ``peer_id`` is its name in errors."""
        super().__init__(peer_id)
        self._seal = seal
        self._memory = memoryview(bytearray(2 * (RECORD_BYTES + OVERHEAD_BYTES)))
        self._first = self._end = 0  # the bytes that no record has taken yet
        self._plain = memoryview(b"")  # of a record that is not just one frame

    @property
    def missing(self) -> int:
        """Bytes still to come of a record that has begun, or 0."""
        there = self._end - self._first
        return max(0, self._size() - there) if there >= _LENGTH.size else 0

    def close(self) -> None:
        """See :class:`FrameReader`."""
        self._first = self._end = 0
        self._memory = self._plain = memoryview(b"")
        super().close()

    def space(self) -> memoryview:
        """See :class:`FrameReader`."""
        left = self._end - self._first
        if self._first:
            self._memory[:left] = self._memory[self._first : self._end]
        self._first, self._end = 0, left
        return self._memory[left:]

    def filled(self, count: int) -> None:
        """See :class:`FrameReader`."""
        self._end += count

    def next(self) -> Frame | None:
        """See :class:`FrameReader`.

        Raises:
            TransportError: what was sealed is not a frame.
            DamagedLinkError: a record does not verify, or is larger than records are. The other
                side did not send that.
        """
        while (frame := super().next()) is None:
            if self._plain:
                if not self._move_on():
                    return None
            elif (record := self._record()) is None:
                return None
            elif (frame := self._open(record)) is not None:
                return frame
        return frame

    def _record(self) -> memoryview | None:
        """The record at the start; None if it is not complete."""
        there = self._end - self._first
        if there < _LENGTH.size or there < (size := self._size()):
            return None
        return self._memory[self._first : self._first + size]

    def _size(self) -> int:
        """The whole size of the record at the start.

        Raises:
            DamagedLinkError: no record has it.
        """
        size: int = _LENGTH.unpack_from(self._memory, self._first)[0]
        if not _TAG_BYTES < size <= RECORD_BYTES + _TAG_BYTES:
            raise self._lost(
                f"a sealed record of {size} bytes, expected "
                f"{_TAG_BYTES + 1} to {RECORD_BYTES + _TAG_BYTES}"
            )
        return _LENGTH.size + size

    def _open(self, record: memoryview) -> Frame | None:
        """Open the record at the start; returns its frame if it has just one, which is the rule."""
        count = len(record) - OVERHEAD_BYTES
        if count <= len(self._body):  # of a large frame: straight into its memory
            self._verified(record, self._body[:count])
            super().filled(count)
            return None
        memory = bytearray(count)
        self._verified(record, memory)
        if (frame := self.whole(memory)) is None:
            self._plain = memoryview(memory)
        return frame

    def _verified(self, record: memoryview, plain: memoryview | bytearray) -> None:
        try:
            self._seal.open_into(record, plain)
        except TransportError as exc:
            raise self._lost(str(exc)) from None
        self._first += len(record)

    def _lost(self, why: str) -> DamagedLinkError:
        words = f"peer {self._peer_id}: connection lost: {why}"
        return DamagedLinkError(words, peer_id=self._peer_id)

    def _move_on(self) -> bool:
        """Move on what has been opened and did not fit; False if there is no room at all."""
        space = super().space()
        count = min(len(space), len(self._plain))
        space[:count] = self._plain[:count]
        super().filled(count)
        self._plain = self._plain[count:]
        return count > 0


def _nonce(number: int) -> bytes:
    return number.to_bytes(12, "big")


def _skipped(views: Sequence[Buffer], count: int) -> list[Buffer]:
    """Leave out the first ``count`` bytes."""
    left: list[Buffer] = []
    for view in views:
        left.append(memoryview(view)[count:])
        count = max(0, count - len(view))
    return left
