"""The options of an engine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tpirt.engine.drafts.base import Drafter
from tpirt.errors import ConfigError
from tpirt.planning.options import PlanOptions, check_range
from tpirt.types import DEFAULT_TIMEOUT_S

AUTO_DRAFT, SUFFIX_DRAFT, NO_DRAFT = "auto", "suffix", "none"
OBJECTIVES = ("latency", "throughput")
_LEAST_RATE = 16 << 10  # bytes a second: four seconds a chunk
MIN_TIMEOUT_S, MAX_TIMEOUT_S = 0.01, 86_400.0  # peers accept no others


@dataclass(frozen=True, kw_only=True)
class EngineOptions(PlanOptions):
    """How to run a model; validated on construction.

    Extends :class:`tpirt.planning.PlanOptions`.

    Attributes:
        threads: compute threads per process; by default the machine's cores divided by its ranks.
        store: folder of this machine's slices; by default ``~/.cache/tpirt/slices``, or the
            ``slices`` folder of a synthetic model.
        store_limit_bytes: maximum size of that folder; by default only the disk limits it.
        upload_bytes_per_s: the most that slices sent to peers take of the network; by default
            nothing bounds it.
        sequences: the most requests that run at once; others wait.
        waiting: the most requests that wait; more are refused.
        spill_bytes: the most that each rank writes to its own disk, in its store, of conversations
            that no request uses and that memory is too short for; 0 for none of them. Beyond, and
            after an hour, they are computed again.
        objective: ``latency``: a prompt slows running answers down by at most a factor of two;
            ``throughput``: prompts are computed as fast as can be.
        ttft_target_s: the longest that an answer's first token should take, in seconds. Requests
            that can still be in time are computed before those that are late; none is refused.
        tpot_target_s: the longest that an answer's further tokens should take on average, in
            seconds. It replaces ``objective``'s factor of two, and further requests wait where one
            more answer would exceed it. ``Engine.goodput`` counts the answers within both.
        draft: how tokens are guessed, which one step then verifies together: ``suffix``: from the
            conversation itself; ``none``; ``auto``: suffix; the directory of a small model with the
            same tokenizer, which the master keeps in memory beside its rank; or a drafter of your
            own. Guesses change no token, and are only verified where that pays.
        timeout_s: longest silence of a peer before it counts as lost, in seconds.
        identity: folder of this user's identities, by default ``~/.config/tpirt``; beyond loopback
            peers are used by the cluster's certificate in it.
        insecure: use peers beyond loopback without encryption and authentication, which they must
            have been told, too.
        trace: file for a trace of all ranks, written when the engine closes; see
            :mod:`tpirt.engine.trace_file`.

    Raises:
        ConfigError: an option has an invalid value.
        MemoryLimitError: the window is too small.
    """

    threads: int | None = None
    store: str | Path | None = None
    store_limit_bytes: int | None = None
    upload_bytes_per_s: int | None = None
    sequences: int = 16
    waiting: int = 256
    spill_bytes: int = 4 << 30
    objective: str = "latency"
    ttft_target_s: float | None = None
    tpot_target_s: float | None = None
    draft: str | Path | Drafter = AUTO_DRAFT
    timeout_s: float = DEFAULT_TIMEOUT_S
    identity: str | Path | None = None
    insecure: bool = False
    trace: str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("threads", self.threads, 1024)
        check_range("sequences", self.sequences, 1024)
        check_range("waiting", self.waiting, 1 << 20)
        check_range("spill_bytes", self.spill_bytes or None, 1 << 60)
        if self.objective not in OBJECTIVES:
            raise ConfigError(f"objective {self.objective!r}: expected {' or '.join(OBJECTIVES)}")
        check_range("store_limit_bytes", self.store_limit_bytes, 1 << 60)
        rate = self.upload_bytes_per_s
        if rate is not None and rate < _LEAST_RATE:
            raise ConfigError(
                f"upload_bytes_per_s: expected at least {_LEAST_RATE}, got {rate}: peers take "
                "slower senders for lost"
            )
        _check_target("ttft_target_s", self.ttft_target_s)
        _check_target("tpot_target_s", self.tpot_target_s)
        if not MIN_TIMEOUT_S <= self.timeout_s <= MAX_TIMEOUT_S:
            raise ConfigError(
                f"timeout_s: expected {MIN_TIMEOUT_S:g} to {MAX_TIMEOUT_S:g} seconds, "
                f"got {self.timeout_s:g}"
            )


def _check_target(name: str, seconds: float | None) -> None:
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError(f"{name}: expected a number of seconds above 0, got {seconds:g}")
