"""The named recipes, from plain rounding to `ditas-plus`: which levers each pulls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ditas_export.errors import CalibrationError

Smoothing = Literal["none", "one-step", "temporal"]
LowRankFit = Literal["none", "weight-error", "output-error"]

ALPHA_GRID = tuple(step / 20 for step in range(21))
"""α ∈ {0, 0.05, …, 1} (DiTAS, Algorithm 1)."""

FIXED_ALPHA = 0.5
"""α without a search (DiTAS, section 3.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A recipe: which levers it pulls."""

    name: str
    summary: str
    smoothing: Smoothing = "none"
    alpha_search: bool = False
    compensated_rounding: bool = False
    target_correction: bool = False
    low_rank: LowRankFit = "none"


METHODS = {
    method.name: method
    for method in (
        Method(name="linear", summary="plain rounding to the nearest code"),
        Method(
            name="smoothquant",
            summary="smoothing from the statistics of one time step, α = 0.5",
            smoothing="one-step",
        ),
        Method(
            name="tas",
            summary="temporal-aggregated smoothing, α = 0.5 (DiTAS, eq. 4)",
            smoothing="temporal",
        ),
        Method(
            name="tas-search",
            summary="TAS with α searched per linear (DiTAS, Algorithm 1)",
            smoothing="temporal",
            alpha_search=True,
        ),
        Method(
            name="ditas",
            summary="the published recipe: TAS, α search, LoRA-AO on the weight error (eq. 10)",
            smoothing="temporal",
            alpha_search=True,
            low_rank="weight-error",
        ),
        Method(
            name="ditas-plus",
            summary="TAS, α search, compensated rounding, two-stream target correction, "
            "low rank on the output error",
            smoothing="temporal",
            alpha_search=True,
            compensated_rounding=True,
            target_correction=True,
            low_rank="output-error",
        ),
    )
}


def method_named(name: str) -> Method:
    """Return the recipe `name`; CalibrationError lists the names there are."""
    try:
        return METHODS[name]
    except KeyError:
        raise CalibrationError(f"no method {name!r}; pick one of {', '.join(METHODS)}") from None
