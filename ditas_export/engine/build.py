"""Building an engine with TensorRT or TensorRT for RTX, one code path for both.

TensorRT for RTX compiles ahead of time on the CPU: no GPU and no driver are needed. TensorRT builds
for the GPU at hand. Either is native code that can crash on a graph, so it runs in a child process,
and a crash becomes one clear error.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ditas_export.artifact_files import atomic_path
from ditas_export.engine.builder_process import BuildRequest
from ditas_export.engine.child import OnProgress, run_builder
from ditas_export.engine.options import BatchRange, BuildOptions
from ditas_export.engine.products import Product
from ditas_export.families.base import ModelConfig
from ditas_export.families.registry import family_of
from ditas_export.onnx_export.file_facts import read_config
from ditas_export.paths import StrPath


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """What a build left: the size of the plan, and the builder's own words."""

    size_bytes: int
    version: str
    log: str


def build_engine(
    onnx_path: StrPath,
    plan_path: StrPath,
    *,
    product: Product,
    options: BuildOptions | None = None,
    on_progress: OnProgress | None = None,
    timeout_s: float = 24 * 3600.0,
) -> BuiltEngine:
    """Build an exported file and return the builder's log. The plan is there whole or not at all.

    The network is strongly typed and TF32 is off: the file decides every precision.

    Args:
        onnx_path: written by `export_onnx` or `export_reference`.
        plan_path: where to write the engine.
        product: what to build with.
        options: batch sizes, and how to build.
        on_progress: called with every step that the builder tells.
        timeout_s: seconds after which the builder is given up.

    Raises:
        EngineError: the product is not installed, lacks an option, refuses the graph, crashes or
            takes too long.
        OnnxExportError: the file does not say which model it holds.
        ArtifactError: the plan or the timing cache cannot be written.
    """
    onnx_path = Path(onnx_path)
    plan_path = Path(plan_path)
    options = options or BuildOptions()
    product.require_options(options)
    product.require_installed()
    shapes = input_shapes(read_config(onnx_path), options.batch)
    with (
        tempfile.TemporaryDirectory() as folder,
        atomic_path(plan_path) as plan,
        _timing_cache(options.timing_cache) as timings,
    ):
        log, result = Path(folder) / "log", Path(folder) / "result.json"
        request = BuildRequest(
            title=product.title,
            module=product.module,
            oldest=list(product.oldest),
            onnx=str(onnx_path),
            plan=str(plan),
            log=str(log),
            result=str(result),
            shapes=shapes,
            workspace_bytes=options.workspace_bytes,
            opt_level=options.opt_level,
            compute_capabilities=list(options.compute_capabilities),
            timing_cache=timings,
            version_compatible=options.version_compatible,
            refit=options.refit,
        )
        facts = run_builder(request, on_progress=on_progress, timeout_s=timeout_s)
        return BuiltEngine(
            size_bytes=plan.stat().st_size,
            version=facts["version"],
            log=log.read_text(encoding="utf-8"),
        )


def input_shapes(config: ModelConfig, batch: BatchRange) -> dict[str, list[list[int]]]:
    """Return each input's smallest, usual and largest shape: of the batch, and of what else varies.

    The family says what its dynamic dimensions may be.
    """
    family = family_of(config)
    varying = family.sizes(config)
    return {
        each.name: [
            [
                rows,
                *(varying[size][place] if isinstance(size, str) else size for size in each.shape),
            ]
            for place, rows in enumerate((batch.smallest, batch.usual, batch.largest))
        ]
        for each in family.inputs(config)
    }


def shape_words(shapes: Mapping[str, list[list[int]]], index: int) -> str:
    """Return one shape of every input, as name:2x4x32x32, as NVIDIA's programs take them."""
    return ",".join(
        f"{name}:{'x'.join(str(size) for size in choices[index])}"
        for name, choices in shapes.items()
    )


@contextlib.contextmanager
def _timing_cache(path: Path | None) -> Iterator[str | None]:
    """Yield a copy of a timing cache for the builder to read and write; it replaces `path`."""
    if path is None:
        yield None
        return
    with atomic_path(path) as partial:
        if path.exists():
            shutil.copyfile(path, partial)
        yield str(partial)
