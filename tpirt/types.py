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


@dataclass(frozen=True)
class StepTimes:
    """Where one rank's time went in one step, in milliseconds.

    A step lasts until the next one begins (``total_ms``), the last one until nothing more is done
    for it. ``compute_ms`` is spent in blocks (on the master in the LM head and in sampling, too),
    ``io_ms`` waiting for weights, ``comm_ms`` in collectives (on the master also in sending the
    step to the workers). What is left of ``total_ms`` is idle: on a worker, waiting for the next
    step; on the master, embedding, text, and what the caller does between two tokens.

    ``head_compute_ms`` and ``head_io_ms`` are the parts of ``compute_ms`` and ``io_ms`` that come
    after the layers, on the master alone.
    """

    step: int
    tokens: int
    prefill: bool
    total_ms: float
    compute_ms: float
    io_ms: float
    comm_ms: float
    head_compute_ms: float
    head_io_ms: float


@dataclass(frozen=True)
class TokenTimes:
    """What one decoded token waited for, in milliseconds of the master's clock.

    A rank's own time is its compute and its waiting for weights within the layers. All ranks meet
    in every collective, so the rank with the most of it, ``slowest_rank``, sets the pace:

    - ``compute_ms``: the slowest rank's compute in the layers, and the master's after them;
    - ``io_ms``: likewise, waiting for weights;
    - ``comm_ms``: the master's time in collectives, without what it waited there because the
      slowest rank's own time was longer than the master's; at least 0;
    - ``other_ms``: what is left of ``total_ms``.

    Ranks that are slow in turn, one in this block and one in the next, wait for each other: sums
    over a step cannot tell that from the network, so it is in ``comm_ms``. A trace can.

    ``gated_by`` is ``compute``, ``disk``, ``network`` or ``other``, whichever took most.
    """

    step: int
    total_ms: float
    compute_ms: float
    io_ms: float
    comm_ms: float
    other_ms: float
    slowest_rank: int
    gated_by: str


@dataclass
class RankStats:
    """What one rank has used and done since a step began, such as a request's first.

    ``io_ms`` is time spent waiting for weights, ``comm_ms`` for other ranks; ``read_ms`` is how
    long its disk was at work, whether anybody waited or not. ``steps`` are the latest 4096.
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
    read_ms: float = 0.0
    steps: list[StepTimes] = field(default_factory=list)


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
    """Drop progress reports; the default."""


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
    decoded: list[TokenTimes] = field(default_factory=list)  # all tokens but the first
