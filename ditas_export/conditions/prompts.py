"""Prompts as texts: a file of lines, or those that come with the package. Imports nothing heavy."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from ditas_export.errors import ArtifactError
from ditas_export.saved_records import shown
from ditas_export.text_files import TextError, read_text

MOST_PROMPTS = 100_000
LONGEST_PROMPT = 4096
"""Characters."""

_LARGEST_FILE = 64 * 2**20
"""Bytes."""


def shipped_prompts() -> tuple[str, ...]:
    """Return the 32 prompts of the package: its own words, varied subjects, short and long."""
    folder = importlib.resources.files("ditas_export.conditions")
    return _lines((folder / "prompts.txt").read_text(encoding="utf-8"))


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a file: a line each; empty lines and those that begin with # are none.

    Raises:
        ArtifactError: no such file, no UTF-8 text, no prompt at all, or too many or too long ones.
    """
    try:
        prompts = _lines(read_text(path, most=_LARGEST_FILE))
    except (OSError, TextError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ArtifactError(f"{path} is no readable file of prompts: {reason}") from error
    if not prompts:
        raise ArtifactError(f"{path} has no prompt; write one on each line")
    if len(prompts) > MOST_PROMPTS:
        raise ArtifactError(
            f"{path} has {len(prompts):,} prompts, expected {MOST_PROMPTS:,} at most; split it"
        )
    for prompt in prompts:
        if len(prompt) > LONGEST_PROMPT:
            raise ArtifactError(
                f"{path} has a prompt of {len(prompt):,} characters ({shown(prompt)}), expected "
                f"{LONGEST_PROMPT:,} at most; shorten it"
            )
    return prompts


def _lines(text: str) -> tuple[str, ...]:
    """Return the prompts of a text."""
    lines = (line.strip() for line in text.splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))
