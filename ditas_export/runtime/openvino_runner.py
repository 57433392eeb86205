"""An exported file in OpenVINO, on the CPU, in float32 around its INT8 products."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import Any

import numpy as np

from ditas_export import __version__
from ditas_export.errors import RunnerError
from ditas_export.onnx_export.external_data import sha256_of_onnx
from ditas_export.runtime.exported_file import ExportedFileRunner
from ditas_export.runtime.inputs import Feed
from ditas_export.runtime.optimized_cache import compiled_folder, machine_facts

INSTALL = 'run: pip install "ditas-export[openvino]"'

FLOAT_ACTIVATIONS = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""Setting under which weight-only linears keep float activations, as in the other backends; by
itself OpenVINO rounds them to 8 bits."""

_PRODUCTS = ("FullyConnected", "MatMul")
"""OpenVINO's kernels of matrix products."""

_FLOATS = {"f32", "f16", "bf16"}
"""Types as OpenVINO names them."""


class OpenVINORunner(ExportedFileRunner):
    """Runs an exported file until it is closed.

    OpenVINO may compute in BF16 where the processor can; float32 is asked for here, so that the
    results are those of the other backends. A file in bfloat16 keeps its type all the same, where
    the processor has it; `description` tells what was compiled.

    Args:
        path: written by `export_onnx` or `export_reference`.
        threads: of inference; None leaves the choice to OpenVINO.
        precision: to ask for in the float parts, "f32", or "bf16" for speed.
        cache: folder that keeps the compiled model, so that the next start need not compile; None
            compiles at every start.
        sha256: `sha256_of_onnx(path)` where the caller has it; the cache finds files by it.

    Raises:
        RunnerError: OpenVINO is missing or refuses the file.
        OnnxExportError: the file does not say which DiT it holds.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        precision: str = "f32",
        cache: Path | None = None,
        sha256: str | None = None,
    ) -> None:
        super().__init__(path)
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision} | FLOAT_ACTIVATIONS
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        if cache is not None:
            # OpenVINO looks at its version, its settings, and the file's path and time; and
            # compiles again where what it kept is cut short.
            facts = {"ditas-export": __version__, "runtime": "openvino", "machine": machine_facts()}
            folder = compiled_folder(sha256 or sha256_of_onnx(path), cache, facts)
            settings["CACHE_DIR"] = str(folder)
        self._version, self._backend = _compile(path, settings)
        self._products = _float_products(self._backend)
        self._idle: SimpleQueue[Any] = SimpleQueue()

    @property
    def description(self) -> str:
        """Backend, version, device, and the types of the float products."""
        return f"openvino {self._version} ({', '.join(['CPU', *self._products])})"

    def _run(self, session: Any, feed: Feed) -> np.ndarray[Any, Any]:
        """Run an inference request of this call alone, one that is idle or a new one.

        Its output buffer is used again, so it is copied before the request is given back.
        """
        try:
            request = self._idle.get_nowait()
        except Empty:
            request = session.create_infer_request()
        (output,) = request.infer(feed).values()
        copied = np.array(output)
        self._idle.put(request)
        return copied

    def close(self) -> None:
        """Let go of the compiled model and its requests."""
        super().close()
        self._idle = SimpleQueue()


def _compile(path: Path, settings: Mapping[str, Any]) -> tuple[str, Any]:
    """Return OpenVINO's version and the compiled model."""
    openvino = _openvino()
    try:
        model = openvino.Core().compile_model(str(path), "CPU", dict(settings))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        raise RunnerError(f"openvino {openvino.__version__} refuses {path}: {reason}") from error
    return openvino.__version__.partition("-")[0], model


def _float_products(model: Any) -> list[str]:
    """Return the float types in which a compiled model multiplies matrices: f32, bf16.

    The precision that was asked for is a hint: the file and the processor have a say.
    """
    kernels = [node.get_rt_info() for node in model.get_runtime_model().get_ops()]
    types = {
        kernel["runtimePrecision"].astype(str)
        for kernel in kernels
        if kernel["layerType"].astype(str) in _PRODUCTS
    }
    return sorted(types & _FLOATS)


def _openvino() -> ModuleType:
    """Import OpenVINO, or say how to install it."""
    try:
        return importlib.import_module("openvino")
    except ImportError as error:
        raise RunnerError(f"openvino is not installed; {INSTALL}") from error
