"""NVIDIA's plug-in for ONNX Runtime: TensorRT for RTX as an execution provider.

The package brings a library that ONNX Runtime loads by its path; the library then names the GPUs
that it runs on, and a session takes one of them.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from ditas_export.errors import RunnerError

NAME = "NvTensorRTRTXExecutionProvider"
PACKAGE = "onnxruntime-ep-nv-tensorrt-rtx"


def rtx_device(runtime: ModuleType, device_id: int) -> Any:
    """Return the device of a GPU, for `SessionOptions.add_provider_for_devices`.

    Args:
        runtime: onnxruntime, 1.24 or later.
        device_id: of the GPU among those that the plug-in runs on.

    Raises:
        RunnerError: the plug-in is not installed, does not load, or runs on no such GPU.
    """
    _register(runtime)
    devices = [device for device in runtime.get_ep_devices() if device.ep_name == NAME]
    if device_id >= len(devices):
        raise RunnerError(
            f"{NAME} runs on {len(devices)} GPUs of this machine, so there is no cuda:{device_id}"
        )
    return devices[device_id]


@functools.cache
def _register(runtime: ModuleType) -> None:
    """Have ONNX Runtime load the plug-in, once in this process."""
    try:
        plugin = importlib.import_module(PACKAGE.replace("-", "_"))
    except ImportError as error:
        raise RunnerError(f"{PACKAGE} is not installed; run: pip install {PACKAGE}") from error
    try:
        runtime.register_execution_provider_library(NAME, plugin.get_library_path())
    except Exception as error:  # onnxruntime's exceptions share no base but this
        reason = str(error).strip().splitlines()[0]
        raise RunnerError(
            f"onnxruntime {runtime.__version__} cannot load {PACKAGE} ({reason}); it needs an "
            f"NVIDIA GPU with its driver"
        ) from error
