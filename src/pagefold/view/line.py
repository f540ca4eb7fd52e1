"""Own the way of words that others chose (names of files and processes) to a terminal: one line, nothing but letters."""

from __future__ import annotations


def one_line(text: str) -> str:
    """Return the text with '?' for line ends, control characters, and bytes of a file name that are no letters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
