from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quantized_fixture import example_inputs, exported, fed, quantized_tiny_dit, snr_db, tiny_dit

from ditas_export.artifact_files import load_tensors, save_tensors, sha256_of_file
from ditas_export.calibration.adaln import quantize_adaln
from ditas_export.calibration.fold import fold_smoothing
from ditas_export.calibration.modules import fake_quantized_model
from ditas_export.calibration.quantized_model import ARTIFACT_FORMAT, QuantizedModel
from ditas_export.errors import ArtifactError, DitasExportError, OnnxExportError, RunnerError
from ditas_export.runtime.onnxruntime_runner import OnnxRuntimeRunner
from ditas_export.runtime.open_runner import open_runner
from ditas_export.runtime.openvino_runner import OpenVINORunner
from ditas_export.runtime.options import Runtime
from ditas_export.runtime.torch_int8 import Int8Runner
from ditas_export.runtime.torch_runner import TorchRunner


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DITAS_EXPORT_CACHE", str(tmp_path / "cache"))


def test_a_checkpoint_runs_in_pytorch(checkpoint: Path) -> None:
    opened = open_runner(str(checkpoint))
    assert isinstance(opened.runner, TorchRunner)
    inputs = example_inputs()
    assert torch.equal(opened.runner(fed(*inputs)), TorchRunner(tiny_dit())(fed(*inputs)))


def save_quantized(path: Path, *, adaln_bits: int = 16, **settings: Any) -> QuantizedModel:
    quantized = quantize_adaln(quantized_tiny_dit(tiny_dit(), **settings), adaln_bits)
    quantized.settings["ranges"] = "static"
    quantized.save(path)
    return quantized


def test_a_quantized_model_runs_by_int8_products_whatever_its_name(tmp_path: Path) -> None:
    quantized = save_quantized(tmp_path / "kept")
    opened = open_runner(str(tmp_path / "kept"), runtime="torch")
    inputs = example_inputs()
    expected = Int8Runner(fold_smoothing(quantized), ranges="static")
    assert isinstance(opened.runner, Int8Runner)
    assert torch.equal(opened.runner(fed(*inputs)), expected(fed(*inputs)))
    assert opened.sha256 == sha256_of_file(tmp_path / "kept")


@pytest.mark.parametrize("activation_bits", [8, 16])
@pytest.mark.parametrize("adaln_bits", [8, 4])
def test_a_quantized_model_of_integer_modulation_runs(
    tmp_path: Path, adaln_bits: int, activation_bits: int
) -> None:
    path = tmp_path / "small.safetensors"
    quantized = save_quantized(path, adaln_bits=adaln_bits, activation_bits=activation_bits)
    opened = open_runner(str(path))
    inputs = example_inputs()
    got = opened.runner(fed(*inputs))
    reference = TorchRunner(fake_quantized_model(fold_smoothing(quantized), ranges="static"))
    # But for rounding ties where INT8 products replace the fake-quantized ones.
    assert snr_db(reference(fed(*inputs)), got) > 50
    assert ("INT8" in opened.runner.description) == (activation_bits == 8)


def test_a_quantized_model_of_float_activations_runs_fake_quantized(tmp_path: Path) -> None:
    quantized = save_quantized(tmp_path / "kept.safetensors", activation_bits=16)
    opened = open_runner(str(tmp_path / "kept.safetensors"))
    inputs = example_inputs()
    expected = TorchRunner(fake_quantized_model(fold_smoothing(quantized), ranges="static"))
    assert torch.equal(opened.runner(fed(*inputs)), expected(fed(*inputs)))
    assert "INT8" not in opened.runner.description


def test_a_quantized_model_is_no_exported_file(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    save_quantized(path)
    with pytest.raises(RunnerError, match=rf"--model CHECKPOINT --artifact {path} out.onnx, and"):
        open_runner(str(path), runtime="onnxruntime")


def test_a_quantized_model_cut_short_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    save_quantized(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DitasExportError, match=r"kept.safetensors .* damaged or cut short"):
        open_runner(str(path))


def test_a_quantized_model_of_another_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "kept.safetensors"
    save_quantized(path)
    tensors, header = load_tensors(path, file_format=ARTIFACT_FORMAT)
    old = "ditas-export quantized DiT 1"
    save_tensors(path, tensors, file_format=old, header=header)
    expected = f"{path} is a {old}, and this version .* reads {ARTIFACT_FORMAT}; make it again$"
    with pytest.raises(ArtifactError, match=expected):
        open_runner(str(path))


@pytest.mark.parametrize("name", ["OUT.ONNX", "out.Onnx"])
def test_an_exported_file_in_capitals(tmp_path: Path, name: str) -> None:
    shutil.copy(exported(), tmp_path / name)
    with open_runner(str(tmp_path / name), runtime="onnxruntime").runner as runner:
        assert isinstance(runner, OnnxRuntimeRunner)


@pytest.mark.parametrize("name", ["OUT.PLAN", "out.Engine"])
def test_an_engine_in_capitals(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunnerError, match=f"{name} is an engine, and runs on GPUs"):
        open_runner(str(tmp_path / name))


@pytest.mark.gpu
@pytest.mark.parametrize("activation_bits", [8, 16])
def test_a_quantized_model_runs_in_half_precision_on_a_gpu(
    tmp_path: Path, activation_bits: int
) -> None:
    path = tmp_path / "kept.safetensors"
    save_quantized(path, activation_bits=activation_bits)
    inputs = example_inputs()
    opened = open_runner(str(path), device="cuda")
    assert "float16" in opened.runner.description
    # Single steps in float16 on a CPU: 55 to 57 dB with 8-bit activations.
    assert snr_db(open_runner(str(path)).runner(fed(*inputs)), opened.runner(fed(*inputs))) > 35


def test_auto_takes_openvino_where_it_is_installed(hide_openvino: Callable[[], None]) -> None:
    pytest.importorskip("openvino", reason="extra [openvino]")
    with open_runner(str(exported()), threads=2).runner as runner:
        assert isinstance(runner, OpenVINORunner)
        openvino = runner(fed(*example_inputs()))
    hide_openvino()
    with open_runner(str(exported()), threads=2).runner as runner:
        assert isinstance(runner, OnnxRuntimeRunner)
        assert snr_db(openvino, runner(fed(*example_inputs()))) > 45  # rounding ties


def test_onnxruntime_keeps_what_it_optimized(tmp_path: Path) -> None:
    with open_runner(str(exported()), runtime="onnxruntime").runner as runner:
        assert "MatMulIntegerToFloat" in runner.description
    assert len(list((tmp_path / "cache").glob("entry-*"))) == 1


def test_a_missing_extra_is_named(hide_openvino: Callable[[], None]) -> None:
    hide_openvino()
    with pytest.raises(RunnerError, match=r"openvino is not installed; run: pip install"):
        open_runner(str(exported()), runtime="openvino")


@pytest.mark.parametrize("runtime", ["tensorrt", "nv-tensorrt-rtx"])
def test_tensorrt_takes_no_unsigned_codes(runtime: Runtime) -> None:
    path = exported(layout="int4", ranges="token", rank=4, target="onnxruntime")
    expected = f"{path} was exported for onnxruntime, .* --target tensorrt or portable$"
    with pytest.raises(OnnxExportError, match=expected):
        open_runner(str(path), runtime=runtime, device="cuda")


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
