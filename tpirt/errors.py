"""The exception tree: everything a user, a file or a peer can cause.

The command line prints ``str(error)`` as one line and exits with ``exit_code``; nothing below it
prints. A message names the subject, what was expected and what came, and what to do.
"""


class TpirtError(Exception):
    """Base of every error that is not a bug of ours."""

    exit_code = 2


class ConfigError(TpirtError):
    """A model configuration or an option that is invalid or not supported."""


class PlanError(ConfigError):
    """A split that cannot be made: too many ranks, a ratio of the wrong length."""


class CheckpointError(TpirtError):
    """A model directory that is missing, damaged or inconsistent."""


class TokenizerError(TpirtError):
    """A tokenizer or chat template that cannot be loaded or that fails on its input."""


class StoreError(TpirtError):
    """A slice store that cannot be written, or whose files are not what its manifest says."""


class MemoryLimitError(TpirtError):
    """A memory limit or window smaller than what the work needs; the message says how much."""


class RequestError(TpirtError):
    """A request that cannot be served: empty, or longer than the context."""


class TransportError(TpirtError):
    """A message that is malformed or out of turn; it was refused and used for nothing."""


class HandshakeError(TransportError):
    """A peer of another protocol version, of another model, or busy with another master."""


class PeerError(TpirtError):
    """A peer reported a failure of its own (its disk, its memory); it is still there."""


class PeerUnreachableError(TpirtError):
    """No peer answers at the address."""

    exit_code = 3


class PeerLostError(TpirtError):
    """A peer died, left or fell silent while it was needed.

    Attributes:
        rank: the peer's; None if not known.
        peer_id: the peer's name; empty if not known.
    """

    exit_code = 3

    def __init__(self, message: str, *, rank: int | None = None, peer_id: str = ""):
        super().__init__(message)
        self.rank = rank
        self.peer_id = peer_id
