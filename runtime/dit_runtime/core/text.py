"""Text for a terminal, a log or an error: names that it holds may be anything, and anybody's."""

from __future__ import annotations

import re
from collections.abc import Iterable

LONGEST = 500  # characters of a message
LONGEST_LINE = 2000  # characters of a line of a table or a list
_LONG_WORD = re.compile(r"\S{161,}")  # a path or a name that leaves the rest of a message no room
_WORD = 80  # characters that are kept of such a word
_ESCAPED = 100_000  # characters that are looked at, so that a name of a gigabyte takes no time


def one_line(text: object, longest: int = LONGEST) -> str:
    """``str(text)`` on one line, without characters that a terminal would obey or not show.

    Control characters, line ends, escape sequences, marks of writing direction and lone surrogates are escaped as in
    Python's literals. A text of more than ``longest`` characters loses the middle of its longest words, which are
    paths and names, and then its own middle: what is wrong is said first, and what to do last.
    """
    line = printable(_cut(str(text), _ESCAPED).strip())
    if len(line) > longest:
        line = _LONG_WORD.sub(lambda word: _cut(word[0], _WORD), line)
    return _cut(line, longest)


def printable(text: str) -> str:
    """``text`` with every character escaped that is not printable, line ends and odd spaces too."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def join_lines(lines: Iterable[str]) -> str:
    """The lines of a text for a terminal: each is printable, stays one line whatever its names hold, and is bounded."""
    return "\n".join(_cut(printable(_cut(line, _ESCAPED)), LONGEST_LINE) for line in lines)


def _cut(text: str, longest: int) -> str:
    """At most ``longest`` characters: of a longer text the beginning and the end, with an ellipsis between them."""
    if len(text) <= longest:
        return text
    head = (longest - 1) * 3 // 5
    return f"{text[:head]}…{text[head + 1 - longest :]}"
