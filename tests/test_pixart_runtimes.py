"""A PixArt's files in OpenVINO, and what NVIDIA's builder makes of them. No GPU needed."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch
from pixart_fixture import SIGMA, pixart, pixart_inputs
from quantized_fixture import quantized_tiny_dit, snr_db

from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.fold import FoldedModel, fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.engine.build import build_engine, input_shapes
from ditas_export.engine.layers import Kernel, built_linears, engine_layers
from ditas_export.engine.options import BatchRange
from ditas_export.engine.products import RTX
from ditas_export.families.registry import linear_names
from ditas_export.onnx_export.export import export_onnx

WIDE = SIGMA
LINEARS = list(linear_names(WIDE))


@cache
def folded(dtype: torch.dtype) -> FoldedModel:
    quantized = quantize_adaln(quantized_tiny_dit(pixart(WIDE), block_size=48, rank=4), 8)
    return fold_smoothing(quantized, dtype=dtype)


@cache
def exported(dtype: torch.dtype, ranges: Any, layout: Any, target: Any) -> Path:
    path = Path(mkdtemp()) / "out.onnx"
    export_onnx(folded(dtype), path, ranges=ranges, layout=layout, target=target)
    return path


def test_openvino_computes_what_was_folded() -> None:
    pytest.importorskip("openvino", reason="extra [openvino]")
    from ditas_export.runtime.openvino_runner import OpenVINORunner

    path = exported(torch.float32, "token", "int4", "portable")
    expected = fake_quantized_model(folded(torch.float32), ranges="token")
    with OpenVINORunner(path, threads=2, as_is=True) as runner:
        for batch, tokens in ((3, 7), (1, 2)):
            inputs = pixart_inputs(WIDE, batch=batch, tokens=tokens)
            assert snr_db(expected(**inputs), runner(inputs)) > 45  # rounding ties


@pytest.mark.skipif(not importlib.util.find_spec("tensorrt_rtx"), reason="extra [rtx]")
@pytest.mark.parametrize(
    ("dtype", "ranges", "layout", "target"),
    [
        (torch.float32, "token", "int4", "portable"),
        pytest.param(torch.float16, "token", "int8", "tensorrt"),
        pytest.param(torch.float16, "static", "int8", "tensorrt", marks=pytest.mark.slow),
        pytest.param(torch.float16, "static", "int4", "portable", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, "token", "int8", "tensorrt", marks=pytest.mark.slow),
    ],
)
def test_every_linear_is_an_integer_product(
    dtype: torch.dtype, ranges: str, layout: str, target: str, tmp_path: Path
) -> None:
    """Rows and tokens are dynamic: the builder is given a range of both."""
    shapes = input_shapes(WIDE, BatchRange())
    sizes = [shape[1] for shape in shapes["encoder_hidden_states"]]
    assert sizes == [1, 300, 512]
    path = exported(dtype, ranges, layout, target)
    log = build_engine(path, tmp_path / "plan", product=RTX).log
    linears = built_linears(engine_layers(log), LINEARS)
    assert {name: each.kernel for name, each in linears.items()} == dict.fromkeys(
        LINEARS, Kernel.INTEGER
    )
