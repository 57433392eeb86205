"""Atomic, checked files: a file either is complete under its final name or is not there."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditas_export.errors import ArtifactError
from ditas_export.file_signs import why_unreadable

_CHUNK_BYTES = 1 << 20

SHA256_DIGITS = 64
"""Hexadecimal digits of a SHA-256."""


def require_writable(path: Path) -> None:
    """Raise ArtifactError if no file can be written at `path`: a folder, or none to write in."""
    if path.is_dir():
        raise ArtifactError(f"{path} is a folder; name a file to write")
    if not path.parent.is_dir():
        raise ArtifactError(f"the folder {path.parent} does not exist; create it first")
    if not os.access(path.parent, os.W_OK):
        raise ArtifactError(f"the folder {path.parent} cannot be written; pick another")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` on success, remove it otherwise.

    Raises:
        ArtifactError: the folder does not exist or cannot be written, `path` is a folder, or the
            disk is full.
    """
    require_writable(path)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise ArtifactError(f"cannot write to {path.parent}: {error.strerror}") from error
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"could not write {path}: {error}; nothing was left behind") from error
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    """Return the process's file-mode mask; reading it means setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sha256_of_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    """Return the hex SHA-256 of tensors, their names, shapes and types, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(
    path: Path, tensors: Mapping[str, Tensor], *, file_format: str, header: Mapping[str, Any]
) -> None:
    """Write one safetensors file whose metadata says what it is and holds `header` as JSON."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: safetensors writes several in no fixed order, and the bytes are to be the same.
    metadata = {file_format: json.dumps(header, sort_keys=True, allow_nan=False)}
    with atomic_path(path) as partial:
        save_file(contiguous, partial, metadata=metadata)


def load_tensors(
    path: Path, *, file_format: str, earlier: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the header that `save_tensors` wrote.

    Args:
        path: the file.
        file_format: what it must be.
        earlier: an earlier format that the caller reads as well.

    Raises:
        ArtifactError: no such file, a truncated file, or a file of another kind.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = next((name for name in (file_format, earlier) if name in metadata), None)
            if found is None:
                kind = file_format.rpartition(" ")[0]
                others = [key for key in metadata if key.startswith(f"{kind} ")]
                raise ArtifactError(
                    f"{path} is a {others[0]}, and this version of ditas-export reads "
                    f"{file_format}; make it again"
                    if others
                    else f"{path} is a safetensors file, but no {file_format}"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            header = json.loads(metadata[found])
            if not isinstance(header, dict):
                raise ArtifactError(f"{path} is damaged: its header is no JSON object")
            return tensors, header
    except (OSError, SafetensorError, ValueError) as error:
        reason = why_unreadable(path, error)
        raise ArtifactError(f"{path} is no readable {file_format} file: {reason}") from error


def differences(found: Mapping[str, Any], stated: Mapping[str, Any]) -> list[str]:
    """Return what differs between two nested records, as `steps 50, now 25`."""
    changed = []
    for name in sorted(found.keys() | stated.keys()):
        before, now = found.get(name), stated.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            changed += differences(before, now)
        elif before != now:
            changed.append(f"{name} {_short(before)}, now {_short(now)}")
    return changed


def _short(value: object) -> str:
    """Return a value in a few characters: of a hash the beginning."""
    if isinstance(value, str) and len(value) == SHA256_DIGITS:
        return f"{value[:12]}…"
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}…"


def json_number(value: float) -> float | str:
    """Return a number as strict JSON takes it, `float` taking it back: "inf", "-inf" and "nan"."""
    return value if math.isfinite(value) else str(value)
