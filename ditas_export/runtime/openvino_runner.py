"""An exported file in OpenVINO, on the CPU, in float32 around its INT8 products."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ditas_export.errors import RunnerError
from ditas_export.runtime.exported_file import ExportedFileRunner, Feed

INSTALL = 'run: pip install "ditas-export[openvino]"'


class OpenVINORunner(ExportedFileRunner):
    """Runs an exported file until it is closed.

    OpenVINO may compute in BF16 where the processor can; float32 is asked for here, so that the
    results are those of the other backends.

    Args:
        path: written by `export_onnx` or `export_reference`.
        threads: of inference; None leaves the choice to OpenVINO.
        precision: of the float parts, "f32", or "bf16" for speed.

    Raises:
        RunnerError: OpenVINO is missing or refuses the file.
        OnnxExportError: the file does not say which DiT it holds.
    """

    def __init__(self, path: Path, *, threads: int | None = None, precision: str = "f32") -> None:
        super().__init__(path)
        self._version, self._session = _compile(path, threads, precision)
        self._precision = precision

    @property
    def description(self) -> str:
        """Backend, version, device and float precision."""
        return f"openvino {self._version} (CPU, {self._precision})"

    def _infer(self, feed: Feed) -> np.ndarray[Any, Any]:
        """Run the compiled model; its output buffer is used again, so it is copied."""
        (output,) = self._session(feed).values()
        return np.array(output)


def _compile(path: Path, threads: int | None, precision: str) -> tuple[str, Any]:
    """Return OpenVINO's version and the compiled model."""
    openvino = _openvino()
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    try:
        core = openvino.Core()
        model = core.compile_model(core.read_model(str(path)), "CPU", settings)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RunnerError(f"openvino {openvino.__version__} refuses {path}: {reason}") from error
    return openvino.__version__.partition("-")[0], model


def _openvino() -> ModuleType:
    """Import OpenVINO, or say how to install it."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise RunnerError(f"openvino is not installed; {INSTALL}") from error
