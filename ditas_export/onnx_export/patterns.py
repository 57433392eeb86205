"""Finding the quantized parts of a graph again: integer products and INT4 chains."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

QUANTIZE = "QuantizeLinear"
DEQUANTIZE = "DequantizeLinear"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Product:
    """A MatMul at least one of whose operands comes from a DequantizeLinear."""

    node: ir.Node
    activation: ir.Node | None  # DequantizeLinear of operand A; None where A is float
    weight: ir.Node | None  # DequantizeLinear of operand B; None where B is float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Int4Chain:
    """`DQ(INT4) → Transpose → Q → DQ`: four bits in the file, INT8 rows in the runtime.

    Where a low-rank branch joins the weight, a Concat before the last DQ appends its codes.
    """

    codes: ir.Node  # DequantizeLinear of the INT4 codes
    transpose: ir.Node
    quantize: ir.Node
    concat: ir.Node | None  # with the INT8 codes of a branch, [rank, N]
    dequantize: ir.Node  # the last one, which feeds the MatMul


def products(graph: ir.Graph) -> Iterator[Product]:
    """Yield every MatMul that a quantizer touches, in graph order."""
    for node in graph:
        if node.op_type != "MatMul":
            continue
        activation, weight = (_dequantizer(value) for value in node.inputs)
        if activation or weight:
            yield Product(node=node, activation=activation, weight=weight)


def int4_chains(graph: ir.Graph) -> Iterator[Int4Chain]:
    """Yield every complete INT4 chain, in graph order."""
    for node in graph:
        if node.op_type == DEQUANTIZE and (chain := int4_chain(node)):
            yield chain


def int4_chain(dequantize: ir.Node) -> Int4Chain | None:
    """Return the INT4 chain that ends in a DequantizeLinear, or None."""
    rows = producer(dequantize, 0)
    concat = rows if rows is not None and rows.op_type == "Concat" else None
    quantize = rows if concat is None else producer(concat, 0)
    transpose = producer(quantize, 0)
    codes = producer(transpose, 0)
    if not (quantize and transpose and codes):
        return None
    found = (codes.op_type, transpose.op_type, quantize.op_type)
    if found != (DEQUANTIZE, "Transpose", QUANTIZE) or not is_int4(codes.inputs[0]):
        return None
    return Int4Chain(
        codes=codes, transpose=transpose, quantize=quantize, concat=concat, dequantize=dequantize
    )


def is_joined(node: ir.Node) -> bool:
    """Return whether a Q or DQ of activations is part of a joined input: `DQ(Concat(Q, Q))`.

    Part of it are all quantizers, the last DequantizeLinear, and the one between the two. An input
    that comes in parts is a Concat of their quantizers first.
    """
    if node.op_type == QUANTIZE:
        return any(joins_codes(reader) for reader in consumers(node))
    source = producer(node, 0)
    if source is None:
        return False
    return is_joined(source) if source.op_type == QUANTIZE else joins_codes(source)


def joins_codes(node: ir.Node) -> bool:
    """Return whether a node is a Concat of nothing but codes of activations."""
    return node.op_type == "Concat" and all(
        maker is not None and (maker.op_type == QUANTIZE or joins_codes(maker))
        for maker in producers(node)
    )


def is_joint(node: ir.Node | None) -> bool:
    """Return whether a node joins an input's codes and an inner product's, not parts of an input.

    Of the parts another Concat is made, with the inner product's.
    """
    if node is None or not joins_codes(node) or joins_digits(node):
        return False
    return not any(joins_codes(reader) for reader in consumers(node))


def joins_digits(node: ir.Node | None) -> bool:
    """Return whether a node joins the digits of a value, which are a new first axis of it."""
    return node is not None and joins_codes(node) and integer_attribute(node, "axis", -1) == 0


def quantizers_of(codes: ir.Node) -> list[ir.Node]:
    """Return the quantizers that codes of activations come from: itself, or those that it joins."""
    if codes.op_type == QUANTIZE:
        return [codes]
    return [found for node in producers(codes) if node for found in quantizers_of(node)]


def producers(node: ir.Node) -> list[ir.Node | None]:
    """Return the nodes that make a node's operands; None for a constant or an input."""
    return [value.producer() if value else None for value in node.inputs]


def producer(node: ir.Node | None, index: int) -> ir.Node | None:
    """Return the node that makes an operand of a node; None for a constant or an input."""
    value = operand(node, index)
    return value.producer() if value else None


def operand(node: ir.Node | None, index: int) -> ir.Value | None:
    """Return an operand of a node, None where it has none."""
    if node is None or index >= len(node.inputs):
        return None
    return node.inputs[index]


def consumers(node: ir.Node) -> list[ir.Node]:
    """Return the nodes that read a node's output, each once per operand."""
    return [use.node for use in node.outputs[0].uses()]


def is_int4(value: ir.Value | None) -> bool:
    """Return whether a value is an INT4 initializer."""
    return (
        value is not None
        and value.const_value is not None
        and value.const_value.dtype == ir.DataType.INT4
    )


def array(value: ir.Value | None) -> np.ndarray | None:
    """Return what an initializer holds; None for anything that is not constant."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def integer_attribute(node: ir.Node, name: str, default: int) -> int:
    """Return an integer attribute of a node, or the operator's default."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _dequantizer(value: ir.Value | None) -> ir.Node | None:
    """Return the DequantizeLinear that makes a value, or None."""
    node = value.producer() if value else None
    return node if node is not None and node.op_type == DEQUANTIZE else None
