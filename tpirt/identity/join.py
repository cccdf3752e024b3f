"""How a device gets its certificate by a short code: the messages, without their transport.

SPAKE2 turns the code into a strong key. An eavesdropper learns nothing about either, and an
attacker can try one code with each exchange. The device that joins proves first that it
has the key, so a wrong guess is counted before anything is answered. Then both sides use the key
for the certificate request and the certificate. The private key never leaves the device.

::

    device                                         master
    "tpirt join 1", SPAKE2 element            ->
                                              <-   SPAKE2 element
    proof (HMAC), request (AES-GCM)           ->
                                              <-   verdict, proof (HMAC), certificate (AES-GCM)
    "kept" (AES-GCM)                          ->
"""

from __future__ import annotations

import hmac
import json
import secrets
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import spake2
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from spake2.ed25519_basic import NotOnCurve

from tpirt.errors import IdentityError

MESSAGE_BYTES = 8 << 10
CODE_DIGITS = 8  # 26 bits: with 3 tries, one chance in 33 million
MOST_TRIES = 3
WELCOME, WRONG_CODE, OVER = b"\0", b"\1", b"\2"

_VERSION = b"tpirt join 1"
_ELEMENT_BYTES = 33
_PROOF_BYTES = 32
_MASTER, _DEVICE = b"tpirt master", b"tpirt device"
_KEPT = b"kept"
_T = TypeVar("_T")
_NONCE = bytes(12)  # every key seals one message


class WrongCodeError(IdentityError):
    """The other side does not know the code."""


@dataclass(frozen=True)
class JoinRequest:
    """What a device asks for: its own name, the port it serves on, a request for its key."""

    name: str
    port: int
    request: str


@dataclass(frozen=True)
class JoinReply:
    """What it gets: its certificate, that of the authority, and the cluster's name."""

    certificate: str
    authority: str
    cluster: str


def new_code() -> str:
    """Draw a code, as people type it: ``4821-0937``."""
    digits = f"{secrets.randbelow(10**CODE_DIGITS):0{CODE_DIGITS}}"
    return f"{digits[:4]}-{digits[4:]}"


def read_code(text: str) -> bytes:
    """Read a code that somebody typed.

    Raises:
        IdentityError: not a code.
    """
    digits = text.replace("-", "").replace(" ", "")
    if not (len(digits) == CODE_DIGITS and digits.isascii() and digits.isdigit()):
        raise IdentityError(f"{text!r}: expected a code of {CODE_DIGITS} digits, such as 4821-0937")
    return digits.encode()


class _Keys:
    """What both sides derive, one key for each purpose."""

    def __init__(self, shared: bytes, transcript: bytes):
        material = HKDF(SHA256(), 5 * 32, salt=None, info=transcript).derive(shared)
        keys = [material[at : at + 32] for at in range(0, len(material), 32)]
        self.device_proof, self.master_proof = (
            hmac.digest(key, transcript, "sha256") for key in keys[:2]
        )
        self.request, self.reply, self.kept = map(AESGCM, keys[2:])


class MasterExchange:
    """The master's side of one attempt."""

    def __init__(self, code: bytes):
        self._spake = spake2.SPAKE2_A(code, idA=_MASTER, idB=_DEVICE)
        self._keys: _Keys | None = None

    def answer(self, message: bytes) -> bytes:
        """Answer a device's first message.

        Raises:
            IdentityError: it is malformed.
        """
        if message[: len(_VERSION)] != _VERSION:
            raise IdentityError("not a request to join, or one of another tpirt version")
        mine, theirs = self._spake.start(), message[len(_VERSION) :]
        self._keys = _finish(self._spake, theirs, mine + theirs)
        return bytes(mine)

    def confirmed(self, message: bytes) -> JoinRequest:
        """Read a device's second message.

        Raises:
            WrongCodeError: it does not know the code.
            IdentityError: it knows it, but what it asks for is malformed.
        """
        assert self._keys is not None
        proof, sealed = message[:_PROOF_BYTES], message[_PROOF_BYTES:]
        if not hmac.compare_digest(proof, self._keys.device_proof):
            raise WrongCodeError("the code is not right")
        return _read(JoinRequest, _open(self._keys.request, sealed))

    def reply(self, reply: JoinReply) -> bytes:
        """Make the answer to a request."""
        assert self._keys is not None
        return WELCOME + self._keys.master_proof + _seal(self._keys.reply, reply)

    def kept(self, message: bytes) -> bool:
        """Whether the device's last message says that it has kept its certificate."""
        assert self._keys is not None
        try:
            return _open(self._keys.kept, message) == _KEPT
        except IdentityError:
            return False


class DeviceExchange:
    """The side of the device that joins."""

    def __init__(self, code: bytes):
        self._spake = spake2.SPAKE2_B(code, idA=_MASTER, idB=_DEVICE)
        self._mine = bytes(self._spake.start())
        self._keys: _Keys | None = None

    def hello(self) -> bytes:
        """The first message."""
        return _VERSION + self._mine

    def request(self, message: bytes, request: JoinRequest) -> bytes:
        """Answer the master's first message.

        Raises:
            IdentityError: it is malformed.
        """
        self._keys = _finish(self._spake, message, message + self._mine)
        return self._keys.device_proof + _seal(self._keys.request, request)

    def accept(self, message: bytes) -> JoinReply:
        """Read the master's verdict.

        Raises:
            WrongCodeError: this side's code is wrong, or the other side does not know it.
            IdentityError: the invitation is over, or the message is malformed.
        """
        assert self._keys is not None
        verdict, proof = message[:1], message[1 : 1 + _PROOF_BYTES]
        if verdict == OVER:
            raise IdentityError("the invitation is over; run `tpirt cluster invite` again")
        if verdict != WELCOME or not hmac.compare_digest(proof, self._keys.master_proof):
            raise WrongCodeError("the code is not right; type it again, or invite again")
        return _read(JoinReply, _open(self._keys.reply, message[1 + _PROOF_BYTES :]))

    def kept(self) -> bytes:
        """The last message: the certificate is on this device's disk."""
        assert self._keys is not None
        return self._keys.kept.encrypt(_NONCE, _KEPT, None)


def _finish(spake: Any, message: bytes, transcript: bytes) -> _Keys:
    """Take the other side's element.

    Raises:
        IdentityError: it is not one.
    """
    if len(message) != _ELEMENT_BYTES:
        raise IdentityError(f"a SPAKE2 element of {len(message)} bytes, expected {_ELEMENT_BYTES}")
    try:
        return _Keys(spake.finish(message), _VERSION + transcript)
    except (spake2.SPAKEError, NotOnCurve, ValueError, AssertionError) as exc:
        raise IdentityError("a SPAKE2 element that is not one") from exc


def _seal(cipher: AESGCM, body: JoinRequest | JoinReply) -> bytes:
    return cipher.encrypt(_NONCE, json.dumps(asdict(body)).encode(), None)


def _open(cipher: AESGCM, sealed: bytes) -> bytes:
    try:
        return cipher.decrypt(_NONCE, sealed, None)
    except (InvalidTag, ValueError) as exc:
        raise IdentityError("a sealed message that does not verify") from exc


def _read(kind: type[_T], data: bytes) -> _T:
    try:
        found = json.loads(data)
        expected = kind.__annotations__
        if found.keys() != expected.keys():
            raise ValueError
        if any(type(found[name]).__name__ != type_ for name, type_ in expected.items()):
            raise ValueError
        return kind(**found)
    except (ValueError, AttributeError, RecursionError) as exc:
        raise IdentityError(f"not a {kind.__name__}") from exc
