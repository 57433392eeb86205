"""Building an engine with TensorRT for RTX, in a process of its own.

The builder compiles ahead of time on the CPU: no GPU and no driver are needed. It is native code
that can crash on a graph, so it runs in a child process, and a crash becomes one clear error.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ditas_export.artifact_files import atomic_path
from ditas_export.dit.model import DiTConfig
from ditas_export.errors import EngineError
from ditas_export.onnx_export.export import read_config

INSTALL = 'run: pip install "ditas-export[rtx]"'


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRange:
    """Batch sizes that an engine takes, and the one that it is tuned for."""

    smallest: int = 1
    usual: int = 2
    largest: int = 8

    def __post_init__(self) -> None:
        """Refuse a range that is not one."""
        if not 1 <= self.smallest <= self.usual <= self.largest:
            raise EngineError(
                f"batch sizes {self.smallest}, {self.usual}, {self.largest}: give the smallest, "
                f"the usual and the largest, from 1 up"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """What a build left: the size of the plan, and the builder's own words."""

    size_bytes: int
    version: str
    log: str


def build_rtx(
    onnx_path: Path,
    *,
    plan_path: Path | None = None,
    batch: BatchRange | None = None,
    timeout_s: float = 3600.0,
) -> BuiltEngine:
    """Build an exported file with TensorRT for RTX and return the builder's log.

    Args:
        onnx_path: written by `export_onnx` or `export_reference`.
        plan_path: where to keep the engine, or None to build for the log alone.
        batch: batch sizes of the engine.
        timeout_s: seconds after which the builder is given up.

    Raises:
        EngineError: the builder is not installed, refuses the graph, crashes or takes too long.
        OnnxExportError: the file does not say which DiT it holds.
    """
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise EngineError(f"TensorRT for RTX is not installed; {INSTALL}")
    shapes = input_shapes(read_config(onnx_path), batch or BatchRange())
    with tempfile.TemporaryDirectory() as folder:
        plan, log, result = (Path(folder) / name for name in ("plan", "log", "result.json"))
        request: dict[str, object] = {
            "onnx": str(onnx_path),
            "plan": str(plan),
            "log": str(log),
            "result": str(result),
            "shapes": shapes,
        }
        _run_builder(request, onnx_path, timeout_s)
        facts = json.loads(result.read_text(encoding="utf-8"))
        built = BuiltEngine(
            size_bytes=plan.stat().st_size,
            version=facts["version"],
            log=log.read_text(encoding="utf-8"),
        )
        if plan_path is not None:
            with atomic_path(plan_path) as partial:
                partial.write_bytes(plan.read_bytes())
    return built


def input_shapes(config: DiTConfig, batch: BatchRange) -> dict[str, list[list[int]]]:
    """Return each input's shape at the smallest, usual and largest batch."""
    sizes = (batch.smallest, batch.usual, batch.largest)
    side = config.input_size
    return {
        "latents": [[size, config.in_channels, side, side] for size in sizes],
        "timesteps": [[size] for size in sizes],
        "class_labels": [[size] for size in sizes],
    }


def _run_builder(request: dict[str, object], onnx_path: Path, timeout_s: float) -> None:
    """Run the child process; EngineError unless it left an engine."""
    script = Path(__file__).with_name("rtx_process.py")
    command = [sys.executable, "-P", str(script), json.dumps(request)]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise EngineError(
            f"TensorRT for RTX did not finish {onnx_path} within {timeout_s:g} s"
        ) from error
    if child.returncode < 0:
        raise EngineError(
            f"TensorRT for RTX crashed on {onnx_path} (signal {-child.returncode}); the graph has "
            f"a form that its builder cannot take"
        )
    if child.returncode:
        lines = child.stderr.strip().splitlines() or ["no reason given"]
        raise EngineError(f"TensorRT for RTX could not build {onnx_path}: {lines[-1]}")
