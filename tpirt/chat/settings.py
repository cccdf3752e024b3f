"""``/set``: sampling parameters by name, parsed from text."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from tpirt.engine.sampler import check_params
from tpirt.errors import ConfigError
from tpirt.types import SamplingParams

NAMES = tuple(field.name for field in fields(SamplingParams))
_NONE = ("none", "off")


def change(params: SamplingParams, name: str, text: str) -> SamplingParams:
    """Return ``params`` with one value changed.

    Raises:
        ConfigError: an unknown parameter, or an invalid value.
    """
    name = canonical(name)
    value: Any = _READERS[name](name, text)
    changed = replace(params, **{name: value})
    check_params(changed)
    return changed


def canonical(name: str) -> str:
    """Return the field's name; ``top-p`` means ``top_p``.

    Raises:
        ConfigError: an unknown parameter; the message has the most similar one.
    """
    wanted = name.lower().replace("-", "_")
    if wanted in NAMES:
        return wanted
    near = difflib.get_close_matches(wanted, NAMES, 1)
    hint = f"did you mean {near[0]}?" if near else "expected one of " + ", ".join(NAMES)
    raise ConfigError(f"no parameter {name!r}: {hint}")


def shown(params: SamplingParams, name: str) -> str:
    """Format a value as in ``/set``."""
    value = getattr(params, name)
    if name == "stop":
        return json.dumps(value, ensure_ascii=False) if value else "none"
    return "none" if value is None else f"{value}"


def _whole(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name}: expected a whole number, got {text!r}") from None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name}: expected a number, got {text!r}") from None


def _whole_or_none(name: str, text: str) -> int | None:
    return None if text.lower() in _NONE else _whole(name, text)


def _stops(name: str, text: str) -> tuple[str, ...]:
    """Parse one plain string, or a JSON list of strings."""
    if text.lower() in _NONE:
        return ()
    if not text.startswith("["):
        return (text,)
    try:
        stops = json.loads(text)
    except ValueError as exc:
        raise ConfigError(f'{name}: expected a list such as ["\\n", "END"]: {exc}') from None
    if not all(isinstance(stop, str) for stop in stops):
        raise ConfigError(f'{name}: expected a list of strings such as ["\\n", "END"], got {text}')
    return tuple(stops)


_READERS: dict[str, Callable[[str, str], object]] = {
    "max_tokens": _whole_or_none,
    "temperature": _number,
    "top_k": _whole,
    "top_p": _number,
    "min_p": _number,
    "repetition_penalty": _number,
    "seed": _whole_or_none,
    "stop": _stops,
}
