"""What the layer report reads from build logs: of TensorRT for RTX 1.7 and of TensorRT 10.10."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from quantized_fixture import TINY

from ditas_export.engine.layers import (
    Kernel,
    built_linears,
    engine_layers,
    layers_from_inspector,
)
from ditas_export.engine.report import (
    LayerReport,
    expected_kernels,
    layer_report,
    with_known_of,
)
from ditas_export.errors import EngineError
from ditas_export.families.registry import linear_names
from ditas_export.onnx_export.form import FileForm

QKV = "blocks.0.attn.qkv"


def tensor(name: str, kind: str, *, key: str = "Datatype") -> str:
    return f"{{ Name: {name}, Dimensions: [-1,96], {key}: {kind}, Format: (Linear) }}"


def line(
    name: str,
    kind: str,
    inputs: list[str],
    nodes: list[str],
    *,
    constants: list[str] | None = None,
    stream: int = 0,
) -> str:
    listed = "" if constants is None else f"Constants: [ {', '.join(constants)}], "
    layers = "".join(f"[ONNX Layer: {node}]" for node in nodes)
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {', '.join(inputs)}], {listed}"
        f"Outputs: [ {tensor('y', 'Half')}], TacticName: tactic, StreamId: {stream}, "
        f"Metadata: {layers}"
    )


def classic_line(kind: str) -> str:
    """Return a GEMM as TensorRT 10.10 writes it: without constants."""
    inputs = [tensor("x", kind, key="Format/Datatype")]
    return line(f"{QKV}/MatMul_myl0_7", "gemm", inputs, [f"{QKV}/MatMul"])


@pytest.mark.parametrize(("kind", "kernel"), [("Int8", Kernel.INTEGER), ("Half", Kernel.FLOAT)])
def test_without_constants_the_first_operand_tells(kind: str, kernel: Kernel) -> None:
    linears = built_linears(engine_layers(classic_line(kind)), [QKV])
    assert linears[QKV].kernel == kernel


def test_one_int8_operand_is_not_enough_where_constants_are_listed() -> None:
    constants = [tensor("weight", "Half")]
    text = line("gemm", "gemm", [tensor("x", "Int8")], [f"{QKV}/MatMul"], constants=constants)
    assert built_linears(engine_layers(text), [QKV])[QKV].kernel == Kernel.FLOAT


CLASSIC = ("gemm", "MatrixMultiply", "CaskGemmMatrixMultiply", "CublasLtMatrixMultiply")
"""Kinds of products in TensorRT, with and without its graph compiler."""


@pytest.mark.parametrize("layer_type", CLASSIC)
def test_kinds_of_products_are_known(layer_type: str) -> None:
    inputs = [tensor("x", "Int8", key="Format/Datatype")]
    text = line("product", layer_type, inputs, [f"{QKV}/MatMul"])
    (built,) = built_linears(engine_layers(text), [QKV]).values()
    assert (built.kernel, built.layer) == (Kernel.INTEGER, "product")


@pytest.mark.parametrize(
    ("words", "kernel"),
    [
        ("Row major Int8 format", Kernel.INTEGER),
        ("Thirty-two wide channel vectorized row major INT8 format", Kernel.INTEGER),
        ("Row major linear FP32", Kernel.FLOAT),
        ("Row major linear BF16 format", Kernel.FLOAT),
        ("BFloat16", Kernel.FLOAT),
        ("N/A due to dynamic shapes", Kernel.UNKNOWN),
        ("a word unheard of", Kernel.UNKNOWN),
    ],
)
def test_a_type_may_be_in_a_description(words: str, kernel: Kernel) -> None:
    assert built_linears(engine_layers(classic_line(words)), [QKV])[QKV].kernel == kernel
    (layer,) = layers_from_inspector(json.dumps({"Layers": [inspected(words)]}))
    assert built_linears([layer], [QKV])[QKV].kernel == kernel


@pytest.mark.parametrize(
    ("kind", "constants", "kernel"),
    [
        ("Int8", None, Kernel.UNKNOWN),  # it may dequantize first
        ("Half", ["Int4"], Kernel.WEIGHT_ONLY),
        ("Half", ["Half"], Kernel.FLOAT),
        ("Half", ["of another kind"], Kernel.UNKNOWN),
    ],
)
def test_a_fusion_that_holds_the_product(
    kind: str, constants: list[str] | None, kernel: Kernel
) -> None:
    listed = None if constants is None else [tensor("w", word) for word in constants]
    text = line("f", "fusion", [tensor("x", kind)], [f"{QKV}/MatMul"], constants=listed)
    assert built_linears(engine_layers(text), [QKV])[QKV].kernel == kernel


def test_what_no_layer_shows_is_unknown_and_not_lost() -> None:
    form = FileForm(
        float_type="fp16", weight_bits=4, activation_bits=8, layout="int8", ranges="token",
        activation_codes="int8", target="portable",
    )  # fmt: skip
    layers = engine_layers(line("product", "gemm", [tensor("x", "Half")], [f"{QKV}/MatMul"]))
    report = layer_report(layers, TINY, form)
    assert report.lost == (QKV,)  # a float operand is known, and no INT8
    assert len(report.unknown) == 4 * TINY.depth - 1
    assert {built.layer for path, built in report.linears.items() if path != QKV} == {""}
    assert report.to_dict()["unknown"] == list(report.unknown)


def test_unlisted_weights_of_a_float_product_are_unknown() -> None:
    form = FileForm(
        float_type="fp16", weight_bits=4, activation_bits=16, layout="int4", target="portable"
    )
    layers = engine_layers(classic_line("Half"))
    assert QKV in layer_report(layers, TINY, form).unknown
    listed = line("p", "gemm", [tensor("x", "Half")], [f"{QKV}/MatMul"], constants=[])
    report = layer_report(engine_layers(listed), TINY, form)
    assert report.lost == (QKV,)


def test_the_log_keeps_the_word_on_what_the_inspector_does_not_know() -> None:
    form = FileForm(
        float_type="fp16", weight_bits=4, activation_bits=8, layout="int8", ranges="token",
        activation_codes="int8", target="portable",
    )  # fmt: skip
    paths = list(linear_names(TINY))

    def log_of(kind: str) -> LayerReport:
        lines = [
            line(path, "gemm", [tensor("x", kind, key="Format/Datatype")], [f"{path}/MatMul"])
            for path in paths
        ]
        return layer_report(engine_layers("\n".join(lines)), TINY, form)

    def inspector_of(*kinds: str) -> LayerReport:
        entries = [
            inspected(kind, Name=path, Metadata=f"[ONNX Layer: {path}/MatMul]")
            for path, kind in zip(paths, kinds, strict=True)
        ]
        return layer_report(layers_from_inspector(json.dumps({"Layers": entries})), TINY, form)

    dynamic = "N/A due to dynamic shapes"
    blind = inspector_of(*[dynamic] * len(paths))
    assert blind.unknown == tuple(paths)
    assert with_known_of(blind, log_of("Int8")) == log_of("Int8")
    partly = inspector_of("Row major linear FP16 format", *[dynamic] * (len(paths) - 1))
    merged = with_known_of(partly, log_of("Int8"))
    assert (merged.lost, merged.unknown) == (tuple(paths[:1]), ())
    sighted = inspector_of(*["Int8"] * len(paths))
    assert with_known_of(sighted, log_of("Half")) is sighted


def inspected(kind: str, **changes: Any) -> dict[str, Any]:
    """Return a layer as the inspector of TensorRT 10 describes it."""
    tensors = [{"Name": "x", "Location": "Device", "Dimensions": [2, 96], "Format/Datatype": kind}]
    return {
        "Name": "gemm",
        "LayerType": "gemm",
        "Inputs": tensors,
        "Outputs": tensors,
        "TacticName": "sm80_xmma",
        "StreamId": 0,
        "Metadata": f"[ONNX Layer: {QKV}/MatMul]\u001e[ONNX Layer: {QKV}/AddBias]",
    } | changes


@pytest.mark.parametrize(
    ("kind", "kernel"),
    [
        ("Thirty-two wide channel vectorized row major Int8 format", Kernel.INTEGER),
        ("Int8", Kernel.INTEGER),
        ("Row major linear FP16 format", Kernel.FLOAT),
        ("Half", Kernel.FLOAT),
    ],
)
def test_an_inspector_says_the_same(kind: str, kernel: Kernel) -> None:
    (layer,) = layers_from_inspector(json.dumps({"Layers": [inspected(kind)], "Bindings": []}))
    assert layer.onnx_nodes == {f"{QKV}/MatMul", f"{QKV}/AddBias"}
    assert built_linears([layer], [QKV])[QKV].kernel == kernel


def test_an_inspector_may_list_constants() -> None:
    constants = [{"Name": f"{QKV}/codes", "Datatype": "Int4"}]
    (layer,) = layers_from_inspector(
        json.dumps({"Layers": [inspected("Half", Constants=constants)]})
    )
    linear = built_linears([layer], [QKV])[QKV]
    assert (linear.kernel, linear.keeps_int4) == (Kernel.WEIGHT_ONLY, True)


@pytest.mark.parametrize("text", ["", "{}", '{"Layers": ["gemm"]}', '{"Layers": [{"Name": "x"}]}'])
def test_an_inspector_without_details_is_refused(text: str) -> None:
    with pytest.raises(EngineError, match=r"does not describe layers .* detailed profiling"):
        layers_from_inspector(text)


def test_neighbours_blocks_and_streams() -> None:
    int8 = [tensor("x", "Int8"), tensor("w", "Int8")]
    log = "\n".join(
        (
            line("shape", "shape_call", [], [], constants=[]),
            line("adaLN", "gemm", [], ["blocks.1.adaLN_modulation.1/MatMul"], constants=[]),
            line("first", "kgen", [], ["Add", "blocks.0.norm1/LayerNormalization"], constants=[]),
            line("in", "kgen", [], ["blocks.0/Mul", f"{QKV}/input_Quantize"], constants=[]),
            line("expand", "kgen", [], [f"{QKV}/weight_Quantize"], constants=[], stream=1),
            line("wait", "wait", [], [], constants=[], stream=1),
            line("product", "gemm", int8, [f"{QKV}/MatMul"], constants=[]),
            line("out", "kgen", [], [f"{QKV}/AddBias", "blocks.0.attn/Slice"], constants=[]),
            line("mha", "kgen", [], [f"blocks.0.attn/{name}" for name in
                                     ("MatMul", "Softmax", "MatMul_1")], constants=[]),
            line("two", "kgen", [], ["blocks.0/Add_5", "blocks.1.norm1/Add"], constants=[]),
            line("second", "kgen", [], ["blocks.1/Mul"], constants=[]),
        )
    )  # fmt: skip
    linear = built_linears(engine_layers(log), [QKV])[QKV]
    assert linear.kernel == Kernel.INTEGER
    assert linear.fused_before == ("blocks.0/Mul",)
    assert linear.fused_inside == ()
    assert linear.fused_after == ("blocks.0.attn/Slice",)
    report = layer_report(engine_layers(log), TINY, FileForm(float_type="fp32"))
    assert [block.kernels for block in report.blocks] == [7, 1]
    assert [block.has_fused_attention for block in report.blocks] == [True, False]
    assert (report.kernels, report.extra_streams) == (9, 1)
    assert not report.linears


def test_what_a_form_asks_for() -> None:
    int8 = FileForm(
        float_type="fp32", weight_bits=4, activation_bits=8, layout="int4", ranges="token",
        activation_codes="int8", target="portable",
    )  # fmt: skip
    asked = expected_kernels(TINY, int8)
    assert set(asked.values()) == {Kernel.INTEGER}
    assert len(asked) == 4 * TINY.depth
    asked = expected_kernels(
        TINY,
        dataclasses.replace(
            int8, activation_bits=16, adaln_bits=8, ranges=None, activation_codes=None
        ),
    )
    assert set(asked.values()) == {Kernel.WEIGHT_ONLY}
    assert "blocks.1.adaLN_modulation.1" in asked
    assert expected_kernels(TINY, FileForm(float_type="fp32")) == {}
