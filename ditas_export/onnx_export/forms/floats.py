"""Linears whose activations are float: of integer weights, and of float weights.

    y = x ŵᵀ + (x rightᵀ) ℓ̂ᵀ + bias

with the names of the portable form. Kernels read the integers of ŵ themselves.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

from ditas_export.calibration.fold import FoldedLinear
from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export.form import Layout
from ditas_export.onnx_export.forms.operands import add_bias, add_branch, smoothed
from ditas_export.onnx_export.subgraph import Subgraph
from ditas_export.quantization.integer import IntegerWeight
from ditas_export.quantization.weight_only import (
    BLOCK_SIZES,
    WeightOnlyWeight,
    from_integer_weight,
)


def lower_float_linear(
    graph: Subgraph, x: ir.Value, weight: torch.Tensor, bias: torch.Tensor
) -> ir.Value:
    """Write a float linear, its weight (N, K) stored as [K, N], and return its output."""
    stored = graph.constant("weight", weight.T)
    return add_bias(graph, graph.node("MatMul", [x, stored]), bias)


def lower_weight_only_linear(
    graph: Subgraph, x: ir.Value, weight: WeightOnlyWeight, bias: torch.Tensor
) -> ir.Value:
    """Write a linear of integer weights and float activations, and return its output."""
    return add_bias(graph, graph.node("MatMul", [x, _weight_only(graph, weight)]), bias)


def lower_with_float_activations(
    graph: Subgraph, x: ir.Value, linear: FoldedLinear, bias: torch.Tensor, *, layout: Layout
) -> ir.Value:
    """Write a linear of integer weights and float activations, with its branch; x (…, K) -> (…, N).

    Raises:
        OnnxExportError: a block size that the weights cannot take.
    """
    (x,) = smoothed([graph], [x], linear)
    weight = from_integer_weight(linear.weight) if layout == "int4" else _rows(linear.weight)
    y = graph.node("MatMul", [x, _weight_only(graph, weight)])
    if linear.low_rank is not None:
        y = add_branch(graph, y, x, linear)
    return add_bias(graph, y, bias)


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
