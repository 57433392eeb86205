"""An ONNX file and the files that its tensors lie in: which may be read, and one hash for all.

One rule for all that read them. The location that is written in the model is a name beside it or
below: neither absolute nor climbing. What is there may be a link, as in a hub's snapshots, and the
link may lead anywhere, as long as it ends at a plain file.

A file that this package writes keeps its data in `<name>.<digest>.data`, the digest that of the
tensors: files of other tensors have data of another name, so that a pair can be replaced by another
without a moment at which a file's data are not its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

import onnx

from ditas_export.artifact_files import atomic_path, settle, sha256_of_file
from ditas_export.errors import ArtifactError, OnnxExportError
from ditas_export.file_signs import describe_impostor, why_unreadable
from ditas_export.onnx_export.by_reference import read_by_reference
from ditas_export.paths import StrPath
from ditas_export.temporary_files import temporary_folder

if TYPE_CHECKING:
    import onnx_ir as ir


def sha256_of_onnx(path: StrPath, *, hash_file: Callable[[Path], str] = sha256_of_file) -> str:
    """Return the hex SHA-256 of an ONNX file and of its external data.

    Without external data it is the hash of the file's bytes. Else it is the hash of the hex hashes
    of all files, the ONNX file's first, one a line, as `sha256sum` lists them without the names.

    Args:
        path: the ONNX file.
        hash_file: gives the hex SHA-256 of one file, from memory where it has it.

    Raises:
        OnnxExportError: see `external_files`.
    """
    path = Path(path)
    files = external_files(path)
    digests = [hash_file(file) for file in (path, *files)]
    if not files:
        return digests[0]
    return hashlib.sha256("".join(f"{each}\n" for each in digests).encode()).hexdigest()


def require_external_data(path: Path) -> None:
    """Refuse an ONNX file whose external data cannot be read, before a runtime does.

    Raises:
        OnnxExportError: see `external_files`.
    """
    external_files(path)


def external_files(path: Path) -> list[Path]:
    """Return the files beside an ONNX file that its tensors lie in, in order of name; all whole.

    Raises:
        OnnxExportError: no readable ONNX file; or external data that are not there, are cut short,
            are no plain file, or lie where the file may not ask for them.
    """
    files = _data_of(path)
    for file, size in files.items():
        _require_bytes(path, file, size)
    return list(files)


def _data_of(path: Path) -> dict[Path, int]:
    """Return where an ONNX file's tensors lie, there or not, and the bytes each file must have.

    Raises:
        OnnxExportError: no readable ONNX file, or one that asks for what it may not.
    """
    wanted = _wanted_bytes(path, read_by_reference(path))
    _require_bytes(path, path, wanted.pop(path.name, 0))
    return {path.parent / location: size for location, size in sorted(wanted.items())}


def load_mapped(path: Path) -> ir.Model:
    """Return an ONNX file's model; its large tensors are mapped from where they lie when read.

    Raises:
        OnnxExportError: see `external_files`.
    """
    external_files(path)
    model = read_by_reference(path)
    for tensor in _tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location":  # resolved: readers of their own rules refuse links
                entry.value = str((path.parent / entry.value).resolve())
    from onnx_ir import from_proto  # half a second that no prepared model needs

    try:
        return from_proto(model)
    except Exception as error:  # its SerdeError has no stable home
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise OnnxExportError(
            f"{path} is no readable ONNX file: {reason}; export it again"
        ) from error


def bytes_of(path: Path) -> int:
    """Return the size of an ONNX file with its data.

    Raises:
        OnnxExportError: see `external_files`.
    """
    return path.stat().st_size + sum(file.stat().st_size for file in external_files(path))


@contextlib.contextmanager
def plain_files(path: Path) -> Iterator[Path]:
    """Yield an ONNX file whose data are plain files beside it, as runtimes ask for.

    It is the file itself, or where links lead out of its folder a copy, for a while.

    Raises:
        OnnxExportError: see `external_files`.
        ArtifactError: the temporary folder cannot take a copy.
    """
    folder = path.parent.resolve()
    if all(folder in file.resolve().parents for file in external_files(path)):
        yield path
        return
    with temporary_folder(room=bytes_of(path)) as copies:
        copy = copies / path.name
        model = load_mapped(path)
        from onnx_ir import save

        save(model, copy, external_data=f"{path.name}.data")
        yield copy


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


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor that a model may refer to another file with, wherever it stands."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        for node in function.node:
            yield from _node_tensors(node)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield the tensors of a graph and of those inside it."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _node_tensors(node)


def _node_tensors(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    """Yield the tensors in a node's attributes."""
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for graph in (attribute.g, *attribute.graphs):
            yield from _graph_tensors(graph)


def _wanted_bytes(path: Path, model: onnx.ModelProto) -> dict[str, int]:
    """Return how long each file must be that tensors lie in, by its location."""
    wanted: dict[str, int] = {}
    for tensor in _tensors(model):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        is_external = tensor.data_location == onnx.TensorProto.EXTERNAL
        if not entries and not is_external:
            continue
        if "location" not in entries or not is_external:
            raise OnnxExportError(
                f"{path} does not say whether its tensor {tensor.name!r} lies in it or elsewhere; "
                f"export it again"
            )
        location = entries["location"]
        _require_beside(path, location)
        try:
            bits = math.prod(tensor.dims) * _BITS[tensor.data_type]
            size = -(-bits // 8)
            offset, length = (int(entries.get(*each)) for each in (("offset", 0), ("length", size)))
        except (ValueError, TypeError, KeyError) as error:  # no number, or a type without a size
            raise OnnxExportError(
                f"{path} does not say where in {location!r} its tensor {tensor.name!r} lies "
                f"({error}); export it again"
            ) from error
        if offset < 0 or length != size:
            raise OnnxExportError(
                f"{path} has {length} bytes from {offset} on for its tensor {tensor.name!r}, which "
                f"takes {size}; export it again"
            )
        wanted[location] = max(wanted.get(location, 0), offset + length)
    return wanted


_BITS = {
    onnx.TensorProto.DataType.Value(name): bits
    for bits, names in {
        4: ("INT4", "UINT4", "FLOAT4E2M1"),
        8: ("BOOL", "INT8", "UINT8", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2",
            "FLOAT8E5M2FNUZ", "FLOAT8E8M0"),
        16: ("FLOAT16", "BFLOAT16", "INT16", "UINT16"),
        32: ("FLOAT", "INT32", "UINT32"),
        64: ("DOUBLE", "INT64", "UINT64", "COMPLEX64"),
        128: ("COMPLEX128",),
    }.items()
    for name in names
    if name in onnx.TensorProto.DataType.keys()  # noqa: SIM118 (no mapping)
}  # fmt: skip
"""Bits of a value by data type; types that this onnx does not know yet are left out."""


def _require_beside(path: Path, location: str) -> None:
    """Refuse a location that is not below the model's folder by its spelling, on any system."""
    for spelled in (PurePosixPath(location), PureWindowsPath(location)):
        if spelled.anchor or ".." in spelled.parts or not spelled.parts or "\0" in location:
            raise OnnxExportError(
                f"{path} keeps tensors in {location!r}, which is not a file beside it; such a file "
                f"could read anything, and is refused: export it again, or save it anew with its "
                f"data beside it"
            )


def _require_bytes(path: Path, file: Path, wanted: int) -> None:
    """Refuse external data that are not there, are no file, or end before the last tensor does."""
    if file.exists() and not (file.is_file() or file.is_dir()):
        raise OnnxExportError(
            f"{path} keeps tensors in {file}, which is a device, a pipe or a socket; put a plain "
            f"file there, or export again"
        )
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
