"""The whole job of `ditas-build`: an exported file to a plan with its metadata and layer report."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
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
from ditas_export.onnx_export.expand import expand_model
from ditas_export.onnx_export.export import save_model
from ditas_export.onnx_export.external_data import (
    bytes_of,
    load_mapped,
    plain_files,
    require_external_data,
    sha256_of_onnx,
)
from ditas_export.onnx_export.file_facts import read_config, read_form, require_form_for_tensorrt
from ditas_export.onnx_export.form import Layout
from ditas_export.onnx_export.manifest import require_own_manifest
from ditas_export.onnx_export.relower import relower_model, why_not_relowerable
from ditas_export.paths import StrPath
from ditas_export.temporary_files import temporary_folder

Build = Callable[[Path, Path], BuiltEngine]
"""Builds an ONNX file into a plan: `build_engine` or `run_tool`, all but the paths bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeEngine:
    """What `make_engine` left beside the plan, and what it knows of the layers."""

    metadata: EngineMetadata
    report: LayerReport | None
    unknown: str | None  # why nothing shows how quantized linears, if there are any, are multiplied


def make_engine(
    onnx_path: StrPath,
    plan_path: StrPath,
    *,
    product: Product,
    options: BuildOptions,
    layout: Layout | None,
    build: Build,
    as_is: bool = False,
) -> MadeEngine:
    """Build a file and write the plan with its metadata, both whole or not at all.

    While an earlier plan is replaced, the metadata describe both: whichever lies there has its own.

    Args:
        onnx_path: written by `export_onnx` or `export_reference`.
        plan_path: the file to write; its metadata go to `metadata_path(plan_path)`.
        product: what `build` builds with.
        options: what `build` is bound to.
        layout: to build in; "int8" expands an int4 file first, None takes what `BuiltForm` does.
        build: does the building.
        as_is: build the form that the file has, not the one of fewest kernels.

    Raises:
        EngineError: the product refuses, or an int8 file is asked for as int4.
        OnnxExportError: no file of this package, nothing in it to expand, or ONNX Runtime's form.
        ArtifactError: a file cannot be written, something else has its name, or another process
            is writing it.
    """
    onnx_path = Path(onnx_path)
    plan_path = Path(plan_path)
    config = read_config(onnx_path)
    require_external_data(onnx_path)
    require_form_for_tensorrt(onnx_path)
    wanted = BuiltForm.of(onnx_path, layout, as_is=as_is)
    job_files(onnx_path, plan_path, options).check()
    onnx_sha256 = sha256_of_onnx(onnx_path)
    require_own_manifest(onnx_path, onnx_sha256)
    earlier = metadata_of(plan_path) if plan_path.exists() else None
    with (
        sole_process(plan_path.with_name(f".{plan_path.name}.lock"), what=plan_path),
        _in_form(onnx_path, wanted) as graph,
    ):
        form = read_form(graph)
        with atomic_path(plan_path) as partial:
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
                model=config,
                form=form,
                options=options,
                gpu=current_gpu(),
                layers=None if report is None else report.to_dict(),
            )
            is_replaced = earlier is not None and earlier.plan_sha256 != metadata.plan_sha256
            replaces = (
                dataclasses.replace(earlier, replaces=None) if earlier and is_replaced else None
            )
            dataclasses.replace(metadata, replaces=replaces).save(metadata_path(plan_path))
        if replaces is not None:
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


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltForm:
    """What is done to a file before it is built; its float type stays in any case.

    By itself, a portable file of INT8 activations is written for TensorRT, in INT8 rows: the form
    of the fewest kernels (docs/tensorrt.md). Every other file is built as it is.
    """

    is_relowered: bool  # written in TensorRT's form
    is_expanded: bool  # INT4 chains become INT8 rows

    @classmethod
    def of(cls, path: Path, layout: Layout | None, *, as_is: bool) -> BuiltForm:
        """Return what is done to a file.

        Args:
            path: the file.
            layout: as asked for, None leaves the choice.
            as_is: leave the file's form alone.

        Raises:
            EngineError: an int8 file is asked for as int4.
            OnnxExportError: no file of this package.
        """
        form = read_form(path)
        if layout == "int4" and form.layout != "int4":
            raise EngineError(
                f"{path} holds no int4 layout, and INT8 rows do not turn back; export it again "
                f"with --layout int4"
            )
        if not form.is_quantized:
            return cls(is_relowered=False, is_expanded=False)
        is_relowered = (
            not as_is
            and form.activation_bits == 8
            and why_not_relowerable(load_mapped(path)) is None
        )
        wanted = layout or ("int8" if is_relowered else form.layout)
        return cls(is_relowered=is_relowered, is_expanded=wanted != form.layout)

    def __str__(self) -> str:
        """Return what is done, in words; "" for nothing."""
        done = ("written for TensorRT", self.is_relowered), ("expanded to int8", self.is_expanded)
        return ", ".join(words for words, is_done in done if is_done)


@contextlib.contextmanager
def _in_form(path: Path, wanted: BuiltForm) -> Iterator[Path]:
    """Yield a file in the form to build, as parsers take it: itself, or another for a while."""
    if not (wanted.is_relowered or wanted.is_expanded):
        with plain_files(path) as plain:
            yield plain
        return
    model = load_mapped(path)
    if wanted.is_relowered:
        relower_model(model, "tensorrt")
    if wanted.is_expanded:
        expand_model(model)
    with temporary_folder(room=bytes_of(path)) as folder:
        written = folder / path.name
        ir.external_data.load_to_model(model)
        save_model(model, written)
        yield written
