"""One folder for what runtimes prepare of models once: optimized, compiled, kernels of a GPU.

An entry is a folder with a manifest. It is complete under its name or not there, is held against
its manifest when it is opened, and is made anew where it does not fit: so anything in the cache may
be deleted, cut or changed at any time. A change that keeps a file's size and times is found by
`Cache.verify` alone.

Beside the entries lie `.partial-*` (what is being made, or used and not kept), `.locks`, and
`.hashes`: what was hashed of models, by the state of their files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from ditas_export import __version__
from ditas_export.errors import RunnerError
from ditas_export.paths import StrPath
from ditas_export.runtime.cache_hashes import FileHashes
from ditas_export.runtime.cache_locks import hold, take, turn
from ditas_export.runtime.cache_manifest import MANIFEST, Manifest, sync
from ditas_export.runtime.cache_settings import (
    FOLDER_VARIABLE,
    LIMIT_VARIABLE,
    allowed_bytes,
    say,
)
from ditas_export.runtime.machine import machine_facts

FORMAT = 1
"""Of entries and their manifests; another number finds none of the earlier ones."""

_PREFIX = "entry-"
_ENTRY = re.compile(rf"{_PREFIX}[0-9a-f]{{32}}")
_PARTIAL = re.compile(r"\.partial-[0-9a-z_]{8}")
_LOCKS, _HASHES = ".locks", ".hashes"
_WHOLE_CACHE = "cache"

Make = Callable[[Path], object]
"""Writes the files of an entry into the folder that it is given; they must not be changed later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """What an entry is found by. Versions of this package and facts of the machine are added."""

    kind: str  # who made it
    source: Path  # the model
    sha256: str  # of the model
    facts: Mapping[str, object]  # what else the entry depends on: versions, settings
    hash_source: Callable[[], str] = field(compare=False)  # gives `sha256` if it is still that file

    @property
    def name(self) -> str:
        """Name of the entry's folder."""
        facts = {
            "format": FORMAT,
            "ditas-export": __version__,
            "machine": machine_facts(),
            "kind": self.kind,
            "sha256": self.sha256,
            "facts": self.facts,
        }
        content = json.dumps(facts, sort_keys=True).encode()
        return f"{_PREFIX}{hashlib.sha256(content).hexdigest()[:32]}"

    def require_unchanged(self) -> None:
        """Hash the model again.

        Raises:
            RunnerError: it is another by now.
        """
        if self.hash_source() != self.sha256:
            raise RunnerError(f"{self.source} was replaced while it was being prepared; run again")


