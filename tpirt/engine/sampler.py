"""Sampling, with the order and the definitions of transformers' logits processors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch

from tpirt.errors import ConfigError, LogitsError
from tpirt.types import SamplingParams

_REMOVED = -float("inf")
_LARGEST = torch.finfo(torch.float32).max
_KINDS: tuple[tuple[str, Any, str], ...] = (
    ("max_tokens", Integral, "a whole number"),
    ("temperature", Real, "a number"),
    ("top_k", Integral, "a whole number"),
    ("top_p", Real, "a number"),
    ("min_p", Real, "a number"),
    ("repetition_penalty", Real, "a number"),
    ("seed", Integral, "a whole number"),
    ("stop", (tuple, list), "a tuple of texts"),
)
_OPTIONAL = ("max_tokens", "seed")
# Below, sampling is greedy for all logits, and dividing by the temperature may overflow.
_GREEDY_BELOW = 1e-6


def check_params(params: SamplingParams) -> None:
    """Validate sampling parameters.

    Raises:
        ConfigError: a value has a wrong type or is out of range; the message has name, range and
            value.
    """
    if not isinstance(params, SamplingParams):
        raise ConfigError(f"params: expected SamplingParams, got {params!r}")
    for name, kind, called in _KINDS:
        value = getattr(params, name)
        if value is None and name in _OPTIONAL:
            continue
        if not isinstance(value, kind) or (kind is Real and not _is_float(value)):
            raise ConfigError(f"{name}: expected {called}, got {value!r}")
    ranges = (
        ("max_tokens", params.max_tokens is None or params.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= params.temperature < float("inf"), "0 (greedy) or more"),
        ("top_k", params.top_k >= 0, "0 (off) or more"),
        ("top_p", 0 < params.top_p <= 1, "above 0, at most 1 (off)"),
        ("min_p", 0 <= params.min_p <= 1, "from 0 (off) to 1"),
        (
            "repetition_penalty",
            1e-3 <= params.repetition_penalty <= 1e3,
            "from 0.001 to 1000; 1 is off",
        ),
        ("seed", params.seed is None or 0 <= params.seed < 1 << 63, "0 to 2^63 - 1"),
        ("stop", all(map(_is_text, params.stop)), "non-empty texts of valid Unicode"),
    )
    for name, ok, expected in ranges:
        if not ok:
            raise ConfigError(f"{name}: expected {expected}, got {getattr(params, name)!r}")


def _is_float(number: Real) -> bool:
    try:
        float(number)
    except OverflowError:
        return False
    return True


def _is_text(text: object) -> bool:
    try:
        return isinstance(text, str) and len(text.encode()) > 0
    except UnicodeEncodeError:  # a lone surrogate, of bytes that were no UTF-8
        return False


def check_finite(logits: torch.Tensor) -> None:
    """Check logits of any shape before they are used.

    Raises:
        LogitsError: one is NaN or infinite.
    """
    for bound in map(float, torch.aminmax(logits)):  # both are NaN if any element is
        if not math.isfinite(bound):
            raise LogitsError(
                f"the model computed logits that are not finite ({bound}): its checkpoint "
                "is damaged (download it again), or its values exceed the dtype (try --dtype "
                "float32)"
            )


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens."""

    def __init__(self, params: SamplingParams):
        self._temperature = float(params.temperature)
        self._penalty = float(params.repetition_penalty)
        self._top_k = int(params.top_k)
        self._top_p, self._min_p = float(params.top_p), float(params.min_p)
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(int(params.seed))

    def next(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """Sample a token.

        Args:
            logits: (V,) float32; overwritten.
            history: prompt and generated ids, for the repetition penalty.

        Raises:
            LogitsError: a logit is NaN or infinite.
        """
        check_finite(logits)
        if self._penalty != 1:
            _penalise(logits, history, self._penalty)
        if self._temperature < _GREEDY_BELOW:
            return int(logits.numpy().argmax())  # torch's takes 25 times as long
        logits /= self._temperature
        if self._temperature < 1:
            logits.clamp_(max=_LARGEST)
        if self._top_k:
            _keep_top_k(logits, self._top_k)
        if self._top_p < 1:
            _keep_top_p(logits, self._top_p)
        if self._min_p:
            probabilities = logits.softmax(-1)
            logits[probabilities < self._min_p * probabilities.max()] = _REMOVED
        drawn = torch.multinomial(logits.softmax(-1), 1, generator=self._generator)
        return int(drawn)


def _penalise(logits: torch.Tensor, history: Sequence[int], penalty: float) -> None:
    ids = torch.tensor(sorted(set(history)))
    scores = logits[ids]
    logits[ids] = torch.where(scores < 0, scores * penalty, scores / penalty)


def _keep_top_k(logits: torch.Tensor, k: int) -> None:
    smallest = logits.topk(min(k, len(logits))).values[-1]
    logits[logits < smallest] = _REMOVED


def _keep_top_p(logits: torch.Tensor, p: float) -> None:
    ascending, order = logits.sort()
    removed = ascending.softmax(-1).cumsum(-1) <= 1 - p
    removed[-1] = False
    logits[order[removed]] = _REMOVED
