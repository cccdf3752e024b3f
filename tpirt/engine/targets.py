"""Targets for an answer's times, and how many answers met them (goodput)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Targets:
    """The longest times that answers should take; None for no target.

    Attributes:
        ttft_s: to the first token, in seconds.
        tpot_s: per token after the first, on average over an answer, in seconds.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None

    def __bool__(self) -> bool:
        return self.ttft_s is not None or self.tpot_s is not None

    def ttft_met(self, ttft_s: float) -> bool:
        """Whether a time to the first token is within its target."""
        return self.ttft_s is None or ttft_s <= self.ttft_s

    def tpot_met(self, tpot_s: float) -> bool:
        """Whether a time per token is within its target."""
        return self.tpot_s is None or tpot_s <= self.tpot_s

    def met(self, ttft_s: float, tpot_s: float) -> bool:
        """Whether both are."""
        return self.ttft_met(ttft_s) and self.tpot_met(tpot_s)


NO_TARGETS = Targets()


@dataclass
class Goodput:
    """How many answers met their targets, of those that were not cancelled and did not fail.

    Attributes:
        targets: what is wanted.
        answers: those that came to their end.
        ttft_met, tpot_met: within one of the targets.
        met: within both.
    """

    targets: Targets
    answers: int = 0
    ttft_met: int = 0
    tpot_met: int = 0
    met: int = 0

    @property
    def share(self) -> float:
        """The share of answers within both targets; 1 before the first one."""
        return self.met / self.answers if self.answers else 1.0

    def count(self, ttft_s: float, tpot_s: float) -> None:
        """Account for an answer."""
        self.answers += 1
        self.ttft_met += self.targets.ttft_met(ttft_s)
        self.tpot_met += self.targets.tpot_met(tpot_s)
        self.met += self.targets.met(ttft_s, tpot_s)

    def explain(self) -> str:
        """Say how many answers met the targets."""
        if not self.targets:
            return "targets: none"
        parts = [
            f"{name} {target_s * 1e3:g} ms met by {met} of {self.answers}"
            for name, target_s, met in (
                ("TTFT", self.targets.ttft_s, self.ttft_met),
                ("TPOT", self.targets.tpot_s, self.tpot_met),
            )
            if target_s is not None
        ]
        return f"targets: {', '.join(parts)}; goodput {self.share:.1%}"
