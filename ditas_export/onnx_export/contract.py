"""What a file must be for ONNX Runtime, TensorRT and OpenVINO to run it fast and right.

Every rule has a name, and the reason for which a file that breaks it is refused. The reasons are
observations on real runtimes: ONNX Runtime 1.24.1 and 1.31.1, the builder of TensorRT for RTX 1.7,
and the documented limits of TensorRT 10 and 11.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export import onnxruntime_form
from ditas_export.onnx_export.lowering import UNSIGNED_ZERO_POINT
from ditas_export.onnx_export.patterns import (
    DEQUANTIZE,
    QUANTIZE,
    Product,
    array,
    consumers,
    int4_chain,
    int4_chains,
    integer_attribute,
    is_int4,
    is_joined,
    joins_codes,
    operand,
    producer,
    producers,
    products,
    quantizers_of,
)
from ditas_export.onnx_export.skeleton import INPUT_NAMES, IR_VERSION, OPSET, OUTPUT_NAME
from ditas_export.quantization.integer import MAX_MULTIPLIER
from ditas_export.quantization.weight_only import BLOCK_SIZES

INTEGER_BLOCK_SIZES = (16, 24, 32, 48, 64, 96, 128)
"""Block sizes of a two-level weight."""

Finding = tuple[str, str, str]
"""Node or value, what was found there, what was expected."""

MAX_LISTED = 20
"""Violations spelled out in an error; the rest are counted."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: `check` yields what breaks it."""

    name: str
    reason: str
    check: Callable[[ir.Model], Iterable[Finding]]


def check_contract(model: ir.Model) -> None:
    """Raise OnnxExportError, naming every broken rule, unless the runtimes can take the model.

    Args:
        model: a whole model, as exported or as loaded from a file.
    """
    broken = [
        f"{rule.name}: {where}: found {found}, expected {expected} ({rule.reason})"
        for rule in RULES
        for where, found, expected in rule.check(model)
    ]
    if not broken:
        return
    if len(broken) > MAX_LISTED:
        broken = [*broken[:MAX_LISTED], f"and {len(broken) - MAX_LISTED} more"]
    raise OnnxExportError("the graph breaks rules of the runtimes: " + "; ".join(broken))


