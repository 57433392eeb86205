"""Rules of the graph as a whole, in every form."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from ditas_export.families.registry import config_of
from ditas_export.onnx_export import onnxruntime_form
from ditas_export.onnx_export.file_facts import CONFIG_KEY
from ditas_export.onnx_export.interface import OUTPUT_NAME, input_types
from ditas_export.onnx_export.rules.rule import Finding, Rule, name_of
from ditas_export.onnx_export.skeleton import IR_VERSION, OPSET
from ditas_export.text_files import parse_json


def _default_domain(model: ir.Model) -> Iterator[Finding]:
    for domain in model.opset_imports:
        if domain not in ("", "ai.onnx"):
            yield "opset imports", f"domain {domain}", "the default domain only"
    for node in model.graph:
        if node.domain not in ("", "ai.onnx"):
            yield name_of(node), f"{node.domain}::{node.op_type}", "an operator of ONNX itself"
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
    values = [*model.graph.inputs, *model.graph.outputs]
    found = [(value.name, value.dtype) for value in values]
    config = config_of(parse_json(model.metadata_props[CONFIG_KEY]))
    inputs = {name: ir.DataType(kind) for name, (kind, _) in input_types(config).items()}
    expected = [*inputs.items(), (OUTPUT_NAME, ir.DataType.FLOAT)]
    if found != expected:
        yield "inputs and output", str(found), str(expected)
    for value in values:
        if value.shape is None or isinstance(value.shape[0], int):
            yield str(value.name), f"shape {value.shape}", "a dynamic first dimension"
    for value in model.graph.inputs:
        sizes = input_types(config).get(str(value.name), (0, ()))[1]
        for place, size in enumerate(sizes, start=1):
            if isinstance(size, str) and value.shape and isinstance(value.shape[place], int):
                yield str(value.name), f"shape {value.shape}", f"a dynamic dimension {size}"


def _no_float64(model: ir.Model) -> Iterator[Finding]:
    outputs = (value for node in model.graph for value in node.outputs)
    for value in (*model.graph.inputs, *model.graph.initializers.values(), *outputs):
        known = value.dtype if value.const_value is None else value.const_value.dtype
        if known == ir.DataType.DOUBLE:
            yield str(value.name), "float64", "float32 or the float side's type"
    for node in model.graph:
        for name, attribute in node.attributes.items():
            is_tensor = attribute.type == ir.AttributeType.TENSOR
            if is_tensor and attribute.as_tensor().dtype == ir.DataType.DOUBLE:
                yield name_of(node), f"a float64 {name}", "float32 or the float side's type"
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and to.as_int() == ir.DataType.DOUBLE:
            yield name_of(node), "a cast to float64", "float32 or the float side's type"


RULES = (
    Rule("default-domain", "no runtime shares another's operators", _default_domain),
    Rule("opset", "the first with INT4 and block scales, or with Attention", _opset),
    Rule("ir-version", "came with the opset; older runtimes refuse later ones", _ir_version),
    Rule("no-float64", "TensorRT has none", _no_float64),
    Rule("interface", "every backend feeds and reads the same tensors", _interface),
)
