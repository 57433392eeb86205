"""What the forms of a quantized linear are made of: activations in codes, weights, factors, bias.

What the runtimes ask of all of them (`contract.py` checks it): the last DequantizeLinear of a
weight feeds its MatMul and nothing else, every MatMul of signed codes has an activation Q/DQ and
scales of its own, scales and zero points are constants, and INT4 feeds only a DequantizeLinear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch

from ditas_export.calibration.fold import FoldedLinear
from ditas_export.onnx_export.form import Layout
from ditas_export.onnx_export.subgraph import Subgraph
from ditas_export.quantization.integer import IntegerWeight
from ditas_export.quantization.ranges import RANGE_FLOOR, Ranges, static_scale, unit_scale


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Normalized:
    """An input as its quantizer takes it."""

    parts: Sequence[ir.Value]  # each over its token's range; static ranges are in the scale alone
    token: ir.Value | None  # the ranges, (…, 1); None where they are static
    scale: torch.Tensor  # of the quantizer, a scalar


def smoothed(
    places: Sequence[Subgraph], inputs: Sequence[ir.Value], linear: FoldedLinear
) -> Sequence[ir.Value]:
    """Write each part of an input times its part of 1/s, where the linear has that to do."""
    if linear.input_multiplier is None:
        return inputs
    multipliers = linear.input_multiplier.chunk(len(inputs))
    return [
        place.node("Mul", [x, place.constant("input_multiplier", multiplier)], name="Smooth")
        for place, x, multiplier in zip(places, inputs, multipliers, strict=True)
    ]


def normalized(
    graph: Subgraph,
    places: Sequence[Subgraph],
    inputs: Sequence[ir.Value],
    linear: FoldedLinear,
    ranges: Ranges,
) -> Normalized:
    """Write each part of an input over its token's range; static ranges leave it as it is."""
    dtype = linear.bias.dtype
    if ranges == "static":
        scale = static_scale(linear.static_range, dtype)
        return Normalized(parts=inputs, token=None, scale=scale)
    token = _token_ranges(graph, places, inputs, dtype)
    divided = [
        place.node("Div", [x, token], name="Normalize")
        for place, x in zip(places, inputs, strict=True)
    ]
    return Normalized(parts=divided, token=token, scale=unit_scale(dtype))


def _token_ranges(
    graph: Subgraph, places: Sequence[Subgraph], inputs: Sequence[ir.Value], dtype: torch.dtype
) -> ir.Value:
    """Write r = max(max x, −min x, 2⁻¹⁴) per token, (…, 1): no pass that writes |x|."""
    axis = graph.axes("last_axis", [-1])
    bounds = []
    for place, x in zip(places, inputs, strict=True):
        bounds.append(place.node("ReduceMax", [x, axis], keepdims=1))
        bounds.append(place.node("Neg", [place.node("ReduceMin", [x, axis], keepdims=1)]))
    floor = graph.scalar("range_floor", RANGE_FLOOR, dtype)
    return graph.node("Max", [*bounds, floor], name="Range")


def denormalized(graph: Subgraph, y: ir.Value, token: ir.Value | None) -> ir.Value:
    """Write y · r; y itself under static ranges."""
    return y if token is None else graph.node("Mul", [y, token], name="Denormalize")


def quantized_input(graph: Subgraph, x: ir.Value, scale: torch.Tensor, prefix: str) -> ir.Value:
    """Write Q/DQ of an activation with constants of its own: shared ones keep MatMuls unfused.

    The branch's, which has a prefix, states the axis, which is the default and without effect on
    one scale: so graph tools that merge equal nodes (onnxslim) leave the two apart.
    """
    quantizer = [
        graph.constant(f"{prefix}input_scale", scale),
        graph.constant(f"{prefix}input_zero_point", torch.zeros((), dtype=torch.int8)),
    ]
    apart = {"axis": 1} if prefix else {}
    codes = graph.node("QuantizeLinear", [x, *quantizer], name=f"{prefix}input_Quantize", **apart)
    return graph.node("DequantizeLinear", [codes, *quantizer], name=f"{prefix}input_Dequantize")


def integer_codes(graph: Subgraph, weight: IntegerWeight, layout: Layout) -> ir.Value:
    """Write the integers of a weight as INT8 [K, N]."""
    if layout == "int8":
        return graph.constant("int8_codes", weight.int8_rows().T)
    return int4_chain(graph, weight)


def int4_chain(graph: Subgraph, weight: IntegerWeight) -> ir.Value:
    """Write a weight as INT4 codes whose INT8 rows the runtime makes when it loads.

    `DQ(codes [N, K], multipliers in fp16) → Transpose → Q(ones)`, and a DequantizeLinear after it:
    the products codes · m are integers, exact in fp16, and the quantizer's ones are per channel
    because a builder crashes on a scalar there.
    """
    rows = weight.codes.shape[0]
    codes = graph.int4_constant("codes", weight.codes)
    multipliers = graph.constant("multipliers", weight.multipliers.to(torch.float16))
    products = graph.node(
        "DequantizeLinear",
        [codes, multipliers],
        name="codes_Dequantize",
        axis=1,
        block_size=weight.block_size,
    )
    columns = graph.node("Transpose", [products], name="weight_Transpose", perm=[1, 0])
    ones = graph.constant("ones", torch.ones(rows, dtype=torch.float16))
    zeros = graph.constant("zeros", torch.zeros(rows, dtype=torch.int8))
    return graph.node("QuantizeLinear", [columns, ones, zeros], name="weight_Quantize", axis=1)


def dequantize(
    graph: Subgraph, codes: ir.Value, scale_name: str, scale: torch.Tensor, part: str
) -> ir.Value:
    """Write INT8 codes [K, N] times a scale per column, or one scalar."""
    zero = torch.zeros(scale.shape, dtype=torch.int8)
    operands = [
        codes,
        graph.constant(scale_name, scale),
        graph.constant(f"{part}_zero_point", zero),
    ]
    return graph.node("DequantizeLinear", operands, name=f"{part}_Dequantize", axis=1)


def right_product(
    graph: Subgraph, x: ir.Value, codes: torch.Tensor, scale: torch.Tensor
) -> ir.Value:
    """Write x (codes · scale)ᵀ, (…, rank)."""
    right_codes = graph.constant("right_codes", codes.T)
    right = dequantize(graph, right_codes, "right_scale", scale, "right")
    return graph.node("MatMul", [x, right], name="right_MatMul")


def add_left_product(graph: Subgraph, y: ir.Value, inner: ir.Value, left: torch.Tensor) -> ir.Value:
    """Write y + inner leftᵀ."""
    outer = graph.node("MatMul", [inner, graph.constant("left", left.T)], name="left_MatMul")
    return graph.node("Add", [y, outer], name="AddLowRank")


def add_branch(graph: Subgraph, y: ir.Value, x: ir.Value, linear: FoldedLinear) -> ir.Value:
    """Write y + (x rightᵀ) ℓ̂ᵀ, the right factor INT8, the left float."""
    low_rank, row_scale = linear.low_rank, linear.weight.row_scale
    assert low_rank is not None  # the caller looked
    right = low_rank.right_codes, low_rank.right_scale(row_scale.dtype)
    return add_left_product(graph, y, right_product(graph, x, *right), low_rank.left(row_scale))


def add_bias(graph: Subgraph, y: ir.Value, bias: torch.Tensor) -> ir.Value:
    """Write y + bias."""
    return graph.node("Add", [y, graph.constant("bias", bias)], name="AddBias")
