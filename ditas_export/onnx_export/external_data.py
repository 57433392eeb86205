"""An ONNX file together with the files that its tensors lie in: which they are, and one hash.

A file that this package writes keeps its data in `<name>.<digest>.data`, the digest that of the
tensors: files of other tensors have data of another name, so that a pair can be replaced by another
without a moment at which a file's data are not its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path

import onnx
import onnx_ir as ir

from ditas_export.artifact_files import atomic_path, settle, sha256_of_file
from ditas_export.errors import ArtifactError, OnnxExportError
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


def data_name(model: ir.Model, name: str) -> str:
    """Return the name of the data of a model that is written as `name`, by its tensors."""
    digest = hashlib.sha256()
    for key, value in model.graph.initializers.items():
        tensor = value.const_value
        assert tensor is not None  # an initializer holds a tensor
        digest.update(f"{key} {tensor.shape} {tensor.dtype};".encode())
        digest.update(tensor.tobytes())
    return f"{name}.{digest.hexdigest()[:16]}.data"


def install(staged: Path, path: Path) -> None:
    """Move an ONNX file with its data to where they belong, over an earlier one with its own.

    The data go first and the earlier file's last, so that there is no moment at which `path` lacks
    its own. What a killed process moved, or did not remove any more, makes no difference.

    Args:
        staged: the file, its data beside it; both named as they will be.
        path: its final place, on the same file system.

    Raises:
        OnnxExportError: no readable ONNX file.
        ArtifactError: another file has the name of the data.
        OSError: a file cannot be moved.
    """
    earlier = set()
    if path.exists():
        with contextlib.suppress(OnnxExportError):
            earlier = set(external_files(path))
    for data in external_files(staged):
        target = path.parent / data.name
        if not data.exists() and target.exists():
            continue  # a killed process had moved it
        if target.exists() and sha256_of_file(target) != sha256_of_file(data):
            raise ArtifactError(f"{target} is there already; delete it, or name another output")
        settle(data, target)
    settle(staged, path)
    mine = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{16}}\.data")
    left = {file for file in path.parent.iterdir() if mine.fullmatch(file.name)}
    for file in sorted((earlier | left) - set(external_files(path))):
        file.unlink(missing_ok=True)


def rename_pair(path: Path, name: str) -> Path:
    """Give a file and its data, all in one folder, names that begin with another one.

    May be run again where it was interrupted.

    Args:
        path: the file; its data have names that begin with its own.
        name: what the file is called afterwards.

    Returns:
        The renamed file; its bytes change where it has data.

    Raises:
        OnnxExportError: no readable ONNX file.
        ArtifactError: the file cannot be written.
        OSError: a file cannot be moved.
    """
    renamed = path.with_name(name)
    if path.exists() and not external_files(path):
        return path.rename(renamed)
    if not renamed.exists():
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = name + entry.value.removeprefix(path.name)
        with atomic_path(renamed) as partial:
            partial.write_bytes(model.SerializeToString())
    for data in external_files(renamed):
        if not data.exists():
            data.with_name(path.name + data.name.removeprefix(name)).rename(data)
    path.unlink(missing_ok=True)
    return renamed


def _sha256_of_data(path: Path, file: Path) -> str:
    """Return the hash of an ONNX file's external data, or say which are missing."""
    try:
        return sha256_of_file(file)
    except OSError as error:
        raise OnnxExportError(
            f"{path} keeps tensors in {file}, which cannot be read ({error.strerror}); put that "
            f"file beside it, or export again"
        ) from error
