from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_fixture import TINY, example_inputs, exported, quantized_tiny_dit, snr_db, tiny_dit
from safetensors.torch import save_file

from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.modules import fake_quantized_dit
from ditas_export.errors import RunnerError
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.open_runner import open_runner
from ditas_export.runtime.openvino_runner import OpenVINORunner
from ditas_export.runtime.torch_runner import TorchRunner


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITAS_EXPORT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    tensors = {name: tensor.contiguous() for name, tensor in tiny_dit().state_dict().items()}
    save_file(tensors, path, metadata={"num_heads": str(TINY.num_heads)})
    return path


def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def find_spec(name: str, *rest: Any) -> Any:
        return None if name == "openvino" else find(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_a_checkpoint_runs_in_pytorch(checkpoint: Path) -> None:
    opened = open_runner(str(checkpoint))
    assert isinstance(opened.runner, TorchRunner)
    inputs = example_inputs()
    assert torch.equal(opened.runner(*inputs), TorchRunner(tiny_dit())(*inputs))


def test_a_quantized_model_runs_fake_quantized(tmp_path: Path) -> None:
    quantized = quantized_tiny_dit(tiny_dit())
    quantized.settings["ranges"] = "static"
    path = tmp_path / "tiny.ditas.safetensors"
    quantized.save(path)
    opened = open_runner(str(path))
    inputs = example_inputs()
    expected = TorchRunner(fake_quantized_dit(fold_smoothing(quantized), ranges="static"))
    assert torch.equal(opened.runner(*inputs), expected(*inputs))


def test_auto_takes_openvino_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="extra [openvino]")
    with open_runner(str(exported()), threads=2).runner as runner:
        assert isinstance(runner, OpenVINORunner)
        openvino = runner(*example_inputs())
    without_openvino(monkeypatch)
    with open_runner(str(exported()), threads=2).runner as runner:
        assert isinstance(runner, OnnxRuntimeRunner)
        assert snr_db(openvino, runner(*example_inputs())) > 45  # rounding ties


def test_onnxruntime_keeps_what_it_optimized(tmp_path: Path) -> None:
    with open_runner(str(exported()), runtime="onnxruntime").runner as runner:
        assert "MatMulIntegerToFloat" in runner.description
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without_openvino(monkeypatch)
    with pytest.raises(RunnerError, match=r"openvino is not installed; run: pip install"):
        open_runner(str(exported()), runtime="openvino")


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("onnx", {"runtime": "torch"}, "PyTorch does not run .* pass the checkpoint"),
        ("onnx", {"runtime": "openvino", "device": "cuda"}, "OpenVINO runner is for CPUs"),
        ("onnx", {"runtime": "tensorrt"}, "TensorRT runs on GPUs"),
        ("onnx", {"runtime": "onnxruntime", "device": "tpu"}, "device='tpu'; choose cpu"),
        ("onnx", {"runtime": "jax"}, "runtime='jax'; choose one of auto, onnxruntime"),
        ("onnx", {"device": "cuda"}, "has no CUDAExecutionProvider; it has .*onnxruntime-gpu"),
        ("digits", {"runtime": "openvino"}, "openvino runs exported files, not digits; run: ditas"),
    ],
)
def test_what_no_backend_runs(model: str, settings: dict[str, Any], message: str) -> None:
    if settings.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    name = str(exported()) if model == "onnx" else model
    with pytest.raises(RunnerError, match=message):
        open_runner(name, **settings)
