"""Text of others, such as names in a file or a runtime's refusal, as a terminal may show it."""

from __future__ import annotations

import unicodedata

HEAD, TAIL = 1000, 500
"""Characters that stay of a message that is longer than both: what was found, and what to do."""

_UNSAFE = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories of what moves the cursor, colours, turns the direction, or is no character."""


def one_line(text: str) -> str:
    """Return a message as one line of bounded length, all of it visible."""
    text = " ".join(text.split())
    if len(text) > HEAD + TAIL:
        left_out = len(text) - HEAD - TAIL
        text = f"{text[:HEAD]} … ({left_out} characters left out) … {text[-TAIL:]}"
    return visible(text)


def visible(text: str) -> str:
    """Return text whose control characters, but for the ends of lines, are written as escapes."""
    if text.isprintable():
        return text
    return "".join(
        character.encode("unicode_escape").decode()
        if unicodedata.category(character) in _UNSAFE and character != "\n"
        else character
        for character in text
    )
