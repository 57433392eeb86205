"""Which noise schedule a table of betas is: what diffusion wrappers keep beside the network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ditas_export.dit.facts import Fact
from ditas_export.dit.process import BetaSchedule
from ditas_export.errors import CheckpointError

_TOLERANCE = 1e-4
"""Relative; float32 tables are closer by far, another schedule nowhere near."""


def facts_of_betas(betas: Tensor, *, name: str, where: str) -> dict[str, Fact]:
    """Return the schedule that a table is.

    Args:
        betas: (T,), any float type, from the cleanest step to the noisiest.
        name: of the table.
        where: the file, for messages.

    Raises:
        CheckpointError: it is none that is followed.
    """
    found = betas.double()
    for schedule, ends, table in _tables(found):
        if table.shape == found.shape and torch.allclose(table, found, rtol=_TOLERANCE, atol=0.0):
            values: Mapping[str, object] = {
                "beta_schedule": schedule,
                "train_timesteps": len(found),
                **ends,
            }
            return {field: Fact(value, name) for field, value in values.items()}
    raise CheckpointError(
        f"{where}: {name} holds {len(found)} betas from {float(found[0]):g} to "
        f"{float(found[-1]):g}, a noise schedule that is not followed (yet); expected linear, "
        f"scaled_linear or squaredcos_cap_v2"
    )


def _tables(found: Tensor) -> Iterator[tuple[BetaSchedule, Mapping[str, float], Tensor]]:
    """Yield the schedules of a table's length and ends: name, ends, float64 betas."""
    count = len(found)
    # float32 tables: as many digits as people write
    start, end = (float(f"{float(beta):.6g}") for beta in (found[0], found[-1]))
    ends = {"beta_start": start, "beta_end": end}
    line = torch.linspace(0, 1, count, dtype=torch.float64)
    if 0 < start <= end < 1:
        yield "linear", ends, start + (end - start) * line
        roots = math.sqrt(start) + (math.sqrt(end) - math.sqrt(start)) * line
        yield "scaled_linear", ends, roots.square()
    phase = torch.arange(count + 1, dtype=torch.float64) / count
    kept = torch.cos((phase + 0.008) / 1.008 * math.pi / 2).square()
    yield "squaredcos_cap_v2", {}, (1 - kept[1:] / kept[:-1]).clamp(max=0.999)
