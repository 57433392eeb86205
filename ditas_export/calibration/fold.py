"""Folding: what ships has no smoothing left but the multiplications where nothing takes it.

Exact in real arithmetic. Computed in float64 and rounded once, to the float side's type, as the
last step; the fake-quantized forward and the ONNX file both read the rounded values.

Identities, for a group of linears whose input is divided by s (a family's table says where):
- modulate: x(1 + scale) + shift, divided by s: shift rows `W, b ← W/s, b/s`; scale rows `W ← W/s`,
  `b ← (b + 1)/s`. The 1 is in the bias, and x is multiplied by what comes out: in halves, 1 and a
  small (1 + scale)/s − 1 would lose its digits. Of integer rows the scales are divided, and the
  codes stay. A modulation with no s takes its 1 the same way.
- a block's own table beside a vector that all blocks share: the same of the table's rows, and the
  block multiplies the vector by 1/s in them.
- an affine norm: weight and bias `/ s`.
- rows of a linear whose output the input is linear in, as softmax(q kᵀ) v is in v: V's rows (bias,
  and the row scale that the low-rank output factor shares) `/ s`.

Halves hold no row scale below 2⁻¹⁴. A row below it takes that scale and is rounded anew: one row
that is nearly dead costs no other row a digit. Rows that fall below it through the s of what reads
them alone keep their digits: a power of two goes from s into the reader's row scales, as far as
those allow it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ditas_export.calibration.quantized_model import QuantizedLinear, QuantizedModel
from ditas_export.families.base import (
    Block,
    Group,
    ModelConfig,
    Modulation,
    Multiply,
    Norm,
    Rows,
    Table,
)
from ditas_export.families.identity import ModelIdentity
from ditas_export.families.registry import family_of, linear_names
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
class FoldedModel:
    """A quantized model whose smoothing is folded; every float in the float side's type."""

    identity: ModelIdentity  # of the float model that it was made from
    dtype: torch.dtype
    float_parameters: Mapping[str, Tensor]  # checkpoint name -> tensor; adaLN folded, dequantized
    adaln: Mapping[str, WeightOnlyWeight]  # module path -> integers; empty where float
    linears: Mapping[str, FoldedLinear]  # module path -> linear, in walk order
    activation_bits: int
    settings: Mapping[str, Any]

    @property
    def config(self) -> ModelConfig:
        """What the model computes beside its tensors."""
        return self.identity.config

    @property
    def adaln_bits(self) -> int:
        """Bits of the modulation weights: 8, 4, or 16 where they are float."""
        return next((weight.bits for weight in self.adaln.values()), 16)


