"""Files that are needed for a while, in the system's temporary folder; a full one is named."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ditas_export.errors import ArtifactError

_ADVICE = "set TMPDIR to a folder with room"


@contextmanager
def temporary_folder(*, room: int) -> Iterator[Path]:
    """Yield an empty folder, removed at the end.

    Args:
        room: bytes that will be written to it, about.

    Raises:
        ArtifactError: there is no temporary folder, or it has not that room, now or when something
            inside fails: runtimes do not say that it was for that.
    """
    try:
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    except OSError as error:
        raise ArtifactError(f"no temporary file can be written: {error}; {_ADVICE}") from error
    with folder as name:
        path = Path(name)
        _require_room(path, room)
        try:
            yield path
        except Exception:
            written = sum(file.stat().st_size for file in path.iterdir())
            _require_room(path, room - written)
            raise


def _require_room(folder: Path, room: int) -> None:
    """Raise ArtifactError where the file system of a folder has less."""
    free = shutil.disk_usage(folder).free
    if free < room:
        raise ArtifactError(
            f"the temporary folder {folder.parent} has {free / 2**20:.1f} MiB free, expected "
            f"{room / 2**20:.1f}; make room there, or {_ADVICE}"
        )
