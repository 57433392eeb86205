"""Paths as callers give them: every public entry takes a string where it takes a `Path`."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

StrPath = str | Path
"""What a public function takes for a file or a folder; `Path(path)` is its first line."""


def convert_path_fields(options: Any) -> None:
    """Make paths of the strings in a frozen dataclass's fields of paths; for `__post_init__`.

    A field that is a name and is given a path, such as a model's, becomes its string.
    """
    for field in fields(options):
        value = getattr(options, field.name)
        is_path = field.type in ("Path", "Path | None")
        if is_path and isinstance(value, str):
            object.__setattr__(options, field.name, Path(value))
        elif not is_path and isinstance(value, Path):
            object.__setattr__(options, field.name, str(value))
