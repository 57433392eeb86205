"""How far apart two tensors are."""

from __future__ import annotations

import math

from torch import Tensor


def snr_db(reference: Tensor, output: Tensor) -> float:
    """Return 10 · log10(Σ reference² / Σ (output − reference)²) in dB; infinity if equal.

    Args:
        reference: any shape.
        output: the same shape.
    """
    signal = float((reference.double() ** 2).sum())
    noise = float(((output.double() - reference.double()) ** 2).sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
