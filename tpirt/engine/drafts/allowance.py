"""Bounds on the time that guesses may lose: small shares of the time that steps take."""

from __future__ import annotations

_MOST_OWED = 4  # times of one token: a machine that stood still is no reason to stop for long


class Allowance:
    """Seconds that may be lost: a share of the time, less what was lost, plus what was saved.

    A caller that only spends what is left loses no more than the share, and what it was wrong by
    the last time, whatever its estimates are. It owes at most 4 tokens' time for that.

    Args:
        share: of the time.
        most_tokens: how much is kept at most, in times of one token.

    Attributes:
        left_s: what may be lost now; below 0 after a loss that was larger than expected.
        is_full: whether no more is kept.
    """

    def __init__(self, share: float, most_tokens: float):
        self._share = share
        self._most_tokens = most_tokens
        self.left_s = 0.0
        self.is_full = False

    def earn(self, seconds: float, token_s: float) -> None:
        """Account for a step; a token takes ``token_s`` without guesses."""
        self.save(self._share * seconds, token_s)

    def save(self, seconds: float, token_s: float) -> None:
        """Account for what was saved or, below 0, lost."""
        most_s = self._most_tokens * token_s
        self.left_s = max(-_MOST_OWED * token_s, min(self.left_s + seconds, most_s))
        self.is_full = self.left_s >= most_s
