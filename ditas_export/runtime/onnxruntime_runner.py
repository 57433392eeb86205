"""An exported file in ONNX Runtime, and the kernels that it really runs there."""

from __future__ import annotations

import importlib
import platform
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from ditas_export.errors import RunnerError
from ditas_export.runtime.exported_file import ExportedFileRunner, Feed
from ditas_export.runtime.optimized_cache import optimized_model
from ditas_export.runtime.rtx_provider import NAME as RTX_PROVIDER
from ditas_export.runtime.rtx_provider import rtx_device

CPU = ("CPUExecutionProvider",)
CUDA = ("CUDAExecutionProvider", *CPU)
TENSORRT = ("TensorrtExecutionProvider", *CUDA)
TENSORRT_RTX = (RTX_PROVIDER, *CPU)

ACCURATE_WEIGHT_ONLY = {"session.qdq_matmulnbits_accuracy_level": "1"}
"""Session entry under which weight-only linears keep float activations; by default they do not."""

_SLOWER_WHEN_FUSED = "SkipLayerNormFusion"
"""Its kernel on CPUs takes six times as long as the Add and the LayerNormalization it is made of
(1.3 ms against 0.2 ms for 512 tokens of width 1152; onnxruntime 1.31.1)."""

_PRODUCTS = ("MatMul", "QLinearMatMul", "Gemm", "FusedMatMul")


class OnnxRuntimeRunner(ExportedFileRunner):
    """Runs an exported file; the session lives until the runner is closed.

    Args:
        path: written by `export_onnx` or `export_reference`.
        threads: of one operator; None leaves the choice to ONNX Runtime.
        providers: execution providers, in order of preference.
        device_id: GPU of the providers that have one.
        session_entries: session configuration entries, such as `ACCURATE_WEIGHT_ONLY`.
        cache: folder that keeps the optimized model, so that the next start need not optimize;
            None optimizes at every start. For the CPU provider alone: others compile for
            themselves.

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
        device_id: int = 0,
        session_entries: Mapping[str, str] | None = None,
        cache: Path | None = None,
    ) -> None:
        super().__init__(path)
        entries = dict(session_entries or {})
        self._kernels: Counter[str] | None = None
        if cache is not None and tuple(providers) == CPU:
            facts = {
                "onnxruntime": _onnxruntime().__version__,
                "entries": entries,
                "machine": [platform.machine(), platform.processor(), _processor_flags()],
            }
            path = optimized_model(
                path, cache, facts, lambda target: _optimize(path, target, entries)
            )
            self._kernels = Counter(_product_kernels(path).values())
        options = session_options(threads, entries)
        if self._kernels is not None:
            options.graph_optimization_level = _onnxruntime().GraphOptimizationLevel.ORT_DISABLE_ALL
        self._session = open_session(path, options, providers, device_id)
        self._providers = ", ".join(self._session.get_providers())

    @property
    def description(self) -> str:
        """Backend, version, execution providers, and the kernels of products where known."""
        kernels = "".join(f"; {count} {kind}" for kind, count in (self._kernels or {}).items())
        return f"onnxruntime {_onnxruntime().__version__} ({self._providers}{kernels})"

    def _infer(self, feed: Feed) -> np.ndarray[Any, Any]:
        """Run the session."""
        (output,) = self._session.run(None, feed)
        return np.asarray(output)


def matmul_kernels(path: Path) -> dict[str, str]:
    """Return, for every matrix product of a file, the operator that ONNX Runtime's CPU runs.

    Loads the file once and reads the optimized graph: "blocks.0.attn.qkv/MatMul" ->
    "MatMulIntegerToFloat" where the INT8 kernel runs, "MatMul" where it fell back to float.

    Raises:
        RunnerError: ONNX Runtime is missing or refuses the file.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder) / "optimized.onnx"
        _optimize(path, optimized, {})
        return _product_kernels(optimized)


def _optimize(path: Path, target: Path, session_entries: Mapping[str, str]) -> None:
    """Write the graph that ONNX Runtime's CPU provider makes of a file."""
    options = session_options(None, session_entries)
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry(
        "session.optimized_model_external_initializers_file_name", f"{target.stem}.data"
    )
    open_session(path, options, CPU)


def _product_kernels(optimized: Path) -> dict[str, str]:
    """Return the operator of every matrix product in an optimized graph."""
    import onnx

    graph = onnx.load(str(optimized), load_external_data=False).graph
    return {
        _original_name(node.name): node.op_type
        for node in graph.node
        if node.op_type.startswith(_PRODUCTS)
    }


def _original_name(name: str) -> str:
    """Return the exported node's name, without what the optimizer appended."""
    path, _, rest = name.partition("/")
    return f"{path}/{rest.partition('/')[0]}"


def _processor_flags() -> str:
    """Return what decides which kernels fit the processor, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def session_options(threads: int | None, session_entries: Mapping[str, str]) -> Any:
    """Return session options without warnings on the screen and without a fusion that costs."""
    options = _onnxruntime().SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry(
        "optimization.disable_specified_optimizers", _SLOWER_WHEN_FUSED
    )
    if threads is not None:
        options.intra_op_num_threads = threads
    for key, value in session_entries.items():
        options.add_session_config_entry(key, value)
    return options


def open_session(path: Path, options: Any, providers: Sequence[str], device_id: int = 0) -> Any:
    """Open a session, or say why ONNX Runtime would not."""
    runtime = _onnxruntime()
    placed = None
    if RTX_PROVIDER in providers:  # what a session does not give to its devices, it runs on the CPU
        options.add_provider_for_devices([rtx_device(runtime, device_id)], {})
    else:
        _require_available(runtime, providers)
        placed = [name if name in CPU else (name, {"device_id": device_id}) for name in providers]
    try:
        session = runtime.InferenceSession(str(path), options, providers=placed)
    except Exception as error:  # onnxruntime's exceptions share no base but this
        reason = str(error).strip().splitlines()[0]
        raise RunnerError(f"onnxruntime {runtime.__version__} refuses {path}: {reason}") from error
    if providers[0] not in session.get_providers():
        raise RunnerError(
            f"onnxruntime {runtime.__version__} has {providers[0]} but could not start it on this "
            f"machine; check the GPU driver and the CUDA libraries, or use --device cpu"
        )
    return session


def _require_available(runtime: ModuleType, providers: Sequence[str]) -> None:
    """Refuse providers that this build of ONNX Runtime does not have."""
    known = runtime.get_available_providers()
    if absent := [name for name in providers if name not in known]:
        raise RunnerError(
            f"this onnxruntime has no {', '.join(absent)}; it has {', '.join(known)}; for a GPU: "
            f"pip uninstall onnxruntime && pip install onnxruntime-gpu"
        )


def _onnxruntime() -> ModuleType:
    """Import ONNX Runtime, or say how to install it."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise RunnerError(
            "onnxruntime is not installed; run: pip install onnxruntime "
            "(or onnxruntime-gpu, never both)"
        ) from error
