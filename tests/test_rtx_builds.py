"""NVIDIA's own builder as judge: what it makes of every linear, read from its log. No GPU needed."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from quantized_fixture import TINY, quantized_tiny_dit, tiny_dit

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.dit.sites import linear_sites
from ditas_export.engine import build
from ditas_export.engine.build import BatchRange, build_rtx
from ditas_export.engine.layers import Kernel, built_linears, engine_layers
from ditas_export.errors import EngineError
from ditas_export.onnx_export.export import export_onnx, export_reference

pytest.importorskip("tensorrt_rtx", reason="extra [rtx]")

MODEL = tiny_dit()
LINEARS = [site.name for site in linear_sites(TINY.depth)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("ranges", ["token", "static"])
@pytest.mark.parametrize("layout", ["int4", "int8"])
@pytest.mark.parametrize("rank", [0, 4])
def test_every_linear_is_an_integer_product(
    tmp_path: Path, dtype: torch.dtype, ranges: str, layout: str, rank: int
) -> None:
    path = tmp_path / "file.onnx"
    folded = fold_smoothing(quantized_tiny_dit(MODEL, rank=rank), dtype=dtype)
    export_onnx(folded, path, layout=layout, ranges=ranges)
    linears = built_linears(build_rtx(path).log, LINEARS)
    assert {name: linear.kernel for name, linear in linears.items()} == dict.fromkeys(
        LINEARS, Kernel.INTEGER
    )
    assert {linear.keeps_int4 for linear in linears.values()} == {layout == "int4"}


def test_the_low_rank_factor_joins_the_integer_product(tmp_path: Path) -> None:
    path = tmp_path / "file.onnx"
    export_onnx(fold_smoothing(quantized_tiny_dit(MODEL), dtype=torch.float16), path)
    layers = engine_layers(build_rtx(path).log)
    for name in LINEARS:
        (product,) = (
            layer for layer in layers if layer.multiplies and f"{name}/MatMul" in layer.onnx_nodes
        )
        assert f"{name}/right_MatMul" in product.onnx_nodes


def test_half_precision_attention_is_one_kernel(tmp_path: Path) -> None:
    path = tmp_path / "file.onnx"
    export_reference(tiny_dit().half(), path)
    names = [layer.name for layer in engine_layers(build_rtx(path).log)]
    assert sum("gemm_mha" in name for name in names) == TINY.depth


@pytest.mark.parametrize(("bits", "layout"), [(4, "int4"), (8, "int8")])
def test_float_activations_read_integer_weights(tmp_path: Path, bits: int, layout: str) -> None:
    path = tmp_path / "file.onnx"
    quantized = quantized_tiny_dit(MODEL, weight_bits=bits, activation_bits=16, block_size=32)
    export_onnx(fold_smoothing(quantized), path, layout=layout, adaln_bits=bits)
    linears = built_linears(build_rtx(path).log, LINEARS)
    assert {linear.kernel for linear in linears.values()} == {Kernel.WEIGHT_ONLY}
    assert {linear.keeps_int4 for linear in linears.values()} == {bits == 4}


def test_the_float_model_has_float_products(tmp_path: Path) -> None:
    path, plan = tmp_path / "file.onnx", tmp_path / "file.plan"
    export_reference(MODEL, path)
    built = build_rtx(path, plan_path=plan, batch=BatchRange(smallest=1, usual=4, largest=4))
    linears = built_linears(built.log, LINEARS)
    assert {linear.kernel for linear in linears.values()} == {Kernel.FLOAT}
    assert plan.stat().st_size == built.size_bytes
    assert built.version
    with pytest.raises(EngineError, match="no layer of the engine multiplies blocks.9.mlp.fc1"):
        built_linears(built.log, ["blocks.9.mlp.fc1"])


def edited(path: Path, edit: Any) -> Path:
    """Export a file and damage it."""
    export_onnx(fold_smoothing(quantized_tiny_dit(MODEL, rank=0)), path)
    model = onnx.load(str(path))
    edit(model)
    onnx.save(model, str(path))
    return path


def test_the_naive_form_is_refused_in_one_line(tmp_path: Path) -> None:
    def straight(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.name == "blocks.0.attn.qkv/MatMul":
                node.input[1] = "blocks.0.attn.qkv/weight_Transpose_output_0"

    with pytest.raises(EngineError, match="could not build") as caught:
        build_rtx(edited(tmp_path / "file.onnx", straight))
    assert "\n" not in str(caught.value)


def test_a_crash_of_the_builder_is_one_line(tmp_path: Path) -> None:
    def scalar_ones(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name.endswith(("/ones", "/weight_zero_point")):
                array = numpy_helper.to_array(tensor)[0]
                if tensor.name.endswith("/ones"):
                    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        for node in model.graph.node:
            if node.name.endswith("/weight_Quantize"):
                name = f"{node.name}_zero"
                zero = numpy_helper.from_array(array_of_zero(), name)
                model.graph.initializer.append(zero)
                node.input[2] = name

    with pytest.raises(EngineError, match=r"crashed on .* \(signal \d+\)") as caught:
        build_rtx(edited(tmp_path / "file.onnx", scalar_ones))
    assert "\n" not in str(caught.value)


def array_of_zero() -> Any:
    return torch.zeros((), dtype=torch.int8).numpy()


def test_refusals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.onnx"
    export_reference(MODEL, path)
    with pytest.raises(EngineError, match="batch sizes 2, 1, 8"):
        BatchRange(smallest=2, usual=1)
    with pytest.raises(EngineError, match=r"did not finish .* within 0.01 s"):
        build_rtx(path, timeout_s=0.01)
    with pytest.raises(EngineError, match="lists no layers"):
        engine_layers("VERBOSE nothing of interest")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install \"ditas-export\[rtx\]\""):
        build_rtx(path)


def test_a_silent_failure_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.onnx"
    export_reference(MODEL, path)
    failed = subprocess.CompletedProcess([], returncode=1, stdout="", stderr="")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(EngineError, match="no reason given"):
        build_rtx(path)
