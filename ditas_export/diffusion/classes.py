"""Classes by name: from `3,7`, `0-9` or `random` to one label per image."""

from __future__ import annotations

import re

import torch

from ditas_export.errors import RunnerError
from ditas_export.families.base import Conditions
from ditas_export.options import LARGEST_SEED
from ditas_export.saved_records import shown

_NUMBER = re.compile(r"[0-9]{1,12}")

RANDOM_IMAGES = 8
"""Images of `random` where no number is asked for."""


def parse_classes(
    text: str, *, conditions: Conditions, count: int | None = None, seed: int
) -> tuple[int, ...]:
    """Return one class per image; a list that is too short starts over.

    Args:
        text: `3,7`, `0-9`, both mixed, or `random`: every class once, in random order.
        conditions: what there is to ask for: the model's classes, or the prompts of a file.
        count: images; as many as `text` names if None, 8 for `random`.
        seed: of the random order.

    Raises:
        RunnerError: no such form, a class that the model does not have, or no image at all.
    """
    if count is not None and count < 1:
        raise RunnerError(f"{count} images; ask for at least one")
    if text == "random":
        if not 0 <= seed <= LARGEST_SEED:
            raise RunnerError(f"seed={seed}; for random classes pick 0 to {LARGEST_SEED}")
        generator = torch.Generator().manual_seed(seed)
        named = torch.randperm(conditions.count, generator=generator).tolist()
        count = RANDOM_IMAGES if count is None else count
    else:
        named = _named_classes(text, conditions)
    return tuple(named[index % len(named)] for index in range(count or len(named)))


def _named_classes(text: str, conditions: Conditions) -> list[int]:
    """Return the classes of a list such as `3,7,10-12`, in its order."""
    named: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _NUMBER.fullmatch(first) or (dash and not _NUMBER.fullmatch(last)):
            raise RunnerError(f"classes={shown(text)}; write 3,7 or 0-9 or random")
        if int(last or first) >= conditions.count:  # before a range of any length is made
            raise RunnerError(
                f"classes={shown(text)} names {conditions.what} {int(last or first)}; "
                f"{conditions.source} has 0 to {conditions.count - 1}"
            )
        if int(last or first) < int(first):
            raise RunnerError(f"classes={shown(text)} names none by {part!r}; write ranges upwards")
        named.extend(range(int(first), int(last or first) + 1))
    return named
