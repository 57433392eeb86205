"""Folding: what ships has no smoothing left but fc2's one multiplication.

Exact in real arithmetic. Computed in float64 and rounded once, to the float side's type, as the
last step; the fake-quantized forward and the ONNX file both read the rounded values.

Identities, for a linear whose input is divided by s (`dit/sites.py` says where each folds):
- modulate: x(1 + scale) + shift, divided by s: shift rows `W, b ← W/s, b/s`; scale rows `W ← W/s`,
  `b ← (b + 1)/s`. The 1 is in the bias, and x is multiplied by what comes out: in halves, 1 and a
  small (1 + scale)/s − 1 would lose its digits. Of integer rows the scales are divided, and the
  codes stay. The last modulation, with no s, takes its 1 the same way.
- V: softmax(q kᵀ) v is linear in v, so V's rows (bias, and the row scale that the low-rank output
  factor shares) `/ s`.

Halves hold no row scale below 2⁻¹⁴. A row below it takes that scale and is rounded anew: one row
that is nearly dead costs no other row a digit. V rows that fall below it through proj's s alone
keep their digits: a power of two goes from s into proj's row scales, as far as those allow it.
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
from ditas_export.dit.model import DiT, DiTConfig
from ditas_export.dit.sites import (
    FINAL_ADALN,
    LINEAR_KINDS,
    adaln_name,
    adaln_rows,
    block_sites,
    final_scale_rows,
    value_rows,
)
from ditas_export.quantization.integer import IntegerWeight, LowRank, joined_rows, rounded_float
from ditas_export.quantization.ranges import RANGE_FLOOR
from ditas_export.quantization.weight_only import WeightOnlyWeight, divide_rows

LEAST_ROW_SCALE = {torch.float16: RANGE_FLOOR}
"""Row scales of a half-precision network stay normal numbers; other types hold all that occur."""


LARGEST_MOVED = 2.0**12
"""Bound of V's weights, bias and values where they take up a power of two: a half holds 16 times as
much, and a value may exceed what attention averages of it."""


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
        QuantizationError: a folded value, or an input that calibration saw, is beyond `dtype`;
            names tensor, value and the remedy.
    """
    parameters = dict(quantized.float_parameters)
    adaln: dict[str, WeightOnlyWeight] = {}
    divisors: dict[str, Tensor] = {}  # of the modulation's rows, by module path
    folded: dict[str, FoldedLinear] = {}
    for block in range(quantized.config.depth):
        exact, name = fold_block(quantized, block, dtype), adaln_name(block)
        divisors[name], parameters[f"{name}.bias"] = exact.divisor, exact.bias
        for site, linear in exact.linears.items():
            folded[site] = _round_linear(site, linear, exact.multipliers.get(site), dtype)
    final_bias = final_modulation(quantized)
    parameters[f"{FINAL_ADALN}.bias"] = final_bias
    divisors[FINAL_ADALN] = torch.ones_like(final_bias)
    for name, divisor in divisors.items():
        if name in quantized.adaln:
            adaln[name] = divide_rows(
                quantized.adaln[name], divisor, dtype, name=f"{name}'s scales"
            )
            parameters[f"{name}.weight"] = adaln[name].dequantize()
        else:
            parameters[f"{name}.weight"] = parameters[f"{name}.weight"].double() / divisor[:, None]
    return FoldedDiT(
        identity=quantized.identity,
        dtype=dtype,
        float_parameters={
            name: rounded_float(name, tensor, dtype) for name, tensor in parameters.items()
        },
        adaln=adaln,
        linears=folded,
        activation_bits=quantized.activation_bits,
        settings=quantized.settings,
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExactBlock:
    """A block whose smoothing is folded, in float64: nothing is rounded yet."""

    linears: Mapping[str, QuantizedLinear]  # module path -> linear, whose s is folded
    multipliers: Mapping[str, Tensor]  # module path -> what its input is multiplied by, (K,)
    divisor: Tensor  # (6D,) of the modulation's rows
    bias: Tensor  # (6D,) of the modulation


def fold_block(quantized: QuantizedDiT, block: int, dtype: torch.dtype) -> ExactBlock:
    """Fold the smoothing of one block, exactly.

    Args:
        quantized: left untouched.
        block: its index.
        dtype: float type of what ships: what halves cannot hold goes elsewhere, as exactly.
    """
    width, name = quantized.config.hidden_size, adaln_name(block)
    sites = {site.kind: site.name for site in block_sites(block)}
    qkv, proj, fc1, fc2 = (_in_float64(quantized.linears[sites[kind]]) for kind in LINEAR_KINDS)
    proj = _sparing_values(qkv, proj, width, dtype)
    qkv = _divide_value_rows(qkv, proj.smoothing_scale, width)
    bias = quantized.float_parameters[f"{name}.bias"]
    divisor, bias = _folded_modulation(bias, qkv, fc1, width)
    linears = zip(LINEAR_KINDS, (qkv, proj, fc1, fc2), strict=True)
    return ExactBlock(
        linears={sites[kind]: linear for kind, linear in linears},
        multipliers={sites["mlp.fc2"]: fc2.smoothing_scale.reciprocal()},
        divisor=divisor,
        bias=bias,
    )


def final_modulation(quantized: QuantizedDiT) -> Tensor:
    """Return the last modulation's bias with the 1 of its scale, (2D,) float64."""
    bias = quantized.float_parameters[f"{FINAL_ADALN}.bias"].to(torch.float64, copy=True)
    bias[final_scale_rows(quantized.config.hidden_size)] += 1
    return bias


def require_representable(model: DiT, dtype: torch.dtype) -> None:
    """Refuse a float model whose unfolded parameters a float type does not hold.

    Folding changes block linears and the blocks' modulation, but for its gates; the rest is known
    beforehand.

    Raises:
        QuantizationError: names tensor, value and the remedy.
    """
    width = model.config.hidden_size
    for name, tensor in model.state_dict().items():
        if not name.startswith("blocks."):
            rounded_float(name, tensor, dtype)
        elif ".adaLN_modulation." in name:
            for gate in ("gate_msa", "gate_mlp"):
                rounded_float(name, tensor[adaln_rows(gate, width)], dtype)


def _in_float64(linear: QuantizedLinear) -> QuantizedLinear:
    """Return the linear with every float that folding touches in float64."""
    return replace(
        linear,
        weight=linear.weight.to(torch.float64),
        bias=linear.bias.double(),
        smoothing_scale=linear.smoothing_scale.double(),
    )


def _sparing_values(
    qkv: QuantizedLinear, proj: QuantizedLinear, width: int, dtype: torch.dtype
) -> QuantizedLinear:
    """Return proj with a power of two moved from s into its row scales, where V's rows need it.

    V's row scales are divided by s. Those that fall below what the type holds by that alone are
    brought back, as far as no row scale of proj falls below it for that, and nothing of V grows
    beyond LARGEST_MOVED. W · s and x / s change by the same power: the function is the same.
    """
    least, rows = LEAST_ROW_SCALE.get(dtype, 0.0), value_rows(width)
    own, values, s = proj.weight.row_scale, qkv.weight.row_scale[rows], proj.smoothing_scale
    integers = joined_rows(qkv.weight, qkv.low_rank)[rows].abs().amax(dim=1)
    lowest = (values / s)[(values >= least) & (integers > 0)].tolist()
    if not lowest or min(lowest) >= least:
        return proj
    grows = torch.cat([integers * values / s, qkv.bias[rows] / s, proj.step_ranges.double()])
    room = [LARGEST_MOVED / float(grows.abs().amax()), *(own[own >= least] / least).tolist()]
    wanted = math.ceil(math.log2(least / min(lowest)))
    power = 2.0 ** max(0, min(wanted, math.floor(math.log2(min(room)))))
    return replace(
        proj,
        weight=replace(proj.weight, row_scale=own / power),
        smoothing_scale=proj.smoothing_scale / power,
        step_ranges=proj.step_ranges * power,
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
        bias[scale] += 1
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


def _round_linear(
    name: str, linear: QuantizedLinear, multiplier: Tensor | None, dtype: torch.dtype
) -> FoldedLinear:
    """Round a linear's floats to `dtype`, the one rounding of folding."""
    weight, low_rank = linear.weight, linear.low_rank
    if dtype in LEAST_ROW_SCALE:
        weight, ratio = weight.with_least_scale(LEAST_ROW_SCALE[dtype])
        low_rank = None if low_rank is None else low_rank.with_rows_times(ratio)
    row_scale = rounded_float(f"{name}'s row scales", weight.row_scale, dtype)
    largest = joined_rows(weight, low_rank).abs().amax(dim=1) * weight.row_scale
    rounded_float(f"{name}'s weight", largest, dtype)
    range_of_input = torch.tensor(linear.static_range, dtype=torch.float64)
    rounded_float(f"{name}'s input range", range_of_input, dtype)
    return FoldedLinear(
        weight=replace(weight, row_scale=row_scale),
        low_rank=low_rank,
        bias=rounded_float(f"{name}'s bias", linear.bias, dtype),
        input_multiplier=None
        if multiplier is None
        else rounded_float(f"1 / s of {name}", multiplier, dtype),
        static_range=linear.static_range,
    )
