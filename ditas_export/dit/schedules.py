"""Which noise schedule a table is: what diffusion wrappers keep beside the network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ditas_export.dit.facts import Fact
from ditas_export.dit.record_parts import RecordPart, table_of
from ditas_export.errors import CheckpointError
from ditas_export.process import BetaSchedule

_TOLERANCE = 1e-4
"""Relative; float32 tables are closer by far, another schedule nowhere near."""

_FEWEST = 10
"""Numbers in the shortest table; an optimizer has two betas."""

_TABLES = ("betas", "alphas_cumprod")
"""Names of tables, the better one first."""


def tables_of_part(part: RecordPart) -> dict[str, Tensor]:
    """Return the table in a part of a checkpoint that tells its noise schedule, by name."""
    for name in _TABLES:
        table = table_of(part.entries.get(name))
        if table is not None and len(table) >= _FEWEST:
            return {name: table}
    return {}


def facts_of_table(table: Tensor, *, name: str, where: str) -> dict[str, Fact]:
    """Return the schedule that a table is.

    Args:
        table: (T,), any float type, from the cleanest step to the noisiest: betas, or where the
            name says so the products of all 1 - beta so far.
        name: of the table.
        where: the file, for messages.

    Raises:
        CheckpointError: it is none that is followed.
    """
    found = table.double()
    is_product = name.endswith("alphas_cumprod")
    for schedule, ends, betas in _candidates(found, is_product=is_product):
        expected = (1 - betas).cumprod(dim=0) if is_product else betas
        if torch.allclose(expected, found, rtol=_TOLERANCE, atol=0.0):
            values: Mapping[str, object] = {
                "beta_schedule": schedule,
                "train_timesteps": len(found),
                **ends,
            }
            return {field: Fact(value, name) for field, value in values.items()}
    raise CheckpointError(
        f"{where}: {name} holds {len(found)} {'products' if is_product else 'betas'} from "
        f"{float(found[0]):g} to {float(found[-1]):g}, a noise schedule that is not followed "
        f"(yet); expected linear, scaled_linear or squaredcos_cap_v2"
    )


def _candidates(
    found: Tensor, *, is_product: bool
) -> Iterator[tuple[BetaSchedule, Mapping[str, float], Tensor]]:
    """Yield the schedules that a table may be: name, ends, float64 betas."""
    ends = (1 - found[0], 1 - found[-1] / found[-2]) if is_product else (found[0], found[-1])
    first, last = map(float, ends)
    # float32 tables: as many digits as people write; what is left of them in products is unsure
    for digits in (2, 3, 4, 6) if is_product else (6,):
        yield from _schedules(len(found), float(f"{first:.{digits}g}"), float(f"{last:.{digits}g}"))


def _schedules(
    count: int, start: float, end: float
) -> Iterator[tuple[BetaSchedule, Mapping[str, float], Tensor]]:
    """Yield the schedules of a length and ends: name, ends, float64 betas."""
    ends = {"beta_start": start, "beta_end": end}
    line = torch.linspace(0, 1, count, dtype=torch.float64)
    if 0 < start <= end < 1:
        yield "linear", ends, start + (end - start) * line
        roots = math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * line
        yield "scaled_linear", ends, roots.square()
    phase = torch.arange(count + 1, dtype=torch.float64) / count
    kept = torch.cos((phase + 0.008) / 1.008 * math.pi / 2).square()
    yield "squaredcos_cap_v2", {}, (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
