"""A model directory's defaults for generation: end tokens and sampling parameters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpirt.engine.sampler import check_params
from tpirt.errors import CheckpointError, ConfigError
from tpirt.types import SamplingParams


@dataclass(frozen=True)
class GenerationDefaults:
    """``eos_ids`` end an answer; ``sampling`` has defaults for the user's parameters."""

    eos_ids: frozenset[int]
    sampling: SamplingParams

    @classmethod
    def from_dir(cls, path: Path, tokenizer_eos: int | None) -> GenerationDefaults:
        """Read ``generation_config.json``; end tokens also from ``config.json`` or the tokenizer.

        Sampling is greedy unless the file says ``do_sample: true``, as in transformers.

        Raises:
            CheckpointError: a file is not valid JSON or an end token is not a number.
        """
        generation = _read(path / "generation_config.json")
        eos = generation.get("eos_token_id")
        if eos is None:
            eos = _read(path / "config.json").get("eos_token_id")
        if eos is None:
            eos = [] if tokenizer_eos is None else tokenizer_eos
        ids = eos if isinstance(eos, list) else [eos]
        if not all(isinstance(i, int) for i in ids):
            raise CheckpointError(f"{path}: eos_token_id: expected numbers, got {eos!r}")
        return cls(frozenset(ids), _sampling(path, generation))


def _sampling(path: Path, generation: dict[str, Any]) -> SamplingParams:
    file = path / "generation_config.json"
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as exc:
        raise CheckpointError(f"{path}: {exc}; copy the file again") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return content
