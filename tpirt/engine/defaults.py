"""A model directory's defaults for generation: end tokens, lengths and sampling parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tpirt.engine.sampler import check_params
from tpirt.errors import CheckpointError, ConfigError
from tpirt.files import read_regular
from tpirt.types import DEFAULT_MAX_TOKENS, SamplingParams


@dataclass(frozen=True)
class GenerationDefaults:
    """What ``generation_config.json`` and its neighbours say.

    Attributes:
        eos_ids: tokens that end an answer.
        sampling: defaults for the user's parameters; without a stated length, ``max_tokens`` is
            ``DEFAULT_MAX_TOKENS``.
        max_new_tokens: the stated maximum of an answer's tokens; None if there is none.
        max_length: likewise of prompt and answer together. It has no effect on longer prompts, or
            with a ``max_tokens``.
    """

    eos_ids: frozenset[int]
    sampling: SamplingParams
    max_new_tokens: int | None = None
    max_length: int | None = None

    @property
    def chat(self) -> SamplingParams:
        """Defaults in a chat: without a stated length, answers run to the context's end."""
        return replace(self.sampling, max_tokens=self.max_new_tokens)

    @classmethod
    def from_dir(cls, path: Path, tokenizer_ends: Iterable[int]) -> GenerationDefaults:
        """Read ``generation_config.json``.

        End tokens are those of ``generation_config.json``, of ``config.json`` and of the tokenizer
        together: files often lack one of them, and then answers would not end. Sampling is greedy
        unless the file says ``do_sample: true``, as in transformers.

        Raises:
            CheckpointError: a file is not valid JSON, or a value is invalid.
        """
        file = path / "generation_config.json"
        generation = _read(file)
        ends = set(tokenizer_ends)
        ends |= _eos_ids(file, generation)
        ends |= _eos_ids(path / "config.json", _read(path / "config.json"))
        new, length = (_length(file, generation, n) for n in ("max_new_tokens", "max_length"))
        most = new if new or length else DEFAULT_MAX_TOKENS
        sampling = _sampling(file, generation)
        sampling = replace(sampling, max_tokens=most, stop=_stops(file, generation))
        return cls(frozenset(ends), sampling, new, length)


def _eos_ids(file: Path, content: dict[str, Any]) -> set[int]:
    eos = content.get("eos_token_id")
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise CheckpointError(f"{file}: eos_token_id: expected numbers, got {eos!r}")
    return set(ids)


def _length(file: Path, generation: dict[str, Any], name: str) -> int | None:
    value = generation.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CheckpointError(f"{file}: {name}: expected a whole number above 0, got {value!r}")
    return value


def _stops(file: Path, generation: dict[str, Any]) -> tuple[str, ...]:
    value = generation.get("stop_strings") or []
    stops = value if isinstance(value, list) else [value]
    if not all(isinstance(stop, str) and stop for stop in stops):
        raise CheckpointError(f"{file}: stop_strings: expected texts, got {value!r}")
    return tuple(stops)


def _sampling(file: Path, generation: dict[str, Any]) -> SamplingParams:
    values: dict[str, float] = {"repetition_penalty": 1.0}
    if generation.get("do_sample"):
        # transformers' defaults for parameters that the file leaves out
        values |= {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0}
    for name in values:
        value = generation.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{file}: {name}: expected a number, got {value!r}")
        if name == "top_k" and value != value // 1:
            raise CheckpointError(f"{file}: top_k: expected a whole number, got {value!r}")
        values[name] = int(value) if name == "top_k" else float(value)
    params = SamplingParams(**values)  # type: ignore[arg-type]
    try:
        check_params(params)
    except ConfigError as exc:
        raise CheckpointError(f"{file}: {exc}") from exc
    return params


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path).decode("utf-8-sig"))
    except FileNotFoundError:
        return {}
    except OSError as exc:
        raise CheckpointError(f"{path}: cannot be read: {exc.strerror}") from exc
    except (ValueError, RecursionError) as exc:
        raise CheckpointError(
            f"{path}: not valid JSON ({exc}); it may be truncated, copy the file again"
        ) from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
