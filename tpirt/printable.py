"""Text that comes from others, fit for a terminal and a log."""

from __future__ import annotations

# C0 except newline and tab, DEL, C1: a terminal obeys these instead of showing them.
_CONTROLS = dict.fromkeys({*range(0x20), *range(0x7F, 0xA0)} - {ord("\n"), ord("\t")})


def printable(text: str) -> str:
    """Drop all control characters that a terminal would obey."""
    return text.translate(_CONTROLS)


def printable_line(text: str) -> str:
    """Replace what a terminal would obey, line breaks included, with question marks."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else "?" for each in text)
