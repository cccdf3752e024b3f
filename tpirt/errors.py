"""Exceptions for everything a user, a file or a peer can cause.

Only the command line prints: ``str(error)`` as one line; then it exits with ``exit_code``. A
message has the subject, the expected and the actual value, and advice.
"""

from __future__ import annotations


class TpirtError(Exception):
    """Base class of all tpirt errors that are not bugs.

    Attributes:
        peer_id: the peer that it is about; empty if none, or unknown.
    """

    exit_code = 2
    peer_id = ""


class ConfigError(TpirtError):
    """An invalid or unsupported model configuration or option."""


class PlanError(ConfigError):
    """An impossible split: too many ranks, or a ratio of the wrong length."""


class CheckpointError(TpirtError):
    """A missing, damaged or inconsistent model directory."""


class TokenizerError(TpirtError):
    """A tokenizer or chat template that cannot be loaded, or fails on its input."""


class StoreError(TpirtError):
    """A slice store that cannot be written, or whose files do not match the manifest."""


class DamagedSliceError(StoreError):
    """A stored slice whose bytes have changed; it is used no more, and made again."""


class MemoryLimitError(TpirtError):
    """A memory limit or window that is too small; the message has the required size."""


class RequestError(TpirtError):
    """A request that cannot be served, for example empty or longer than the context."""


class QueueFullError(RequestError):
    """As many requests are running and waiting as may; a later one can be served."""


class LogitsError(TpirtError):
    """The model computed NaN or infinity: no token can be chosen."""


class TransportError(TpirtError):
    """A malformed or unexpected message; it was rejected."""


class HandshakeError(TransportError):
    """A peer with another protocol version or another model."""


class IdentityError(HandshakeError):
    """A certificate that is missing, damaged, expired, revoked or of another cluster."""


class PeerBusyError(HandshakeError):
    """A peer that serves another master."""

    exit_code = 3


class PeerError(TpirtError):
    """A peer reported a failure of its own (disk, memory); it is still connected."""


class PeerUnreachableError(TpirtError):
    """No peer answers at the address."""

    exit_code = 3


class PeerLostError(TpirtError):
    """A peer died, left or became silent while it was needed.

    Attributes:
        rank: the peer's rank; None if unknown.
        silent_s: seconds since its last sign of life; None if unknown.
    """

    exit_code = 3

    def __init__(self, message: str, *, rank: int | None = None, peer_id: str = ""):
        super().__init__(message)
        self.rank = rank
        self.peer_id = peer_id
        self.silent_s: float | None = None


class DamagedLinkError(PeerLostError, TransportError):
    """A link brought what its peer did not send, or cannot be proved to have sent.

    The peer is not to blame, and is connected again.
    """

    @classmethod
    def of(cls, exc: TransportError) -> DamagedLinkError:
        """The error of something invalid that came in the clear."""
        return cls(f"{exc}; it may have been damaged on its way, in the clear")
