"""What a file says of itself: model, form, metadata. Reads no tensors, and imports little."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
import torch

from ditas_export.errors import CheckpointError, OnnxExportError
from ditas_export.families.base import ModelConfig
from ditas_export.families.entry_points import UnknownFamilyError
from ditas_export.families.identity import ModelIdentity
from ditas_export.families.registry import config_of
from ditas_export.onnx_export.by_reference import read_by_reference
from ditas_export.onnx_export.form import FileForm
from ditas_export.onnx_export.interface import why_unlike
from ditas_export.options import Precision
from ditas_export.paths import StrPath
from ditas_export.saved_records import from_record
from ditas_export.text_files import TextError, parse_json

CONFIG_KEY = "ditas_export.config"
FAMILY_KEY = "ditas_export.family"
IDENTITY_KEY = "ditas_export.identity"
FORM_KEY = "ditas_export.form"

FLOAT_TYPES: Mapping[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
"""Float types of a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _RecordedIdentity:
    """An identity as a file states it, beside the configuration."""

    tensors_sha256: str
    fingerprint: str


def read_config(path: StrPath) -> ModelConfig:
    """Return what the model in a file that this package wrote computes beside its tensors.

    A file of an earlier version, which does not record all of it, has the defaults that were meant.

    Raises:
        OnnxExportError: no ONNX file, one of another origin, a damaged record, or a graph of
            another model than is recorded.
    """
    path = Path(path)
    config, _ = _read_model(path)
    return config


def read_identity(path: StrPath) -> ModelIdentity | None:
    """Return the float model that a file was made from; None where an earlier version wrote it.

    Raises:
        OnnxExportError: no ONNX file, one of another origin, or a damaged record.
    """
    path = Path(path)
    _, identity = _read_model(path)
    return identity


def _read_model(path: Path) -> tuple[ModelConfig, ModelIdentity | None]:
    """Return a file's configuration, and the identity that holds it where one is recorded."""
    model = read_by_reference(path)
    stated = _metadata_of(model)
    text = _entry(path, stated, CONFIG_KEY)
    try:
        config = config_of(parse_json(text))
    except UnknownFamilyError as error:
        raise OnnxExportError(f"{path}: {error}") from error
    except (TextError, CheckpointError) as error:
        raise OnnxExportError(
            f"{path} does not say which model it holds ({error}); export it with ditas-export"
        ) from error
    if reason := why_unlike(model.graph, config):
        raise OnnxExportError(
            f"{path} holds another model than its record says: {reason}; export it again"
        )
    text = stated.get(IDENTITY_KEY, "")
    if not text:
        return config, None
    try:
        recorded = from_record(_RecordedIdentity, parse_json(text))
        identity = ModelIdentity(tensors_sha256=recorded.tensors_sha256, config=config)
        if identity.fingerprint == recorded.fingerprint:
            return config, identity
        reason = "its fingerprint is not that of its configuration and tensors"
    except (TextError, CheckpointError) as error:
        reason = str(error)
    raise OnnxExportError(
        f"{path} has a damaged record of its model ({reason}); export it again with ditas-export"
    )


def read_form(path: StrPath) -> FileForm:
    """Return how a file was written.

    Raises:
        OnnxExportError: no ONNX file, one of another origin, or a damaged record.
    """
    path = Path(path)
    text = metadata_entry(path, FORM_KEY)
    try:
        return FileForm.from_dict(parse_json(text))
    except (TextError, OnnxExportError) as error:
        raise OnnxExportError(
            f"{path} has a damaged record of its form ({error}); export it with ditas-export"
        ) from error


def is_quantized_file(path: StrPath) -> bool:
    """Return whether `export_onnx` wrote a file."""
    path = Path(path)
    form = _form_or_none(path)
    return form is not None and form.is_quantized


def is_float_file(path: StrPath) -> bool:
    """Return whether `export_reference` wrote a file."""
    path = Path(path)
    form = _form_or_none(path)
    return form is not None and not form.is_quantized


def _form_or_none(path: Path) -> FileForm | None:
    """Return how a file was written, None for one that this package did not write."""
    try:
        return read_form(path)
    except OnnxExportError:
        return None


def metadata_entry(path: Path, key: str) -> str:
    """Return one entry of a file's metadata, or say why it has none."""
    return _entry(path, file_metadata(path), key)


def _entry(path: Path, found: Mapping[str, str], key: str) -> str:
    """Return one entry of the metadata that a file has, or say why it has none."""
    if key not in found:
        raise OnnxExportError(
            f"{path} has no metadata entry {key}: ditas-export did not write it, or a tool that "
            f"rewrote it left the metadata out (polygraphy surgeon sanitize does); export it with "
            f"ditas-export, or take the file as it was before"
        )
    return found[key]


def require_form_for_tensorrt(path: StrPath) -> None:
    """Raise if a file was written in ONNX Runtime's form.

    Raises:
        OnnxExportError: it was, with UINT8 activations, or no file of this package.
    """
    path = Path(path)
    if not read_form(path).fits_tensorrt:
        raise OnnxExportError(
            f"{path} was exported for onnxruntime, in a form that TensorRT does not take (UINT8 "
            f"activations); export it again with --target tensorrt or portable"
        )


def file_metadata(path: StrPath) -> dict[str, str]:
    """Return an ONNX file's metadata; its tensors are not read.

    Raises:
        OnnxExportError: no readable ONNX file.
    """
    return _metadata_of(read_by_reference(Path(path)))


def _metadata_of(model: onnx.ModelProto) -> dict[str, str]:
    """Return a model's metadata."""
    return {entry.key: entry.value for entry in model.metadata_props}
