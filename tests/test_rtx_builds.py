"""NVIDIA's own builder as judge: what it makes of each linear, from its log. No GPU needed."""

from __future__ import annotations

import importlib.util
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from quantized_fixture import TINY, exported, exported_reference, quantized_tiny_dit

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.engine import child
from ditas_export.engine.build import build_engine
from ditas_export.engine.layers import (
    BuiltLinear,
    EngineLayer,
    Kernel,
    built_linears,
    engine_layers,
)
from ditas_export.engine.options import BatchRange, BuildOptions
from ditas_export.engine.products import RTX
from ditas_export.engine.report import layer_report
from ditas_export.errors import EngineError
from ditas_export.families.load import load_model
from ditas_export.families.registry import linear_names
from ditas_export.onnx_export.export import export_onnx
from ditas_export.onnx_export.file_facts import read_config, read_form

pytest.importorskip("tensorrt_rtx", reason="extra [rtx]")

LINEARS = list(linear_names(TINY))
FLOAT_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMS = [
    *itertools.product(("portable",), FLOAT_TYPES, ("token", "static"), ("int4", "int8"), (0, 5)),
    *itertools.product(("tensorrt",), FLOAT_TYPES, ("token", "static"), ("int4", "int8"), (5,)),
]
"""Target, float type, ranges, layout, rank: all there are."""

QUICK = [
    *itertools.product(("portable",), ("fp32", "fp16"), ("token", "static"), ("int4",), (5,)),
    ("tensorrt", "bf16", "token", "int8", 5),
    # the form whose qkv the builder multiplies in float unless something guards it
    ("portable", "fp32", "static", "int8", 0),
]
"""What is built in every run of the tests."""

MOST_KERNELS = {
    ("tensorrt", "token", "int8", 5): 16,  # no multiple of 8: zeros fill it up
    ("tensorrt", "token", "int8", 32): 16,
    ("tensorrt", "token", "int4", 32): 20,
    ("tensorrt", "static", "int8", 32): 14,
    ("tensorrt", "static", "int4", 32): 18,
    ("tensorrt", "token", "int8", 0): 12,
    ("tensorrt", "static", "int8", 0): 10,
}
"""Target, ranges, layout, rank -> kernels per block of the bundled model in fp16."""


def build_log(path: Path, **settings: Any) -> str:
    """Build a file for the builder's log alone."""
    with tempfile.TemporaryDirectory() as folder:
        return build_engine(path, Path(folder) / "plan", product=RTX, **settings).log


def layers_of(path: Path) -> list[EngineLayer]:
    return engine_layers(build_log(path))


def linears_of(path: Path, names: list[str] = LINEARS) -> dict[str, BuiltLinear]:
    return built_linears(layers_of(path), names)


def require_integer_products(path: Path, names: list[str], *, layout: str) -> None:
    """Build a file; every linear must be an INT8×INT8 GEMM, INT4 kept in layout int4 alone."""
    linears = linears_of(path, names)
    kernels = {name: linear.kernel for name, linear in linears.items()}
    assert kernels == dict.fromkeys(names, Kernel.INTEGER)
    assert {linear.keeps_int4 for linear in linears.values()} == {layout == "int4"}


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(
            form, marks=() if form in QUICK else pytest.mark.slow, id="-".join(map(str, form))
        )
        for form in FORMS
    ],
)
def test_every_form_of_the_bundled_model_is_all_integer_products(
    tmp_path: Path, form: tuple[str, str, str, str, int]
) -> None:
    target, precision, ranges, layout, rank = form
    model = load_model("digits").model
    quantized = quantized_tiny_dit(model, block_size=48, rank=rank)
    folded = fold_smoothing(quantized, dtype=FLOAT_TYPES[precision])
    path = tmp_path / "digits.onnx"
    export_onnx(folded, path, layout=layout, ranges=ranges, target=target)
    names = list(linear_names(model.config))
    require_integer_products(path, names, layout=layout)


