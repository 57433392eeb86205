"""Folding: what ships has no smoothing left but fc2's one multiplication.

Exact in real arithmetic. Computed in float64 and rounded once, to the float side's type, as the
last step; the fake-quantized forward and the ONNX file both read the rounded values.

Identities, for a linear whose input is divided by s (`dit/sites.py` says where each folds):
- modulate: x(1 + scale) + shift, divided by s: shift rows `W, b ← W/s, b/s`; scale rows `W ← W/s`,
  `b ← (b + 1 − s)/s`. Of integer rows the scales are divided, and the codes stay.
- V: softmax(q kᵀ) v is linear in v, so V's rows (bias, and the row scale that the low-rank output
  factor shares) `/ s`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ditas_export.calibration.quantized_dit import QuantizedDiT, QuantizedLinear
from ditas_export.dit.identity import ModelIdentity
from ditas_export.dit.model import DiTConfig
from ditas_export.dit.sites import (
    FINAL_ADALN,
    LINEAR_KINDS,
    adaln_name,
    adaln_rows,
    block_sites,
    value_rows,
)
from ditas_export.errors import QuantizationError
from ditas_export.quantization.integer import IntegerWeight, LowRank
from ditas_export.quantization.weight_only import WeightOnlyWeight, divide_rows

SMALLEST_HALF_SCALE = 2.0**-14
"""Row scales of a half-precision network stay normal numbers."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldedLinear:
    """A linear as it ships: `y = Q(x · input_multiplier) Wᵀ + bias`."""

    weight: IntegerWeight  # row_scale in the float side's type
    low_rank: LowRank | None
    bias: Tensor  # (N,) in the float side's type
    input_multiplier: Tensor | None  # (K,) in the float side's type: 1/s of fc2, else None
    static_range: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FoldedDiT:
    """A quantized DiT whose smoothing is folded; every float in the float side's type."""

    identity: ModelIdentity  # of the float model that it was made from
    dtype: torch.dtype
    float_parameters: Mapping[str, Tensor]  # checkpoint name -> tensor; adaLN folded, dequantized
    adaln: Mapping[str, WeightOnlyWeight]  # module path -> integers; empty where float
    linears: Mapping[str, FoldedLinear]  # module path -> linear, in walk order
    activation_bits: int
    settings: Mapping[str, Any]

    @property
    def config(self) -> DiTConfig:
        """What the model computes beside its tensors."""
        return self.identity.config

    @property
    def adaln_bits(self) -> int:
        """Bits of the modulation weights: 8, 4, or 16 where they are float."""
        return next((weight.bits for weight in self.adaln.values()), 16)


def fold_smoothing(quantized: QuantizedDiT, *, dtype: torch.dtype = torch.float32) -> FoldedDiT:
    """Return the model with s folded away, exact but for one rounding to `dtype`.

    Args:
        quantized: left untouched.
        dtype: float type of what ships (float64 for proofs).

    Raises:
        QuantizationError: a folded value overflows `dtype`.
    """
    parameters = dict(quantized.float_parameters)
    adaln: dict[str, WeightOnlyWeight] = {}
    divisors: dict[str, Tensor] = {}  # of the modulation's rows, by module path
    width = quantized.config.hidden_size
    folded: dict[str, FoldedLinear] = {}
    for block in range(quantized.config.depth):
        sites = {site.kind: site.name for site in block_sites(block)}
        qkv, proj, fc1, fc2 = (_in_float64(quantized.linears[sites[kind]]) for kind in LINEAR_KINDS)
        proj = _with_normal_row_scales(proj, dtype)
        qkv = _with_normal_row_scales(_divide_value_rows(qkv, proj.smoothing_scale, width), dtype)
        fc1, fc2 = (_with_normal_row_scales(linear, dtype) for linear in (fc1, fc2))
        name = adaln_name(block)
        divisors[name], parameters[f"{name}.bias"] = _folded_modulation(
            parameters[f"{name}.bias"], qkv, fc1, width
        )
        folded[sites["attn.qkv"]] = _round_linear(qkv, dtype)
        folded[sites["attn.proj"]] = _round_linear(proj, dtype)
        folded[sites["mlp.fc1"]] = _round_linear(fc1, dtype)
        folded[sites["mlp.fc2"]] = replace(
            _round_linear(fc2, dtype), input_multiplier=fc2.smoothing_scale.reciprocal().to(dtype)
        )
    final_bias = parameters[f"{FINAL_ADALN}.bias"]
    divisors[FINAL_ADALN] = torch.ones_like(final_bias, dtype=torch.float64)
    for name, divisor in divisors.items():
        if name in quantized.adaln:
            adaln[name] = divide_rows(quantized.adaln[name], divisor, dtype)
            parameters[f"{name}.weight"] = adaln[name].dequantize()
        else:
            weight = parameters[f"{name}.weight"].double() / divisor[:, None]
            parameters[f"{name}.weight"] = weight.to(dtype)
    rounded = {name: tensor.to(dtype) for name, tensor in parameters.items()}
    for name, tensor in rounded.items():
        if not tensor.isfinite().all():
            raise QuantizationError(f"{name} overflows {dtype} once folded; use precision fp32")
    return FoldedDiT(
        identity=quantized.identity,
        dtype=dtype,
        float_parameters=rounded,
        adaln=adaln,
        linears=folded,
        activation_bits=quantized.activation_bits,
        settings=quantized.settings,
    )


