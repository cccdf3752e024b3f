"""Plain data shared by all packages: sampling options, tokens and measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

DEFAULT_TIMEOUT_S = 20.0  # longest silence of a peer before it counts as lost
DEFAULT_MAX_TOKENS = 256  # of an answer outside a chat


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is sampled; terms are defined as in transformers.

    With ``max_tokens`` None an answer runs to the end of the context. An entry of ``stop`` that is
    the text of an added token, such as ``<|im_end|>``, stops at that token. ``temperature == 0`` is
    greedy. ``top_k == 0``, ``top_p == 1``, ``min_p == 0`` and ``repetition_penalty == 1`` turn the
    respective filter off.
    """

    max_tokens: int | None = DEFAULT_MAX_TOKENS
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Token:
    """One generated token; ``text`` is the newly printable text, in whole characters."""

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
    """Time of one rank in one step, in milliseconds.

    A step lasts until the next one begins (``total_ms``); the last one until its work is done.
    ``compute_ms`` is time in blocks (on the master also in the LM head and in sampling), ``io_ms``
    waiting for weights, ``comm_ms`` in collectives (on the master also sending the step to the
    workers). Each moment counts once, for the first of these that is under way: with
    micro-batches, one half computes during the other's sum. So the three never exceed
    ``total_ms``. The rest is idle: a worker waits for the next step; the master embeds and decodes
    text, or its caller works between two tokens.

    ``head_compute_ms`` and ``head_io_ms`` are the parts of ``compute_ms`` and ``io_ms`` after the
    layers, on the master only.
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
    """Time of one decoded token by cause, in milliseconds of the master's clock.

    A rank's own time is its compute and its wait for weights within the layers. Every collective
    synchronizes all ranks, so the rank with the longest own time, ``slowest_rank``, sets the pace:

    - ``compute_ms``: the slowest rank's compute in the layers, and the master's after them;
    - ``io_ms``: likewise, waiting for weights;
    - ``comm_ms``: the master's time in collectives, minus the difference between the slowest
      rank's own time and the master's; at least 0;
    - ``other_ms``: the rest of ``total_ms``.

    If different ranks are slow in different blocks, they wait for each other. Sums over a step
    cannot separate these waits from the network, so ``comm_ms`` includes them. A trace can.

    ``gated_by`` is the largest of ``compute``, ``disk``, ``network`` and ``other``.
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
    """Counters of one rank since a step began (``Engine.stats``: since the latest request began).

    ``io_ms`` is time spent waiting for weights, ``comm_ms`` for other ranks, both only while
    nothing is computed; ``read_ms`` is the time of all reads, waited for or not. ``steps`` are the
    latest 4096.
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
    """Progress of a long operation: ``done`` of ``total`` ``unit``."""

    stage: str
    done: int
    total: int
    unit: str = "bytes"
    detail: str = ""


# Stages that are over when they are reported; ``detail`` has the words. A peer was lost; a group
# was formed again, with the number of its peers; tokens come again.
LOST = "lost"
RECONNECTED = "reconnected"
RESUMED = "resumed"

ProgressCallback = Callable[[Progress], None]


def ignore_progress(_: Progress) -> None:
    """Drop progress reports; the default."""


@dataclass
class Recovery:
    """How the loss of a peer was survived, and how long it took, in milliseconds.

    Attributes:
        peer_id: the peer that was lost.
        change: who takes part now instead; empty if all came back.
        peers: number of workers now.
        noticing_ms: from its last sign of life until it counted as lost.
        forming_ms: from then until another group was formed.
        sent_bytes: of weights, to workers, meanwhile.
        replayed_tokens: that were computed again.
        replaying_ms: from the new group to the next token; 0 if no request was under way.
    """

    peer_id: str
    change: str
    peers: int
    noticing_ms: float
    forming_ms: float
    sent_bytes: int
    replayed_tokens: int = 0
    replaying_ms: float = 0.0

    def explain(self) -> str:
        """Say how long it took."""
        parts = (self.noticing_ms, self.forming_ms, self.replaying_ms)
        noticing, forming, replaying = (f"{part / 1e3:.1f}" for part in parts)
        return (
            f"after {sum(parts) / 1e3:.1f} s: {noticing} s to notice, {forming} s to form a group, "
            f"{replaying} s to compute {self.replayed_tokens} tokens again"
        )


@dataclass
class Completion:
    """A finished generation; ``tpirt generate --json`` prints it."""

    text: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    finish_reason: str
    ttft_ms: float
    tpot_ms: float
    world_size: int
    # Empty if a worker was lost after the last token, before it gave its statistics.
    ranks: list[RankStats] = field(default_factory=list)
    # All steps but the first; with a reconnect, those after it. A step with right guesses made
    # more than one token.
    decoded: list[TokenTimes] = field(default_factory=list)
    guesses: int = 0  # that were verified
    right_guesses: int = 0
    in_time: bool | None = None  # whether it met the engine's targets; None without any
    recoveries: list[Recovery] = field(default_factory=list)  # of peers lost meanwhile
