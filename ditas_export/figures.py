"""Figures: ratios of energies in decibels, how sure a mean is, and figures in strict JSON."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def decibels(signal: float, noise: float) -> float:
    """Return 10 · log10(signal / noise), with a meaning for every 0 / 0.

    Infinity where nothing is lost, of nothing too; minus infinity where something is lost of
    nothing, or either is not finite.

    Args:
        signal: Σ reference².
        noise: Σ (output − reference)².
    """
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return -math.inf
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def finite_or_none(value: float) -> float | None:
    """Return a figure as strict JSON takes it, of 6 digits; None if infinite or not a number."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def confidence_interval(values: Sequence[float], *, strata: int = 1) -> tuple[float, float]:
    """Return the 95 % interval of a mean, by Student's t.

    Infinitely wide below two values of a stratum, and where one is not finite.

    Args:
        values: of one stratum after the other, in rounds.
        strata: how many there are, such as the classes that every seed draws: what they differ by
            is not chance, and does not widen the interval.

    The quantile is the normal one with three terms of its Cornish-Fisher expansion (Abramowitz and
    Stegun, 26.7.5): 1 % short of the true one at three degrees of freedom, 0.1 % at seven.
    """
    freedom = len(values) - strata
    if freedom < 1 or not all(map(math.isfinite, values)):
        return -math.inf, math.inf
    rounds = [values[start::strata] for start in range(strata)]
    squares = sum((value - statistics.fmean(each)) ** 2 for each in rounds for value in each)
    mean, z = statistics.fmean(values), statistics.NormalDist().inv_cdf(0.975)
    quantile = (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )
    half = quantile * math.sqrt(squares / freedom / len(values))
    return mean - half, mean + half
