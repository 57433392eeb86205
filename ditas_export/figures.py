"""Figures: what a ratio of energies is in decibels, and how a figure stands in strict JSON."""

from __future__ import annotations

import math


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
