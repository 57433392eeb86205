"""An ONNX file and the files that its tensors lie in: whether they are whole, and one hash.

A file that this package writes keeps its data in `<name>.<digest>.data`, the digest that of the
tensors: files of other tensors have data of another name, so that a pair can be replaced by another
without a moment at which a file's data are not its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from pathlib import Path

import onnx
import onnx_ir as ir

from ditas_export.artifact_files import atomic_path, settle, sha256_of_file
from ditas_export.errors import ArtifactError, OnnxExportError
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
    files = _data_of(path)
    for file, size in files.items():
        _require_bytes(path, file, size)
    return list(files)


def _data_of(path: Path) -> dict[Path, int]:
    """Return where an ONNX file's tensors lie, there or not, and the bytes each file must have.

    Raises:
        OnnxExportError: no readable ONNX file.
    """
    try:
        wanted = _wanted_bytes(load_by_reference(path).graph)
    except Exception as error:  # protobuf's DecodeError has no stable home
        reason = why_unreadable(path, error)
        raise OnnxExportError(f"{path} is no readable ONNX file: {reason}") from error
    wanted.pop(path.name, None)
    return {path.parent / location: size for location, size in sorted(wanted.items())}


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
    its own. What a killed process moved makes no difference; what it did not remove any more,
    `remove_other_data` does.

    Args:
        staged: the file, its data beside it; both named as they will be.
        path: its final place, on the same file system.

    Raises:
        OnnxExportError: no readable ONNX file.
        ArtifactError: another file has the name of the data.
        OSError: a file cannot be moved.
    """
    of_earlier_versions = path.with_name(f"{path.name}.data")
    had_such = False
    if path.exists():
        with contextlib.suppress(OnnxExportError):
            had_such = of_earlier_versions in _data_of(path)
    for data in _data_of(staged):
        target = path.parent / data.name
        if not data.exists() and target.exists():
            continue  # a killed process had moved it
        if target.exists() and sha256_of_file(target) != sha256_of_file(data):
            raise ArtifactError(f"{target} is there already; delete it, or name another output")
        settle(data, target)
    settle(staged, path)
    if had_such and of_earlier_versions not in _data_of(path):
        of_earlier_versions.unlink(missing_ok=True)
    remove_other_data(path)


def remove_other_data(path: Path) -> None:
    """Remove what has the name of data of a file that this package wrote, and is not its own.

    By name, whatever an earlier file said: a stranger's may name anything.

    Raises:
        OnnxExportError: no readable ONNX file.
        OSError: a file cannot be removed.
    """
    mine = re.compile(rf"{re.escape(path.name)}\.[0-9a-f]{{16}}\.data")
    found = {file for file in path.parent.iterdir() if mine.fullmatch(file.name)}
    for file in sorted(found - set(_data_of(path))):
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
    if path.exists() and not _data_of(path):
        return path.rename(renamed)
    if not renamed.exists():
        model = onnx.load(str(path), load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = name + entry.value.removeprefix(path.name)
        with atomic_path(renamed) as partial:
            partial.write_bytes(model.SerializeToString())
    for data in _data_of(renamed):
        if not data.exists():
            data.with_name(path.name + data.name.removeprefix(name)).rename(data)
    path.unlink(missing_ok=True)
    return renamed


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
