"""A list of images by label and seed, one a line: what `ditas-sample --list` reads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ditas_export.errors import RunnerError
from ditas_export.text_files import TextError, read_text

LARGEST_SEED = 2**63 - 1

_NUMBER = re.compile(r"[0-9]{1,20}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedImages:
    """One label and one seed per image."""

    labels: tuple[int, ...]
    seeds: tuple[int, ...]


def read_wanted(path: Path) -> WantedImages:
    """Read a list of images.

    A line is `LABEL SEED`, two whole numbers with white space or a comma between; the seed may be
    left out and is 0 then. Empty lines, and what follows a #, are left out.

    Raises:
        RunnerError: no readable text, a line of another form (with its number), or no image.
    """
    try:
        lines = read_text(path).splitlines()
    except (OSError, TextError) as error:
        raise RunnerError(f"cannot read {path}: {error}; expected lines of LABEL SEED") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        words = line.partition("#")[0].replace(",", " ").split()
        if not words:
            continue
        if len(words) > 2 or not all(map(_NUMBER.fullmatch, words)):
            raise RunnerError(
                f"{path}, line {number}: {line.strip()[:40]!r}; expected LABEL SEED, such as 3 17"
            )
        label, seed = int(words[0]), int(words[1]) if len(words) == 2 else 0
        if max(label, seed) > LARGEST_SEED:
            raise RunnerError(f"{path}, line {number}: a number beyond {LARGEST_SEED}")
        pairs.append((label, seed))
    if not pairs:
        raise RunnerError(f"{path} names no image; expected lines of LABEL SEED, such as 3 17")
    labels, seeds = zip(*pairs, strict=True)
    return WantedImages(labels=labels, seeds=seeds)
