"""The form that every runtime takes: INT8 products, a scale for each output channel.

With x the input, q its INT8 codes, r its token ranges, ŵ = codes · m · row_scale, ℓ̂ = left_codes ·
row_scale and right = right_codes / divisor, it computes what
`calibration/modules.py::FakeQuantLinear` computes:

    y = (DQ(q) ŵᵀ + (DQ(q) rightᵀ) ℓ̂ᵀ) · r + bias,      q = Q(x / r)
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import torch

from ditas_export.calibration.fold import FoldedLinear
from ditas_export.onnx_export.form import Layout
from ditas_export.onnx_export.forms.operands import (
    add_bias,
    add_branch,
    denormalized,
    dequantize,
    integer_codes,
    normalized,
    quantized_input,
    smoothed,
)
from ditas_export.onnx_export.subgraph import Subgraph
from ditas_export.quantization.ranges import Ranges


def lower_portable(
    graph: Subgraph,
    x: ir.Value,
    linear: FoldedLinear,
    bias: torch.Tensor,
    *,
    layout: Layout,
    ranges: Ranges,
) -> ir.Value:
    """Write a linear of INT8 products and return its output; x (…, K) -> (…, N)."""
    x_on_grid = normalized(graph, [graph], smoothed([graph], [x], linear), linear, ranges)
    (codes,) = x_on_grid.parts
    y = _integer_product(graph, codes, linear, x_on_grid.scale, layout)
    return add_bias(graph, denormalized(graph, y, x_on_grid.token), bias)


def lower_cut(
    graph: Subgraph,
    x: ir.Value,
    linear: FoldedLinear,
    bias: torch.Tensor,
    *,
    layout: Layout,
) -> ir.Value:
    """Write a linear of static ranges and no branch, whose output is cut, as no builder cuts it.

    TensorRT for RTX cuts the INT8 rows of a MatMul whose output is cut, and multiplies the pieces
    in float. A scalar between them stops it: the row scales are doubled, the product is halved,
    both exact.
    """
    x_on_grid = normalized(graph, [graph], smoothed([graph], [x], linear), linear, "static")
    (codes,) = x_on_grid.parts
    weight = linear.weight
    doubled = replace(linear, weight=replace(weight, row_scale=weight.row_scale * 2))
    y = _integer_product(graph, codes, doubled, x_on_grid.scale, layout)
    half = graph.scalar("half", 0.5, linear.bias.dtype)
    return add_bias(graph, graph.node("Mul", [y, half], name="Halve"), bias)


def _integer_product(
    graph: Subgraph, x: ir.Value, linear: FoldedLinear, scale: torch.Tensor, layout: Layout
) -> ir.Value:
    """Write the INT8 × INT8 products of a linear: x (…, K) -> (…, N), no bias."""
    codes = integer_codes(graph, linear.weight, layout)
    weight = dequantize(graph, codes, "row_scale", linear.weight.row_scale, "weight")
    y = graph.node("MatMul", [quantized_input(graph, x, scale, ""), weight])
    if linear.low_rank is None:
        return y
    return add_branch(graph, y, quantized_input(graph, x, scale, "right_"), linear)
