"""Locks between processes that share a cache folder; a killed process holds none.

Windows, and file systems without locks, are taken on trust.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system says that has no locks."""


def hold(folder: Path) -> int | None:
    """Hold a folder as one that is used, with others; wait while it is being taken away.

    Returns:
        A handle that holds it until it is closed, also under another name; None if it is gone.
    """
    return _held(folder, exclusive=False)


def take(folder: Path) -> int | None:
    """Hold a folder alone.

    Returns:
        A handle that holds it until it is closed; None if it is gone or anyone else holds it.
    """
    return _held(folder, exclusive=True)


def _held(folder: Path, *, exclusive: bool) -> int | None:
    """Lock a folder by its own handle, so that the lock goes with it."""
    if sys.platform == "win32":  # opens no folders
        return os.open(os.devnull, os.O_RDONLY) if folder.is_dir() else None
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    if _lock(handle, exclusive=exclusive, wait=not exclusive) and _is_at(handle, folder):
        return handle
    os.close(handle)
    return None


@contextmanager
def turn(lock: Path, *, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Be the only one here: processes and threads come in one after another.

    Args:
        lock: a file that is made for it, and removed afterwards.
        on_wait: called if somebody else is in here.

    Raises:
        OSError: the file cannot be made.
    """
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        try:
            if not _lock(handle, exclusive=True, wait=False):
                on_wait()
                _lock(handle, exclusive=True, wait=True)
            if not _is_at(handle, lock):
                continue  # whoever was in here has removed it
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return
        finally:
            os.close(handle)


def _lock(handle: int, *, exclusive: bool, wait: bool) -> bool:
    """Lock an open file; return whether it was free."""
    if sys.platform == "win32":
        return True
    kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Return whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False
