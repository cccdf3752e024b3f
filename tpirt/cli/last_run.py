"""The last run of ``tpirt chat``: options in a readable file, which the next one takes up.

The file is ``tpirt.toml`` beside the keys of this user. Names and values are those of the options.
What weakens protection (``--insecure``) is not remembered, nor what concerns one conversation.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import shlex
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpirt.errors import ConfigError, IdentityError
from tpirt.files import can_be_made, read_regular
from tpirt.units import parse_bytes

FILE = "tpirt.toml"

Value = str | int | float | bool | list[str]

_PLACES = ("local", "peers", "discover")  # one of these takes the place of the others
_NAMES = (
    *("model", *_PLACES),
    *("spares", "ratio", "memory", "window", "spill", "threads", "store", "store-limit"),
    "upload-limit",
    *("dtype", "quantize", "kv", "collective", "comm-dtype", "timeout", "context", "draft"),
    "no-journal",  # who once wants nothing written down is not asked again
)
_PATHS = ("model", "store", "draft")
_SIZES = ("memory", "spill", "store-limit", "upload-limit")
_LISTS = ("peers", "spares")
_MOST_BYTES = 64 << 10
_HEAD = """\
# The last run of `tpirt chat`. One without --model repeats it, but for the options that are given.
# Names and values are those of the options; edit them as you like.

[chat]
"""
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


@dataclass(frozen=True)
class _NotGiven:
    """Stands in the arguments for an option that was not given."""

    default: Any


def mark(parser: argparse.ArgumentParser) -> None:
    """Have the parser tell which of the options that are remembered were given."""
    for action in _actions(parser).values():
        action.default = _NotGiven(action.default)


def take_up(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> str:
    """Fill in what was not given: from the last run, or by default.

    Returns:
        The options of the last run that are used and not as by default, as they would be typed.

    Raises:
        ConfigError: the file has an error; says where.
    """
    actions = _actions(parser)
    given = [name for name in _NAMES if not _is_open(arguments, actions[name])]
    last = {}
    if not arguments.fresh and "model" not in given:
        last = _read(path_of(arguments), actions)
    elsewhere = any(name in _PLACES for name in given)
    replaced = {*given, *((*_PLACES, "spares", "ratio") if elsewhere else ())}
    used = {name: value for name, value in last.items() if name not in replaced}
    for name, action in actions.items():
        if name in used:
            setattr(arguments, action.dest, used[name].parsed)
        elif name not in given:
            setattr(arguments, action.dest, action.default.default)
    chosen = _values({name: option.parsed for name, option in used.items()}, actions)
    return " ".join(used[name].typed for name in chosen)


def names_model(arguments: argparse.Namespace) -> bool:
    """Whether ``--model`` was given; asked before the last run is taken up."""
    return not isinstance(arguments.model, _NotGiven)


def remember(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Write the options of this run, if they differ from those in the file; none with ``--fresh``.

    Raises:
        IdentityError: it cannot be written.
    """
    path = path_of(arguments)
    if arguments.fresh or path is None or not can_be_made(path.parent):
        return
    actions = _actions(parser)
    now = {name: getattr(arguments, action.dest) for name, action in actions.items()}
    values = _values(now, actions)
    with contextlib.suppress(ConfigError):
        before = {name: option.parsed for name, option in _read(path, actions).items()}
        if _values(before, actions) == values:
            return
    from tpirt.identity.folder import write_private

    with contextlib.suppress(UnicodeEncodeError):  # a path that is not text
        write_private(path, (_HEAD + dumps(values)).encode())


def path_of(arguments: argparse.Namespace) -> Path | None:
    """Where the file is; None without a home directory."""
    from tpirt.identity.folder import config_folder

    try:
        return config_folder(arguments.identity) / FILE
    except IdentityError:
        return None


def dumps(values: Mapping[str, Value]) -> str:
    """Write TOML: one line for each value."""
    return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items())


def _toml(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, (int, float)):
        return repr(value)
    return f'"{"".join(_escaped(char) for char in value)}"'


