"""What a rule is, and what several rooms of them look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from ditas_export.onnx_export.patterns import (
    DEQUANTIZE,
    QUANTIZE,
    Product,
    array,
    consumers,
    is_int4,
    operand,
    producer,
    products,
)

Finding = tuple[str, str, str]
"""Node or value, what was found there, what was expected."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: `check` yields what breaks it."""

    name: str
    reason: str
    check: Callable[[ir.Model], Iterable[Finding]]


def name_of(node: ir.Node) -> str:
    """Return how a finding names a node."""
    return node.name or node.op_type


def quantizers(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """Yield Q and DQ nodes, or one kind of them."""
    for node in model.graph:
        if node.op_type in (op_types or (QUANTIZE, DEQUANTIZE)):
            yield node


def activation_quantizers(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the QuantizeLinear nodes whose input is not a constant weight."""
    for node in quantizers(model, QUANTIZE):
        source = producer(producer(node, 0), 0)
        if not (source and is_int4(source.inputs[0])):
            yield node


def integer_products(model: ir.Model) -> Iterator[Product]:
    """Yield the MatMuls both of whose operands are dequantized."""
    for product in products(model.graph):
        if product.activation and product.weight:
            yield product


def following_add(product: Product) -> ir.Node | None:
    """Return the Add of a constant that alone reads an integer product, or None."""
    readers = consumers(product.node)
    if len(readers) == 1 and readers[0].op_type == "Add":
        constants = [value for value in readers[0].inputs if value and value.const_value]
        return readers[0] if constants else None
    return None


def other_zero_point(node: ir.Node, dtype: ir.DataType, point: int) -> str | None:
    """Return what a node has in place of a constant zero point, None where it has that."""
    value = operand(node, 2)
    zero = array(value)
    if value is None or zero is None:
        return "no zero point"
    assert value.const_value is not None  # it has an array
    if value.const_value.dtype == dtype and (zero == point).all():
        return None
    return f"{value.const_value.dtype.name} {'non-zero' if zero.any() else 'zeros'}"
