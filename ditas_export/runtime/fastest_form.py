"""A portable file in the form that runtimes on CPUs run fastest; every other file as it is.

Runners import this only where a model is not prepared yet: onnx-ir takes half a second.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from ditas_export.onnx_export.expand import expand_chain
from ditas_export.onnx_export.external_data import bytes_of, load_mapped, plain_files
from ditas_export.onnx_export.file_facts import read_form
from ditas_export.onnx_export.patterns import int4_chains
from ditas_export.onnx_export.relower import relower_model, why_not_relowerable
from ditas_export.options import Precision, Target
from ditas_export.temporary_files import temporary_folder

FASTEST: Literal["onnxruntime"] = "onnxruntime"
"""The target whose form ONNX Runtime and OpenVINO run fastest on CPUs (docs/performance.md)."""


def is_rewritten(target: Target | None, float_type: Precision) -> bool:
    """Return whether files of a target and a float type run in another form here."""
    return target == "portable" and float_type == "fp32"


def load_fastest(path: Path, *, as_is: bool) -> ir.Model:
    """Return a file's model in its fastest form; tensors that stay are mapped.

    Args:
        path: written by `export_onnx` or `export_reference`.
        as_is: take the file's own form all the same.

    Raises:
        OnnxExportError: no such file, or a record that does not fit its linears.
    """
    model = load_mapped(path)
    if not as_is and _has_faster_form(path, model):
        relower_model(model, FASTEST)
    return model


@contextmanager
def fastest_file(path: Path, *, as_is: bool) -> Iterator[Path]:
    """Yield a file in its fastest form, as runtimes ask for it; see `load_fastest`.

    It is the file itself where that is its own form, else another one, for a while.

    Raises:
        OnnxExportError: see `load_fastest`.
        ArtifactError: the temporary folder cannot take it.
    """
    model = None if as_is else load_mapped(path)
    if model is None or not _has_faster_form(path, model):
        with plain_files(path) as plain:
            yield plain
        return
    relower_model(model, FASTEST)
    with temporary_folder(room=bytes_of(path)) as folder:
        written = folder / path.name
        ir.save(model, written, external_data=f"{path.name}.data")
        yield written


def write_expanded(path: Path, target: Path, *, as_is: bool) -> None:
    """Write a file in its form here, its INT4 chains as INT8 rows and its tensors beside it."""
    model = load_fastest(path, as_is=as_is)
    for chain in list(int4_chains(model.graph)):
        expand_chain(model.graph, chain)
    ir.save(model, target, external_data=f"{target.name}.data")


def _has_faster_form(path: Path, model: ir.Model) -> bool:
    """Return whether CPUs run a file faster in another form that it can be written in."""
    form = read_form(path)
    return is_rewritten(form.target, form.float_type) and why_not_relowerable(model) is None
