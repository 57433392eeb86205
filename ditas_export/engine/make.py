"""The whole job of `ditas-build`: an exported file to a plan with its metadata and layer report."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ditas_export.artifact_files import atomic_path, sha256_of_file, sole_process
from ditas_export.engine.build import BuiltEngine
from ditas_export.engine.layers import engine_layers
from ditas_export.engine.metadata import (
    KIND,
    EngineMetadata,
    Gpu,
    is_plan_file,
    metadata_of,
    metadata_path,
)
from ditas_export.engine.options import BuildOptions
from ditas_export.engine.products import Product
from ditas_export.engine.report import LayerReport, expected_kernels, layer_report
from ditas_export.errors import EngineError
from ditas_export.job_files import JobFiles, Output, json_kind
from ditas_export.onnx_export.expand import expand
from ditas_export.onnx_export.export import read_config, read_form, require_form_for_tensorrt
from ditas_export.onnx_export.external_data import (
    plain_files,
    require_external_data,
    sha256_of_onnx,
)
from ditas_export.onnx_export.form import Layout
from ditas_export.onnx_export.manifest import require_own_manifest

Build = Callable[[Path, Path], BuiltEngine]
"""Builds an ONNX file into a plan: `build_engine` or `run_tool`, all but the paths bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeEngine:
    """What `make_engine` left beside the plan, and what it knows of the layers."""

    metadata: EngineMetadata
    report: LayerReport | None
    unknown: str | None  # why nothing shows how quantized linears, if there are any, are multiplied


def make_engine(
    onnx_path: Path,
    plan_path: Path,
    *,
    product: Product,
    options: BuildOptions,
    layout: Layout | None,
    build: Build,
) -> MadeEngine:
    """Build a file and write the plan with its metadata, both whole or not at all.

    While an earlier plan is replaced, the metadata describe both: whichever lies there has its own.

    Args:
        onnx_path: written by `export_onnx` or `export_reference`.
        plan_path: the file to write; its metadata go to `metadata_path(plan_path)`.
        product: what `build` builds with.
        options: what `build` is bound to.
        layout: to build in; "int8" expands an int4 file first, None takes the file as it is.
        build: does the building.

    Raises:
        EngineError: the product refuses, or an int8 file is asked for as int4.
        OnnxExportError: no file of this package, nothing in it to expand, or ONNX Runtime's form.
        ArtifactError: a file cannot be written, something else has its name, or another process
            is writing it.
    """
    config = read_config(onnx_path)
    require_external_data(onnx_path)
    require_form_for_tensorrt(onnx_path)
    job_files(onnx_path, plan_path, options).check()
    onnx_sha256 = sha256_of_onnx(onnx_path)
    require_own_manifest(onnx_path, onnx_sha256)
    earlier = metadata_of(plan_path) if plan_path.exists() else None
    with (
        sole_process(plan_path.with_name(f".{plan_path.name}.lock"), what=plan_path),
        _in_layout(onnx_path, layout) as graph,
        atomic_path(plan_path) as partial,
    ):
        form = read_form(graph)
        built = build(graph, partial)
        report, unknown = None, None
        try:
            report = layer_report(engine_layers(built.log), config, form)
            if report.unknown:
                names = ", ".join(report.unknown)
                unknown = f"the build log does not tell how {names} are multiplied"
        except EngineError as error:
            unknown = str(error) if expected_kernels(config, form) else None
        metadata = EngineMetadata(
            product=product.name,
            version=built.version,
            plan_sha256=sha256_of_file(partial),
            plan_bytes=built.size_bytes,
            onnx_name=onnx_path.name,
            onnx_sha256=onnx_sha256,
            dit=config,
            form=form,
            options=options,
            gpu=current_gpu(),
            layers=None if report is None else report.to_dict(),
        )
        replaces = None if earlier is None else dataclasses.replace(earlier, replaces=None)
        dataclasses.replace(metadata, replaces=replaces).save(metadata_path(plan_path))
    metadata.save(metadata_path(plan_path))
    return MadeEngine(metadata=metadata, report=report, unknown=unknown)


def job_files(onnx_path: Path, plan_path: Path, options: BuildOptions) -> JobFiles:
    """Return the files of a build. The timing cache is both read and written, whatever is in it."""
    outputs = [
        Output(path=plan_path, what="engine", is_ours=is_plan_file),
        Output(path=metadata_path(plan_path), what="engine's metadata", is_ours=json_kind(KIND)),
    ]
    if options.timing_cache is not None:
        cache = options.timing_cache
        outputs.append(Output(path=cache, what="timing cache", is_ours=lambda _: True))
    return JobFiles(inputs={"MODEL.onnx": onnx_path}, outputs=tuple(outputs))


def current_gpu() -> Gpu | None:
    """Return the GPU at hand, None without one."""
    if not torch.cuda.is_available():
        return None
    return Gpu.at(torch.device("cuda", torch.cuda.current_device()))


def needs_expansion(path: Path, layout: Layout | None) -> bool:
    """Return whether a file is in another layout than is asked for, and can be turned into it.

    Raises:
        EngineError: an int8 file is asked for as int4.
        OnnxExportError: no file of this package.
    """
    found = read_form(path).layout
    if layout == "int4" and found != "int4":
        raise EngineError(
            f"{path} holds no int4 layout, and INT8 rows do not turn back; export it again with "
            f"--layout int4"
        )
    return layout == "int8" and found != "int8"


@contextlib.contextmanager
def _in_layout(path: Path, layout: Layout | None) -> Iterator[Path]:
    """Yield a file in the layout asked for, as parsers take it: itself, or another for a while."""
    if not needs_expansion(path, layout):
        with plain_files(path) as plain:
            yield plain
        return
    with tempfile.TemporaryDirectory() as folder:
        expanded = Path(folder) / path.name
        expand(path, expanded)
        yield expanded
