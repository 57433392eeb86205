"""TensorRT's form of a linear with low-rank factors: its row scales taken out of the products.

Both products have one scalar scale σ then, and the builder makes one INT8 GEMM of the two, and one
kernel of the sum where it can:

    y = (DQ(q) (codes · m σ)ᵀ + (DQ(q) (right_codes · σ)ᵀ) (left_codes / divisor)ᵀ)
        · row_scale / σ · r + bias

It is the portable form's function (the names are explained there), exact but for rounding.
"""

from __future__ import annotations

import math

import onnx_ir as ir
import torch
from torch.nn import functional

from ditas_export.calibration.fold import FoldedLinear
from ditas_export.onnx_export.form import Layout
from ditas_export.onnx_export.forms.operands import (
    add_bias,
    add_left_product,
    denormalized,
    dequantize,
    integer_codes,
    normalized,
    quantized_input,
    right_product,
    smoothed,
)
from ditas_export.onnx_export.subgraph import Subgraph
from ditas_export.quantization.integer import MAX_CODE_8BIT, LowRank, rounded_float
from ditas_export.quantization.ranges import Ranges

RANK_MULTIPLE = 8
"""Of other ranks TensorRT for RTX makes eight kernels more in every block."""

LARGEST_PRODUCT = 2.0**14
"""Bound of a product under a shared scale: with a low-rank part as large, a half still holds it."""


def lower_with_shared_scale(
    graph: Subgraph,
    x: ir.Value,
    linear: FoldedLinear,
    low_rank: LowRank,
    bias: torch.Tensor,
    *,
    layout: Layout,
    ranges: Ranges,
) -> ir.Value:
    """Write a linear whose INT8 products share a scale; x (…, K) -> (…, N)."""
    x_on_grid = normalized(graph, [graph], smoothed([graph], [x], linear), linear, ranges)
    (codes,) = x_on_grid.parts
    y = _shared_scale_product(graph, codes, linear, low_rank, x_on_grid.scale, layout)
    return add_bias(graph, denormalized(graph, y, x_on_grid.token), bias)


def _shared_scale_product(
    graph: Subgraph,
    x: ir.Value,
    linear: FoldedLinear,
    low_rank: LowRank,
    scale: torch.Tensor,
    layout: Layout,
) -> ir.Value:
    """Write the INT8 × INT8 products under one scalar scale, their sum times the row scales.

    TensorRT for RTX multiplies by row scales in a kernel of its own, once for the weight and once
    for the right factor, before it can add; a scalar goes into the GEMM.
    """
    rows = linear.weight.row_scale.double()
    shared = shared_scale(linear.weight.codes.shape[1], float(scale))
    scalar = torch.tensor(shared, dtype=scale.dtype)
    codes = integer_codes(graph, linear.weight, layout)
    weight = dequantize(graph, codes, "weight_scale", scalar, "weight")
    y = graph.node("MatMul", [quantized_input(graph, x, scale, ""), weight])
    missing = -low_rank.rank % RANK_MULTIPLE
    left = (low_rank.left_codes / low_rank.divisor.double()).to(scale.dtype)
    inner = right_product(
        graph,
        quantized_input(graph, x, scale, "right_"),
        functional.pad(low_rank.right_codes, (0, 0, 0, missing)),
        scalar,
    )
    y = add_left_product(graph, y, inner, functional.pad(left, (0, missing)))
    rescale = rounded_float("a row scale in TensorRT's form", rows / shared, scale.dtype)
    row_scale = graph.constant("row_scale", rescale)
    return graph.node("Mul", [y, row_scale], name="Rescale")


def shared_scale(in_features: int, input_scale: float) -> float:
    """Return the largest power of two with which no product of INT8 codes leaves the bound."""
    largest = in_features * (MAX_CODE_8BIT + 1) * MAX_CODE_8BIT * input_scale
    return 2.0 ** math.floor(math.log2(LARGEST_PRODUCT / largest))
