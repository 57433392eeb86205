"""NVIDIA's plug-in for ONNX Runtime: registered for real, as far as that goes without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import torch
from quantized_fixture import example_inputs, exported, fed

from ditas_export.errors import RunnerError
from ditas_export.runtime import onnxruntime_runner
from ditas_export.runtime.onnxruntime_runner import TENSORRT_RTX, OnnxRuntimeRunner
from ditas_export.runtime.open_runner import open_runner
from ditas_export.runtime.rtx_provider import NAME, PACKAGE, rtx_device

PLUGIN = "onnxruntime_ep_nv_tensorrt_rtx"


def install_plugin(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin: Any = ModuleType(PLUGIN)
    plugin.get_library_path = lambda: str(library)
    monkeypatch.setitem(sys.modules, PLUGIN, plugin)


def runtime_with(*names: str) -> Any:
    """Return a stand-in for onnxruntime that has devices of these providers."""
    runtime: Any = ModuleType("onnxruntime")
    runtime.registered = []
    runtime.register_execution_provider_library = lambda *words: runtime.registered.append(words)
    runtime.get_ep_devices = lambda: [
        SimpleNamespace(ep_name=name, number=number) for number, name in enumerate(names)
    ]
    return runtime


def cpu_device(*_: object) -> Any:
    """Return the one device that ONNX Runtime has everywhere."""
    return next(
        device
        for device in onnxruntime.get_ep_devices()
        if device.ep_name == "CPUExecutionProvider"
    )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, PLUGIN, None)
    with pytest.raises(RunnerError, match=f"is not installed; run: pip install {PACKAGE}"):
        open_runner(str(exported()), runtime="nv-tensorrt-rtx", device="cuda")


def test_a_cpu_is_no_device_for_it() -> None:
    with pytest.raises(RunnerError, match="TensorRT runs on GPUs; use --device cuda"):
        open_runner(str(exported()), runtime="nv-tensorrt-rtx")


def test_a_library_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ONNX Runtime says so; without a driver it says the same of the real library."""
    (tmp_path / "plugin.so").write_bytes(b"no library")
    install_plugin(tmp_path / "plugin.so", monkeypatch)
    with pytest.raises(
        RunnerError, match=r"cannot load .*plugin\.so.*; it needs an NVIDIA"
    ) as caught:
        OnnxRuntimeRunner(exported(), providers=TENSORRT_RTX)
    assert "\n" not in str(caught.value)


def test_a_gpu_is_found_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_plugin(tmp_path / "plugin.so", monkeypatch)
    runtime = runtime_with("CPUExecutionProvider", NAME, NAME)
    assert [rtx_device(runtime, number).number for number in (0, 1)] == [1, 2]
    assert runtime.registered == [(NAME, str(tmp_path / "plugin.so"))]  # a second time is an error
    with pytest.raises(RunnerError, match="runs on 2 GPUs of this machine, so there is no cuda:2"):
        rtx_device(runtime, 2)


def test_a_device_is_handed_to_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_runner, "rtx_device", cpu_device)
    monkeypatch.setattr(onnxruntime_runner, "RTX_PROVIDER", "CPUExecutionProvider")
    inputs = example_inputs()
    with OnnxRuntimeRunner(exported()) as runner:
        found = runner(fed(*inputs))
    monkeypatch.undo()
    with OnnxRuntimeRunner(exported()) as runner:
        assert torch.equal(found, runner(fed(*inputs)))


def test_a_provider_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_runner, "rtx_device", cpu_device)
    with pytest.raises(RunnerError, match=f"has {NAME} but could not start it"):
        OnnxRuntimeRunner(exported(), providers=TENSORRT_RTX)
