"""Where the user's cache is and how large it may become, and how it speaks. Nothing heavy."""

from __future__ import annotations

import math
import os
import warnings
from contextlib import suppress
from pathlib import Path

from ditas_export.errors import RunnerError

FOLDER_VARIABLE = "DITAS_EXPORT_CACHE"
LIMIT_VARIABLE = "DITAS_EXPORT_CACHE_GIB"
DEFAULT_LIMIT_GIB = 20


def user_folder() -> Path | None:
    """Return the user's cache folder: $DITAS_EXPORT_CACHE, or the system's place for caches.

    None for a user without a home.
    """
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen)
    if (caches := Path(os.environ.get("XDG_CACHE_HOME") or "")).is_absolute():
        return caches / "ditas-export"
    if os.environ.get("HOME") != "":
        with suppress(RuntimeError):
            return Path.home() / ".cache" / "ditas-export"
    return None


def default_cache() -> Path | None:
    """Return `user_folder()`, with a warning where there is none."""
    folder = user_folder()
    if folder is None:
        say(
            f"this user has no home folder for a cache, so models are prepared at every start; "
            f"set {FOLDER_VARIABLE} to a folder"
        )
    return folder


def allowed_bytes() -> int:
    """Return the size that the user allows the cache.

    Raises:
        RunnerError: $DITAS_EXPORT_CACHE_GIB is no size.
    """
    text = os.environ.get(LIMIT_VARIABLE) or str(DEFAULT_LIMIT_GIB)
    try:
        limit = float(text)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        raise RunnerError(
            f"{LIMIT_VARIABLE}={text!r}; give the cache's size in GiB, such as {DEFAULT_LIMIT_GIB}"
        )
    return int(limit * 2**30)


def say(text: str) -> None:
    """Tell the user what does no harm to the numbers."""
    warnings.warn(text, RuntimeWarning, stacklevel=2)
