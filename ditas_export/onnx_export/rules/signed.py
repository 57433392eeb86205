"""Rules of signed codes: weights in every form, activations in all but the joined one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import onnx_ir as ir

from ditas_export.onnx_export.patterns import (
    DEQUANTIZE,
    QUANTIZE,
    array,
    consumers,
    int4_chains,
    is_int4,
    is_joined,
    operand,
)
from ditas_export.onnx_export.rules.rule import (
    Finding,
    Rule,
    following_add,
    integer_products,
    name_of,
    other_zero_point,
    quantizers,
)


def _signed(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """Yield the Q and DQ nodes of signed codes, or one kind of them."""
    return (node for node in quantizers(model, *op_types) if not is_joined(node))


def _zero_points(model: ir.Model) -> Iterator[Finding]:
    for node in _signed(model):
        if node.op_type == DEQUANTIZE and array(operand(node, 2)) is None:
            continue  # zeros of the codes' own type; constant-scales looks at others
        if found := other_zero_point(node, ir.DataType.INT8, 0):
            yield name_of(node), found, "an INT8 zero point of zeros"


def _dequantize_feeds_product(model: ir.Model) -> Iterator[Finding]:
    for node in _signed(model, DEQUANTIZE):
        readers = [reader.op_type for reader in consumers(node)]
        if readers == ["Transpose"] and is_int4(node.inputs[0]):
            continue
        if readers != ["MatMul"]:
            yield name_of(node), f"read by {readers or 'nothing'}", "read by one MatMul"


def _quantizer_pairs(model: ir.Model) -> Iterator[Finding]:
    joined = [chain.quantize for chain in int4_chains(model.graph) if chain.concat]
    for node in _signed(model, QUANTIZE):
        readers = [reader.op_type for reader in consumers(node)]
        if node not in joined and readers != [DEQUANTIZE]:
            yield name_of(node), f"read by {readers or 'nothing'}", f"read by {[DEQUANTIZE]}"


def _own_constants(model: ir.Model) -> Iterator[Finding]:
    readers: dict[str, set[str]] = defaultdict(set)
    for product in integer_products(model):
        for node in (product.activation, product.weight):
            if node is None or is_joined(node):
                continue
            for index in (1, 2):
                if value := operand(node, index):
                    readers[str(value.name)].add(name_of(product.node))
    for constant, names in readers.items():
        if len(names) > 1:
            yield constant, f"used for {sorted(names)}", "a constant for each MatMul"


def _cut_product(model: ir.Model) -> Iterator[Finding]:
    for product in integer_products(model):
        add = following_add(product)
        if add is None or (product.activation and is_joined(product.activation)):
            continue
        cuts = {node.op_type for node in consumers(add)} & {"Reshape", "Split", "Slice", "Gather"}
        if cuts:
            expected = "a multiplication between the MatMul and its bias"
            yield name_of(product.node), f"MatMul, bias, {sorted(cuts)[0]}", expected


RULES = (
    Rule(
        "zero-points",
        "TensorRT takes INT8 and zero only, ONNX defaults to UINT8 without one, and ONNX Runtime "
        "does not fuse a quantizer that has none",
        _zero_points,
    ),
    Rule(
        "dequantize-feeds-product",
        "anything between, or a second reader, keeps the runtimes from fusing it",
        _dequantize_feeds_product,
    ),
    Rule(
        "quantizer-pairs",
        "a shared quantizer of signed codes keeps every reader in float",
        _quantizer_pairs,
    ),
    Rule(
        "own-constants",
        "ONNX Runtime does not fuse MatMuls of signed codes that share them",
        _own_constants,
    ),
    Rule(
        "cut-product",
        "TensorRT for RTX cuts the INT8 weight instead and multiplies in float",
        _cut_product,
    ),
)
