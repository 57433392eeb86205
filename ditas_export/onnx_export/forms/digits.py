"""ONNX Runtime's form of a weight-only linear of INT8 rows that few rows of floats go through.

Its input is written as three digits, the codes of what the digits before leave:

    x = r · (d₀ + d₁ / 254 + d₂ / 254²),      y = r · (d₀ ŵᵀ + d₁ ŵᵀ / 254 + d₂ ŵᵀ / 254²) + bias

Three digits are as many bits as a float32 has, so the numbers are those of float inputs, to float
rounding; the products are exact. ONNX Runtime's own kernel for float inputs writes the whole weight
out in float32 at every call: of 1152 inputs and 6912 outputs 20 ms for two rows, where this
takes 0.5 ms (onnxruntime 1.31.1).

Codes are UINT8 with a zero point of 128, as in the joined form: one quantizer serves two readers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ditas_export.onnx_export.forms.joined import UNSIGNED_ZERO_POINT
from ditas_export.onnx_export.patterns import DEQUANTIZE, producer
from ditas_export.onnx_export.subgraph import Subgraph
from ditas_export.quantization.ranges import RANGE_FLOOR

DIGITS = 3

DIGIT_BASE = 254.0
"""What a digit leaves is at most half a step, 2⁻⁸, and 127 steps after this factor."""

DIGIT_STEP = 2.0**-7
"""A power of two: a digit is a float32 exactly, and so is what it leaves."""

PATH = "adaLN_modulation"
"""How the nodes are named that every modulation linear reads."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Digits:
    """An input (rows, K) in digits."""

    values: ir.Value  # (3, rows, K), dequantized, each within ±1
    weights: ir.Value  # (3, rows, 1), what each counts
    axis: ir.Value  # the first, a list of axes


def modulation_in_digits(model: ir.Model, modules: Collection[str]) -> None:
    """Give the modulation linears of INT8 rows their inputs in digits, in place.

    They all read one value, whose digits are written once.

    Args:
        model: its linears are lowered; where their weights are no INT8 rows, they stay.
        modules: paths of the modulation linears.
    """
    names = {f"{module}/MatMul": module for module in modules}
    digits: dict[str, Digits] = {}
    for node in list(model.graph):
        module, weight = names.get(str(node.name)), producer(node, 1)
        if module is None or weight is None or not _has_rows(weight):
            continue
        x, rows = node.inputs
        assert x is not None  # a MatMul has both
        assert rows is not None
        made = _computation(x)
        if made not in digits:
            digits[made] = _digits(Subgraph(node, PATH), x)
        y = _sum_of_products(Subgraph(node, module), digits[made], rows)
        node.outputs[0].replace_all_uses_with(y)
        model.graph.remove(node, safe=True)
    RemoveUnusedNodesPass()(model)


def _sum_of_products(graph: Subgraph, x: Digits, rows: ir.Value) -> ir.Value:
    """Write the product of all digits with a weight, (K, N), and their sum, (rows, N)."""
    products = graph.node("MatMul", [x.values, rows])
    weighted = graph.node("Mul", [products, x.weights], name="Weigh")
    return graph.node("ReduceSum", [weighted, x.axis], name="Sum", keepdims=0)


def _has_rows(weight: ir.Node) -> bool:
    """Return whether a weight is INT8 rows, dequantized."""
    codes = weight.inputs[0]
    constant = None if codes is None else codes.const_value
    is_int8 = constant is not None and constant.dtype == ir.DataType.INT8
    return weight.op_type == DEQUANTIZE and is_int8


def _digits(graph: Subgraph, x: ir.Value) -> Digits:
    """Write the digits of (rows, K), over the range of each row."""
    first, last = graph.axes("first_axis", [0]), graph.axes("last_axis", [-1])
    dtype = torch.float32
    base = graph.scalar("digit_base", DIGIT_BASE, dtype)
    rest = graph.node("Unsqueeze", [x, first])
    # Zeros but where x is not finite: a quantizer, and the largest of several, may hide that.
    faults = graph.node("ReduceSum", [graph.node("Sub", [rest, rest]), last], keepdims=1)
    highest = graph.node("ReduceMax", [rest, last], keepdims=1)
    lowest = graph.node("Neg", [graph.node("ReduceMin", [rest, last], keepdims=1)])
    floor = graph.scalar("range_floor", RANGE_FLOOR, dtype)
    bound = graph.node("Max", [highest, lowest, floor], name="Bound")
    widening = graph.scalar("widening", 128 / 127, dtype)  # so that 1 is 127 steps
    span = graph.node("Mul", [bound, widening], name="Range")
    rest = graph.node("Div", [rest, span], name="Normalize")
    grid = [
        graph.scalar("digit_step", DIGIT_STEP, dtype),
        graph.constant("digit_zero_point", torch.tensor(UNSIGNED_ZERO_POINT, dtype=torch.uint8)),
    ]
    codes = []
    for index in range(DIGITS):
        place = graph.below(f"digit_{index}")
        codes.append(place.node("QuantizeLinear", [rest, *grid], name="Quantize"))
        if index + 1 < DIGITS:
            digit = place.node("DequantizeLinear", [codes[-1], *grid], name="Dequantize")
            rest = place.node("Mul", [place.node("Sub", [rest, digit]), base])
    joined = graph.node("Concat", codes, name="Digits", axis=0)
    counts = torch.tensor([[[DIGIT_BASE**-index]] for index in range(DIGITS)], dtype=dtype)
    weights = graph.node("Mul", [span, graph.constant("digit_counts", counts)], name="Counts")
    return Digits(
        values=graph.node("DequantizeLinear", [joined, *grid], name="digits_Dequantize"),
        weights=graph.node("Add", [weights, faults], name="Weights"),
        axis=first,
    )


def _computation(value: ir.Value) -> str:
    """Return how a value is computed: equal texts are equal values.

    The skeleton has SiLU of one embedding before each modulation linear.
    """
    node = value.producer()
    if node is None or node.op_type not in ("Mul", "Sigmoid") or node.attributes:
        return str(value.name)
    operands = ", ".join("" if each is None else _computation(each) for each in node.inputs)
    return f"{node.op_type}({operands})"
