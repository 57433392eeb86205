"""What other people's graph tools make of the files; where they are not installed it is skipped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from onnxruntime.quantization import quantize_dynamic
from quantized_fixture import example_inputs, exported, exported_reference, fed, snr_db

from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner, matmul_kernels


def kernels(path: Path) -> Counter[str]:
    return Counter(matmul_kernels(path).values())


def equal_nodes(model: onnx.ModelProto) -> list[str]:
    """Return the Q/DQ nodes that equal an earlier one, inputs compared by value."""
    values = {
        tensor.name: (tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes())
        for tensor in model.graph.initializer
    }
    seen, equal = set(), []
    for node in model.graph.node:
        attributes = tuple(sorted(str(each) for each in node.attribute))
        key = (node.op_type, attributes, tuple(values.get(name, name) for name in node.input))
        if node.op_type.endswith("QuantizeLinear") or node.op_type == "DequantizeLinear":
            if key in seen:
                equal.append(node.name)
            seen.add(key)
    return equal


FILES = {"default": {}, "static": {"ranges": "static"}, "int8": {"layout": "int8"}}


@pytest.mark.parametrize("settings", FILES.values(), ids=FILES)
def test_no_two_quantizers_are_equal(settings: dict[str, str]) -> None:
    """A tool may merge those that are, and a Q that two products share costs both their kernels."""
    assert equal_nodes(onnx.load(str(exported(**settings)))) == []  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", FILES.values(), ids=FILES)
def test_onnxslim_keeps_the_integer_kernels(settings: dict[str, str], tmp_path: Path) -> None:
    onnxslim = pytest.importorskip("onnxslim", reason="not a dependency")
    path = exported(**settings)  # type: ignore[arg-type]
    onnx.save(onnxslim.slim(str(path)), str(tmp_path / "slim.onnx"))
    assert kernels(tmp_path / "slim.onnx") == kernels(path)
    assert kernels(path)["MatMulIntegerToFloat"] > 0


def test_onnxruntime_quantizes_the_reference(tmp_path: Path) -> None:
    """People compare with what `quantize_dynamic` makes of the float file."""
    quantize_dynamic(str(exported_reference()), str(tmp_path / "dynamic.onnx"))
    session = onnxruntime.InferenceSession(str(tmp_path / "dynamic.onnx"))
    latents, timesteps, labels = example_inputs()
    feed = {"latents": latents, "timesteps": timesteps, "class_labels": labels}
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})
    with OnnxRuntimeRunner(exported_reference()) as runner:
        expected = runner(fed(latents, timesteps, labels))
    # What INT8 costs a random model; 35.7 dB when written.
    assert snr_db(expected, torch.from_numpy(found)) > 20
