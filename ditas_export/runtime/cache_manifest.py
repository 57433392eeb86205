"""What an entry of the cache holds, file by file: enough to tell whether it still does."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from ditas_export import text_files
from ditas_export.errors import RunnerError
from ditas_export.saved_records import Within, from_record
from ditas_export.text_files import TextError

MANIFEST = "manifest.json"
"""The name of an entry's manifest."""


_NEVER_EMPTY = ("onnxruntime", "openvino")
"""Kinds of entries that hold files from the first; runtimes fill the others themselves."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileFacts:
    """A file's state on the disk, which a start compares, and its hash."""

    size: Annotated[int, Within(0, 2**63)]
    mtime_ns: Annotated[int, Within(-(2**63), 2**63)]
    inode: Annotated[int, Within(0, 2**64)]
    sha256: str

    def has_state_of(self, path: Path) -> bool:
        """Return whether a file has the size, time and inode that are recorded."""
        found = _plain(path)
        return found is not None and _state(found) == (self.size, self.mtime_ns, self.inode)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an entry is of, and its files."""

    kind: str
    source: str  # the model, where it was when the entry was made
    files: Mapping[str, FileFacts]  # none where a runtime itself fills the folder, and checks it

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(facts.size for facts in self.files.values())

    def save(self, folder: Path) -> None:
        """Write the manifest of an entry, at once.

        Raises:
            OSError: it cannot be written.
        """
        write_json(folder / MANIFEST, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Self | None:
        """Read what `save` wrote; None if there is no such file, or another's."""
        try:
            found = from_record(cls, read_json(folder / MANIFEST), error=RunnerError)
        except RunnerError:
            return None
        plain_names = all(name == Path(name).name for name in found.files)
        is_whole = bool(found.files) or found.kind not in _NEVER_EMPTY
        return found if plain_names and is_whole else None

    @classmethod
    def of(cls, folder: Path, *, kind: str, source: Path) -> Self:
        """Return the manifest of files that were just written; their bytes are on the disk then.

        Raises:
            OSError: a file cannot be read, or something is no plain file.
        """
        files = {}
        for path in sorted(folder.iterdir()):
            sync(path)
            files[path.name] = _facts(path)
        return cls(kind=kind, source=str(source), files=files)

    def checked(self, folder: Path, *, whole: bool = False) -> Self | None:
        """Return the manifest as it is now, None if a file's bytes are others.

        Args:
            folder: of the entry.
            whole: hash every file; else those alone whose state differs.
        """
        files = {}
        for name, facts in self.files.items():
            path = folder / name
            files[name] = facts
            if not whole and facts.has_state_of(path):
                continue
            found = _plain(path)
            if found is None or found.st_size != facts.size:
                return None
            try:
                files[name] = _facts(path)
            except OSError:
                return None
            if files[name].sha256 != facts.sha256:
                return None
        return dataclasses.replace(self, files=files)


def read_json(path: Path) -> Any:
    """Return the content of a small JSON file, None if there is none to read."""
    try:
        return text_files.read_json(path)
    except (OSError, TextError):
        return None


def write_json(path: Path, content: Any) -> None:
    """Write a small JSON file, whole at every moment.

    Raises:
        OSError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return once a file's bytes, or a folder's names, are on the disk."""
    if os.name == "nt":  # syncs no file that is open for reading
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def hash_of_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _facts(path: Path) -> FileFacts:
    """Return a file's facts; OSError if it changes meanwhile."""
    before = path.stat()
    digest = hash_of_file(path)
    if _plain(path) is None or _state(before) != _state(path.stat()):
        raise OSError(f"{path} changed while it was read")
    size, mtime_ns, inode = _state(before)
    return FileFacts(size=size, mtime_ns=mtime_ns, inode=inode, sha256=digest)


def _state(found: os.stat_result) -> tuple[int, int, int]:
    """Return what tells a changed file from an unchanged one."""
    return found.st_size, found.st_mtime_ns, found.st_ino


def _plain(path: Path) -> os.stat_result | None:
    """Return the state of a plain file, None of anything else; links are not followed."""
    try:
        found = path.lstat()
    except OSError:
        return None
    return found if stat.S_ISREG(found.st_mode) else None
