"""Hashes of models' files, remembered by the state of each file: gigabytes are not read again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ditas_export.runtime.cache_manifest import hash_of_file, read_json, write_json

SETTLED_NS = 2 * 10**9
"""A file that changed this short a time ago may change again without showing it: times are coarse.
Its hash is not remembered."""


@dataclass(frozen=True, slots=True)
class FileHashes:
    """A folder with a small file for every file that was hashed.

    A file's state is its size, inode and times; the time of its last change of any kind is among
    them, which no tool sets back.
    """

    folder: Path

    def of_file(self, path: Path) -> tuple[str, OSError | None]:
        """Return the hex SHA-256 of a file, remembered from when it was in the same state.

        Returns:
            The hash, and why it could not be remembered, if so.

        Raises:
            OSError: no such file.
        """
        record, before = self._record(path), _state(path)
        known = read_json(record)
        if _is_whole(known) and known["state"] == before:
            return str(known["sha256"]), None
        digest = hash_of_file(path)
        settled = time.time_ns() - max(before["mtime_ns"], before["ctime_ns"]) > SETTLED_NS
        if settled and _state(path) == before:
            content = {"path": str(path.resolve()), "state": before, "sha256": digest}
            content["check"] = _check(content)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(record, content)
            except OSError as error:
                return digest, error
        return digest, None

    def forget_gone(self) -> None:
        """Forget files that are not there any more."""
        for record, content in self._records():
            if not Path(str(content.get("path"))).exists():
                with suppress(OSError):
                    record.unlink()

    def forget_wrong(self) -> list[tuple[Path, str]]:
        """Hash all files again; forget what is not so, and return it.

        Returns:
            The file that it was remembered in, and the file that it was of.
        """
        wrong = []
        for record, content in self._records():
            path = Path(str(content.get("path")))
            try:
                same_state = _state(path) == content.get("state")
                if not same_state or hash_of_file(path) == content.get("sha256"):
                    continue
            except OSError:
                continue
            with suppress(OSError):
                record.unlink()
            wrong.append((record, str(path)))
        return wrong

    def _record(self, path: Path) -> Path:
        """Return where a file's hash is remembered."""
        name = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
        return self.folder / f"{name[:32]}.json"

    def _records(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """Yield all that is remembered."""
        for record in sorted(self.folder.glob("*.json")):
            content = read_json(record)
            yield record, content if isinstance(content, dict) else {}


def _check(content: Mapping[str, Any]) -> str:
    """Return the hash of a record but for itself, by which a damaged one is known."""
    kept = {name: value for name, value in content.items() if name != "check"}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def _is_whole(known: Any) -> bool:
    """Return whether a record is as it was written."""
    return isinstance(known, dict) and known.get("check") == _check(known)


def _state(path: Path) -> dict[str, int]:
    """Return what a file's hash is remembered with."""
    found = path.stat()
    return {
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
    }
