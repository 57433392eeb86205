"""A quantized linear as standard QDQ operators; one function per form of its weight.

With x the input, q its INT8 codes, r its token ranges and ŵ = codes · m · row_scale, every form
computes what `calibration/modules.py::FakeQuantLinear` computes:

    y = (DQ(q) ŵᵀ + (DQ(q) rightᵀ) leftᵀ) · r + bias,      q = Q(x / r)

What the runtimes ask of the form (`contract.py` checks it): the last DequantizeLinear of a weight
feeds its MatMul and nothing else, every MatMul has an activation Q/DQ and scales of its own, scales
and zero points are constants, and INT4 feeds only a DequantizeLinear.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import onnx_ir as ir
import torch

from ditas_export.calibration.fold import FoldedLinear
from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export.subgraph import Subgraph
from ditas_export.quantization.integer import IntegerWeight, LowRank
from ditas_export.quantization.ranges import RANGE_FLOOR, Ranges, static_scale, unit_scale
from ditas_export.quantization.weight_only import (
    BLOCK_SIZES,
    WeightOnlyWeight,
    from_integer_weight,
)

Layout = Literal["int4", "int8"]
"""How a 4-bit weight is stored: INT4 blocks, or the same numbers as INT8 rows."""


def lower_linear(
    graph: Subgraph,
    x: ir.Value,
    linear: FoldedLinear,
    *,
    layout: Layout,
    ranges: Ranges,
    activation_bits: int,
    splits_output: bool,
) -> ir.Value:
    """Write one quantized linear and return its output.

    Args:
        graph: where to write; its path is the linear's.
        x: (…, K), the linear's input.
        linear: what to write.
        layout: storage of the weight.
        ranges: of the activations.
        activation_bits: 8, or 16 for float activations.
        splits_output: the output is cut into parts, as qkv's is.

    Raises:
        OnnxExportError: a layout or block size that the weight cannot take.
    """
    if linear.weight.bits == 8 and layout == "int4":
        raise OnnxExportError("8-bit weights have no int4 layout; use layout int8")
    if linear.input_multiplier is not None:
        multiplier = graph.constant("input_multiplier", linear.input_multiplier)
        x = graph.node("Mul", [x, multiplier], name="Smooth")
    if activation_bits == 8 and ranges == "token":
        token = _token_ranges(graph, x, linear.bias.dtype)
        normalized = graph.node("Div", [x, token], name="Normalize")
        scale = unit_scale(linear.bias.dtype)
        y = _integer_product(graph, normalized, linear, scale, layout)
        y = graph.node("Mul", [y, token], name="Denormalize")
        return _add_bias(graph, y, linear.bias)
    if activation_bits == 16:
        y = _float_product(graph, x, linear, layout)
    elif linear.low_rank is None and splits_output:
        y = _opaque_product(graph, x, linear, layout)
    else:
        scale = static_scale(linear.static_range, linear.bias.dtype)
        y = _integer_product(graph, x, linear, scale, layout)
    # After a bare MatMul, a bias of rank 3: ONNX Runtime turns MatMul + Add of rank 1, where the
    # shapes are fixed, into a Gemm that 1.24 runs in float and that 1.31 refuses.
    bias = linear.bias if linear.low_rank else linear.bias[None, None]
    return _add_bias(graph, y, bias)


def lower_float_linear(
    graph: Subgraph, x: ir.Value, weight: torch.Tensor, bias: torch.Tensor
) -> ir.Value:
    """Write a float linear, its weight (N, K) stored as [K, N], and return its output."""
    stored = graph.constant("weight", weight.T)
    return _add_bias(graph, graph.node("MatMul", [x, stored]), bias)


def lower_weight_only_linear(
    graph: Subgraph, x: ir.Value, weight: WeightOnlyWeight, bias: torch.Tensor
) -> ir.Value:
    """Write a linear of integer weights and float activations, and return its output."""
    return _add_bias(graph, graph.node("MatMul", [x, _weight_only(graph, weight)]), bias)


def _token_ranges(graph: Subgraph, x: ir.Value, dtype: torch.dtype) -> ir.Value:
    """Write r = max(max x, −min x, 2⁻¹⁴) per token, (…, 1): no pass that writes |x|."""
    axis = graph.axes("last_axis", [-1])
    highest = graph.node("ReduceMax", [x, axis], keepdims=1)
    lowest = graph.node("ReduceMin", [x, axis], keepdims=1)
    floor = graph.scalar("range_floor", RANGE_FLOOR, dtype)
    return graph.node("Max", [highest, graph.node("Neg", [lowest]), floor], name="Range")


def _integer_product(
    graph: Subgraph, x: ir.Value, linear: FoldedLinear, scale: torch.Tensor, layout: Layout
) -> ir.Value:
    """Write the INT8 × INT8 products of a linear: x (…, K) -> (…, N), no bias."""
    store = _int4_chain if layout == "int4" else _int8_rows
    weight = store(graph, linear.weight)
    y = graph.node("MatMul", [_quantized_input(graph, x, scale, ""), weight])
    if linear.low_rank is None:
        return y
    return _add_branch(graph, y, _quantized_input(graph, x, scale, "right_"), linear.low_rank)


def _opaque_product(graph: Subgraph, x: ir.Value, linear: FoldedLinear, layout: Layout) -> ir.Value:
    """Write a static product whose parts a builder cannot pull into the weight.

    TensorRT for RTX cuts the INT8 rows of a MatMul whose output is cut, and multiplies the pieces
    in float. A scalar between them stops it: the row scales are doubled, the product is halved,
    both exact.
    """
    weight = linear.weight
    doubled = replace(linear, weight=replace(weight, row_scale=weight.row_scale * 2))
    scale = static_scale(linear.static_range, linear.bias.dtype)
    y = _integer_product(graph, x, doubled, scale, layout)
    return graph.node("Mul", [y, graph.scalar("half", 0.5, linear.bias.dtype)], name="Halve")


def _float_product(graph: Subgraph, x: ir.Value, linear: FoldedLinear, layout: Layout) -> ir.Value:
    """Write the products of a linear with float activations: x (…, K) -> (…, N), no bias."""
    weight = from_integer_weight(linear.weight) if layout == "int4" else _rows(linear.weight)
    y = graph.node("MatMul", [x, _weight_only(graph, weight)])
    return y if linear.low_rank is None else _add_branch(graph, y, x, linear.low_rank)


def _add_bias(graph: Subgraph, y: ir.Value, bias: torch.Tensor) -> ir.Value:
    """Write y + bias."""
    return graph.node("Add", [y, graph.constant("bias", bias)], name="AddBias")


def _add_branch(graph: Subgraph, y: ir.Value, x: ir.Value, low_rank: LowRank) -> ir.Value:
    """Write y + (x rightᵀ) leftᵀ, the right factor INT8 with a scale per column, the left float."""
    codes = graph.constant("right_codes", low_rank.right_codes.T)
    scale = graph.constant("right_scale", low_rank.right_scale)
    zero = graph.constant("right_zero_point", torch.zeros(low_rank.rank, dtype=torch.int8))
    right = graph.node("DequantizeLinear", [codes, scale, zero], name="right_Dequantize", axis=1)
    inner = graph.node("MatMul", [x, right], name="right_MatMul")
    left = graph.constant("left", low_rank.left.T)
    outer = graph.node("MatMul", [inner, left], name="left_MatMul")
    return graph.node("Add", [y, outer], name="AddLowRank")


def _quantized_input(graph: Subgraph, x: ir.Value, scale: torch.Tensor, prefix: str) -> ir.Value:
    """Write Q/DQ of an activation with constants of its own: shared ones keep MatMuls unfused."""
    quantizer = [
        graph.constant(f"{prefix}input_scale", scale),
        graph.constant(f"{prefix}input_zero_point", torch.zeros((), dtype=torch.int8)),
    ]
    codes = graph.node("QuantizeLinear", [x, *quantizer], name=f"{prefix}input_Quantize")
    return graph.node("DequantizeLinear", [codes, *quantizer], name=f"{prefix}input_Dequantize")


def _int4_chain(graph: Subgraph, weight: IntegerWeight) -> ir.Value:
    """Write a weight as INT4 codes whose INT8 rows the runtime makes when it loads.

    `DQ(codes [N, K], multipliers in fp16) → Transpose → Q(ones) → DQ(row_scale) `: the products
    codes · m are integers, exact in fp16, and the quantizer's ones are per channel because a
    builder crashes on a scalar there.
    """
    rows = weight.codes.shape[0]
    codes = graph.int4_constant("codes", weight.codes)
    multipliers = graph.constant("multipliers", weight.multipliers.to(torch.float16))
    zero = graph.constant("weight_zero_point", torch.zeros(rows, dtype=torch.int8))
    products = graph.node(
        "DequantizeLinear",
        [codes, multipliers],
        name="codes_Dequantize",
        axis=1,
        block_size=weight.block_size,
    )
    columns = graph.node("Transpose", [products], name="weight_Transpose", perm=[1, 0])
    ones = graph.constant("ones", torch.ones(rows, dtype=torch.float16))
    integers = graph.node("QuantizeLinear", [columns, ones, zero], name="weight_Quantize", axis=1)
    row_scale = graph.constant("row_scale", weight.row_scale)
    return graph.node(
        "DequantizeLinear", [integers, row_scale, zero], name="weight_Dequantize", axis=1
    )


def _int8_rows(graph: Subgraph, weight: IntegerWeight) -> ir.Value:
    """Write a weight as INT8 [K, N], one scale per output channel."""
    rows = weight.codes.shape[0]
    integers = graph.constant("int8_codes", weight.int8_rows().T)
    zero = graph.constant("weight_zero_point", torch.zeros(rows, dtype=torch.int8))
    row_scale = graph.constant("row_scale", weight.row_scale)
    return graph.node(
        "DequantizeLinear", [integers, row_scale, zero], name="weight_Dequantize", axis=1
    )


def _weight_only(graph: Subgraph, weight: WeightOnlyWeight) -> ir.Value:
    """Write a weight-only weight as the [K, N] operand of a MatMul."""
    if weight.bits == 8:
        codes = graph.constant("int8_codes", weight.codes.T)
        scale = graph.constant("row_scale", weight.scale[:, 0])
        return graph.node("DequantizeLinear", [codes, scale], name="weight_Dequantize", axis=1)
    if weight.block_size not in BLOCK_SIZES:
        raise OnnxExportError(
            f"block_size={weight.block_size} has no weight-only kernel; with float activations "
            f"quantize in blocks of {', '.join(map(str, sorted(BLOCK_SIZES)))}, or export layout "
            f"int8"
        )
    codes = graph.int4_constant("codes", weight.codes.T.contiguous())
    scale = graph.constant("block_scale", weight.scale.T)
    return graph.node(
        "DequantizeLinear",
        [codes, scale],
        name="weight_Dequantize",
        axis=0,
        block_size=weight.block_size,
    )


def _rows(weight: IntegerWeight) -> WeightOnlyWeight:
    """Return a two-level weight as INT8 rows."""
    return WeightOnlyWeight(codes=weight.int8_rows(), scale=weight.row_scale[:, None], bits=8)
