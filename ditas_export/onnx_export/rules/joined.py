"""Rules of the joined form: UINT8 codes of an input and of its inner product in one product.

Of the digits of an input, which are such codes too, and of the weight that a joined product has,
whose last rows are its branch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import onnx_ir as ir

from ditas_export.onnx_export.forms.joined import UNSIGNED_ZERO_POINT
from ditas_export.onnx_export.patterns import (
    DEQUANTIZE,
    QUANTIZE,
    array,
    consumers,
    int4_chains,
    integer_attribute,
    is_joined,
    is_joint,
    joins_codes,
    joins_digits,
    operand,
    producer,
    producers,
    quantizers_of,
)
from ditas_export.onnx_export.rules.rule import (
    Finding,
    Rule,
    name_of,
    other_zero_point,
    quantizers,
)


def _joined(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """Yield the Q and DQ nodes of joined codes, or one kind of them."""
    return (node for node in quantizers(model, *op_types) if is_joined(node))


def _joined_zero_points(model: ir.Model) -> Iterator[Finding]:
    for node in _joined(model):
        if found := other_zero_point(node, ir.DataType.UINT8, UNSIGNED_ZERO_POINT):
            yield name_of(node), found, f"a UINT8 zero point of {UNSIGNED_ZERO_POINT}"


def _joined_readers(model: ir.Model) -> Iterator[Finding]:
    for node in _joined(model, DEQUANTIZE):
        readers = [reader.op_type for reader in consumers(node)]
        codes = producer(node, 0)
        if is_joint(codes) or joins_digits(codes):  # feeds several products
            readers = sorted(set(readers))
        reader = "Sub" if codes and any(map(joins_digits, consumers(codes))) else "MatMul"
        if readers != [reader]:
            yield name_of(node), f"read by {readers or 'nothing'}", f"read by one {reader}"
    for node in _joined(model, QUANTIZE):
        readers = sorted(reader.op_type for reader in consumers(node))
        joints = readers.count("Concat")  # one of every linear that reads the input
        if not joints or readers not in (
            ["Concat"] * joints,
            sorted(["Concat", DEQUANTIZE] * joints),
        ):
            expected = f"read by {['Concat', DEQUANTIZE]}"
            yield name_of(node), f"read by {readers or 'nothing'}", expected


def _joined_codes(model: ir.Model) -> Iterator[Finding]:
    for concat in filter(is_joint, model.graph):
        makers = producers(concat)
        codes, inner = makers if len(makers) == 2 else (None, None)
        source = producer(producer(producer(inner, 0), 0), 0)  # of the inner product's input
        axis = integer_attribute(concat, "axis", 0)
        if codes is None or source is not codes or axis != -1:
            expected = "codes and those of a product of theirs, on the last axis"
            yield name_of(concat), "another joint", expected
            continue
        if joins_codes(codes) and integer_attribute(codes, "axis", 0) != -1:
            yield name_of(codes), "parts of an input on another axis", "the last axis"
        around = [*quantizers_of(codes), *consumers(codes), *consumers(concat)]
        if inner is None or not _on_one_grid(inner, *around):
            yield name_of(concat), "codes of several scales", "one scale and zero point"


def _digits(model: ir.Model) -> Iterator[Finding]:
    for concat in filter(joins_digits, model.graph):
        makers = producers(concat)
        for coarse, fine in pairwise(makers):
            rest = producer(producer(fine, 0), 0)
            digit = producer(rest, 1)
            if (
                rest is None
                or rest.op_type != "Sub"
                or operand(rest, 0) is not operand(coarse, 0)
                or producer(digit, 0) is not coarse
            ):
                yield name_of(concat), "another joint", "digits of what those before leave"
                break
        readers = [reader for maker in makers if maker for reader in consumers(maker)]
        if not _on_one_grid(*quantizers_of(concat), *readers, *consumers(concat)):
            yield name_of(concat), "digits of several scales", "one scale and zero point"


def _on_one_grid(*nodes: ir.Node) -> bool:
    """Return whether all quantizers among some nodes have one scale and zero point."""
    grids = {
        tuple(str(array(operand(node, index))) for index in (1, 2))
        for node in nodes
        if node.op_type in (QUANTIZE, DEQUANTIZE)
    }
    return len(grids) == 1


def _joined_rows(model: ir.Model) -> Iterator[Finding]:
    for chain in int4_chains(model.graph):
        if chain.concat is None:
            continue
        readers = [reader.op_type for reader in consumers(chain.quantize)]
        if readers != ["Concat"]:
            yield name_of(chain.quantize), f"read by {readers}", "read by one Concat"
        added = operand(chain.concat, 1)
        constant = added.const_value if added and len(chain.concat.inputs) == 2 else None
        if (
            constant is None
            or constant.dtype != ir.DataType.INT8
            or integer_attribute(chain.concat, "axis", 1) != 0
        ):
            yield name_of(chain.concat), "another joint", "INT8 constants below the rows, axis 0"


RULES = (
    Rule(
        "joined-zero-points",
        "ONNX Runtime joins codes, and shares a quantizer, where they are unsigned alone",
        _joined_zero_points,
    ),
    Rule(
        "joined-readers",
        "anything between, or another reader, keeps ONNX Runtime from fusing it",
        _joined_readers,
    ),
    Rule(
        "joined-codes",
        "one product of a weight and its branch has one scale for the inputs of both",
        _joined_codes,
    ),
    Rule(
        "digits",
        "digits of one value, each counting its share of the one before, have one scale",
        _digits,
    ),
    Rule(
        "joined-rows",
        "one product of a weight and its branch has the integers of both as one constant",
        _joined_rows,
    ),
)