def fold_smoothing(quantized: QuantizedModel, *, dtype: torch.dtype = torch.float32) -> FoldedModel:
    """Return the model with s folded away, exact but for one rounding to `dtype`.

    Args:
        quantized: left untouched.
        dtype: float type of what ships (float64 for proofs).

    Raises:
        QuantizationError: a folded value, or an input that calibration saw, is beyond `dtype`;
            names tensor, value and the remedy.
    """
    family = family_of(quantized.config)
    parameters = dict(quantized.float_parameters)
    modulations = {
        name: plain_modulation(quantized, name) for name in family.modulations(quantized.config)
    }
    folded: dict[str, FoldedLinear] = {}
    for block in family.blocks(quantized.config):
        exact = fold_block(quantized, block, dtype)
        modulations |= exact.modulations
        parameters |= exact.parameters
        for name, linear in exact.linears.items():
            folded[name] = _round_linear(name, linear, exact.multipliers.get(name), dtype)
    adaln: dict[str, WeightOnlyWeight] = {}
    for name, modulation in modulations.items():
        parameters[f"{name}.bias"] = modulation.bias
        if name in quantized.adaln:
            adaln[name] = divide_rows(
                quantized.adaln[name], modulation.divisor, dtype, name=f"{name}'s scales"
            )
            parameters[f"{name}.weight"] = adaln[name].dequantize()
        else:
            weight = parameters[f"{name}.weight"].double()
            parameters[f"{name}.weight"] = weight / modulation.divisor[:, None]
    return FoldedModel(
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
class ExactModulation:
    """A folded modulation linear, in float64."""

    divisor: Tensor  # (N,) of its rows
    bias: Tensor  # (N,), every scale's 1 in it


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExactBlock:
    """A block whose smoothing is folded, in float64: nothing is rounded yet."""

    linears: Mapping[str, QuantizedLinear]  # module path -> linear, whose s is folded
    multipliers: Mapping[str, Tensor]  # module path -> what its input is multiplied by, (K,)
    modulations: Mapping[str, ExactModulation]  # module path -> what takes smoothing
    parameters: Mapping[str, Tensor]  # name -> tables and their multipliers, norms


def plain_modulation(quantized: QuantizedModel, name: str) -> ExactModulation:
    """Return a modulation linear as it ships without smoothing: the 1 of its scales in its bias."""
    bias = quantized.float_parameters[f"{name}.bias"].to(torch.float64, copy=True)
    for rows in family_of(quantized.config).modulations(quantized.config)[name]:
        bias[rows] += 1
    return ExactModulation(divisor=torch.ones_like(bias), bias=bias)


def fold_block(quantized: QuantizedModel, block: Block, dtype: torch.dtype) -> ExactBlock:
    """Fold the smoothing of one block, exactly.

    Args:
        quantized: left untouched.
        block: of its family's.
        dtype: float type of what ships: what halves cannot hold goes elsewhere, as exactly.
    """
    linears = {name: _in_float64(quantized.linears[name]) for name in block.linears}
    for group in block.groups():
        _spare_rows(linears, block, group, dtype)
    multipliers: dict[str, Tensor] = {}
    plain: dict[str, ExactModulation] = {}
    parameters: dict[str, Tensor] = {}
    for group in block.groups():
        readers = [block.name(path) for path in group.linears]
        whole = linears[readers[0]].smoothing_scale
        for fold in group.folds:
            s = whole[fold.channels]
            match fold:
                case Rows():
                    name = block.name(fold.linear)
                    linears[name] = _divide_rows(linears[name], fold.rows, s)
                case Modulation():
                    name = block.name(fold.linear)
                    if name not in plain:
                        plain[name] = plain_modulation(quantized, name)
                    divisor = plain[name].divisor
                    divisor[fold.shift] = divisor[fold.scale] = s
                case Table():
                    _fold_into_table(quantized, block, fold, s, parameters)
                case Norm():
                    parameters |= _divided_norm(quantized, block.name(fold.norm), s)
                case Multiply():
                    multiplier = torch.ones_like(whole)
                    multiplier[fold.channels] = s.reciprocal()
                    multipliers |= dict.fromkeys(readers, multiplier)
    return ExactBlock(
        linears=linears,
        multipliers=multipliers,
        modulations={
            name: replace(modulation, bias=modulation.bias / modulation.divisor)
            for name, modulation in plain.items()
        },
        parameters=parameters,
    )


def _fold_into_table(
    quantized: QuantizedModel, block: Block, fold: Table, s: Tensor, parameters: dict[str, Tensor]
) -> None:
    """Divide two rows of a table, the scale's 1 in it, and those of its multiplier, in place."""
    name, multiplier = block.name(fold.table), block.name(fold.multiplier)
    if name not in parameters:
        parameters[name] = quantized.float_parameters[name].to(torch.float64, copy=True)
        parameters[multiplier] = torch.ones_like(parameters[name])
    parameters[name][fold.scale] += 1
    for row in (fold.scale, fold.shift):
        parameters[name][row] /= s
        parameters[multiplier][row] = s.reciprocal()


def _divided_norm(quantized: QuantizedModel, name: str, s: Tensor) -> dict[str, Tensor]:
    """Return a norm's parameters divided by s, by name."""
    parts = (f"{name}.weight", f"{name}.bias")
    known = quantized.float_parameters
    return {part: known[part].double() / s for part in parts if part in known}


def require_representable(
    config: ModelConfig, parameters: Mapping[str, Tensor], dtype: torch.dtype
) -> None:
    """Refuse a float model whose unfolded parameters a float type does not hold.

    Folding changes quantized linears, tables, norms, and the rows of modulations that take
    smoothing; the rest is known beforehand.

    Raises:
        QuantizationError: names tensor, value and the remedy.
    """
    family = family_of(config)
    taken = {f"{name}.{part}" for name in linear_names(config) for part in ("weight", "bias")}
    folded: dict[str, Tensor] = {}  # name of a parameter -> rows that folding leaves
    for block in family.blocks(config):
        for fold in (fold for group in block.groups() for fold in group.folds):
            if isinstance(fold, Table):
                taken.add(block.name(fold.table))
            elif isinstance(fold, Norm):
                taken |= {f"{block.name(fold.norm)}.{part}" for part in ("weight", "bias")}
            elif isinstance(fold, Modulation):
                name = block.name(fold.linear)
                for part in (f"{name}.weight", f"{name}.bias"):
                    left = torch.ones(len(parameters[part]), dtype=torch.bool)
                    left = folded.setdefault(part, left)
                    left[fold.scale] = left[fold.shift] = False
    for name, tensor in parameters.items():
        if name not in taken:
            rounded_float(name, tensor[folded[name]] if name in folded else tensor, dtype)


def _in_float64(linear: QuantizedLinear) -> QuantizedLinear:
    """Return the linear with every float that folding touches in float64."""
    return replace(
        linear,
        weight=linear.weight.to(torch.float64),
        bias=linear.bias.double(),
        smoothing_scale=linear.smoothing_scale.double(),
    )


def _spare_rows(
    linears: dict[str, QuantizedLinear], block: Block, group: Group, dtype: torch.dtype
) -> None:
    """Move a power of two from a group's s into its row scales where folded rows need it, in place.

    The row scales of what s folds into are divided by it. Those that fall below what the type holds
    by that alone are brought back, as far as no row scale of the group falls below it for that, and
    nothing that is folded into grows beyond LARGEST_MOVED. W · s and x / s change by the same
    power: the function is the same.
    """
    least = LEAST_ROW_SCALE.get(dtype, 0.0)
    readers = [block.name(path) for path in group.linears]
    whole = linears[readers[0]].smoothing_scale
    lowest: list[float] = []
    grows: list[Tensor] = [linears[name].step_ranges.double() for name in readers]
    for fold in group.folds:
        if isinstance(fold, Rows):
            made, s = linears[block.name(fold.linear)], whole[fold.channels]
            values = made.weight.row_scale[fold.rows]
            integers = joined_rows(made.weight, made.low_rank)[fold.rows].abs().amax(dim=1)
            lowest += (values / s)[(values >= least) & (integers > 0)].tolist()
            grows += [integers * values / s, made.bias[fold.rows] / s]
    if not lowest or min(lowest) >= least:
        return
    own = torch.cat([linears[name].weight.row_scale for name in readers])
    room = [
        LARGEST_MOVED / float(torch.cat(grows).abs().amax()),
        *(own[own >= least] / least).tolist(),
    ]
    wanted = math.ceil(math.log2(least / min(lowest)))
    power = 2.0 ** max(0, min(wanted, math.floor(math.log2(min(room)))))
    for name in readers:
        linear = linears[name]
        linears[name] = replace(
            linear,
            weight=replace(linear.weight, row_scale=linear.weight.row_scale / power),
            smoothing_scale=linear.smoothing_scale / power,
            step_ranges=linear.step_ranges * power,
        )


def _divide_rows(linear: QuantizedLinear, rows: slice, s: Tensor) -> QuantizedLinear:
    """Return a linear with some rows divided by s; the codes stay as they are."""
    divisor = torch.ones_like(linear.weight.row_scale)
    divisor[rows] = s
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
