"""ONNX Runtime's form of a linear with low-rank factors, where the float side is float32.

The branch joins the linear's integer product, its inner product as codes on the input's own grid:

    y = DQ([q | p]) [ŵ | ℓ̂]ᵀ · r + bias,      p = Q(DQ(q) rightᵀ)

with the names of the portable form. Such a linear may read its input channels in parts, and give
its output channels in parts: one product for each, all of the same codes.

These codes are UINT8 with a zero point of 128: ONNX Runtime lets two products read one quantizer,
and joins codes, where they are unsigned alone. TensorRT refuses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
import torch

from ditas_export.calibration.fold import FoldedLinear
from ditas_export.onnx_export.form import Layout
from ditas_export.onnx_export.forms.operands import (
    add_bias,
    denormalized,
    dequantize,
    int4_chain,
    normalized,
    right_product,
    smoothed,
)
from ditas_export.onnx_export.interface import INPUT_PART, OUTPUT_PART
from ditas_export.onnx_export.subgraph import Subgraph
from ditas_export.quantization.integer import LowRank, joined_rows
from ditas_export.quantization.ranges import Ranges

UNSIGNED_ZERO_POINT = 128
"""Of codes in UINT8 that are INT8 codes plus this."""


def lower_joined(
    graph: Subgraph,
    inputs: Sequence[ir.Value],
    linear: FoldedLinear,
    low_rank: LowRank,
    bias: torch.Tensor,
    *,
    layout: Layout,
    ranges: Ranges,
    outputs: int,
) -> Sequence[ir.Value]:
    """Write a linear whose branch joins its integer product, and return the parts of its output.

    Args:
        graph: where to write; its path is the linear's.
        inputs: equal parts of (…, K), in the order of their channels.
        linear: what to write.
        low_rank: its branch.
        bias: as it is to be stored.
        layout: storage of the weight.
        ranges: of the activations, over all parts of a token.
        outputs: number of equal parts of the output, (…, N / outputs) each.
    """
    places = _places(graph, INPUT_PART, len(inputs))
    x = normalized(graph, places, smoothed(places, inputs, linear), linear, ranges)
    grid = [
        graph.constant("input_scale", x.scale),
        graph.constant("input_zero_point", torch.tensor(UNSIGNED_ZERO_POINT, dtype=torch.uint8)),
    ]

    def dequantized(codes: ir.Value, prefix: str) -> ir.Value:
        return graph.node("DequantizeLinear", [codes, *grid], name=f"{prefix}_Dequantize")

    parts = [
        place.node("QuantizeLinear", [part, *grid], name="input_Quantize")
        for place, part in zip(places, x.parts, strict=True)
    ]
    codes = parts[0] if len(parts) == 1 else graph.node("Concat", parts, name="Codes", axis=-1)
    right = low_rank.right_codes, low_rank.right_scale(x.scale.dtype)
    inner = right_product(graph, dequantized(codes, "input"), *right)
    inner_codes = graph.node("QuantizeLinear", [inner, *grid], name="inner_Quantize")
    joined = dequantized(graph.node("Concat", [codes, inner_codes], name="Join", axis=-1), "joined")
    made = []
    for place, rows, part_of_bias in zip(
        _places(graph, OUTPUT_PART, outputs),
        _parts(linear, outputs),
        bias.chunk(outputs, dim=-1),
        strict=True,
    ):
        weight = _joined_weight(place, rows, layout)
        y = denormalized(place, place.node("MatMul", [joined, weight]), x.token)
        made.append(add_bias(place, y, part_of_bias))
    return made


def _places(graph: Subgraph, name: str, parts: int) -> Sequence[Subgraph]:
    """Return where each of some parts is written: with the linear itself, where there is one."""
    return [graph] if parts == 1 else [graph.below(f"{name}{index}") for index in range(parts)]


def _parts(linear: FoldedLinear, outputs: int) -> Sequence[FoldedLinear]:
    """Return the linear's rows for each of equal parts of the outputs, in order; biases stay."""
    weight, low_rank = linear.weight, linear.low_rank
    assert low_rank is not None  # the caller looked
    columns = zip(
        weight.codes.chunk(outputs),
        weight.multipliers.chunk(outputs),
        weight.row_scale.chunk(outputs),
        low_rank.left_codes.chunk(outputs),
        strict=True,
    )
    return [
        replace(
            linear,
            weight=replace(weight, codes=codes, multipliers=multipliers, row_scale=row_scale),
            low_rank=replace(low_rank, left_codes=left_codes),
        )
        for codes, multipliers, row_scale, left_codes in columns
    ]


def _joined_weight(graph: Subgraph, linear: FoldedLinear, layout: Layout) -> ir.Value:
    """Write [ŵ | ℓ̂]ᵀ, [K + rank, N], its integers dequantized by the row scales."""
    weight, low_rank = linear.weight, linear.low_rank
    assert low_rank is not None  # the caller looked
    if layout == "int8":
        rows = graph.constant("int8_codes", joined_rows(weight, low_rank).T)
    else:
        left_codes = graph.constant("left_codes", low_rank.left_codes.T)
        rows = graph.node("Concat", [int4_chain(graph, weight), left_codes], name="Rows", axis=0)
    return dequantize(graph, rows, "row_scale", weight.row_scale, "weight")
