"""Classes by name: from `3,7`, `0-9` or `random` to one label per image."""

from __future__ import annotations

import re

import torch

from ditas_export.errors import RunnerError
from ditas_export.options import LARGEST_SEED
from ditas_export.saved_records import shown

_NUMBER = re.compile(r"[0-9]{1,12}")

RANDOM_IMAGES = 8
"""Images of `random` where no number is asked for."""


def parse_classes(
    text: str, *, num_labels: int, count: int | None = None, seed: int
) -> tuple[int, ...]:
    """Return one class per image; a list that is too short starts over.

    Args:
        text: `3,7`, `0-9`, both mixed, or `random`: every class once, in random order.
        num_labels: `DiTConfig.num_labels` of the model: its classes, or 1 where it has none.
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
        named = torch.randperm(num_labels, generator=generator).tolist()
        count = RANDOM_IMAGES if count is None else count
    else:
        named = _named_classes(text, num_labels)
    return tuple(named[index % len(named)] for index in range(count or len(named)))


def _named_classes(text: str, num_labels: int) -> list[int]:
    """Return the classes of a list such as `3,7,10-12`, in its order."""
    named: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _NUMBER.fullmatch(first) or (dash and not _NUMBER.fullmatch(last)):
            raise RunnerError(f"classes={shown(text)}; write 3,7 or 0-9 or random")
        if int(last or first) >= num_labels:  # before a range of any length is made
            raise RunnerError(
                f"classes={shown(text)} names class {int(last or first)}; this model has 0 to "
                f"{num_labels - 1}"
            )
        if int(last or first) < int(first):
            raise RunnerError(f"classes={shown(text)} names none by {part!r}; write ranges upwards")
        named.extend(range(int(first), int(last or first) + 1))
    return named
