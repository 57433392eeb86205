"""A folder of models that a runtime has optimized once, found again by hash."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from ditas_export.errors import RunnerError

MODEL_NAME = "model.onnx"
"""The optimized model's name inside its entry; its tensors may lie beside it."""


def default_cache() -> Path:
    """Return the user's cache folder: $DITAS_EXPORT_CACHE, or the system's place for caches."""
    if chosen := os.environ.get("DITAS_EXPORT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditas-export"


def optimized_model(
    sha256: str, cache: Path, facts: Mapping[str, object], optimize: Callable[[Path], None]
) -> Path:
    """Return the optimized form of a file, made now or found from an earlier run.

    Args:
        sha256: of the file, its external data included.
        cache: folder of entries, created if need be; anything in it can be deleted at any time.
        facts: what the optimized form depends on beside the file: versions, options, processor.
        optimize: writes the optimized model to the path that it is given.

    Raises:
        RunnerError: the folder cannot be written.
        Exception: what `optimize` raises; nothing is left behind.
    """
    key = hashlib.sha256(json.dumps([sha256, facts], sort_keys=True).encode()).hexdigest()
    entry = cache / key[:32]
    if (entry / MODEL_NAME).is_file():
        return entry / MODEL_NAME
    try:
        cache.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
    except OSError as error:
        raise RunnerError(
            f"cannot keep the optimized model in {cache} ({error.strerror}); "
            f"set DITAS_EXPORT_CACHE to a folder that can be written"
        ) from error
    try:
        optimize(staged / MODEL_NAME)
        if not (entry / MODEL_NAME).is_file():  # another process may have been first
            staged.rename(entry)
    except OSError as error:
        if not (entry / MODEL_NAME).is_file():
            raise RunnerError(
                f"could not keep the optimized model in {cache}: {error.strerror}; "
                f"set DITAS_EXPORT_CACHE to another folder"
            ) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return entry / MODEL_NAME
