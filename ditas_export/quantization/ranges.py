"""INT8 activations: the range of a tensor, its codes, and back.

Two forms ship. `token`: every token is divided by its own largest magnitude, so the quantizer's
scale is the constant 1/127 and the result is multiplied by the range again. `static`: one constant
range per linear. Both are symmetric: no runtime has a kernel for zero points.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Ranges = Literal["token", "static"]

MAX_CODE = 127
RANGE_FLOOR = 2.0**-14
"""Smallest range: the smallest normal half, the same in every float type and runtime."""


def token_ranges(x: Tensor) -> Tensor:
    """Return each token's range max(max|x|, 2⁻¹⁴): (…, K) -> (…, 1)."""
    return x.abs().amax(dim=-1, keepdim=True).clamp(min=RANGE_FLOOR)


def unit_scale(dtype: torch.dtype) -> Tensor:
    """Return the constant scale 1/127 of a normalised activation, a scalar in `dtype`."""
    return torch.tensor(1.0 / MAX_CODE, dtype=torch.float64).to(dtype)


def static_scale(static_range: float, dtype: torch.dtype) -> Tensor:
    """Return the scale of a constant range, max(range, 2⁻¹⁴) / 127, a scalar in `dtype`.

    In half precision the scale never falls below 2⁻¹⁴ itself, its smallest normal number.
    """
    scale = max(static_range, RANGE_FLOOR) / MAX_CODE
    if dtype == torch.float16:
        scale = max(scale, RANGE_FLOOR)
    return torch.tensor(scale, dtype=torch.float64).to(dtype)


def quantize(x: Tensor, scale: Tensor) -> Tensor:
    """Return clamp(round(x / scale), −128, 127), ties to even, as x's float type (ONNX rule)."""
    codes: Tensor = (x / scale).round_()
    return codes.clamp_(-MAX_CODE - 1, MAX_CODE)


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of x in each token's own range, as x's float type, and the ranges (…, 1)."""
    ranges = token_ranges(x)
    return quantize(x / ranges, unit_scale(x.dtype).to(x.device)), ranges


def activation_codes(x: Tensor, *, ranges: Ranges, static_range: float) -> tuple[Tensor, Tensor]:
    """Return the codes of x, as x's float type, and the steps that they count: x ≈ codes · steps.

    Args:
        x: (…, K).
        ranges: the form that ships.
        static_range: the constant range of `static`.

    Returns:
        codes (…, K) and steps, (…, 1) or a scalar.
    """
    if ranges == "token":
        codes, own = token_codes(x)
        return codes, own * unit_scale(x.dtype).to(x.device)
    scale = static_scale(static_range, x.dtype).to(x.device)
    return quantize(x, scale), scale


def fake_quantize_tensor_asymmetric(x: Tensor, *, bits: int = 8) -> Tensor:
    """Return x rounded on one dynamic asymmetric range per tensor (paper, eq. 3).

    For comparison in PyTorch only: no runtime has a kernel for it.
    """
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(x.dtype).tiny)
    zero_point = (-low / scale).round()
    codes = ((x / scale).round() + zero_point).clamp(0, 2**bits - 1)
    rounded: Tensor = (codes - zero_point) * scale
    return rounded
