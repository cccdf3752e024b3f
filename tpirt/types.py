"""Plain data that crosses module borders: options in, tokens and measurements out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen, with transformers' definitions of each term.

    ``temperature == 0`` is greedy. ``top_k == 0``, ``top_p == 1``, ``min_p == 0`` and
    ``repetition_penalty == 1`` switch the respective filter off.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Token:
    """One generated token: ``text`` is what became printable with it (whole characters only)."""

    id: int
    text: str
    finish_reason: str | None = None  # "stop", "length" on the last one


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; ``role`` is ``system``, ``user`` or ``assistant``."""

    role: str
    content: str


@dataclass
class RankStats:
    """What one rank has used and done since its session (bytes) or the request (times) began.

    ``io_ms`` is time spent waiting for weights, ``comm_ms`` for other ranks.
    """

    rank: int = 0
    peer_id: str = ""
    peak_rss_bytes: int = 0
    weights_bytes: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    io_ms: float = 0.0
    compute_ms: float = 0.0
    comm_ms: float = 0.0
    bytes_read: int = 0


@dataclass(frozen=True)
class Progress:
    """A step of something longer than a second: ``done`` of ``total`` ``unit``."""

    stage: str
    done: int
    total: int
    unit: str = "bytes"
    detail: str = ""


ProgressCallback = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """Drop progress reports: the default where nobody looks."""


@dataclass
class Completion:
    """A finished generation: what ``tpirt generate --json`` prints."""

    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    ttft_ms: float
    tpot_ms: float
    world_size: int
    ranks: list[RankStats] = field(default_factory=list)
