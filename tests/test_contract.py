"""Every rule of the contract: an exported file keeps it, and one break of it is named."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper
from quantized_fixture import exported, exported_reference

from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export.contract import MAX_LISTED, RULES, check_contract

QKV = "blocks.0.attn.qkv"
PART = f"{QKV}/output_1"
"""Of qkv where it gives its output in parts."""
FC2 = "blocks.0.mlp.fc2"
DIGITS = "adaLN_modulation"
"""Where the digits are written that all modulation linears read."""
Graph = onnx.GraphProto


@pytest.fixture(scope="module")
def files() -> dict[str, onnx.ModelProto]:
    """One file of each form, without low rank where the form is at its barest."""
    paths = {
        "int4": exported(layout="int4", ranges="token", rank=4),
        "static": exported(layout="int8", ranges="static", rank=0),
        "joined": exported(layout="int4", ranges="static", rank=4, target="onnxruntime"),
        "digits": exported(adaln_bits=8, rank=4, target="onnxruntime"),
        "weight_only": exported(activation_bits=16, block_size=32, adaln_bits=4),
        "reference": exported_reference(),
    }
    return {name: onnx.load(str(path)) for name, path in paths.items()}


def node(graph: Graph, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.name == name)


def set_constant(graph: Graph, name: str, array: np.ndarray) -> None:
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def add_constant(graph: Graph, name: str, array: np.ndarray) -> str:
    graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def insert_before(graph: Graph, name: str, index: int, op_type: str, *extra: str) -> None:
    """Put a node between operand `index` of a node and what makes it."""
    reader = node(graph, name)
    position = list(graph.node).index(reader)
    made = helper.make_node(op_type, [reader.input[index], *extra], [f"{name}_new"], name="New")
    reader.input[index] = f"{name}_new"
    graph.node.insert(position, made)


def foreign_operator(model: onnx.ModelProto) -> None:
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    node(model.graph, f"{QKV}/Neg").domain = "com.microsoft"


def other_opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 23


def other_ir_version(model: onnx.ModelProto) -> None:
    model.ir_version = 11


def other_input(model: onnx.ModelProto) -> None:
    model.graph.input[1].type.tensor_type.elem_type = onnx.TensorProto.FLOAT


def constant_in_float64(model: onnx.ModelProto) -> None:
    set_constant(model.graph, f"{QKV}/row_scale", np.ones(288))


def cast_to_float64(model: onnx.ModelProto) -> None:
    product = node(model.graph, f"{QKV}/MatMul").output[0]
    cast = helper.make_node("Cast", [product], ["wide"], name="Wide", to=onnx.TensorProto.DOUBLE)
    model.graph.node.append(cast)


def attribute_in_float64(model: onnx.ModelProto) -> None:
    value = numpy_helper.from_array(np.ones(1), "value")
    model.graph.node.append(helper.make_node("Constant", [], ["wide"], name="Wide", value=value))


def fixed_batch(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def scale_at_run_time(model: onnx.ModelProto) -> None:
    insert_before(model.graph, f"{QKV}/input_Quantize", 1, "Abs")


def negative_scale(model: onnx.ModelProto) -> None:
    set_constant(model.graph, f"{QKV}/row_scale", -np.ones(288, np.float32))


def no_zero_point(model: onnx.ModelProto) -> None:
    del node(model.graph, f"{QKV}/input_Quantize").input[2]


def asymmetric(model: onnx.ModelProto) -> None:
    set_constant(model.graph, f"{QKV}/input_zero_point", np.array(3, np.int8))


def unsigned(model: onnx.ModelProto) -> None:
    set_constant(model.graph, f"{QKV}/input_zero_point", np.array(0, np.uint8))


def output_type(model: onnx.ModelProto) -> None:
    attribute = helper.make_attribute("output_dtype", onnx.TensorProto.INT8)
    node(model.graph, f"{QKV}/input_Quantize").attribute.append(attribute)


def mixed_float_types(model: onnx.ModelProto) -> None:
    set_constant(model.graph, f"{QKV}/row_scale", np.ones(288, np.float16))


def scale_per_input_channel(model: onnx.ModelProto) -> None:
    set_constant(model.graph, f"{QKV}/input_scale", np.ones(96, np.float32))


def weight_scale_along_inputs(model: onnx.ModelProto) -> None:
    set_constant(model.graph, f"{QKV}/row_scale", np.ones(96, np.float32))
    node(model.graph, f"{QKV}/weight_Dequantize").attribute[0].i = 0


def int4_elsewhere(model: onnx.ModelProto) -> None:
    node(model.graph, f"{QKV}/codes_Dequantize").op_type = "Cast"


def int4_straight(model: onnx.ModelProto) -> None:
    node(model.graph, f"{QKV}/MatMul").input[1] = f"{QKV}/codes_Dequantize_output_0"


def scalar_weight_quantizer(model: onnx.ModelProto) -> None:
    set_constant(model.graph, f"{QKV}/ones", np.array(1, np.float16))


def fractional_multipliers(model: onnx.ModelProto) -> None:
    set_constant(model.graph, f"{QKV}/multipliers", np.full((288, 2), 1.5, np.float16))


def odd_block(model: onnx.ModelProto) -> None:
    attributes = node(model.graph, f"{QKV}/codes_Dequantize").attribute
    next(attribute for attribute in attributes if attribute.name == "block_size").i = 40


def node_between(model: onnx.ModelProto) -> None:
    insert_before(model.graph, f"{QKV}/MatMul", 1, "Relu")


def shared_quantizer(model: onnx.ModelProto) -> None:
    node(model.graph, f"{QKV}/right_input_Dequantize").input[0] = f"{QKV}/input_Quantize_output_0"


def shared_scale(model: onnx.ModelProto) -> None:
    for name in ("Quantize", "Dequantize"):
        node(model.graph, f"{QKV}/right_input_{name}").input[1] = f"{QKV}/input_scale"


def quantized_attention(model: onnx.ModelProto) -> None:
    attention = node(model.graph, "blocks.0.attn/MatMul")
    attention.input[0] = f"{QKV}/input_Dequantize_output_0"


INT4_BREAKS = [
    (foreign_operator, "default-domain"),
    (other_opset, "opset"),
    (other_ir_version, "ir-version"),
    (other_input, "interface"),
    (fixed_batch, "interface"),
    (constant_in_float64, "no-float64"),
    (cast_to_float64, "no-float64"),
    (attribute_in_float64, "no-float64"),
    (scale_at_run_time, "constant-scales"),
    (negative_scale, "positive-scales"),
    (no_zero_point, "zero-points"),
    (asymmetric, "zero-points"),
    (unsigned, "zero-points"),
    (output_type, "no-output-type"),
    (mixed_float_types, "one-float-type"),
    (scale_per_input_channel, "scalar-activation-scale"),
    (weight_scale_along_inputs, "channel-weight-scale"),
    (int4_elsewhere, "int4-feeds-dequantize"),
    (int4_straight, "int4-form"),
    (scalar_weight_quantizer, "weight-quantizer"),
    (fractional_multipliers, "weight-quantizer"),
    (odd_block, "block-sizes"),
    (node_between, "dequantize-feeds-product"),
    (shared_quantizer, "quantizer-pairs"),
    (shared_scale, "own-constants"),
    (quantized_attention, "no-quantizer-elsewhere"),
]


def rank_one_bias(model: onnx.ModelProto) -> None:
    set_constant(model.graph, "blocks.0.mlp.fc2/bias", np.zeros(96, np.float32))


def bare_qkv(model: onnx.ModelProto) -> None:
    node(model.graph, f"{QKV}/AddBias").input[0] = f"{QKV}/MatMul_output_0"
    model.graph.node.remove(node(model.graph, f"{QKV}/Halve"))


def wide_weight_only_block(model: onnx.ModelProto) -> None:
    attributes = node(model.graph, f"{QKV}/weight_Dequantize").attribute
    next(attribute for attribute in attributes if attribute.name == "block_size").i = 48


def older_opset(model: onnx.ModelProto) -> None:
    """Of the forms without `Attention`."""
    model.opset_import[0].version = 21


def older_ir_version(model: onnx.ModelProto) -> None:
    model.ir_version = 10


def signed_joined_codes(model: onnx.ModelProto) -> None:
    set_constant(model.graph, f"{QKV}/input_zero_point", np.array(0, np.int8))


def other_unsigned_zero_point(model: onnx.ModelProto) -> None:
    set_constant(model.graph, f"{QKV}/input_zero_point", np.array(127, np.uint8))


def second_reader_of_joined_codes(model: onnx.ModelProto) -> None:
    twin = copy.deepcopy(node(model.graph, f"{QKV}/input_Dequantize"))
    twin.name, twin.output[0] = "Twin", "twin"
    model.graph.node.append(twin)
    node(model.graph, f"{QKV}/right_MatMul").input[0] = "twin"


def second_reader_of_chained_rows(model: onnx.ModelProto) -> None:
    rows = f"{PART}/weight_Quantize_output_0"
    model.graph.node.append(helper.make_node("Identity", [rows], ["copy"], name="Copy"))


def unsigned_without_zero_point(model: onnx.ModelProto) -> None:
    del node(model.graph, f"{QKV}/joined_Dequantize").input[2]


def other_scale(model: onnx.ModelProto, name: str) -> None:
    other = add_constant(model.graph, "other_scale", np.array(0.5, np.float32))
    node(model.graph, f"{QKV}/{name}").input[1] = other


def other_scale_of_inner_codes(model: onnx.ModelProto) -> None:
    other_scale(model, "inner_Quantize")


def other_scale_of_joined_codes(model: onnx.ModelProto) -> None:
    other_scale(model, "joined_Dequantize")


def other_scale_of_the_inner_input(model: onnx.ModelProto) -> None:
    other_scale(model, "input_Dequantize")


def swapped_joint(model: onnx.ModelProto) -> None:
    joint = node(model.graph, f"{QKV}/Join")
    joint.input[:] = joint.input[::-1]


def joint_on_tokens(model: onnx.ModelProto) -> None:
    node(model.graph, f"{QKV}/Join").attribute[0].i = 1


def joint_with_another_linears_codes(model: onnx.ModelProto) -> None:
    other = "blocks.1.attn.qkv/inner_Quantize_output_0"
    node(model.graph, f"{QKV}/Join").input[1] = other


def parts_of_an_input_on_tokens(model: onnx.ModelProto) -> None:
    node(model.graph, f"{FC2}/Codes").attribute[0].i = 1


def other_scale_of_a_part(model: onnx.ModelProto) -> None:
    other = add_constant(model.graph, "other_scale", np.array(0.5, np.float32))
    node(model.graph, f"{FC2}/input_1/input_Quantize").input[1] = other


def part_left_out_of_the_joint(model: onnx.ModelProto) -> None:
    parts = node(model.graph, f"{FC2}/Codes").input
    joint = node(model.graph, f"{FC2}/Join").input
    joint[:] = [*parts[:-1], joint[1]]


def reader_of_joined_codes_that_is_no_product(model: onnx.ModelProto) -> None:
    value = f"{QKV}/joined_Dequantize_output_0"
    model.graph.node.append(helper.make_node("Identity", [value], ["copy"], name="Copy"))


def second_product_of_the_inner_input(model: onnx.ModelProto) -> None:
    product = node(model.graph, f"{QKV}/right_MatMul")
    twin = helper.make_node("MatMul", list(product.input), ["twin"], name="Twin")
    model.graph.node.append(twin)


def rows_beside_rows(model: onnx.ModelProto) -> None:
    node(model.graph, f"{PART}/Rows").attribute[0].i = 1


def unsigned_rows_of_the_branch(model: onnx.ModelProto) -> None:
    set_constant(model.graph, f"{PART}/left_codes", np.ones((4, 96), np.uint8))


def rows_of_three(model: onnx.ModelProto) -> None:
    node(model.graph, f"{PART}/Rows").input.append(f"{PART}/left_codes")


def rows_of_the_branch_at_run_time(model: onnx.ModelProto) -> None:
    insert_before(model.graph, f"{PART}/Rows", 1, "Abs")


def digits_of_another_value(model: onnx.ModelProto) -> None:
    node(model.graph, f"{DIGITS}/digit_1/Sub").input[0] = f"{DIGITS}/Unsqueeze_output_0"


def digits_in_another_order(model: onnx.ModelProto) -> None:
    digits = node(model.graph, f"{DIGITS}/Digits").input
    digits[:] = [digits[1], digits[0], digits[2]]


def other_scale_of_a_digit(model: onnx.ModelProto) -> None:
    other = add_constant(model.graph, "other_scale", np.array(0.5, np.float32))
    node(model.graph, f"{DIGITS}/digit_2/Quantize").input[1] = other


def other_scale_of_all_digits(model: onnx.ModelProto) -> None:
    other = add_constant(model.graph, "other_scale", np.array(0.5, np.float32))
    node(model.graph, f"{DIGITS}/digits_Dequantize").input[1] = other


def second_reader_of_a_digit(model: onnx.ModelProto) -> None:
    value = f"{DIGITS}/digit_0/Dequantize_output_0"
    model.graph.node.append(helper.make_node("Identity", [value], ["copy"], name="Copy"))


OTHER_BREAKS = [
    ("digits", digits_of_another_value, "digits"),
    ("digits", digits_in_another_order, "digits"),
    ("digits", other_scale_of_a_digit, "digits"),
    ("digits", other_scale_of_all_digits, "digits"),
    ("digits", second_reader_of_a_digit, "joined-readers"),
    ("joined", older_opset, "opset"),
    ("joined", older_ir_version, "ir-version"),
    ("joined", signed_joined_codes, "joined-zero-points"),
    ("joined", other_unsigned_zero_point, "joined-zero-points"),
    ("joined", unsigned_without_zero_point, "joined-zero-points"),
    ("joined", other_scale_of_inner_codes, "joined-codes"),
    ("joined", other_scale_of_joined_codes, "joined-codes"),
    ("joined", other_scale_of_the_inner_input, "joined-codes"),
    ("joined", swapped_joint, "joined-codes"),
    ("joined", joint_on_tokens, "joined-codes"),
    ("joined", joint_with_another_linears_codes, "joined-codes"),
    ("joined", parts_of_an_input_on_tokens, "joined-codes"),
    ("joined", other_scale_of_a_part, "joined-codes"),
    ("joined", part_left_out_of_the_joint, "joined-codes"),
    ("joined", reader_of_joined_codes_that_is_no_product, "joined-readers"),
    ("joined", second_product_of_the_inner_input, "joined-readers"),
    ("joined", rows_beside_rows, "joined-rows"),
    ("joined", unsigned_rows_of_the_branch, "joined-rows"),
    ("joined", rows_of_three, "joined-rows"),
    ("joined", rows_of_the_branch_at_run_time, "joined-rows"),
    ("joined", second_reader_of_joined_codes, "joined-readers"),
    ("joined", second_reader_of_chained_rows, "joined-rows"),
    ("static", rank_one_bias, "bias-rank"),
    ("joined", rank_one_bias, "bias-rank"),
    ("static", bare_qkv, "cut-product"),
    ("weight_only", wide_weight_only_block, "block-sizes"),
]

ALL_BREAKS = [("int4", *pair) for pair in INT4_BREAKS] + OTHER_BREAKS


def test_every_rule_has_a_name_a_reason_and_a_break() -> None:
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.reason for rule in RULES)
    assert {rule for _, _, rule in ALL_BREAKS} == {rule.name for rule in RULES}


@pytest.mark.parametrize("name", ["int4", "static", "joined", "digits", "weight_only", "reference"])
def test_exported_files_keep_every_rule(files: dict[str, onnx.ModelProto], name: str) -> None:
    check_contract(ir.from_proto(files[name]))


@pytest.mark.parametrize(
    ("name", "damage", "rule"),
    ALL_BREAKS,
    ids=[f"{name}-{damage.__name__}" for name, damage, _ in ALL_BREAKS],
)
def test_a_break_is_named(
    files: dict[str, onnx.ModelProto],
    name: str,
    damage: Callable[[onnx.ModelProto], None],
    rule: str,
) -> None:
    model = copy.deepcopy(files[name])
    damage(model)
    with pytest.raises(
        OnnxExportError, match=f"[:;] {rule}: .*found .*expected .*\\(.+\\)"
    ) as caught:
        check_contract(ir.from_proto(model))
    assert "\n" not in str(caught.value)


def test_a_function_is_no_plain_operator(files: dict[str, onnx.ModelProto]) -> None:
    model = copy.deepcopy(files["int4"])
    body = [helper.make_node("Relu", ["x"], ["y"])]
    model.functions.append(
        helper.make_function("", "Own", ["x"], ["y"], body, [helper.make_opsetid("", 21)])
    )
    with pytest.raises(OnnxExportError, match="default-domain: Own: found a model-local function"):
        check_contract(ir.from_proto(model))


def test_two_quantized_activations_are_refused(files: dict[str, onnx.ModelProto]) -> None:
    model = copy.deepcopy(files["int4"])
    node(model.graph, f"{QKV}/MatMul").input[1] = "blocks.0.attn.proj/input_Dequantize_output_0"
    with pytest.raises(OnnxExportError, match="two quantized activations"):
        check_contract(ir.from_proto(model))


def test_a_long_list_is_cut(files: dict[str, onnx.ModelProto]) -> None:
    model = copy.deepcopy(files["int4"])
    broken = 0
    for part in model.graph.node:
        if part.op_type == "QuantizeLinear" and len(part.input) > 2:
            del part.input[2]
            broken += 1
    with pytest.raises(OnnxExportError, match=f"and {broken - MAX_LISTED} more$"):
        check_contract(ir.from_proto(model))


def test_an_odd_number_of_codes_is_refused(files: dict[str, onnx.ModelProto]) -> None:
    model = copy.deepcopy(files["int4"])
    tensor = next(t for t in model.graph.initializer if t.name == f"{QKV}/codes")
    del tensor.dims[:]
    tensor.dims.extend([3, 3])
    tensor.raw_data = bytes(5)
    with pytest.raises(OnnxExportError, match="an odd number of 4-bit codes"):
        check_contract(ir.from_proto(model))
