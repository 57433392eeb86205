"""Rules of every QuantizeLinear, DequantizeLinear and integer product, in every form."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from ditas_export.onnx_export.patterns import (
    array,
    int4_chain,
    integer_attribute,
    operand,
    producer,
    products,
)
from ditas_export.onnx_export.rules.rule import (
    Finding,
    Rule,
    activation_quantizers,
    following_add,
    integer_products,
    name_of,
    quantizers,
)


def _constant_scales(model: ir.Model) -> Iterator[Finding]:
    for node in quantizers(model):
        for index, kind in ((1, "scale"), (2, "zero point")):
            value = operand(node, index)
            if value is not None and value.const_value is None:
                yield name_of(node), f"a {kind} computed at run time", "an initializer"


def _positive_scales(model: ir.Model) -> Iterator[Finding]:
    for node in quantizers(model):
        scale = array(operand(node, 1))
        if scale is not None and not (np.isfinite(scale) & (scale > 0)).all():
            yield name_of(node), f"a scale of {float(np.min(scale))}", "finite scales above 0"


def _no_output_type(model: ir.Model) -> Iterator[Finding]:
    for node in quantizers(model):
        if "output_dtype" in node.attributes:
            yield name_of(node), "the attribute output_dtype", "the type of the zero point alone"


def _one_float_type(model: ir.Model) -> Iterator[Finding]:
    for product in integer_products(model):
        types = {
            value.const_value.dtype.name
            for value in (operand(product.activation, 1), operand(product.weight, 1))
            if value is not None and value.const_value is not None
        }
        if len(types) > 1:
            yield name_of(product.node), f"scales in {sorted(types)}", "one float type"


def _scalar_activation_scale(model: ir.Model) -> Iterator[Finding]:
    for node in activation_quantizers(model):
        scale = array(operand(node, 1))
        if scale is not None and scale.ndim:
            yield name_of(node), f"a scale of shape {scale.shape}", "a scalar"


def _channel_weight_scale(model: ir.Model) -> Iterator[Finding]:
    for product in integer_products(model):
        assert product.weight is not None  # an integer product has both
        scale = array(operand(product.weight, 1))
        axis = integer_attribute(product.weight, "axis", 1)
        blocked = integer_attribute(product.weight, "block_size", 0)
        if scale is not None and (scale.ndim > 1 or axis not in (1, -1) or blocked):
            found = f"a scale of shape {scale.shape} on axis {axis}, block size {blocked}"
            expected = "one scale, or one per output channel, axis 1 of [K, N]"
            yield name_of(product.weight), found, expected


def _no_quantizer_elsewhere(model: ir.Model) -> Iterator[Finding]:
    for product in products(model.graph):
        if product.weight is None:
            yield name_of(product.node), "INT8 activations times a float operand", "an INT8 weight"
        elif producer(product.weight, 0) and not int4_chain(product.weight):
            yield name_of(product.node), "two quantized activations", "a weight as operand B"


def _bias_rank(model: ir.Model) -> Iterator[Finding]:
    for product in integer_products(model):
        add = following_add(product)
        if add is None:
            continue
        rank = min(bias.ndim for value in add.inputs if (bias := array(value)) is not None)
        if rank < 3:
            expected = "a bias of shape [1, 1, N], or another operator between"
            yield name_of(add), f"a bias of rank {rank} right after a MatMul", expected


RULES = (
    Rule("constant-scales", "TensorRT takes build-time constants only", _constant_scales),
    Rule("positive-scales", "TensorRT's parser refuses others", _positive_scales),
    Rule("no-output-type", "TensorRT compares it with the zero point's", _no_output_type),
    Rule("one-float-type", "a Cast would stand between DQ and MatMul", _one_float_type),
    Rule(
        "scalar-activation-scale",
        "TensorRT quantizes activations per tensor only",
        _scalar_activation_scale,
    ),
    Rule(
        "channel-weight-scale",
        "a scale along K is no factor of the product: ONNX Runtime computes it wrong in silence",
        _channel_weight_scale,
    ),
    Rule(
        "no-quantizer-elsewhere",
        "attention and residuals stay float: head sizes of DiT have no INT8 kernel",
        _no_quantizer_elsewhere,
    ),
    Rule(
        "bias-rank",
        "with fixed shapes ONNX Runtime makes a Gemm of it, float in 1.24, refused by 1.31",
        _bias_rank,
    ),
)
