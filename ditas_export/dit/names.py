"""The words of a name, however it is written."""

from __future__ import annotations

import re

_BETWEEN = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[^A-Za-z0-9]+")


def words_of(name: str) -> list[str]:
    """Return the words of a snake_case, dotted or CamelCase name, in lower case."""
    return [word.lower() for word in _BETWEEN.split(name) if word]