def _in_float64(linear: QuantizedLinear) -> QuantizedLinear:
    """Return the linear with every float that folding touches in float64."""
    return replace(
        linear,
        weight=linear.weight.to(torch.float64),
        bias=linear.bias.double(),
        smoothing_scale=linear.smoothing_scale.double(),
    )


def _with_normal_row_scales(linear: QuantizedLinear, dtype: torch.dtype) -> QuantizedLinear:
    """Return the linear with s scaled by a power of two so that halves hold its row scales.

    W · s and x / s change by the same power: the function is the same.
    """
    smallest = float(linear.weight.row_scale.amin())
    if dtype != torch.float16 or smallest >= SMALLEST_HALF_SCALE:
        return linear
    power = 2.0 ** math.ceil(math.log2(SMALLEST_HALF_SCALE / smallest))
    return replace(
        linear,
        weight=replace(linear.weight, row_scale=linear.weight.row_scale * power),
        smoothing_scale=linear.smoothing_scale * power,
        step_ranges=linear.step_ranges / power,
    )


def _folded_modulation(
    bias: Tensor, qkv: QuantizedLinear, fc1: QuantizedLinear, width: int
) -> tuple[Tensor, Tensor]:
    """Return what a block's modulation rows are divided by, and their bias then: (6D,) float64."""
    bias = bias.to(torch.float64, copy=True)
    divisor = torch.ones_like(bias)
    for branch, linear in (("msa", qkv), ("mlp", fc1)):
        s = linear.smoothing_scale
        shift, scale = (adaln_rows(f"{part}_{branch}", width) for part in ("shift", "scale"))
        divisor[shift] = divisor[scale] = s
        bias[scale] = bias[scale] + 1 - s
    return divisor, bias / divisor


def _divide_value_rows(linear: QuantizedLinear, s: Tensor, width: int) -> QuantizedLinear:
    """Return qkv with the rows that make V divided by proj's s; the codes stay as they are."""
    divisor = torch.ones_like(linear.weight.row_scale)
    divisor[value_rows(width)] = s
    return replace(
        linear,
        weight=replace(linear.weight, row_scale=linear.weight.row_scale / divisor),
        bias=linear.bias / divisor,
    )


def _round_linear(linear: QuantizedLinear, dtype: torch.dtype) -> FoldedLinear:
    """Round a linear's floats to `dtype`, the one rounding of folding."""
    row_scale = linear.weight.row_scale.to(dtype)
    if not row_scale.isfinite().all():
        raise QuantizationError(f"a row scale overflows {dtype}; use precision fp32")
    return FoldedLinear(
        weight=replace(linear.weight, row_scale=row_scale),
        low_rank=linear.low_rank,
        bias=linear.bias.to(dtype),
        input_multiplier=None,
        static_range=linear.static_range,
    )