def _quantizers(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """Yield Q and DQ nodes, or one kind of them."""
    for node in model.graph:
        if node.op_type in (op_types or (QUANTIZE, DEQUANTIZE)):
            yield node


def _activation_quantizers(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the QuantizeLinear nodes whose input is not a constant weight."""
    for node in _quantizers(model, QUANTIZE):
        source = producer(producer(node, 0), 0)
        if not (source and is_int4(source.inputs[0])):
            yield node


def _integer_products(model: ir.Model) -> Iterator[Product]:
    """Yield the MatMuls both of whose operands are dequantized."""
    for product in products(model.graph):
        if product.activation and product.weight:
            yield product


def _name(node: ir.Node) -> str:
    return node.name or node.op_type


def _default_domain(model: ir.Model) -> Iterator[Finding]:
    for domain in model.opset_imports:
        if domain not in ("", "ai.onnx"):
            yield "opset imports", f"domain {domain}", "the default domain only"
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            yield _name(node), f"{node.domain}::{node.op_type}", "an operator of ONNX itself"
    for function in model.functions.values():
        yield function.name, "a model-local function", "operators only"


def _opset(model: ir.Model) -> Iterator[Finding]:
    found, expected = model.opset_imports.get(""), _versions(model)[0]
    if found != expected:
        yield "opset imports", f"opset {found}", f"opset {expected}"


def _ir_version(model: ir.Model) -> Iterator[Finding]:
    expected = _versions(model)[1]
    if model.ir_version != expected:
        yield "the file", f"IR version {model.ir_version}", f"IR version {expected}"


def _versions(model: ir.Model) -> tuple[int, int]:
    """Return the opset and the IR version that a graph is to have."""
    if any(node.op_type == "Attention" for node in model.graph):
        return onnxruntime_form.OPSET, onnxruntime_form.IR_VERSION
    return OPSET, IR_VERSION


def _interface(model: ir.Model) -> Iterator[Finding]:
    kinds = (ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT64, ir.DataType.FLOAT)
    expected = list(zip((*INPUT_NAMES, OUTPUT_NAME), kinds, strict=True))
    values = [*model.graph.inputs, *model.graph.outputs]
    found = [(value.name, value.dtype) for value in values]
    if found != expected:
        yield "inputs and output", str(found), str(expected)
    for value in values:
        if value.shape is None or isinstance(value.shape[0], int):
            yield str(value.name), f"shape {value.shape}", "a dynamic first dimension"


def _constant_scales(model: ir.Model) -> Iterator[Finding]:
    for node in _quantizers(model):
        for index, kind in ((1, "scale"), (2, "zero point")):
            value = operand(node, index)
            if value is not None and value.const_value is None:
                yield _name(node), f"a {kind} computed at run time", "an initializer"


def _positive_scales(model: ir.Model) -> Iterator[Finding]:
    for node in _quantizers(model):
        scale = array(operand(node, 1))
        if scale is not None and not (np.isfinite(scale) & (scale > 0)).all():
            yield _name(node), f"a scale of {float(np.min(scale))}", "finite scales above 0"


def _zero_points(model: ir.Model) -> Iterator[Finding]:
    for node in _quantizers(model):
        value = operand(node, 2)
        zero = array(value)
        joined = is_joined(node)
        dtype, point, expected = ir.DataType.INT8, 0, "an INT8 zero point of zeros"
        if joined:
            dtype, point = ir.DataType.UINT8, UNSIGNED_ZERO_POINT
            expected = f"a UINT8 zero point of {point}"
        if value is None or zero is None:
            if node.op_type == QUANTIZE or joined:
                yield _name(node), "no zero point", expected
            continue
        assert value.const_value is not None  # it has an array
        if value.const_value.dtype != dtype or (zero != point).any():
            found = f"{value.const_value.dtype.name} {'non-zero' if zero.any() else 'zeros'}"
            yield _name(node), found, expected


def _no_output_type(model: ir.Model) -> Iterator[Finding]:
    for node in _quantizers(model):
        if "output_dtype" in node.attributes:
            yield _name(node), "the attribute output_dtype", "the type of the zero point alone"


def _one_float_type(model: ir.Model) -> Iterator[Finding]:
    for product in _integer_products(model):
        types = {
            value.const_value.dtype.name
            for value in (operand(product.activation, 1), operand(product.weight, 1))
            if value is not None and value.const_value is not None
        }
        if len(types) > 1:
            yield _name(product.node), f"scales in {sorted(types)}", "one float type"


def _scalar_activation_scale(model: ir.Model) -> Iterator[Finding]:
    for node in _activation_quantizers(model):
        scale = array(operand(node, 1))
        if scale is not None and scale.ndim:
            yield _name(node), f"a scale of shape {scale.shape}", "a scalar"


def _channel_weight_scale(model: ir.Model) -> Iterator[Finding]:
    for product in _integer_products(model):
        assert product.weight is not None  # an integer product has both
        scale = array(operand(product.weight, 1))
        axis = integer_attribute(product.weight, "axis", 1)
        blocked = integer_attribute(product.weight, "block_size", 0)
        if scale is not None and (scale.ndim > 1 or axis not in (1, -1) or blocked):
            found = f"a scale of shape {scale.shape} on axis {axis}, block size {blocked}"
            expected = "one scale, or one per output channel, axis 1 of [K, N]"
            yield _name(product.weight), found, expected


def _int4_feeds_dequantize(model: ir.Model) -> Iterator[Finding]:
    for value in model.graph.initializers.values():
        if not is_int4(value):
            continue
        for use in value.uses():
            if use.node.op_type != DEQUANTIZE:
                yield (
                    _name(use.node),
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
            yield _name(product.node), "INT4 dequantized straight into it", expected


def _weight_quantizer(model: ir.Model) -> Iterator[Finding]:
    for node in _quantizers(model, DEQUANTIZE):
        chain = int4_chain(node)
        if chain is None:
            continue
        codes, ones = array(chain.codes.inputs[0]), array(operand(chain.quantize, 1))
        if codes is None or ones is None:
            continue  # constant-scales says so
        if ones.shape != codes.shape[:1] or (ones != 1).any():
            yield _name(chain.quantize), f"a scale of shape {ones.shape}", "a 1 per output channel"
        multipliers = array(operand(chain.codes, 1))
        if multipliers is not None and not (
            np.isin(multipliers, np.arange(1, MAX_MULTIPLIER + 1)).all()
        ):
            expected = f"integers of 1 to {MAX_MULTIPLIER}"
            yield _name(chain.codes), "other block multipliers", expected


def _block_sizes(model: ir.Model) -> Iterator[Finding]:
    for node in _quantizers(model, DEQUANTIZE):
        if not is_int4(node.inputs[0]):
            continue
        size, axis = integer_attribute(node, "block_size", 0), integer_attribute(node, "axis", 1)
        straight = any(use.op_type == "MatMul" for use in consumers(node))
        allowed, along = (sorted(BLOCK_SIZES), 0) if straight else (INTEGER_BLOCK_SIZES, 1)
        if size not in allowed or axis != along:
            found = f"blocks of {size} on axis {axis}"
            yield _name(node), found, f"blocks of {allowed} on axis {along}, the input channels"


def _dequantize_feeds_product(model: ir.Model) -> Iterator[Finding]:
    for node in _quantizers(model, DEQUANTIZE):
        readers = [reader.op_type for reader in consumers(node)]
        if readers == ["Transpose"] and is_int4(node.inputs[0]):
            continue
        if _is_joint(producer(node, 0)):  # feeds a product for every part of the output
            readers = sorted(set(readers))
        if readers != ["MatMul"]:
            yield _name(node), f"read by {readers or 'nothing'}", "read by one MatMul"


def _quantizer_pairs(model: ir.Model) -> Iterator[Finding]:
    chained = [chain.quantize for chain in int4_chains(model.graph) if chain.concat]
    for node in _quantizers(model, QUANTIZE):
        readers = sorted(reader.op_type for reader in consumers(node))
        expected = [[DEQUANTIZE]]
        if is_joined(node):
            expected = [["Concat"], ["Concat", DEQUANTIZE]]
        elif node in chained:
            expected = [["Concat"]]
        if readers not in expected:
            yield _name(node), f"read by {readers or 'nothing'}", f"read by {expected[-1]}"


def _own_constants(model: ir.Model) -> Iterator[Finding]:
    readers: dict[str, set[str]] = defaultdict(set)
    for product in _integer_products(model):
        for node in (product.activation, product.weight):
            if node is None or is_joined(node):
                continue
            for index in (1, 2):
                if value := operand(node, index):
                    readers[str(value.name)].add(_name(product.node))
    for constant, names in readers.items():
        if len(names) > 1:
            yield constant, f"used for {sorted(names)}", "a constant for each MatMul"


def _is_joint(node: ir.Node | None) -> bool:
    """Return whether a node joins an input's codes and an inner product's, not parts of an input.

    Of the parts another Concat is made, with the inner product's.
    """
    if node is None or not joins_codes(node):
        return False
    return not any(joins_codes(reader) for reader in consumers(node))


def _joined_codes(model: ir.Model) -> Iterator[Finding]:
    for concat in filter(_is_joint, model.graph):
        makers = producers(concat)
        codes, inner = makers if len(makers) == 2 else (None, None)
        source = producer(producer(producer(inner, 0), 0), 0)  # of the inner product's input
        axis = integer_attribute(concat, "axis", 0)
        if codes is None or source is not codes or axis != -1:
            expected = "codes and those of a product of theirs, on the last axis"
            yield _name(concat), "another joint", expected
            continue
        if joins_codes(codes) and integer_attribute(codes, "axis", 0) != -1:
            yield _name(codes), "parts of an input on another axis", "the last axis"
        around = [*quantizers_of(codes), inner, *consumers(codes), *consumers(concat)]
        grids = {
            tuple(str(array(operand(node, index))) for index in (1, 2))
            for node in around
            if node is not concat
        }
        if len(grids) != 1:
            yield _name(concat), "codes of several scales", "one scale and zero point"
    for chain in int4_chains(model.graph):
        if chain.concat is None:
            continue
        added = operand(chain.concat, 1)
        constant = added.const_value if added and len(chain.concat.inputs) == 2 else None
        if (
            constant is None
            or constant.dtype != ir.DataType.INT8
            or integer_attribute(chain.concat, "axis", 1) != 0
        ):
            yield _name(chain.concat), "another joint", "INT8 constants below the rows, axis 0"


def _no_quantizer_elsewhere(model: ir.Model) -> Iterator[Finding]:
    for product in products(model.graph):
        if product.weight is None:
            yield _name(product.node), "INT8 activations times a float operand", "an INT8 weight"
        elif producer(product.weight, 0) and not int4_chain(product.weight):
            yield _name(product.node), "two quantized activations", "a weight as operand B"


def _following_add(product: Product) -> ir.Node | None:
    """Return the Add of a constant that alone reads an integer product, or None."""
    readers = consumers(product.node)
    if len(readers) == 1 and readers[0].op_type == "Add":
        constants = [value for value in readers[0].inputs if value and value.const_value]
        return readers[0] if constants else None
    return None


def _bias_rank(model: ir.Model) -> Iterator[Finding]:
    for product in _integer_products(model):
        add = _following_add(product)
        if add is None:
            continue
        rank = min(bias.ndim for value in add.inputs if (bias := array(value)) is not None)
        if rank < 3:
            expected = "a bias of shape [1, 1, N], or another operator between"
            yield _name(add), f"a bias of rank {rank} right after a MatMul", expected


def _cut_product(model: ir.Model) -> Iterator[Finding]:
    for product in _integer_products(model):
        add = _following_add(product)
        if add is None or (product.activation and is_joined(product.activation)):
            continue
        cuts = {node.op_type for node in consumers(add)} & {"Reshape", "Split", "Slice", "Gather"}
        if cuts:
            expected = "a multiplication between the MatMul and its bias"
            yield _name(product.node), f"MatMul, bias, {sorted(cuts)[0]}", expected


RULES = (
    Rule("default-domain", "no runtime shares another's operators", _default_domain),
    Rule("opset", "the first with INT4 and block scales, or with Attention", _opset),
    Rule("ir-version", "came with the opset; older runtimes refuse later ones", _ir_version),
    Rule("interface", "every backend feeds and reads the same tensors", _interface),
    Rule("constant-scales", "TensorRT takes build-time constants only", _constant_scales),
    Rule("positive-scales", "TensorRT's parser refuses others", _positive_scales),
    Rule(
        "zero-points",
        "TensorRT takes INT8 and zero only, ONNX defaults to UINT8 without one, and ONNX Runtime "
        "does not fuse a quantizer that has none, nor joined codes unless they are unsigned",
        _zero_points,
    ),
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
        "joined-codes",
        "one product of a weight and its branch has one scale for the inputs of both",
        _joined_codes,
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
    Rule(
        "cut-product",
        "TensorRT for RTX cuts the INT8 weight instead and multiplies in float",
        _cut_product,
    ),
)
"""All rules, in the order in which violations are listed."""
