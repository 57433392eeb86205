"""Which rows pass through a model at once, and which of them are which rank's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ditas_export.distributed import Ranks
from ditas_export.errors import CalibrationError

ROWS_PER_BATCH = 16
"""Rows (state and guidance half) that pass through a linear at once, where they are short."""

TOKENS_PER_BATCH = 1024
"""Tokens that pass through a linear at once, long rows fewer at a time: what a wide linear makes of
them stays in the processor's cache, and is not asked of the system anew each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """Which rows are this rank's."""

    ranks: Ranks
    batches: list[tuple[int, slice]]  # number of the batch, rows of all ranks
    total: int  # rows of all ranks

    @classmethod
    def of(cls, rows: int, row_tokens: int, ranks: Ranks) -> Share:
        """Return this rank's share.

        Raises:
            CalibrationError: more ranks than batches.
        """
        return cls(ranks=ranks, batches=rank_batches(rows, row_tokens, ranks), total=rows)

    @property
    def rows(self) -> slice:
        """This rank's rows among those of all ranks."""
        return slice(self.batches[0][1].start, self.batches[-1][1].stop)

    def local_batches(self) -> Iterator[tuple[int, slice]]:
        """Yield the batches, their rows counted from this rank's first."""
        for number, rows in self.batches:
            yield number, slice(rows.start - self.rows.start, rows.stop - self.rows.start)


def row_batches(rows: int, row_tokens: int = 1) -> Iterator[slice]:
    """Yield slices that cover all rows, of at most 16 rows and, past one row, 1024 tokens."""
    size = max(1, min(ROWS_PER_BATCH, TOKENS_PER_BATCH // row_tokens))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def rank_batches(rows: int, row_tokens: int, ranks: Ranks) -> list[tuple[int, slice]]:
    """Return this rank's batches of rows with their numbers: neighbours, shared evenly.

    Raises:
        CalibrationError: more ranks than batches.
    """
    batches = list(enumerate(row_batches(rows, row_tokens)))
    if len(batches) < ranks.world_size:
        raise CalibrationError(
            f"{ranks.world_size} processes for {rows} rows of calibration states; "
            f"launch at most {len(batches)}, or give the walk more states (--walk-tokens, "
            f"--samples, --steps)"
        )
    first, last = (len(batches) * rank // ranks.world_size for rank in (ranks.rank, ranks.rank + 1))
    return batches[first:last]
