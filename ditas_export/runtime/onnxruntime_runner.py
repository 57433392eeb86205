"""An exported file in ONNX Runtime, and the kernels that it really runs there."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from ditas_export.dit.model import DiTConfig
from ditas_export.errors import RunnerError
from ditas_export.onnx_export.export import read_config
from ditas_export.runtime.inputs import require_inputs

CPU = ("CPUExecutionProvider",)

ACCURATE_WEIGHT_ONLY = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Session entry under which weight-only linears keep float activations; by default they do not."""


class OnnxRuntimeRunner:
    """Runs an exported file; the session lives until the runner is closed.

    Args:
        path: written by `export_onnx` or `export_reference`.
        threads: of one operator; None leaves the choice to ONNX Runtime.
        providers: execution providers, in order of preference.
        session_entries: session configuration entries, such as `ACCURATE_WEIGHT_ONLY`.

    Raises:
        RunnerError: ONNX Runtime is missing, has no such provider, or refuses the file.
        OnnxExportError: the file does not say which DiT it holds.
    """

    def __init__(
        self,
        path: Path,
        *,
        threads: int | None = None,
        providers: Sequence[str] = CPU,
        session_entries: Mapping[str, str] | None = None,
    ) -> None:
        self._config = read_config(path)
        options = _options(threads, session_entries or {})
        self._session: Any = _open(path, options, providers)
        self._providers = ", ".join(self._session.get_providers())

    @property
    def config(self) -> DiTConfig:
        """Shape of the model behind the runner."""
        return self._config

    @property
    def description(self) -> str:
        """Backend, version and execution providers."""
        return f"onnxruntime {_onnxruntime().__version__} ({self._providers})"

    def __call__(self, latents: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        """Return ε and the learned variance, (N, 2C, H, W) float32.

        Raises:
            RunnerError: inputs that do not fit the model, or a closed runner.
        """
        if self._session is None:
            raise RunnerError("this runner is closed; open the file again")
        feed = require_inputs(self._config, latents, timesteps, class_labels)
        (output,) = self._session.run(None, feed)
        return torch.from_numpy(output)

    def __enter__(self) -> Self:
        """Return the runner, ready."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the session; its threads spin after a run, so do not keep idle ones."""
        self._session = None


def matmul_kernels(path: Path) -> dict[str, str]:
    """Return, for every matrix product of a file, the operator that ONNX Runtime's CPU runs.

    Loads the file once and reads the optimized graph: "blocks.0.attn.qkv/MatMul" ->
    "MatMulIntegerToFloat" where the INT8 kernel runs, "MatMul" where it fell back to float.

    Raises:
        RunnerError: ONNX Runtime is missing or refuses the file.
    """
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = _options(None, {})
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimized.data"
        )
        _open(path, options, CPU)
        graph = onnx.load(str(optimized), load_external_data=False).graph
    return {
        _original_name(node.name): node.op_type
        for node in graph.node
        if node.op_type.startswith(("MatMul", "QLinearMatMul", "Gemm", "FusedMatMul"))
    }


def _original_name(name: str) -> str:
    """Return the exported node's name, without what the optimizer appended."""
    path, _, rest = name.partition("/")
    return f"{path}/{rest.partition('/')[0]}"


def _options(threads: int | None, session_entries: Mapping[str, str]) -> Any:
    """Return session options that keep ONNX Runtime's warnings off the screen."""
    options = _onnxruntime().SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in session_entries.items():
        options.add_session_config_entry(key, value)
    return options


def _open(path: Path, options: Any, providers: Sequence[str]) -> Any:
    """Open a session, or say why ONNX Runtime would not."""
    runtime = _onnxruntime()
    if absent := [name for name in providers if name not in runtime.get_available_providers()]:
        raise RunnerError(
            f"this onnxruntime has no {', '.join(absent)}; it has "
            f"{', '.join(runtime.get_available_providers())}"
        )
    try:
        return runtime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:  # onnxruntime's exceptions share no base but this
        reason = str(error).strip().splitlines()[0]
        raise RunnerError(f"onnxruntime {runtime.__version__} refuses {path}: {reason}") from error


def _onnxruntime() -> ModuleType:
    """Import ONNX Runtime, or say how to install it."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise RunnerError(
            "onnxruntime is not installed; run: pip install onnxruntime "
            "(or onnxruntime-gpu, never both)"
        ) from error
