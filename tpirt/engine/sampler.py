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
    for name, kind, called in _KINDS:
        value = getattr(params, name)
        if not isinstance(value, kind) and (value is not None or name not in _OPTIONAL):
            raise ConfigError(f"{name}: expected {called}, got {value!r}")
    ranges = (
        ("max_tokens", params.max_tokens is None or params.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= params.temperature < float("inf"), "0 (greedy) or more"),
        ("top_k", params.top_k >= 0, "0 (off) or more"),
        ("top_p", 0 < params.top_p <= 1, "above 0, at most 1 (off)"),
        ("min_p", 0 <= params.min_p <= 1, "from 0 (off) to 1"),
        (
            "repetition_penalty",
            0 < params.repetition_penalty < float("inf"),
            "above 0; 1 is off",
        ),
        ("seed", params.seed is None or 0 <= params.seed < 1 << 63, "0 to 2^63 - 1"),
        ("stop", all(text and isinstance(text, str) for text in params.stop), "non-empty strings"),
    )
    for name, ok, expected in ranges:
        if not ok:
            raise ConfigError(f"{name}: expected {expected}, got {getattr(params, name)!r}")


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
        self._params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def next(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """Sample a token.

        Args:
            logits: (V,) float32; overwritten.
            history: prompt and generated ids, for the repetition penalty.

        Raises:
            LogitsError: a logit is NaN or infinite.
        """
        check_finite(logits)
        params = self._params
        if params.repetition_penalty != 1:
            _penalise(logits, history, params.repetition_penalty)
        if params.temperature < _GREEDY_BELOW:
            return int(logits.numpy().argmax())  # torch's takes 25 times as long
        logits /= params.temperature
        if params.top_k:
            _keep_top_k(logits, params.top_k)
        if params.top_p < 1:
            _keep_top_p(logits, params.top_p)
        if params.min_p:
            probabilities = logits.softmax(-1)
            logits[probabilities < params.min_p * probabilities.max()] = _REMOVED
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
