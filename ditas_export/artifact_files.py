"""Atomic, checked files: a file either is complete under its final name or is not there."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shlex
import shutil
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ditas_export.errors import ArtifactError
from ditas_export.file_signs import why_unreadable
from ditas_export.text_files import parse_json

if sys.platform != "win32":
    import fcntl

_CHUNK_BYTES = 1 << 20

RESERVED_BYTES = 24
"""Bytes of a name that are kept for those beside it: `.NAME.partial`, `NAME.<16 digits>.data`."""

_COMMAND_CHARACTERS = 200
"""What is told of a command that holds a lock, at most."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system says that has no locks."""

SHA256_DIGITS = 64
"""Hexadecimal digits of a SHA-256."""


def require_writable(path: Path) -> None:
    """Raise ArtifactError if no file can be written at `path`, with what stands in the way."""
    try:
        found = path.stat() if os.path.lexists(path) else None
        parent = path.parent.stat()
    except FileNotFoundError:
        if os.path.lexists(path):
            raise ArtifactError(f"{path} links to nothing; delete it, or name another") from None
        raise ArtifactError(f"the folder {path.parent} does not exist; create it first") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error.strerror}; name another") from error
    if found is not None and stat.S_ISDIR(found.st_mode):
        raise ArtifactError(f"{path} is a folder; name a file to write")
    if found is not None and not stat.S_ISREG(found.st_mode):
        raise ArtifactError(f"{path} is a device, pipe or socket; name a file to write")
    if not stat.S_ISDIR(parent.st_mode):
        raise ArtifactError(f"{path.parent} is no folder; name another")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ArtifactError(f"the folder {path.parent} cannot be written; pick another")
    longest = _longest_name(path.parent) - RESERVED_BYTES
    if len(os.fsencode(path.name)) > longest:
        raise ArtifactError(f"the name of {path} is too long; use {longest} bytes at most")


def _longest_name(folder: Path) -> int:
    """Return the bytes that a name in a folder may have."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):  # no such call, or no limit
        return 255


def partial_path(path: Path) -> Path:
    """Return where a file is written before it gets its name: reserved, always the same.

    So whatever a killed process left there is taken up by the next that writes the file.
    """
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it over `path` on success, remove it otherwise.

    The bytes are on the disk before the name is. Processes that write one file do so in turn.

    Raises:
        ArtifactError: the folder does not exist or cannot be written, `path` is a folder, or the
            disk is full.
    """
    require_writable(path)
    partial = partial_path(path)
    try:
        handle = _open_locked(partial, wait=True)
    except OSError as error:
        raise ArtifactError(f"cannot write to {path.parent}: {error.strerror}") from error
    try:
        yield partial
        settle(partial, path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            raise ArtifactError(
                f"could not write {path}: {error}; nothing was left behind"
            ) from error
        raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def staging_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, removed at the end, whatever happens.

    Raises:
        ArtifactError: the folder cannot be made, a file in it cannot be written, or another process
            is writing `path`.
    """
    require_writable(path)
    folder = partial_path(path)
    with sole_process(path.with_name(f".{path.name}.lock"), what=path):
        try:
            shutil.rmtree(folder, ignore_errors=True)  # of a killed process
            folder.mkdir()
            yield folder
        except OSError as error:
            raise ArtifactError(
                f"could not write {path}: {error}; nothing was left behind"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def settle(staged: Path, path: Path) -> None:
    """Give a finished file its final name: its bytes reach the disk first, then the name does."""
    _sync(staged)
    staged.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Return once the bytes of a file, or the names in a folder, are on the disk."""
    if sys.platform == "win32" and path.is_dir():
        return  # has no such call for folders
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def sole_process(lock: Path, *, what: Path) -> Iterator[None]:
    """Hold a lock while a job writes; the lock file goes at the end, its content says who.

    A killed process holds nothing. File systems without locks are taken on trust.

    Raises:
        ArtifactError: another process holds it, or the file cannot be written.
    """
    try:
        handle = _open_locked(lock, wait=False)
    except BlockingIOError:
        raise ArtifactError(
            f"{_holder(lock)} is writing {what} now; wait for it, stop it, or name another"
        ) from None
    except OSError as error:
        raise ArtifactError(f"cannot write {lock}: {error.strerror}; pick another") from error
    try:
        os.write(handle, _own_name().encode(errors="backslashreplace"))
        yield
    finally:
        if _is_at(handle, lock):
            lock.unlink()
        os.close(handle)


def _own_name() -> str:
    """Return what another process is told of this one: its number, its command, since when."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if len(command) > _COMMAND_CHARACTERS:
        command = f"{command[:_COMMAND_CHARACTERS]}…"
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    return f"process {os.getpid()} on {socket.gethostname()} ({command}, since {since})"


def _holder(lock: Path) -> str:
    """Return which process has a lock, as far as its file says."""
    with contextlib.suppress(OSError):
        if found := lock.read_text(encoding="utf-8", errors="backslashreplace"):
            return found
    return "another process"


def _open_locked(path: Path, *, wait: bool) -> int:
    """Create or open a file that is empty and locked by this process; return its handle."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _require_file(handle, path)
            _lock(handle, wait=wait)
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # it was renamed or removed while this process waited


def _require_file(handle: int, path: Path) -> None:
    """Raise OSError where what was opened is a pipe or a device: writing to it would never end."""
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise OSError(errno.EEXIST, f"{path.name} is there, and is no file; delete it")


def _is_at(handle: int, path: Path) -> bool:
    """Return whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _lock(handle: int, *, wait: bool) -> None:
    """Lock an open file; BlockingIOError where another process has it and `wait` is False."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


_CONTENT = "content_sha256"
"""Entry of a header that `save_tensors` adds and `load_tensors` takes away."""


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
    """Write one safetensors file whose metadata says what it is and holds `header` as JSON.

    The hash of tensors and header goes with them, by which damage is known.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {**header, _CONTENT: _content_sha256(contiguous, header)}
    # One entry: safetensors writes several in no fixed order, and the bytes are to be the same.
    metadata = {file_format: json.dumps(header, sort_keys=True, allow_nan=False)}
    with atomic_path(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # as the user's umask has it; safetensors 0.8 makes it 0600
        save_file(contiguous, partial, metadata=metadata)
        partial.chmod(mode)


def load_tensors(
    path: Path, *, file_format: str, earlier: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the header that `save_tensors` wrote.

    Args:
        path: the file.
        file_format: what it must be.
        earlier: an earlier format that the caller reads as well.

    Raises:
        ArtifactError: no such file, a truncated or a damaged file, or one of another kind.
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
            header = parse_json(metadata[found])
            if not isinstance(header, dict):
                raise ArtifactError(f"{path} is damaged: its header is no JSON object")
            recorded = header.pop(_CONTENT, None)  # earlier versions wrote none
            content = None if recorded is None else _content_sha256(tensors, header)
    except (OSError, SafetensorError, ValueError) as error:
        reason = why_unreadable(path, error)
        raise ArtifactError(f"{path} is no readable {file_format} file: {reason}") from error
    if recorded != content:
        raise ArtifactError(f"{path} is damaged: it holds something else than was written")
    return tensors, header


def _content_sha256(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Return the hex SHA-256 of all that a safetensors file of this package holds."""
    text = json.dumps(header, sort_keys=True, allow_nan=False)
    return hashlib.sha256(f"{sha256_of_tensors(tensors)} {text}".encode()).hexdigest()


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
