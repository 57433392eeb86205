"""Which grid a position table is for: its length does not tell, its values may."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ditas_export.dit.model import sincos_table
from ditas_export.errors import CheckpointError

_MATCH = 0.1
"""Distance, relative to the table's norm, below which a table is taken for a sin-cos one.

Rounding to 8 bits makes 0.03; tables of two grids of 4 patches are 0.16 apart, longer ones 0.25 and
more.
"""


def square_side(table: Tensor, *, where: str) -> tuple[int, bool]:
    """Return the side of the square grid that a position table is for, in patches.

    Args:
        table: (1, T, D), any float type.
        where: the file, for messages.

    Returns:
        The side; and whether the table is the published sin-cos one, rather than a learned one,
        which is taken for a square's because nothing says otherwise.

    Raises:
        CheckpointError: no table, a length that is no square, or the sin-cos table of another grid.
    """
    if table.ndim != 3 or not table.numel() or not table.is_floating_point():
        raise CheckpointError(
            f"{where}: pos_embed is {tuple(table.shape)}; expected a table of (1, tokens, width)"
        )
    tokens, width = table.shape[1:]
    side = math.isqrt(tokens)
    values = table[0].double()
    if width % 4 == 0 and _is_near(values, sincos_table(width, side, side)):
        return side, True
    for rows, columns, other in _other_grids(width, tokens):
        if _is_near(values, other):
            raise CheckpointError(
                f"{where}: pos_embed is that of a grid of {rows} x {columns} patches; a grid that "
                f"is not square is not followed (yet)"
            )
    if side**2 != tokens:
        raise CheckpointError(
            f"{where}: pos_embed has {tokens} tokens, which make no square; a grid that is not "
            f"square is not followed (yet)"
        )
    return side, False


def _other_grids(width: int, tokens: int) -> Iterator[tuple[int, int, Tensor]]:
    """Yield every grid of a length that is no square: rows, columns, sin-cos table.

    Twice each: with the column encoded first, as published, and with the row.
    """
    for rows in range(1, tokens + 1 if width % 4 == 0 else 1):
        columns = tokens // rows
        if rows * columns == tokens and rows != columns:
            table = sincos_table(width, rows, columns)
            yield rows, columns, table
            yield rows, columns, torch.cat(table.chunk(2, dim=1)[::-1], dim=1)


def _is_near(table: Tensor, other: Tensor) -> bool:
    """Return whether two tables are one but for rounding."""
    if table.shape != other.shape:
        return False
    return bool((table - other).norm() < _MATCH * other.norm())
