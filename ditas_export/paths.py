"""Paths as callers give them: every public entry takes a string where it takes a `Path`."""

from __future__ import annotations

from pathlib import Path

StrPath = str | Path
"""What a public function takes for a file or a folder; `Path(path)` is its first line.

Options convert theirs by their type hints, see `saved_records.py`.
"""