def _escaped(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    return f"\\u{ord(char):04x}" if ord(char) < 0x20 or ord(char) == 0x7F else char


@dataclass(frozen=True)
class _Option:
    """An option in the file: how it would be typed, and what the parser makes of it."""

    typed: str
    parsed: Any


def _read(path: Path | None, actions: Mapping[str, argparse.Action]) -> dict[str, _Option]:
    try:
        if path is None or not path.exists():
            return {}
        text = read_regular(path, _MOST_BYTES).decode("utf-8-sig")
        tables = tomllib.loads(text)
    except OSError as exc:
        raise _broken(path, f"cannot be read: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise _broken(path, f"not UTF-8 text (byte {exc.start})") from exc
    except tomllib.TOMLDecodeError as exc:
        raise _broken(path, str(exc)) from exc
    found = {}
    for name, value in _table(path, text, tables).items():
        try:
            found[name] = _option(name, value, actions)
        except (ConfigError, argparse.ArgumentTypeError, ValueError) as exc:
            raise _broken(path, f"line {_line(text, name)}: {name}: {exc}") from exc
    excluded = [name for name in _PLACES if name in found]
    if len(excluded) > 1:
        why = f"{excluded[1]}: not together with {excluded[0]}"
        raise _broken(path, f"line {_line(text, excluded[1])}: {why}")
    return found


def _table(path: Path, text: str, tables: Mapping[str, Any]) -> dict[str, Any]:
    for name, table in tables.items():
        if name != "chat" or not isinstance(table, dict):
            raise _broken(path, f"line {_line(text, name)}: {name}: expected only [chat]")
    found: dict[str, Any] = tables.get("chat", {})
    return found


def _option(name: str, value: Any, actions: Mapping[str, argparse.Action]) -> _Option:
    """Read one option as the command line would.

    Raises:
        ConfigError, ArgumentTypeError, ValueError: it is none, or has no such value.
    """
    if name not in actions:
        near = difflib.get_close_matches(name, actions, 1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(actions)}"
        raise ConfigError(f"unknown; {hint}")
    action = actions[name]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"expected true or false, got {value!r}")
        return _Option(f"--{name}" if value else "", value)
    parts = value if isinstance(value, list) else [value]
    if not parts or not {type(part) for part in parts} <= {str, int, float}:
        raise ConfigError(f"expected text or a number, got {value!r}")
    text = ",".join(map(str, parts))
    parsed = action.type(text) if callable(action.type) else text
    if action.choices is not None and parsed not in action.choices:
        raise ConfigError(f"{text!r}: expected one of {', '.join(map(str, action.choices))}")
    return _Option(f"--{name} {shlex.quote(text)}", parsed)


def _values(options: Mapping[str, Any], actions: Mapping[str, argparse.Action]) -> dict[str, Value]:
    """What to write for the options that are not as by default."""
    return {
        name: _value(name, parsed)
        for name, parsed in options.items()
        if parsed != actions[name].default.default and not _is_bundled(name, parsed)
    }


def _is_bundled(name: str, parsed: Any) -> bool:
    """Whether an option is the path of the bundled model, which is that of one installation."""
    from tpirt.engine.model import BUNDLED_MODEL

    return name == "model" and Path(parsed).resolve() == BUNDLED_MODEL.resolve()


def _value(name: str, parsed: Any) -> Value:
    """What to write for an option; paths are absolute, for the next run may be elsewhere."""
    if name in _SIZES:
        return _size(parsed)
    if name in _PATHS and os.path.exists(parsed):
        return str(os.path.abspath(parsed))
    if name in _LISTS:
        return list(parsed)
    if isinstance(parsed, tuple):
        return ",".join(f"{part:g}" for part in parsed)
    value: Value = parsed
    return value


def _size(count: int) -> str:
    """Write a size so that it reads the same; 0 is none."""
    for unit in "TGMK":
        if count and count % parse_bytes(f"1{unit}") == 0:
            return f"{count // parse_bytes(f'1{unit}')}{unit}"
    return str(count) if count else "none"


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    by_name = {option: action for action in parser._actions for option in action.option_strings}
    return {name: by_name[f"--{name}"] for name in _NAMES}


def _is_open(arguments: argparse.Namespace, action: argparse.Action) -> bool:
    return isinstance(getattr(arguments, action.dest), _NotGiven)


def _line(text: str, name: str) -> int:
    found = re.search(rf"""^[ \t]*\[?[ \t]*["']?{re.escape(name)}\b""", text, re.MULTILINE)
    return text.count("\n", 0, found.start()) + 1 if found else 1


def _broken(path: Path | None, why: str) -> ConfigError:
    return ConfigError(f"{path}: {why}; correct it or remove it, or use --fresh to go without it")
