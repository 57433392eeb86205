"""Modulation linears of ONNX Runtime's form: INT8 products that compute what float inputs would."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from quantized_fixture import TINY, example_inputs, exported, fed, snr_db, tiny_folded

from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.families.registry import family_of
from ditas_export.runtime.inputs import feed_of
from ditas_export.runtime.onnxruntime_runner import matmul_kernels

MODULE = "blocks.1.adaLN_modulation.1"


@pytest.fixture(scope="module")
def path() -> Path:
    """A file whose modulation linears have 8-bit weights, in ONNX Runtime's form."""
    return exported(adaln_bits=8, target="onnxruntime")


def linear_session(path: Path) -> onnxruntime.InferenceSession:
    """Return a session, told nothing, of one modulation linear without its bias."""
    model = onnx.shape_inference.infer_shapes(onnx.load(str(path)))
    (x,) = (node.input[0] for node in model.graph.node if node.name == "adaLN_modulation/Unsqueeze")
    only = onnx.utils.Extractor(model).extract_model([x], [f"{MODULE}/Sum_output_0"])
    return onnxruntime.InferenceSession(
        only.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def weight(path: Path) -> np.ndarray:
    """Return that linear's weight, (K, N), in float64."""
    codes, scale = (
        numpy_helper.to_array(tensor).astype(np.float64)
        for name in ("int8_codes", "row_scale")
        for tensor in onnx.load(str(path)).graph.initializer
        if tensor.name == f"{MODULE}/{name}"
    )
    return np.asarray(codes * scale)


@pytest.mark.parametrize("magnitude", [1e-4, 1.0, 1e6])
def test_the_products_are_those_of_float_inputs(path: Path, magnitude: float) -> None:
    x = np.random.default_rng(0).standard_normal((5, 96)).astype(np.float32) * magnitude
    x[1] = 0
    x[2] = magnitude
    x[3, 1:] *= 1e-6
    session = linear_session(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.astype(np.float32)})
    exact = x.astype(np.float64) @ weight(path)
    largest = np.abs(x).max(axis=1, keepdims=True) * np.abs(weight(path)).sum(axis=0)
    assert (np.abs(y - exact) <= 2.0**-22 * largest).all()


def test_what_is_not_finite_stays_so(path: Path) -> None:
    x = np.ones((2, 96), np.float32)
    x[1, 7] = np.nan
    session = linear_session(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x})
    assert np.isfinite(y[0]).all()
    assert not np.isfinite(y[1]).any()


def test_the_digits_are_written_once(path: Path) -> None:
    names = [node.name for node in onnx.load(str(path)).graph.node]
    assert sum(name.endswith("/Digits") for name in names) == 1


def test_every_product_runs_on_integers(path: Path) -> None:
    kernels = matmul_kernels(path)
    assert {kernels[f"{module}/MatMul"] for module in family_of(TINY).modulations(TINY)} == {
        "MatMulIntegerToFloat"
    }


def test_a_session_that_is_told_nothing_reads_floats_too(path: Path) -> None:
    inputs = example_inputs(batch=3)
    fake = fake_quantized_model(tiny_folded(adaln_bits=8), ranges="token", target="onnxruntime")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, feed_of(TINY, fed(*inputs)))
    assert snr_db(fake(*inputs), torch.from_numpy(found)) > 64  # a tie of the block linears


def test_4_bits_stay_as_they_are() -> None:
    path = exported(adaln_bits=4, target="onnxruntime")
    assert not any("igit" in node.name for node in onnx.load(str(path)).graph.node)
