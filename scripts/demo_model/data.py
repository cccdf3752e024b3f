"""The facts and phrasings of the small world, read from `data/*.toml`.

A text is split at line ends and bars into phrases; a phrase that stands twice is drawn twice as
often. Tables are looked up by dotted key, such as `colour.of`.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple, NoReturn

FOLDER = Path(__file__).parent / "data"


class DataError(Exception):
    """A data file cannot be used; the message names the file and the key."""


class Reply(NamedTuple):
    """One thing that users say, the answer to it, and the topic it opens, if any."""

    phrase: str
    answer: str
    topic: str


class Data:
    """All data files of a folder under one set of keys."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self._values: dict[str, Any] = {}  # leaves (phrases, numbers) and tables, by dotted key
        self._files: dict[str, str] = {}  # the file of each top-level key
        for path in sorted(folder.glob("*.toml")):
            try:
                content = tomllib.loads(path.read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
                raise DataError(f"{path.name}: {exc}") from None
            for key, value in content.items():
                if key in self._files:
                    raise DataError(f"{path.name}: {key}: already in {self._files[key]}")
                self._files[key] = path.name
                self._add(key, value)

    def _add(self, key: str, value: object) -> Any:
        if isinstance(value, str):
            self._values[key] = self._split(key, value)
        elif isinstance(value, dict):
            self._values[key] = {name: self._add(f"{key}.{name}", v) for name, v in value.items()}
        elif isinstance(value, list):
            items = [self._add(f"{key}[{i}]", item) for i, item in enumerate(value, 1)]
            self._values[key] = [
                reply for i in range(1, len(items) + 1) for reply in self._replies(f"{key}[{i}]")
            ]
        elif isinstance(value, int | float) and not isinstance(value, bool) and value >= 0:
            self._values[key] = value
        else:
            self.fail(key, f"expected a text, a table or a number from 0, got {value!r}")
        return self._values[key]

    def _split(self, key: str, text: str) -> tuple[str, ...]:
        lines = filter(None, map(str.strip, text.splitlines()))
        phrases = tuple(cell.strip() for line in lines for cell in line.split("|"))
        if not any(phrases):
            self.fail(key, "is empty")
        for phrase in phrases:
            try:
                list(Formatter().parse(phrase))
            except ValueError as exc:
                self.fail(key, f"{phrase!r}: {exc}")
        return phrases

    def _replies(self, key: str) -> list[Reply]:
        topic = self.text(f"{key}.topic") if f"{key}.topic" in self._values else ""
        answer = self.text(f"{key}.answer")
        return [Reply(phrase, answer, topic) for phrase in self.phrases(f"{key}.ask")]

    def fail(self, key: str, problem: str) -> NoReturn:
        """Raise a DataError about a key."""
        top = key.split(".")[0].split("[")[0]
        raise DataError(f"{self._files.get(top, 'data/*.toml')}: {key}: {problem}")

    def _get(self, key: str, kind: type, expected: str) -> Any:
        if key not in self._values:
            self.fail(key, f"is missing; expected {expected}")
        if not isinstance(self._values[key], kind):
            self.fail(key, f"expected {expected}")
        return self._values[key]

    def phrases(self, key: str) -> tuple[str, ...]:
        """Return a list of phrases."""
        return self._get(key, tuple, "phrases")

    def join(self, *keys: str) -> list[str]:
        """Return the phrases of several lists."""
        return [phrase for key in keys for phrase in self.phrases(key)]

    def text(self, key: str) -> str:
        """Return a single phrase."""
        phrases = self.phrases(key)
        if len(phrases) != 1:
            self.fail(key, f"expected one phrase, got {len(phrases)}")
        return phrases[0]

    def names(self, key: str) -> list[str]:
        """Return the keys of a table, in the order of the file."""
        return list(self._get(key, dict, "a table"))

    def row(self, key: str, columns: tuple[str, ...]) -> dict[str, str]:
        """Return the phrases of a row under the names of its columns."""
        cells = self.phrases(key)
        if len(cells) != len(columns):
            self.fail(key, f"expected {' | '.join(columns)}, got {len(cells)} of {len(columns)}")
        return dict(zip(columns, cells, strict=True))

    def replies(self, key: str) -> list[Reply]:
        """Return all phrases of an array of answers."""
        return self._get(key, list, "[[entries]] with answer and ask")

    def number(self, key: str) -> float:
        """Return a number."""
        return self._get(key, int | float, "a number")

    def fill(self, template: str, **words: object) -> str:
        """Replace the placeholders of a phrase."""
        try:
            return template.format(**words)
        except (KeyError, IndexError, AttributeError, ValueError):
            phrases = {k: v for k, v in self._values.items() if isinstance(v, tuple)}
            key = next((k for k, v in phrases.items() if template in v), "?")
            known = ", ".join(f"{{{name}}}" for name in words)
            self.fail(key, f"{template!r} has an unknown placeholder; known are {known}")
