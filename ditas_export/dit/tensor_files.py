"""What a checkpoint file holds, by its content whatever its name, never running code.

safetensors, PyTorch's zip archives and its older streams, and the index of a file in shards.
Tensors are mapped from the file.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ditas_export import text_files
from ditas_export.dit.pickles import PickleContent, read_legacy_pickle, read_zip_pickle
from ditas_export.errors import CheckpointError
from ditas_export.text_files import TextError

SAFETENSORS_SUFFIXES = (".safetensors", ".sft")

_HEAD_BYTES = 512
_LONGEST_HEADER = 100_000_000
"""Bytes that a safetensors header may have."""

_OTHER_KINDS = {
    b"\x1f\x8b": "a gzip archive",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"GGUF": "a GGUF file",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}
"""First bytes of what is often taken for a checkpoint."""

MOST_TENSORS = 200_000
"""Tensors of a file; a training checkpoint of a thousand blocks has fewer."""

_LONGEST_NAME = 200
_MOST_SHARDS = 10_000
_TAR_PLACE = slice(257, 262)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TensorFile:
    """What a checkpoint file holds."""

    content: Mapping[str, Any]  # tensors, or parts that hold them
    metadata: Mapping[str, str] = field(default_factory=dict)  # of safetensors
    not_made: tuple[str, ...] = ()  # names of what a pickle would have called


def read_tensor_file(path: Path) -> TensorFile:
    """Read one checkpoint file; a JSON index reads the shards that it lists, beside it.

    Raises:
        CheckpointError: no such file, another kind of file, or a damaged one.
    """
    head = _head(path)
    if head.lstrip()[:1] == b"{":
        return _read_shards(path)
    return _read_weights(path, head)


def refuse_other_kinds(path: Path) -> None:
    """Raise CheckpointError for a file that is a pointer, a web page, an archive or empty."""
    _refuse_known(path, _head(path))


def _head(path: Path) -> bytes:
    """Return a file's first bytes."""
    try:
        with path.open("rb") as file:
            return file.read(_HEAD_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"cannot read {path}: {reason}") from error


def _read_weights(path: Path, head: bytes) -> TensorFile:
    """Read a file of tensors by what its first bytes say."""
    if head.startswith(b"PK\x03\x04"):
        return _of_pickle(path, read_zip_pickle(path))
    if head.startswith(b"\x80") and not _is_safetensors(head):
        return _of_pickle(path, read_legacy_pickle(path))
    _refuse_known(path, head)
    if _is_safetensors(head) or path.suffix in SAFETENSORS_SUFFIXES:
        return _read_safetensors(path)
    raise CheckpointError(
        f"{path} is no checkpoint: expected a safetensors file, one written by torch.save, or a "
        f"folder written by diffusers"
    )


def _is_safetensors(head: bytes) -> bool:
    """Return whether a file starts as safetensors do: the header's length, then JSON."""
    if len(head) < 9 or head[8:9] != b"{":
        return False
    (length,) = struct.unpack("<Q", head[:8])
    return bool(2 <= length <= _LONGEST_HEADER)


def _refuse_known(path: Path, head: bytes) -> None:
    """Name what is no checkpoint for what it is."""
    if not head:
        raise CheckpointError(f"{path} is empty; get it again")
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d+)", head)
        of = f" of {int(size[1]):,} bytes" if size else ""
        raise CheckpointError(
            f"{path} is a git-LFS pointer to a file{of}, not the file: run `git lfs pull` where it "
            f"was cloned, or download it"
        )
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        raise CheckpointError(
            f"{path} is a web page (HTML or XML), not a checkpoint: a log-in or an error was "
            f"saved in its place; download it again"
        )
    kind = next((kind for magic, kind in _OTHER_KINDS.items() if head.startswith(magic)), None)
    if head[_TAR_PLACE] == b"ustar":
        kind = "a tar archive"
    if kind is not None:
        what = "unpack it and pass the checkpoint" if "archive" in kind else "convert it"
        raise CheckpointError(
            f"{path} is {kind}; expected safetensors or what torch.save writes: {what}"
        )


def _read_safetensors(path: Path) -> TensorFile:
    """Map a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            _require_few(path, len(file.keys()))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return TensorFile(content=tensors, metadata=file.metadata() or {})
    except (OSError, SafetensorError, RuntimeError, ValueError, LookupError) as error:
        raise CheckpointError(
            f"{path} is no safetensors file, or was damaged or cut short "
            f"({str(error).partition(chr(10))[0]}); get it again"
        ) from error


def _require_few(path: Path, count: int) -> None:
    """Refuse a file of more tensors than any checkpoint has."""
    if count > MOST_TENSORS:
        raise CheckpointError(
            f"{path} has {count:,} tensors, expected {MOST_TENSORS:,} at most; get it again"
        )


def _of_pickle(path: Path, read: PickleContent) -> TensorFile:
    """Refuse a pickle that holds no tensors by name, or too many."""
    _require_few(path, read.tensors)
    if isinstance(read.content, dict):
        return TensorFile(content=read.content, not_made=read.not_made)
    kind = getattr(read.content, "name", None) or type(read.content).__name__
    raise CheckpointError(
        f"{path} holds a {kind}, expected a state dict: write the model's state_dict() by "
        f"torch.save, best as safetensors"
    )


def _read_shards(path: Path) -> TensorFile:
    """Read the shards that an index lists, from the index's own folder."""
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{path} lists no shards: it has no 'weight_map'")
    if odd := [name for name in names.values() if not isinstance(name, str)]:
        raise CheckpointError(f"{path} lists {str(odd[0])[:40]!r} as a shard; expected file names")
    tensors: dict[str, Tensor] = {}
    if len(set(names.values())) > _MOST_SHARDS:
        raise CheckpointError(
            f"{path} lists {len(set(names.values())):,} shards, expected {_MOST_SHARDS:,} at most"
        )
    for name in sorted(set(names.values())):
        shard = path.parent / Path(name).name
        tensors.update(_read_weights(shard, _head(shard)).content)
    return TensorFile(content=tensors)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: no such file, no JSON, or no object.
    """
    try:
        content = text_files.read_json(path)
    except (OSError, TextError) as error:
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(f"{path} is no readable JSON file: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    return content


def abbreviated(names: list[str], *, shown: int = 3) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(map(_printable, names[:shown])) + more


def _printable(name: str) -> str:
    """Return a name without control characters, cut where it is longer than any parameter's."""
    return "".join(letter if letter.isprintable() else "?" for letter in name[:_LONGEST_NAME])