@pytest.mark.parametrize(
    "form",
    [
        ("token", "int8", 32),
        pytest.param(("static", "int8", 32), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_bfloat16_takes_the_kernels_of_float16(tmp_path: Path, form: tuple[str, str, int]) -> None:
    ranges, layout, rank = form
    quantized = quantized_tiny_dit(load_model("digits").model, rank=rank)
    path = tmp_path / "digits.onnx"
    reports = []
    for dtype in (torch.float16, torch.bfloat16):
        folded = fold_smoothing(quantized, dtype=dtype)
        export_onnx(folded, path, layout=layout, ranges=ranges, target="tensorrt")
        reports.append(layer_report(layers_of(path), read_config(path), read_form(path)))
    half, brain = reports
    assert brain.blocks == half.blocks
    assert all(block.has_fused_attention for block in brain.blocks)
    assert brain.extra_streams == half.extra_streams == 0


def test_the_low_rank_factor_joins_the_integer_product() -> None:
    layers = layers_of(exported(layout="int4", ranges="token", rank=4))
    for name in LINEARS:
        (product,) = (
            layer for layer in layers if layer.multiplies and f"{name}/MatMul" in layer.onnx_nodes
        )
        assert f"{name}/right_MatMul" in product.onnx_nodes


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(
            form, marks=() if form == next(iter(MOST_KERNELS)) else pytest.mark.slow,
            id="-".join(map(str, form)),
        )
        for form in MOST_KERNELS
    ],
)  # fmt: skip
def test_a_block_takes_no_more_kernels_than_recorded(
    tmp_path: Path, form: tuple[str, str, str, int]
) -> None:
    target, ranges, layout, rank = form
    model = load_model("digits").model
    folded = fold_smoothing(quantized_tiny_dit(model, rank=rank), dtype=torch.float16)
    path = tmp_path / "digits.onnx"
    export_onnx(folded, path, layout=layout, ranges=ranges, target=target)
    layers = layers_of(path)
    report = layer_report(layers, read_config(path), read_form(path))
    assert not report.lost
    first, *others = report.blocks  # the first reads the embedders' output too
    assert max(block.kernels for block in others) <= MOST_KERNELS[form]
    assert first.kernels <= MOST_KERNELS[form] + 1
    assert all(block.has_fused_attention for block in report.blocks)
    assert report.extra_streams == 0
    assert not [layer.name for layer in layers if multiplies_int8_in_float(layer)]


def multiplies_int8_in_float(layer: EngineLayer) -> bool:
    """Return whether a product reads INT8 activations beside an operand that is not INT8."""
    operands = (*layer.input_types, *layer.constant_types)
    integers = operands.count("Int8")
    return layer.multiplies and "Int8" in layer.input_types and integers < 2


def test_half_precision_attention_is_one_kernel() -> None:
    path = exported_reference(torch.float16)
    log = build_log(path)
    names = [layer.name for layer in engine_layers(log)]
    assert sum("gemm_mha" in name for name in names) == TINY.depth
    report = layer_report(engine_layers(log), read_config(path), read_form(path))
    assert [block.has_fused_attention for block in report.blocks] == [True] * TINY.depth


@pytest.mark.parametrize(("bits", "layout"), [(4, "int4"), (8, "int8")])
def test_float_activations_read_integer_weights(bits: int, layout: str) -> None:
    settings = {"weight_bits": bits, "activation_bits": 16, "block_size": 32}
    path = exported(layout=layout, adaln_bits=bits, **settings)
    report = layer_report(layers_of(path), read_config(path), read_form(path))
    adaln = [f"blocks.{block}.adaLN_modulation.1" for block in range(TINY.depth)]
    assert set(report.linears) == {*LINEARS, *adaln}
    assert {linear.kernel for linear in report.linears.values()} == {Kernel.WEIGHT_ONLY}
    assert {linear.keeps_int4 for linear in report.linears.values()} == {bits == 4}
    assert not report.lost


def test_the_float_model_has_float_products(tmp_path: Path) -> None:
    path, plan = exported_reference(), tmp_path / "file.plan"
    options = BuildOptions(batch=BatchRange(smallest=1, usual=4, largest=4))
    built = build_engine(path, plan, product=RTX, options=options)
    linears = built_linears(engine_layers(built.log), LINEARS)
    assert {linear.kernel for linear in linears.values()} == {Kernel.FLOAT}
    assert plan.stat().st_size == built.size_bytes
    assert built.version
    (absent,) = built_linears(engine_layers(built.log), ["blocks.9.mlp.fc1"]).values()
    assert absent.kernel == Kernel.UNKNOWN


def edited(path: Path, edit: Any) -> Path:
    """Write a damaged copy of a file."""
    model = onnx.load(str(exported(layout="int4", ranges="token", rank=0)))
    edit(model)
    onnx.save(model, str(path))
    return path


def test_the_naive_form_is_refused_in_one_line(tmp_path: Path) -> None:
    def straight(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.name == "blocks.0.attn.qkv/MatMul":
                node.input[1] = "blocks.0.attn.qkv/weight_Transpose_output_0"

    with pytest.raises(EngineError, match="could not build") as caught:
        build_log(edited(tmp_path / "file.onnx", straight))
    assert "\n" not in str(caught.value)


def test_a_crash_of_the_builder_is_one_line(tmp_path: Path) -> None:
    def scalar_quantizer(model: onnx.ModelProto) -> None:
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            if not node.name.endswith("/weight_Quantize"):
                continue
            for index in (1, 2):
                first = numpy_helper.to_array(constants[node.input[index]])[0]
                name = f"{node.name}_{index}"
                model.graph.initializer.append(numpy_helper.from_array(np.array(first), name))
                node.input[index] = name

    with pytest.raises(EngineError, match=r"crashed on .* \(signal \d+\)") as caught:
        build_log(edited(tmp_path / "file.onnx", scalar_quantizer))
    assert "\n" not in str(caught.value)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    path = exported_reference()
    with pytest.raises(EngineError, match="batch sizes 2, 1, 8"):
        BatchRange(smallest=2, usual=1)
    with pytest.raises(EngineError, match=r"did not finish .* within 0.01 s"):
        build_log(path, timeout_s=0.01)
    with pytest.raises(EngineError, match="lists no layers"):
        engine_layers("VERBOSE nothing of interest")
    unknown = BuildOptions(compute_capabilities=("8.9", "9.0"))
    with pytest.raises(EngineError, match=r"compute capability 9\.0; only 7\.5, 8\.0, .* 12\.1$"):
        build_log(path, options=unknown)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install \"ditas-export\[rtx\]\""):
        build_log(path)


def test_options_reach_the_builder() -> None:
    path = exported(layout="int4", ranges="token", rank=4)
    build_log(path, options=BuildOptions(compute_capabilities=("8.9", "12.0"), opt_level=1))
    with pytest.raises(EngineError, match="sm75"):
        build_log(path, options=BuildOptions(compute_capabilities=("7.5",)))
    with pytest.raises(EngineError, match="workspace"):
        build_log(path, options=BuildOptions(workspace_gib=0.001))


def test_cancelling_stops_the_builder(tmp_path: Path) -> None:
    def interrupt(phase: str, done: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(exported(), tmp_path / "plan", product=RTX, on_progress=interrupt)
    assert not list(tmp_path.iterdir())


def test_a_silent_failure_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child.sys, "executable", "false")
    with pytest.raises(EngineError, match="no reason given"):
        build_log(exported_reference())
