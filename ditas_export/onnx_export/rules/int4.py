"""Rules of INT4 weights: under INT8 activations a chain, under float ones straight."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ditas_export.onnx_export.patterns import (
    DEQUANTIZE,
    array,
    consumers,
    int4_chain,
    integer_attribute,
    is_int4,
    operand,
    products,
)
from ditas_export.onnx_export.rules.rule import Finding, Rule, name_of, quantizers
from ditas_export.quantization.integer import MAX_MULTIPLIER
from ditas_export.quantization.weight_only import BLOCK_SIZES

INTEGER_BLOCK_SIZES = (16, 24, 32, 48, 64, 96, 128)
"""Block sizes of a two-level weight."""


def _int4_feeds_dequantize(model: ir.Model) -> Iterator[Finding]:
    for value in model.graph.initializers.values():
        if not is_int4(value):
            continue
        for use in value.uses():
            if use.node.op_type != DEQUANTIZE:
                yield (
                    name_of(use.node),
                    f"INT4 into {use.node.op_type}",
                    "INT4 into a DequantizeLinear",
                )
        assert value.const_value is not None  # is_int4 looked
        if value.const_value.size % 2:
            yield str(value.name), "an odd number of 4-bit codes", "whole bytes"


def _int4_form(model: ir.Model) -> Iterator[Finding]:
    for product in products(model.graph):
        if product.activation and product.weight and is_int4(product.weight.inputs[0]):
            expected = "DQ → Transpose → Q → DQ between INT4 codes and INT8 activations"
            yield name_of(product.node), "INT4 dequantized straight into it", expected


def _weight_quantizer(model: ir.Model) -> Iterator[Finding]:
    for node in quantizers(model, DEQUANTIZE):
        chain = int4_chain(node)
        if chain is None:
            continue
        codes, ones = array(chain.codes.inputs[0]), array(operand(chain.quantize, 1))
        if codes is None or ones is None:
            continue  # constant-scales says so
        if ones.shape != codes.shape[:1] or (ones != 1).any():
            yield (
                name_of(chain.quantize),
                f"a scale of shape {ones.shape}",
                "a 1 per output channel",
            )
        multipliers = array(operand(chain.codes, 1))
        if multipliers is not None and not (
            np.isin(multipliers, np.arange(1, MAX_MULTIPLIER + 1)).all()
        ):
            expected = f"integers of 1 to {MAX_MULTIPLIER}"
            yield name_of(chain.codes), "other block multipliers", expected


def _block_sizes(model: ir.Model) -> Iterator[Finding]:
    for node in quantizers(model, DEQUANTIZE):
        if not is_int4(node.inputs[0]):
            continue
        size, axis = integer_attribute(node, "block_size", 0), integer_attribute(node, "axis", 1)
        straight = any(use.op_type == "MatMul" for use in consumers(node))
        allowed, along = (sorted(BLOCK_SIZES), 0) if straight else (INTEGER_BLOCK_SIZES, 1)
        if size not in allowed or axis != along:
            found = f"blocks of {size} on axis {axis}"
            yield name_of(node), found, f"blocks of {allowed} on axis {along}, the input channels"


RULES = (
    Rule("int4-feeds-dequantize", "TensorRT refuses INT4 elsewhere", _int4_feeds_dequantize),
    Rule(
        "int4-form",
        "with INT8 activations TensorRT's build fails and ONNX Runtime falls back to float",
        _int4_form,
    ),
    Rule(
        "weight-quantizer",
        "TensorRT's builder crashes on a scalar there, and integers are what makes it exact",
        _weight_quantizer,
    ),
    Rule("block-sizes", "kernels exist for these only", _block_sizes),
)
