"""Text that comes from others, fit for a terminal and a log."""

from __future__ import annotations


def printable_line(text: str) -> str:
    """Replace what a terminal would obey, line breaks included, with question marks."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else "?" for each in text)
