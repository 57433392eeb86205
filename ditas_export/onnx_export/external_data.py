"""An ONNX file together with the files that its tensors lie in: which they are, and one hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ditas_export.artifact_files import sha256_of_file
from ditas_export.errors import OnnxExportError
from ditas_export.onnx_export.by_reference import load_by_reference


def sha256_of_onnx(path: Path) -> str:
    """Return the hex SHA-256 of an ONNX file and of its external data.

    Without external data it is the hash of the file's bytes. Else it is the hash of the hex hashes
    of all files, the ONNX file's first, one a line, as `sha256sum` lists them without the names.

    Raises:
        OnnxExportError: no readable ONNX file, or external data that are not there.
    """
    files = external_files(path)
    digest = sha256_of_file(path)
    external = [_sha256_of_data(path, file) for file in files]
    if not external:
        return digest
    return hashlib.sha256("".join(f"{each}\n" for each in [digest, *external]).encode()).hexdigest()


def external_files(path: Path) -> list[Path]:
    """Return the files beside an ONNX file that its tensors lie in, in order of name.

    Raises:
        OnnxExportError: no readable ONNX file.
    """
    try:
        graph = load_by_reference(path).graph
    except Exception as error:  # protobuf's DecodeError has no stable home
        raise OnnxExportError(f"{path} is no readable ONNX file: {error}") from error
    locations = {
        entry.value
        for tensor in graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path.parent / location for location in sorted(locations - {path.name})]


def _sha256_of_data(path: Path, file: Path) -> str:
    """Return the hash of an ONNX file's external data, or say which are missing."""
    try:
        return sha256_of_file(file)
    except OSError as error:
        raise OnnxExportError(
            f"{path} keeps tensors in {file}, which cannot be read ({error.strerror}); put that "
            f"file beside it, or export again"
        ) from error
