"""Weight-only integers: one float scale per block, or per output channel; float activations.

For linears whose inputs stay float (the modulation linears, and every block linear without
activation bits): `W ≈ codes · scale`, codes along blocks of input channels.
Shapes: N output channels, K input channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ditas_export.errors import QuantizationError
from ditas_export.quantization.integer import (
    IntegerWeight,
    max_code,
    require_integers,
    require_scales,
    rounded_float,
)

BLOCK_SIZES = (128, 64, 32)
"""Block sizes of 4-bit weight-only kernels, the largest first."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WeightOnlyWeight:
    """A weight (N, K) as `codes · scale`, each scale spanning a block of input channels."""

    codes: Tensor  # (N, K) int8; |codes| <= 7 for 4 bits, <= 127 for 8
    scale: Tensor  # (N, K / block_size) float, finite, > 0; one column for 8 bits
    bits: int

    def __post_init__(self) -> None:
        """Check the shapes and ranges that the exporter relies on."""
        if self.bits not in (4, 8):
            raise QuantizationError(f"weight bits are 4 or 8, not {self.bits}")
        codes, scale = tuple(self.codes.shape), tuple(self.scale.shape)
        fits = len(codes) == len(scale) == 2 and scale[0] == codes[0] and scale[1] > 0
        if not fits or codes[1] % scale[1]:
            raise QuantizationError(f"codes {codes} and scale {scale} do not fit together")
        require_integers("codes", self.codes, low=-max_code(self.bits), high=max_code(self.bits))
        require_scales("weight-only scales", self.scale)

    @property
    def block_size(self) -> int:
        """Input channels that share one scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def dequantize(self) -> Tensor:
        """Return the weight, (N, K), in the scale's float type."""
        scale = self.scale.repeat_interleave(self.block_size, dim=1)
        return self.codes.to(self.scale.dtype) * scale


def from_integer_weight(weight: IntegerWeight) -> WeightOnlyWeight:
    """Return a two-level weight with its two scales multiplied: one float scale per block."""
    scale = weight.multipliers.to(weight.row_scale.dtype) * weight.row_scale[:, None]
    return WeightOnlyWeight(codes=weight.codes, scale=scale, bits=weight.bits)


def widest_block(in_features: int) -> int:
    """Return the largest block size, of 128, 64 and 32, that divides a width.

    Raises:
        QuantizationError: none of them does.
    """
    for size in BLOCK_SIZES:
        if in_features % size == 0:
            return size
    raise QuantizationError(
        f"no block size of {', '.join(map(str, BLOCK_SIZES))} divides in_features={in_features}; "
        f"use 8 bits or keep the weight in float"
    )


def divide_rows(
    weight: WeightOnlyWeight, divisor: Tensor, dtype: torch.dtype, *, name: str
) -> WeightOnlyWeight:
    """Return the weight with row n over divisor[n], its scales rounded to a float type.

    The codes stay as they are: a scale rounded to 8 significant bits or more moves a code of 127 by
    less than half. Only where a scale falls below the type's smallest normal number is it that
    number, and the block is rounded anew to it.

    Args:
        weight: left untouched.
        divisor: (N,) float64, > 0.
        dtype: float type of the scales that ship.
        name: what an error calls the scales.

    Raises:
        QuantizationError: a scale overflows `dtype`, see `rounded_float`.
    """
    exact = weight.scale.double() / divisor[:, None]
    scale = rounded_float(name, exact.clamp(min=torch.finfo(dtype).tiny), dtype)
    ratio = (exact / scale.double()).repeat_interleave(weight.block_size, dim=1)
    return WeightOnlyWeight(
        codes=(weight.codes * ratio).round().to(torch.int8), scale=scale, bits=weight.bits
    )
