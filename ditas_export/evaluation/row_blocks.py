"""Matrices of pairs, a block of rows at a time."""

from __future__ import annotations

from torch import Tensor

LARGEST_BLOCK = 2**25
"""Entries that are held at once: 256 MiB in float64."""


def row_blocks(left: Tensor, right: Tensor) -> list[slice]:
    """Return the rows of `left` in blocks of which every pair with a row of `right` may be held."""
    rows = max(1, LARGEST_BLOCK // len(right))
    return [slice(start, start + rows) for start in range(0, len(left), rows)]
