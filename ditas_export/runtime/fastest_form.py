"""A portable file in the form that runtimes on CPUs run fastest; every other file as it is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from ditas_export.onnx_export.export import read_form
from ditas_export.onnx_export.external_data import load_mapped, plain_files
from ditas_export.onnx_export.relower import relower_model, why_not_relowerable

FASTEST: Literal["onnxruntime"] = "onnxruntime"
"""The target whose form ONNX Runtime and OpenVINO run fastest on CPUs (docs/performance.md)."""


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
        OSError: the temporary folder cannot take it.
    """
    if as_is or not _has_faster_form(path, load_mapped(path)):
        with plain_files(path) as plain:
            yield plain
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        written = Path(folder) / path.name
        ir.save(load_fastest(path, as_is=False), written, external_data=f"{path.name}.data")
        yield written


def _has_faster_form(path: Path, model: ir.Model) -> bool:
    """Return whether CPUs run a file faster in another form that it can be written in."""
    return read_form(path).float_type == "fp32" and why_not_relowerable(model) is None
