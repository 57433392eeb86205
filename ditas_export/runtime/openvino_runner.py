"""An exported file in OpenVINO, on the CPU, in float32 around its INT8 products."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ditas_export.dit.model import DiTConfig
from ditas_export.errors import RunnerError
from ditas_export.onnx_export.export import read_config
from ditas_export.runtime.inputs import require_inputs

INSTALL = 'run: pip install "ditas-export[openvino]"'


class OpenVINORunner:
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
        self._config = read_config(path)
        self._version, self._model = _compile(path, threads, precision)
        self._precision = precision

    @property
    def config(self) -> DiTConfig:
        """Shape of the model behind the runner."""
        return self._config

    @property
    def description(self) -> str:
        """Backend, version, device and float precision."""
        return f"openvino {self._version} (CPU, {self._precision})"

    def __call__(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """Return ε and the learned variance, (N, 2C, H, W) float32.

        Raises:
            RunnerError: inputs that do not fit the model, or a closed runner.
        """
        if self._model is None:
            raise RunnerError("this runner is closed; open the file again")
        feed = require_inputs(self._config, latents, timesteps, class_labels)
        (output,) = self._model(feed).values()
        return torch.from_numpy(output.copy())

    def __enter__(self) -> Self:
        """Return the runner, ready."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Free the compiled model."""
        self._model = None


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