class Entry:
    """A folder of prepared files, held until it is closed: no process takes it away meanwhile."""

    def __init__(self, path: Path, handle: int, *, kept: bool) -> None:
        self.path = path
        self.kept = kept
        self._release = weakref.finalize(self, _release, handle, None if kept else path)

    def close(self) -> None:
        """Let go of the folder; one that is not kept is removed."""
        self._release()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryFacts:
    """What is known of an entry without reading its files."""

    path: Path
    manifest: Manifest | None  # None where it is damaged
    size: int  # bytes
    used: float  # when it was opened last, in seconds since 1970
    is_open: bool  # by any process


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something whose bytes are not those that were recorded; it was removed where possible."""

    path: Path
    source: str  # the model
    what: str
    removed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    """A folder of entries, bounded in size; processes may share it.

    What cannot be written is done without, and said by a warning.
    """

    root: Path
    limit: int  # bytes

    @classmethod
    def at(cls, root: StrPath) -> Self:
        """Return the cache in a folder, of the size that the user allows.

        Raises:
            RunnerError: $DITAS_EXPORT_CACHE_GIB is no size.
        """
        root = Path(root)
        return cls(root=root, limit=allowed_bytes())

    def find(self, key: Key) -> Entry | None:
        """Return an entry that is there and fits its manifest, else None."""
        folder = self.root / key.name
        handle = hold(folder)
        if handle is None:
            return None
        manifest = Manifest.load(folder)
        found = manifest and manifest.checked(folder)
        if not found:
            os.close(handle)
            return None
        with suppress(OSError):  # of a cache that is only read
            if found != manifest:
                found.save(folder)
            os.utime(folder / MANIFEST)
        return Entry(folder, handle, kept=True)

    def entry(self, key: Key, make: Make) -> Entry | None:
        """Return the entry of a key, found or made now; None if nothing can be written.

        One process makes it, others wait.

        Raises:
            RunnerError: the model changed meanwhile; nothing was kept.
            Exception: what `make` raises, but for OSError; nothing was kept.
        """
        if found := self.find(key):
            with suppress(OSError):  # of a cache that is only read
                self._trim()
            return found
        return self._made(key, make, anew=False)

    def renew(self, key: Key, make: Make) -> None:
        """Make the entry of a key anew; what goes wrong is said, and nothing is kept."""
        try:
            if made := self._made(key, make, anew=True):
                made.close()
        except RunnerError as error:
            say(str(error))

    def hash_of_file(self, path: Path) -> str:
        """Return the hex SHA-256 of a file, remembered from when it had the same size and times.

        Raises:
            OSError: no such file.
        """
        digest, error = self._hashes.of_file(path)
        if error is not None:
            self._say_unwritable(error)
        return digest

    def entries(self) -> list[EntryFacts]:
        """Return what is in the cache, used last first."""
        found = [_entry_facts(path) for path in self._folders(_ENTRY)]
        return sorted(found, key=lambda facts: facts.used, reverse=True)

    def verify(self) -> list[Fault]:
        """Hash everything; remove what is not what was kept, and return it."""
        faults = []
        for path in self._folders(_ENTRY):
            handle = hold(path)
            if handle is None:
                continue
            try:
                manifest = Manifest.load(path)
                if manifest is None or manifest.checked(path, whole=True) is None:
                    source = manifest.source if manifest else "unknown"
                    what = "files changed or missing" if manifest else "no manifest"
                    removed = self._discard(path)
                    faults.append(Fault(path=path, source=source, what=what, removed=removed))
            finally:
                os.close(handle)
        what = "other bytes than its remembered hash"
        for record, source in self._hashes.forget_wrong():
            removed = not record.exists()
            faults.append(Fault(path=record, source=source, what=what, removed=removed))
        return faults

    def clear(self) -> list[EntryFacts]:
        """Remove everything but what a process has open; return what was removed."""
        removed = []
        for facts in self.entries():
            handle = take(facts.path)
            if handle is None:
                continue
            if self._discard(facts.path):
                removed.append(facts)
            os.close(handle)
        self._reclaim()
        shutil.rmtree(self.root / _HASHES, ignore_errors=True)
        return removed

    @property
    def _hashes(self) -> FileHashes:
        """The remembered hashes of models' files."""
        return FileHashes(self.root / _HASHES)

    def _made(self, key: Key, make: Make, *, anew: bool) -> Entry | None:
        """Make an entry, or take the one that another process has made while this one waited."""
        try:
            locks = self.root / _LOCKS
            locks.mkdir(parents=True, exist_ok=True)

            def on_wait() -> None:
                say(f"another process is preparing {key.source}; waiting for it")

            with turn(locks / key.name, on_wait=on_wait):
                found = None if anew else self.find(key)
                return found or self._prepared(key, make)
        except OSError as error:
            self._say_unwritable(error)
            return None

    def _prepared(self, key: Key, make: Make) -> Entry:
        """Make an entry, and keep it if there is room."""
        self._reclaim()
        staged, handle = self._staging()
        try:
            make(staged)
            manifest = Manifest.of(staged, kind=key.kind, source=key.source.absolute())
            key.require_unchanged()
            manifest.save(staged)
            kept = self._keep(staged, key, manifest.size)
        except BaseException:
            _release(handle, staged)
            raise
        return Entry(self.root / key.name if kept else staged, handle, kept=kept)

    def _staging(self) -> tuple[Path, int]:
        """Return a new folder, held."""
        while True:
            staged = self._partial()
            staged.mkdir(mode=0o700)
            if (handle := hold(staged)) is not None:
                return staged, handle

    def _keep(self, staged: Path, key: Key, size: int) -> bool:
        """Give a finished entry its name, others making room; False if there is no room for it."""
        final = self.root / key.name
        with turn(self.root / _LOCKS / _WHOLE_CACHE):
            if not self._make_room(size, besides=final):
                say(
                    f"what was prepared of {key.source} is used and not kept: it has "
                    f"{size / 2**30:.1f} GiB, and the cache {self.root} has no room for it; "
                    f"{LIMIT_VARIABLE} allows {self.limit / 2**30:g} GiB"
                )
                return False
            if final.exists():
                _remove(final, self._partial())
            staged.rename(final)
            sync(self.root)
            return True

    def _trim(self) -> None:
        """Remove entries where a lower limit was set since they were kept."""
        if sum(facts.size for facts in self.entries()) > self.limit:
            with turn(self.root / _LOCKS / _WHOLE_CACHE):
                self._make_room(0)

    def _make_room(self, size: int, *, besides: Path | None = None) -> bool:
        """Remove entries that nobody has open, used longest ago first, until a size fits.

        Args:
            size: of what is to come, in bytes; where it cannot fit, nothing is removed for it.
            besides: an entry that it replaces.
        """
        others = [facts for facts in self.entries() if facts.path != besides]
        excess = sum(facts.size for facts in others) + size - self.limit
        leaving = []
        with ExitStack() as taken:
            for facts in reversed(others):
                if excess > 0 and (handle := take(facts.path)) is not None:
                    taken.callback(os.close, handle)
                    leaving.append(facts.path)
                    excess -= facts.size
            if excess > 0 and size:
                return False
            for path in leaving:
                _remove(path, self._partial())
        return True

    def _discard(self, path: Path) -> bool:
        """Remove an entry; return whether it is gone."""
        with suppress(OSError):
            _remove(path, self._partial())
        return not path.exists()

    def _reclaim(self) -> None:
        """Remove what killed processes left, and hashes of files that are gone."""
        for path in self._folders(_PARTIAL):
            if (handle := take(path)) is not None:
                _release(handle, path)
        self._hashes.forget_gone()

    def _partial(self) -> Path:
        """Return a name that nothing has."""
        return self.root / f".partial-{secrets.token_hex(4)}"

    def _folders(self, pattern: re.Pattern[str]) -> Sequence[Path]:
        """Return the folders of ours of one kind; none of a cache that is not there."""
        try:
            paths = sorted(self.root.iterdir())
        except OSError:
            return []
        return [path for path in paths if pattern.fullmatch(path.name) and _is_folder(path)]

    def _say_unwritable(self, error: OSError) -> None:
        """Say that the cache is done without."""
        say(
            f"the cache {self.root} cannot be written ({error.strerror or error}), so models are "
            f"prepared at every start; set {FOLDER_VARIABLE} to a folder that can be written"
        )


def _entry_facts(path: Path) -> EntryFacts:
    """Return what is known of an entry."""
    manifest = Manifest.load(path)
    size, used = 0, 0.0
    with suppress(OSError):  # it is being removed
        size = sum(file.lstat().st_size for file in path.rglob("*"))
        used = (path / MANIFEST).stat().st_mtime if manifest else 0.0
    handle = take(path)
    if handle is not None:
        os.close(handle)
    return EntryFacts(path=path, manifest=manifest, size=size, used=used, is_open=handle is None)


def _is_folder(path: Path) -> bool:
    """Return whether a path is a folder and no link to one."""
    return path.is_dir() and not path.is_symlink()


def _remove(folder: Path, partial: Path) -> None:
    """Remove a folder that has a name, at once: under a name of unfinished ones it goes."""
    folder.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def _release(handle: int, folder: Path | None) -> None:
    """Remove a folder, if any, and let go of what is held."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os.close(handle)
