"""An ONNX file and the files that its tensors lie in: whether they are whole, and one hash."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path

import onnx
import onnx_ir as ir

from ditas_export.artifact_files import sha256_of_file
from ditas_export.errors import OnnxExportError
from ditas_export.file_signs import describe_impostor, why_unreadable
from ditas_export.onnx_export.by_reference import load_by_reference


def sha256_of_onnx(path: Path) -> str:
    """Return the hex SHA-256 of an ONNX file and of its external data.

    Without external data it is the hash of the file's bytes. Else it is the hash of the hex hashes
    of all files, the ONNX file's first, one a line, as `sha256sum` lists them without the names.

    Raises:
        OnnxExportError: see `external_files`.
    """
    files = external_files(path)
    digest = sha256_of_file(path)
    external = [sha256_of_file(file) for file in files]
    if not external:
        return digest
    return hashlib.sha256("".join(f"{each}\n" for each in [digest, *external]).encode()).hexdigest()


def require_external_data(path: Path) -> None:
    """Refuse an ONNX file whose external data are not there or cut short, before a runtime does.

    Raises:
        OnnxExportError: see `external_files`.
    """
    external_files(path)


def external_files(path: Path) -> list[Path]:
    """Return the files beside an ONNX file that its tensors lie in, in order of name; all whole.

    Raises:
        OnnxExportError: no readable ONNX file, or external data that are not there or cut short.
    """
    try:
        wanted = _wanted_bytes(load_by_reference(path).graph)
    except Exception as error:  # protobuf's DecodeError has no stable home
        reason = why_unreadable(path, error)
        raise OnnxExportError(f"{path} is no readable ONNX file: {reason}") from error
    wanted.pop(path.name, None)
    files = {path.parent / location: size for location, size in sorted(wanted.items())}
    for file, size in files.items():
        _require_bytes(path, file, size)
    return list(files)


def _wanted_bytes(graph: onnx.GraphProto) -> dict[str, int]:
    """Return how long each file must be that tensors lie in, by its location."""
    wanted: dict[str, int] = {}
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if "location" not in entries:
            continue
        bits = math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth
        length = int(entries.get("length", -(-bits // 8)))
        end = int(entries.get("offset", 0)) + length
        wanted[entries["location"]] = max(wanted.get(entries["location"], 0), end)
    return wanted


def _require_bytes(path: Path, file: Path, wanted: int) -> None:
    """Refuse external data that are not there, are no file, or end before the last tensor does."""
    try:
        found = file.stat().st_size
        with file.open("rb"):
            pass
    except OSError as error:
        reason = why_unreadable(file, error)
        raise OnnxExportError(
            f"{path} keeps tensors in {file}, which cannot be read ({reason}); put that file "
            f"beside it, or export again"
        ) from error
    if found < wanted:
        sign = describe_impostor(file)
        what = f"it is {sign}" if sign else "it was cut short; copy it again"
        raise OnnxExportError(
            f"{path} keeps tensors in {file}, which has {found} bytes where {wanted} are expected: "
            f"{what}"
        )
