"""A quantized linear as standard QDQ operators; one function per form of its weight.

With x the input, q its INT8 codes, r its token ranges, ŵ = codes · m · row_scale, ℓ̂ = left_codes ·
row_scale and right = right_codes / divisor, every form computes what
`calibration/modules.py::FakeQuantLinear` computes:

    y = (DQ(q) ŵᵀ + (DQ(q) rightᵀ) ℓ̂ᵀ) · r + bias,      q = Q(x / r)

For TensorRT a linear with low-rank factors takes its row scales out of the products, exact but for
rounding. Both have one scalar scale σ then, and the builder makes one INT8 GEMM of the two, and one
kernel of the sum where it can:

    y = (DQ(q) (codes · m σ)ᵀ + (DQ(q) (right_codes · σ)ᵀ) (left_codes / divisor)ᵀ)
        · row_scale / σ · r + bias

For ONNX Runtime with a float32 side the branch joins the linear's integer product, its inner
product as codes on the input's own grid:

    y = DQ([q | p]) [ŵ | ℓ̂]ᵀ · r + bias,      p = Q(DQ(q) rightᵀ)

Such a linear may read its input channels in parts, and give its output channels in parts: one
product for each, all of the same codes.

These codes are UINT8 with a zero point of 128: ONNX Runtime lets two products read one quantizer,
and joins codes, where they are unsigned alone. TensorRT refuses them.

What the runtimes ask of the form (`contract.py` checks it): the last DequantizeLinear of a weight
feeds its MatMul and nothing else, every MatMul of signed codes has an activation Q/DQ and scales of
its own, scales and zero points are constants, and INT4 feeds only a DequantizeLinear.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import onnx_ir as ir
import torch
from torch.nn import functional

from ditas_export.calibration.fold import FoldedLinear
from ditas_export.calibration.modules import in_onnxruntime_form
from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export.form import Layout
from ditas_export.onnx_export.subgraph import Subgraph
from ditas_export.options import Target
from ditas_export.quantization.integer import (
    MAX_CODE_8BIT,
    IntegerWeight,
    LowRank,
    joined_rows,
)
from ditas_export.quantization.ranges import RANGE_FLOOR, Ranges, static_scale, unit_scale
from ditas_export.quantization.weight_only import (
    BLOCK_SIZES,
    WeightOnlyWeight,
    from_integer_weight,
)

RANK_MULTIPLE = 8
"""Ranks of the form for TensorRT."""

INPUT_PART, OUTPUT_PART = "input_", "output_"
"""How the names of nodes of one part go on after a linear's path, before the part's number."""

UNSIGNED_ZERO_POINT = 128
"""Of codes in UINT8 that are INT8 codes plus this."""

LARGEST_PRODUCT = 2.0**14
"""Bound of a product under a shared scale: with a low-rank part as large, a half still holds it."""


def lower_linear(
    graph: Subgraph,
    inputs: Sequence[ir.Value],
    linear: FoldedLinear,
    *,
    layout: Layout,
    ranges: Ranges,
    activation_bits: int,
    splits_output: bool,
    target: Target = "portable",
    outputs: int = 1,
) -> Sequence[ir.Value]:
    """Write one quantized linear and return its outputs.

    Args:
        graph: where to write; its path is the linear's.
        inputs: (…, K), the linear's input; with a joined branch, any number of equal parts of it.
        linear: what to write.
        layout: storage of the weight.
        ranges: of the activations.
        activation_bits: 8, or 16 for float activations.
        splits_output: the output is cut into parts, as qkv's is.
        target: the runtime whose form to write, where they differ.
        outputs: 1; with a joined branch, any number of equal parts of the output.

    Raises:
        OnnxExportError: a layout or block size that the weight cannot take.
    """
    if linear.weight.bits == 8 and layout == "int4":
        raise OnnxExportError("8-bit weights have no int4 layout; use layout int8")
    dtype, low_rank = linear.bias.dtype, linear.low_rank
    own_form = in_onnxruntime_form(target, dtype)
    if own_form and low_rank is not None and activation_bits == 8:
        return _lower_joined(
            graph, inputs, linear, low_rank, layout=layout, ranges=ranges, outputs=outputs
        )
    assert len(inputs) == outputs == 1  # parts are for joined branches alone
    (x,) = _smoothed([graph], inputs, linear)
    if activation_bits == 16:
        y = _float_product(graph, x, linear, layout)
        return [_add_bias(graph, y, linear.bias if low_rank else _bias_of_rank_3(linear))]
    (x,), token, scale = _normalized(graph, [graph], [x], linear, ranges)
    if low_rank is not None and target == "tensorrt":
        y = _shared_scale_product(graph, x, linear, low_rank, scale, layout)
    elif low_rank is None and token is None and splits_output:
        y = _opaque_product(graph, x, linear, scale, layout)
    else:
        y = _integer_product(graph, x, linear, scale, layout)
    follows_product = low_rank is None and token is None
    keeps_apart = own_form or follows_product
    y = _denormalized(graph, y, token)
    return [_add_bias(graph, y, _bias_of_rank_3(linear) if keeps_apart else linear.bias)]


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


def _smoothed(
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


def _normalized(
    graph: Subgraph,
    places: Sequence[Subgraph],
    inputs: Sequence[ir.Value],
    linear: FoldedLinear,
    ranges: Ranges,
) -> tuple[Sequence[ir.Value], ir.Value | None, torch.Tensor]:
    """Return each part of an input over its token's range, the ranges, and the quantizer's scale.

    Static ranges are in the scale: the input is left as it is then, and the ranges are None.
    """
    dtype = linear.bias.dtype
    if ranges == "static":
        return inputs, None, static_scale(linear.static_range, dtype)
    token = _token_ranges(graph, places, inputs, dtype)
    divided = [
        place.node("Div", [x, token], name="Normalize")
        for place, x in zip(places, inputs, strict=True)
    ]
    return divided, token, unit_scale(dtype)


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


def _denormalized(graph: Subgraph, y: ir.Value, token: ir.Value | None) -> ir.Value:
    """Write y · r; y itself under static ranges."""
    return y if token is None else graph.node("Mul", [y, token], name="Denormalize")


def _integer_product(
    graph: Subgraph, x: ir.Value, linear: FoldedLinear, scale: torch.Tensor, layout: Layout
) -> ir.Value:
    """Write the INT8 × INT8 products of a linear: x (…, K) -> (…, N), no bias."""
    codes = _integer_codes(graph, linear.weight, layout)
    weight = _dequantize(graph, codes, "row_scale", linear.weight.row_scale, "weight")
    y = graph.node("MatMul", [_quantized_input(graph, x, scale, ""), weight])
    if linear.low_rank is None:
        return y
    return _add_branch(graph, y, _quantized_input(graph, x, scale, "right_"), linear)


def _opaque_product(
    graph: Subgraph, x: ir.Value, linear: FoldedLinear, scale: torch.Tensor, layout: Layout
) -> ir.Value:
    """Write a static product whose parts a builder cannot pull into the weight.

    TensorRT for RTX cuts the INT8 rows of a MatMul whose output is cut, and multiplies the pieces
    in float. A scalar between them stops it: the row scales are doubled, the product is halved,
    both exact.
    """
    weight = linear.weight
    doubled = replace(linear, weight=replace(weight, row_scale=weight.row_scale * 2))
    y = _integer_product(graph, x, doubled, scale, layout)
    return graph.node("Mul", [y, graph.scalar("half", 0.5, linear.bias.dtype)], name="Halve")


def _lower_joined(
    graph: Subgraph,
    inputs: Sequence[ir.Value],
    linear: FoldedLinear,
    low_rank: LowRank,
    *,
    layout: Layout,
    ranges: Ranges,
    outputs: int,
) -> Sequence[ir.Value]:
    """Write a linear whose branch joins its integer product, in parts of its input and output."""
    places = _places(graph, INPUT_PART, len(inputs))
    inputs = _smoothed(places, inputs, linear)
    inputs, token, scale = _normalized(graph, places, inputs, linear, ranges)
    grid = [
        graph.constant("input_scale", scale),
        graph.constant("input_zero_point", torch.tensor(UNSIGNED_ZERO_POINT, dtype=torch.uint8)),
    ]

    def dequantized(codes: ir.Value, prefix: str) -> ir.Value:
        return graph.node("DequantizeLinear", [codes, *grid], name=f"{prefix}_Dequantize")

    parts = [
        place.node("QuantizeLinear", [x, *grid], name="input_Quantize")
        for place, x in zip(places, inputs, strict=True)
    ]
    codes = parts[0] if len(parts) == 1 else graph.node("Concat", parts, name="Codes", axis=-1)
    right = low_rank.right_codes, low_rank.right_scale(scale.dtype)
    inner = _right_product(graph, dequantized(codes, "input"), *right)
    inner_codes = graph.node("QuantizeLinear", [inner, *grid], name="inner_Quantize")
    joined = dequantized(graph.node("Concat", [codes, inner_codes], name="Join", axis=-1), "joined")
    made = []
    for place, rows in zip(
        _places(graph, OUTPUT_PART, outputs), _parts(linear, outputs), strict=True
    ):
        weight = _joined_weight(place, rows, layout)
        y = _denormalized(place, place.node("MatMul", [joined, weight]), token)
        made.append(_add_bias(place, y, _bias_of_rank_3(rows)))
    return made


def _places(graph: Subgraph, name: str, parts: int) -> Sequence[Subgraph]:
    """Return where each of some parts is written: with the linear itself, where there is one."""
    return [graph] if parts == 1 else [graph.below(f"{name}{index}") for index in range(parts)]


def _parts(linear: FoldedLinear, outputs: int) -> Sequence[FoldedLinear]:
    """Return a linear of equal parts of the outputs for each of them, in order."""
    weight, low_rank = linear.weight, linear.low_rank
    assert low_rank is not None  # the caller looked
    columns = zip(
        weight.codes.chunk(outputs),
        weight.multipliers.chunk(outputs),
        weight.row_scale.chunk(outputs),
        low_rank.left_codes.chunk(outputs),
        linear.bias.chunk(outputs),
        strict=True,
    )
    return [
        replace(
            linear,
            weight=replace(weight, codes=codes, multipliers=multipliers, row_scale=row_scale),
            low_rank=replace(low_rank, left_codes=left_codes),
            bias=bias,
        )
        for codes, multipliers, row_scale, left_codes, bias in columns
    ]


def _joined_weight(graph: Subgraph, linear: FoldedLinear, layout: Layout) -> ir.Value:
    """Write [ŵ | ℓ̂]ᵀ, [K + rank, N], its integers dequantized by the row scales."""
    weight, low_rank = linear.weight, linear.low_rank
    assert low_rank is not None  # the caller looked
    if layout == "int8":
        rows = graph.constant("int8_codes", joined_rows(weight, low_rank).T)
    else:
        left_codes = graph.constant("left_codes", low_rank.left_codes.T)
        rows = graph.node("Concat", [_int4_chain(graph, weight), left_codes], name="Rows", axis=0)
    return _dequantize(graph, rows, "row_scale", weight.row_scale, "weight")


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
    shared = _shared_scale(linear.weight.codes.shape[1], float(scale))
    scalar = torch.tensor(shared, dtype=scale.dtype)
    codes = _integer_codes(graph, linear.weight, layout)
    weight = _dequantize(graph, codes, "weight_scale", scalar, "weight")
    y = graph.node("MatMul", [_quantized_input(graph, x, scale, ""), weight])
    # Of other ranks TensorRT for RTX makes eight kernels more in every block.
    missing = -low_rank.rank % RANK_MULTIPLE
    left = (low_rank.left_codes / low_rank.divisor.double()).to(scale.dtype)
    inner = _right_product(
        graph,
        _quantized_input(graph, x, scale, "right_"),
        functional.pad(low_rank.right_codes, (0, 0, 0, missing)),
        scalar,
    )
    y = _add_left_product(graph, y, inner, functional.pad(left, (0, missing)))
    row_scale = graph.constant("row_scale", (rows / shared).to(scale.dtype))
    return graph.node("Mul", [y, row_scale], name="Rescale")


def _shared_scale(in_features: int, input_scale: float) -> float:
    """Return the largest power of two with which no product of INT8 codes leaves the bound."""
    largest = in_features * (MAX_CODE_8BIT + 1) * MAX_CODE_8BIT * input_scale
    return 2.0 ** math.floor(math.log2(LARGEST_PRODUCT / largest))


def _float_product(graph: Subgraph, x: ir.Value, linear: FoldedLinear, layout: Layout) -> ir.Value:
    """Write the products of a linear with float activations: x (…, K) -> (…, N), no bias."""
    weight = from_integer_weight(linear.weight) if layout == "int4" else _rows(linear.weight)
    y = graph.node("MatMul", [x, _weight_only(graph, weight)])
    return y if linear.low_rank is None else _add_branch(graph, y, x, linear)


def _bias_of_rank_3(linear: FoldedLinear) -> torch.Tensor:
    """Return a bias that ONNX Runtime fuses with nothing, (1, 1, N).

    It turns MatMul + Add of rank 1, where the shapes are fixed, into a Gemm that 1.24 runs in float
    and that 1.31 refuses; and Add of rank 1 + Gelu into a FastGelu that is slower than the two.
    """
    return linear.bias[None, None]


def _add_bias(graph: Subgraph, y: ir.Value, bias: torch.Tensor) -> ir.Value:
    """Write y + bias."""
    return graph.node("Add", [y, graph.constant("bias", bias)], name="AddBias")


def _add_branch(graph: Subgraph, y: ir.Value, x: ir.Value, linear: FoldedLinear) -> ir.Value:
    """Write y + (x rightᵀ) ℓ̂ᵀ, the right factor INT8, the left float."""
    low_rank, row_scale = linear.low_rank, linear.weight.row_scale
    assert low_rank is not None  # the caller looked
    right = low_rank.right_codes, low_rank.right_scale(row_scale.dtype)
    return _add_left_product(graph, y, _right_product(graph, x, *right), low_rank.left(row_scale))


def _right_product(
    graph: Subgraph, x: ir.Value, codes: torch.Tensor, scale: torch.Tensor
) -> ir.Value:
    """Write x (codes · scale)ᵀ, (…, rank)."""
    right_codes = graph.constant("right_codes", codes.T)
    right = _dequantize(graph, right_codes, "right_scale", scale, "right")
    return graph.node("MatMul", [x, right], name="right_MatMul")


def _add_left_product(
    graph: Subgraph, y: ir.Value, inner: ir.Value, left: torch.Tensor
) -> ir.Value:
    """Write y + inner leftᵀ."""
    outer = graph.node("MatMul", [inner, graph.constant("left", left.T)], name="left_MatMul")
    return graph.node("Add", [y, outer], name="AddLowRank")


def _quantized_input(graph: Subgraph, x: ir.Value, scale: torch.Tensor, prefix: str) -> ir.Value:
    """Write Q/DQ of an activation with constants of its own: shared ones keep MatMuls unfused."""
    quantizer = [
        graph.constant(f"{prefix}input_scale", scale),
        graph.constant(f"{prefix}input_zero_point", torch.zeros((), dtype=torch.int8)),
    ]
    codes = graph.node("QuantizeLinear", [x, *quantizer], name=f"{prefix}input_Quantize")
    return graph.node("DequantizeLinear", [codes, *quantizer], name=f"{prefix}input_Dequantize")


def _integer_codes(graph: Subgraph, weight: IntegerWeight, layout: Layout) -> ir.Value:
    """Write the integers of a weight as INT8 [K, N]."""
    if layout == "int8":
        return graph.constant("int8_codes", weight.int8_rows().T)
    return _int4_chain(graph, weight)


def _int4_chain(graph: Subgraph, weight: IntegerWeight) -> ir.Value:
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


def _dequantize(
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
