"""Temporal-aggregated smoothing (TAS): the scale s of `x Wᵀ = (x / s)(W · s)ᵀ`."""

from __future__ import annotations

import torch
from torch import Tensor

from ditas_export.errors import QuantizationError

SMALLEST_SCALE = 1e-4
"""s is clamped here, as in the published code: a channel that is always zero stays harmless."""


def smoothing_scale(input_max: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """Return s_c = a_c^α / b_c^(1−α), clamped at 1e-4.

    Args:
        input_max: a, (K,): largest |x_c| over time steps, samples and tokens; ≥ 0, finite.
        weight_max: b, (K,): largest |W_nc| over output channels; ≥ 0, finite.
        alpha: 0 (all difficulty stays in the activations) to 1 (all moves to the weights).

    Returns:
        (K,) in the inputs' type, finite and positive.

    Raises:
        QuantizationError: α outside [0, 1], or a maximum that is not finite.

    Source: DiTAS, eq. 4.
    """
    if not 0.0 <= alpha <= 1.0:
        raise QuantizationError(f"alpha={alpha} lies outside [0, 1]")
    if not (input_max.isfinite().all() and weight_max.isfinite().all()):
        raise QuantizationError("a channel maximum has NaN or infinity; check the checkpoint")
    smallest = torch.finfo(input_max.dtype).tiny
    return (input_max**alpha / weight_max.clamp(min=smallest) ** (1.0 - alpha)).clamp(
        min=SMALLEST_SCALE, max=1 / SMALLEST_SCALE
    )


def channel_maxima(weight: Tensor) -> Tensor:
    """Return b, the largest magnitude of each input channel: (N, K) -> (K,)."""
    return weight.abs().amax(dim=0)
